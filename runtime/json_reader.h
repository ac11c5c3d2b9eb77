#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "core/device.h"

namespace moemamba {

// Walks over a JSON text of somebody else's, front to back. It keeps nothing: what it hands out are
// views of the text, so that no text makes it take memory. Whatever is no JSON (RFC 8259, UTF-8, at
// most 64 values within each other) or not what is asked for next is an Error that begins with what
// the text is called, and says the byte.
class JsonReader {
 public:
  JsonReader(std::string_view text, std::string called) : text_(text), called_(std::move(called)) {}

  // What the text, or its next part, is called in errors.
  void call(std::string called) { called_ = std::move(called); }

  // The next value must be of that kind. `member` and `element` must take the value that comes.
  void object(FunctionRef<void(std::string_view key)> member);
  void list(FunctionRef<void()> element);
  std::string_view string();  // between its quotes, escapes as they stand
  int64_t integer();          // from 0 to 2^62 - 1
  double number();            // any number
  void skip();                // any value
  void end();                 // nothing comes any more

 private:
  char peek();  // past blanks; 0 at the end
  bool take(char c);
  void take_number();
  void take_escape();
  void take_word(std::string_view word);
  void enter(char opening, const char* expected);
  [[noreturn]] void refuse(const char* expected) const;

  std::string_view text_;
  std::string called_;
  size_t at_ = 0;
  int depth_ = 0;
};

// What a string of a JsonReader stands for.
std::string unescaped(std::string_view string);

}  // namespace moemamba
