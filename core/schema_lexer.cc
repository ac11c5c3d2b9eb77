#include <algorithm>
#include <cctype>
#include <cstdint>
#include <utility>

#include "core/schema_parts.h"

namespace moemamba {

namespace {

bool belongs_to_word(char c) { return std::isalnum(uint8_t(c)) || c == '_' || c == '.'; }

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const char lower = char(std::tolower(uint8_t(c)));
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

}  // namespace

Token Lexer::take() {
  Token taken = std::move(token_);
  advance();
  return taken;
}

char Lexer::next() {
  const char c = rest_.front();
  rest_.remove_prefix(1);
  if (c == '\n') {
    ++line_;
    column_ = 1;
  } else {
    ++column_;
  }
  return c;
}

void Lexer::skip_blanks() {
  while (!rest_.empty()) {
    if (rest_.front() == '#') {
      while (!rest_.empty() && rest_.front() != '\n') next();
    } else if (std::isspace(uint8_t(rest_.front()))) {
      next();
    } else {
      return;
    }
  }
}

void Lexer::advance() {
  skip_blanks();
  token_ = Token{.kind = Token::end, .line = line_, .column = column_};
  if (rest_.empty()) return;
  const char first = next();
  if (first == '"' || first == '\'') return read_text(first);
  const bool sign = (first == '-' || first == '+') && !rest_.empty() && belongs_to_word(rest_[0]);
  if (!sign && !belongs_to_word(first)) {
    token_.kind = std::string_view("{}<>[]:;,").find(first) != std::string_view::npos
                      ? Token::symbol
                      : Token::wrong;
    token_.value = token_.kind == Token::symbol ? std::string(1, first) : "unexpected character";
    if (token_.kind == Token::wrong && std::isprint(uint8_t(first)))
      token_.value += std::string(" '") + first + "'";
    return;
  }
  token_.kind = Token::word;
  const bool number = sign || std::isdigit(uint8_t(first)) || first == '.';
  const size_t more = more_of_word(first, number);
  token_.value.reserve(1 + more);  // no more than that: words may be long
  token_.value = first;
  for (size_t i = 0; i < more; ++i) token_.value += next();
}

// Bytes that belong to the word after `first`.
size_t Lexer::more_of_word(char first, bool number) const {
  char before = first;
  bool hex = false;
  for (size_t i = 0; i < rest_.size(); before = rest_[i++]) {
    const bool exponent_sign = number && !hex && (before == 'e' || before == 'E') &&
                               (rest_[i] == '+' || rest_[i] == '-');
    if (!belongs_to_word(rest_[i]) && !exponent_sign) return i;
    hex = hex || rest_[i] == 'x' || rest_[i] == 'X';
  }
  return rest_.size();
}

void Lexer::read_text(char quote) {
  token_.kind = Token::text;
  size_t length = 0;  // with backslashes
  while (length < rest_.size() && rest_[length] != quote && rest_[length] != '\n')
    length += rest_[length] == '\\' ? 2 : 1;
  token_.value.reserve(std::min(length, rest_.size()));
  while (!rest_.empty() && rest_.front() != '\n') {
    const char c = next();
    if (c == quote) return;
    if (c == '\\') {
      read_escape();
    } else {
      token_.value += c;
    }
  }
  token_.kind = Token::wrong;
  token_.value = "text without closing quote";
}

// After a backslash; an escape that text format does not know stands for itself.
void Lexer::read_escape() {
  if (rest_.empty() || rest_.front() == '\n') return;
  const char c = next();
  static constexpr std::string_view kNames = "abfnrtv\\'\"?", kBytes = "\a\b\f\n\r\t\v\\'\"?";
  const auto named = kNames.find(c);
  if (named != std::string_view::npos) {
    token_.value += kBytes[named];
  } else if (c == 'x' && !rest_.empty() && hex_digit(rest_[0]) >= 0) {
    int byte = hex_digit(next());
    if (!rest_.empty() && hex_digit(rest_[0]) >= 0) byte = 16 * byte + hex_digit(next());
    token_.value += char(byte);
  } else if (c >= '0' && c <= '7') {
    int byte = c - '0';
    for (int i = 0; i < 2 && !rest_.empty() && rest_[0] >= '0' && rest_[0] <= '7'; ++i)
      byte = 8 * byte + (next() - '0');
    token_.value += char(byte);
  } else {
    token_.value += c;
  }
}

}  // namespace moemamba
