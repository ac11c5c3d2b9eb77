#include "runtime/json_reader.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr int kDeepest = 64;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Four hex digits as a number; -1 where they are not.
int hex_unit(std::string_view text) {
  int unit = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), unit, 16);
  const bool all = text.size() == 4 && text[0] != '-' && end == text.data() + 4;
  return error == std::errc() && all ? unit : -1;
}

// Bytes of the character at the front (Unicode's table 3-7); 0 where it is no UTF-8.
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? uint8_t(text[i]) : 0; };
  const auto follows = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const int first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  const int least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const int most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  if (second < least || second > most) return 0;
  if (first >= 0xe0 && first <= 0xef) return follows(2) ? 3 : 0;
  return first >= 0xf0 && first <= 0xf4 && follows(2) && follows(3) ? 4 : 0;
}

void append_utf8(std::string& text, int c) {
  if (c < 0x80) {
    text += char(c);
  } else if (c < 0x800) {
    text += {char(0xc0 | c >> 6), char(0x80 | (c & 63))};
  } else if (c < 0x10000) {
    text += {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
  } else {
    text += {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)),
             char(0x80 | (c & 63))};
  }
}

}  // namespace

void JsonReader::refuse(const char* expected) const {
  std::string found = "its end";
  if (at_ < text_.size()) {
    const char c = text_[at_];
    const bool shows = c > ' ' && c < 127;
    found = shows ? concat('\'', c, '\'') : concat("a byte ", int(uint8_t(c)));
  }
  throw Error(
      concat(called_, ": damaged: expected ", expected, " at byte ", at_, ", found ", found));
}

char JsonReader::peek() {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' ||
                                text_[at_] == '\t'))
    ++at_;
  return at_ < text_.size() ? text_[at_] : '\0';
}

bool JsonReader::take(char c) {
  if (peek() != c || at_ == text_.size()) return false;
  ++at_;
  return true;
}

void JsonReader::enter(char opening, const char* expected) {
  if (peek() != opening) refuse(expected);
  if (depth_ == kDeepest) refuse("at most 64 values within each other");
  ++depth_;
  ++at_;
}

void JsonReader::object(FunctionRef<void(std::string_view)> member) {
  enter('{', "an object");
  if (!take('}')) {
    do {
      const std::string_view key = string();
      if (!take(':')) refuse("':'");
      member(key);
    } while (take(','));
    if (!take('}')) refuse("',' or '}'");
  }
  --depth_;
}

void JsonReader::list(FunctionRef<void()> element) {
  enter('[', "a list");
  if (!take(']')) {
    do element();
    while (take(','));
    if (!take(']')) refuse("',' or ']'");
  }
  --depth_;
}

std::string_view JsonReader::string() {
  if (!take('"')) refuse("a text in quotes");
  const size_t begin = at_;
  for (;;) {
    if (at_ == text_.size()) refuse("a closing quote");
    const char c = text_[at_];
    if (c == '"') break;
    if (uint8_t(c) < 0x20) refuse("no control character in a text");
    if (c == '\\') {
      take_escape();
      continue;
    }
    const size_t length = utf8_length(text_.substr(at_, 4));
    if (length == 0) refuse("UTF-8");
    at_ += length;
  }
  return text_.substr(begin, at_++ - begin);
}

void JsonReader::take_escape() {
  const char kind = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
  if (kind != 'u') {
    if (!kind || std::string_view("\"\\/bfnrt").find(kind) == std::string_view::npos)
      refuse("an escape of JSON");
    at_ += 2;
    return;
  }
  const auto unit_at = [&](size_t at) {
    return hex_unit(text_.substr(std::min(at, text_.size()), 4));
  };
  const int unit = unit_at(at_ + 2);
  const bool high = unit >= 0xd800 && unit < 0xdc00, low = unit >= 0xdc00 && unit < 0xe000;
  if (unit < 0 || low) refuse("four hex digits of a character after \\u");
  if (high) {  // the second half must follow
    const int second = unit_at(at_ + 8);
    if (text_.substr(at_ + 6, 2) != "\\u" || second < 0xdc00 || second >= 0xe000)
      refuse("two halves of a character after \\u");
  }
  at_ += high ? 12 : 6;
}

int64_t JsonReader::integer() {
  constexpr const char* kExpected = "an integer from 0 to 2^62 - 1";
  if (!is_digit(peek())) refuse(kExpected);
  const size_t begin = at_;
  take_number();
  uint64_t value = 0;
  const char* end = text_.data() + at_;
  const auto result = std::from_chars(text_.data() + begin, end, value);
  if (result.ec != std::errc() || result.ptr != end || value >= uint64_t{1} << 62) {
    at_ = begin;
    refuse(kExpected);
  }
  return int64_t(value);
}

double JsonReader::number() {
  if (peek() != '-' && !is_digit(peek())) refuse("a number");
  const size_t begin = at_;
  take_number();
  double value = 0;
  if (std::from_chars(text_.data() + begin, text_.data() + at_, value).ec == std::errc())
    return value;
  at_ = begin;
  refuse("a number that a double takes");
}

void JsonReader::take_number() {
  const auto digits = [&] {
    const size_t begin = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
    if (at_ == begin) refuse("a digit");
    return begin;
  };
  const auto next_is = [&](std::string_view any) {
    return at_ < text_.size() && any.find(text_[at_]) != std::string_view::npos;
  };
  if (next_is("-")) ++at_;
  const size_t begin = digits();
  if (text_[begin] == '0' && at_ > begin + 1) {
    at_ = begin;
    refuse("a number without zeros before it");
  }
  if (next_is(".")) {
    ++at_;
    digits();
  }
  if (!next_is("eE")) return;
  ++at_;
  if (next_is("+-")) ++at_;
  digits();
}

void JsonReader::take_word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) refuse("a value");
  at_ += word.size();
}

void JsonReader::skip() {
  switch (peek()) {
    case '{':
      return object([&](std::string_view) { skip(); });
    case '[':
      return list([&] { skip(); });
    case '"':
      string();
      return;
    case 't':
      return take_word("true");
    case 'f':
      return take_word("false");
    case 'n':
      return take_word("null");
    default:
      if (peek() != '-' && !is_digit(peek())) refuse("a value");
      take_number();
  }
}

void JsonReader::end() {
  peek();
  if (at_ < text_.size()) refuse("nothing more");
}

std::string unescaped(std::string_view string) {
  std::string text;
  text.reserve(string.size());
  for (size_t i = 0; i < string.size(); ++i) {
    if (string[i] != '\\') {
      text += string[i];
      continue;
    }
    constexpr std::string_view kNames = "bfnrt", kBytes = "\b\f\n\r\t";
    const char kind = string[++i];
    const size_t named = kNames.find(kind);
    if (kind != 'u') {
      text += named == std::string_view::npos ? kind : kBytes[named];
      continue;
    }
    int c = hex_unit(string.substr(i + 1, 4));
    i += 4;
    if (c >= 0xd800 && c < 0xdc00) {
      c = 0x10000 + ((c - 0xd800) << 10) + hex_unit(string.substr(i + 3, 4)) - 0xdc00;
      i += 6;
    }
    append_utf8(text, c);
  }
  return text;
}

}  // namespace moemamba
