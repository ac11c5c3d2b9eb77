#include "core/schema_text.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <utility>
#include <vector>

namespace moemamba {

namespace {

constexpr int kDeepest = 64;  // nested groups; guards the stack

std::string found(const Token& token) {
  switch (token.kind) {
    case Token::end: return "the end of the file";
    case Token::text: return "a text in quotes";
    case Token::wrong: return token.value;
    default: return concat('"', token.value.substr(0, 60), '"');
  }
}

}  // namespace

void TextReader::read() { read_message(settings_.target_, "", '\0'); }

std::string TextReader::place(const Token& at) const {
  return concat(name_, ":", at.line, ":", at.column);
}

void TextReader::note(const Token& at, const std::string& path, const std::string& message) {
  settings_.add_problem(concat(place(at), ": ", path, path.empty() ? "" : ": ", message));
}

// Up to `closing`, which is taken; '\0': up to the end of the file.
void TextReader::read_message(Message& message, const std::string& prefix, char closing) {
  for (;;) {
    const Token& token = lexer_.peek();
    if (token.kind == Token::end) {
      if (closing) note(token, "", concat("expected '", closing, "', found ", found(token)));
      return;
    }
    if (closing && token.is(closing)) {
      lexer_.take();
      return;
    }
    if (token.kind == Token::word) {
      read_field(message, prefix);
    } else if (token.is(';') || token.is(',')) {
      lexer_.take();
    } else {
      note(token, "", concat("expected the name of a setting, found ", found(token)));
      const int line = token.line;
      lexer_.take();
      skip_line(line);
    }
  }
}

void TextReader::read_field(Message& message, const std::string& prefix) {
  const Token name = lexer_.take();
  const std::string path = prefix + name.value.substr(0, 100);
  const Field* field = message.GetDescriptor()->FindFieldByName(name.value);
  if (!field) {
    note(name, path, no_such_setting(*settings_.target_.GetDescriptor(), *message.GetDescriptor(),
                                     prefix, name.value, ""));
    return skip_value(false);
  }
  const bool group = field->cpp_type() == Field::CPPTYPE_MESSAGE;
  const bool colon = lexer_.peek().is(':');
  if (colon) lexer_.take();
  const Token& next = lexer_.peek();
  const bool opens = next.is('{') || next.is('<');
  if (group ? !opens : !colon || next.kind == Token::end || next.is('{') || next.is('<')) {
    const char* form = group ? " { ... }" : ": VALUE";
    note(name, path, concat("expected \"", name.value, form, "\", found ", found(next)));
    return colon || opens ? skip_value(colon) : skip_line(name.line);
  }
  if (!begin(message, *field, path, name)) return skip_value(true);
  if (group) read_group(message, *field, path);
  else read_values(message, *field, path);
}

// Notes that this file gives `path`; clears a list at its first mention. False: given twice.
bool TextReader::begin(Message& message, const Field& field, const std::string& path,
                       const Token& name) {
  Settings::Place& first = settings_.places_[path];
  const size_t reading = settings_.names_.size();
  const bool is_first = first.reading != reading;
  if (!is_first && !field.is_repeated()) {
    note(name, path, concat("given twice, first at ", first.line, ":", first.column, "; keep one"));
    return false;
  }
  if (is_first && field.is_repeated()) settings_.clear_list(message, field);
  first = {.reading = reading, .line = name.line, .column = name.column};
  return true;
}

void TextReader::read_group(Message& message, const Field& field, const std::string& path) {
  if (depth_ == kDeepest) {
    note(lexer_.peek(), path, concat("more than ", kDeepest, " groups within each other"));
    return skip_balanced();
  }
  if (!has_room(lexer_.peek(), field, path)) return skip_balanced();
  const char closing = lexer_.take().is('{') ? '}' : '>';
  const auto& reflection = *message.GetReflection();
  Message* inner;
  std::string prefix = path + ".";
  if (field.is_repeated()) {
    inner = reflection.AddMessage(&message, &field);
    prefix = concat(path, "[", reflection.FieldSize(message, &field) - 1, "].");
  } else {
    inner = reflection.MutableMessage(&message, &field);
  }
  ++depth_;
  read_message(*inner, prefix, closing);
  --depth_;
}

void TextReader::read_values(Message& message, const Field& field, const std::string& path) {
  if (!lexer_.peek().is('[')) return read_value(message, field, path);
  const Token opening = lexer_.peek();
  if (!field.is_repeated()) {
    note(opening, path, "takes one value, found a list");
    return skip_balanced();
  }
  lexer_.take();
  while (!lexer_.peek().is(']')) {
    const Token& token = lexer_.peek();
    if (token.kind != Token::word && token.kind != Token::text) {
      note(token, path, concat("expected a value, \",\" or \"]\", found ", found(token)));
      return skip_line(token.line);
    }
    read_value(message, field, path);
    if (lexer_.peek().is(',')) lexer_.take();
  }
  lexer_.take();
}

void TextReader::read_value(Message& message, const Field& field, const std::string& path) {
  const Token& next = lexer_.peek();
  if (next.kind != Token::word && next.kind != Token::text) {
    const int line = next.line;
    note(next, path, concat("expected a value, found ", found(next)));
    if (!next.is('}') && !next.is('>')) skip_line(line);
    return;
  }
  const bool room = has_room(next, field, path);
  Token token = lexer_.take();
  Given given{.value = std::move(token.value),
              .form = token.kind == Token::text ? Given::quoted : Given::word};
  while (token.kind == Token::text && lexer_.peek().kind == Token::text)
    given.value += lexer_.take().value;  // "a" "b" is "ab"
  if (!room) return;
  const std::string wrong = assign(message, field, std::move(given));
  if (!wrong.empty()) note(token, path, wrong);
}

// For another element, where `field` is a list; counts it. What is wrong is said once.
bool TextReader::has_room(const Token& at, const Field& field, const std::string& path) {
  const bool room = !field.is_repeated() || settings_.elements_ < Settings::kMostElements;
  if (room) settings_.elements_ += field.is_repeated();
  else if (!std::exchange(full_, true)) note(at, path, too_many_elements());
  return room;
}

// What follows a name that is not read: a value, a list or a group.
void TextReader::skip_value(bool after_colon) {
  if (lexer_.peek().is(':')) {
    lexer_.take();
    after_colon = true;
  }
  const Token& next = lexer_.peek();
  if (next.is('{') || next.is('<') || next.is('[')) return skip_balanced();
  if (!after_colon) return;  // the next word is a name
  if (next.kind == Token::word) {
    lexer_.take();
  } else {
    while (lexer_.peek().kind == Token::text) lexer_.take();
  }
}

void TextReader::skip_balanced() {
  int open = 0;
  do {
    const Token token = lexer_.take();
    if (token.kind == Token::end) return;
    open += token.is('{') || token.is('<') || token.is('[');
    open -= token.is('}') || token.is('>') || token.is(']');
  } while (open > 0);
}

// To the first token after `line` or to a brace that closes the group.
void TextReader::skip_line(int line) {
  while (lexer_.peek().kind != Token::end && lexer_.peek().line == line &&
         !lexer_.peek().is('}') && !lexer_.peek().is('>'))
    lexer_.take();
}

}  // namespace moemamba
