#pragma once
// Inside of core/schema: not for other rooms.
#include <map>
#include <string>
#include <string_view>

#include "core/schema.h"
#include "core/schema_parts.h"

namespace moemamba {

// Reads one file in text format into the settings' message and goes on after every problem: what an
// unknown name holds is skipped as a whole, after a broken sentence reading resumes on the next
// line.
class TextReader {
 public:
  TextReader(Settings& settings, std::string name, std::string_view text)
      : settings_(settings), name_(std::move(name)), lexer_(text) {}
  void read();

 private:
  using Message = google::protobuf::Message;
  using Field = google::protobuf::FieldDescriptor;

  void read_message(Message& message, const std::string& prefix, char closing);
  void read_field(Message& message, const std::string& prefix);
  void read_group(Message& message, const Field& field, const std::string& path);
  void read_values(Message& message, const Field& field, const std::string& path);
  void read_value(Message& message, const Field& field, const std::string& path);
  bool begin(Message& message, const Field& field, const std::string& path, const Token& name);
  bool has_room(const Token& at, const Field& field, const std::string& path);
  void skip_value(bool after_colon);
  void skip_balanced();
  void skip_line(int line);
  void note(const Token& at, const std::string& path, const std::string& message);
  std::string place(const Token& at) const;

  Settings& settings_;
  std::string name_;
  Lexer lexer_;
  int depth_ = 0;
  bool full_ = false;  // lists had no room for an element
};

}  // namespace moemamba
