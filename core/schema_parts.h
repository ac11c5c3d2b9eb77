#pragma once
// Inside of core/schema: not for other rooms.
#include <string>
#include <string_view>
#include <vector>

namespace google::protobuf {
class Descriptor;
class FieldDescriptor;
class Message;
}  // namespace google::protobuf

namespace moemamba {

// One word of the text format.
struct Token {
  enum Kind { word, text, symbol, wrong, end } kind = end;
  std::string value;  // text: without quotes and escapes; wrong: what is wrong
  int line = 1, column = 1;  // of its first byte, from 1
  bool is(char c) const { return kind == symbol && value[0] == c; }
};

// Cuts text format into tokens; the last one is `end`, for ever. Names and numbers are both words
// ("-1.5e-3", "RELU"). Comments (#) and blanks vanish.
class Lexer {
 public:
  explicit Lexer(std::string_view text) : rest_(text) { advance(); }
  const Token& peek() const { return token_; }
  Token take();

 private:
  void advance();
  void skip_blanks();
  size_t more_of_word(char first, bool number) const;
  void read_text(char quote);
  void read_escape();
  char next();

  std::string_view rest_;
  int line_ = 1, column_ = 1;
  Token token_;
};

// One value as the user wrote it.
struct Given {
  std::string value;
  enum { word, quoted, option } form;  // option: all that follows "="
};

// Sets `field` (adds to it, if a list) and returns "", or returns what is wrong and sets nothing.
std::string assign(google::protobuf::Message& message,
                   const google::protobuf::FieldDescriptor& field, Given given);

// "no such setting; did you mean ...?" for `name` in a message of `root` that stands at `prefix`
// ("parallel."); `mark` goes before names that are given in full.
std::string no_such_setting(const google::protobuf::Descriptor& root,
                            const google::protobuf::Descriptor& message, const std::string& prefix,
                            const std::string& name, const std::string& mark);

// What is said where lists would hold more than Settings::kMostElements.
std::string too_many_elements();

// The candidate with the fewest edits to `name`, in any case; empty if none is near.
std::string nearest(const std::string& name, const std::vector<std::string>& candidates);

// "0 to 4096", "at least 1"; empty if the schema gives no range.
std::string range_text(const google::protobuf::FieldDescriptor& field);
std::string number_text(double value);
std::string number_text(float value);

}  // namespace moemamba
