#pragma once
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"

namespace google::protobuf {
class FieldDescriptor;
class Message;
}  // namespace google::protobuf

namespace moemamba {

// The user's settings are wrong; what() lists every problem, one a line. Exit code 2.
class BadSettings : public Error {
 public:
  using Error::Error;
};

// Fills any protobuf message from files in text format and dotted options (house.md, decision 10).
// Read files first, in order, then options: what is read later wins, a list is replaced whole by
// the first mention of a later file or of the options. Nothing throws on bad input: every problem
// is kept (the first hundred, or 16 KiB), with its place, until throw_problems():
//   run.textproto:3:3: parallel.exprt: no such setting; did you mean "expert"?
//   --model.experts=-1: out of range: must be 0 to 4096, found -1
// What is read takes at most twice its bytes in memory, and a constant
// (tests/fuzz/settings_fuzz.cc). For that all lists together hold at most kMostElements: a short
// text in a list takes many times what it has in the file.
class Settings {
 public:
  static constexpr int kMostElements = 1000;
  explicit Settings(google::protobuf::Message& target) : target_(target) {}

  void read_file(const std::string& path);                         // of at most 1 MiB
  void read_text(const std::string& name, std::string_view text);  // name: for messages
  // "--model.experts=32"; bools and enums by name in any case; repeat an option to fill a list.
  void read_option(const std::string& option);

  // A problem with the value of `setting` ("parallel.expert"), whoever gave it.
  void object(const std::string& setting, const std::string& message);
  // Where the value of `setting` was given: "run.textproto:3:3", "--parallel.expert=3"; empty if it
  // is the default.
  std::string place_of(const std::string& setting) const;

  const std::vector<std::string>& problems() const { return problems_; }
  void throw_problems() const;  // BadSettings unless there are none

 private:
  friend class TextReader;
  std::string assign_option(const std::string& path, std::string value);
  void add_problem(std::string problem);
  void clear_list(google::protobuf::Message& message,
                  const google::protobuf::FieldDescriptor& list);

  // Where a value was given: in the text of a reading, or as an option.
  struct Place {
    size_t reading = 0;  // counted from 1
    int line = 0, column = 0;
    std::string option;
  };
  google::protobuf::Message& target_;
  std::vector<std::string> problems_;
  size_t problem_bytes_ = 0;
  std::vector<std::string> names_;  // of the texts read
  std::map<std::string, Place> places_;
  std::set<std::string> option_lists_;  // lists that an option has begun anew
  int elements_ = 0;                    // of all lists
};

// All settings of `message`, defaults included, in text format: read back, it gives the same text.
std::string resolved_text(const google::protobuf::Message& message);
// The same one by one: ("model.experts", "8").
std::vector<std::pair<std::string, std::string>> resolved_values(
    const google::protobuf::Message& message);

// What a schema says of itself. `descriptors`: a serialised FileDescriptorSet with imports and
// source info (what CMake embeds); `message`: "moemamba.RunConfig". Its groups may hold lists of
// their own kind, but no cycle of single groups.
std::string reference_page(std::string_view descriptors, const std::string& message);  // Markdown
std::string settings_help(std::string_view descriptors, const std::string& message);   // plain text

}  // namespace moemamba
