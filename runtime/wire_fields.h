#pragma once
#include <climits>
#include <cstdint>
#include <string_view>

namespace moemamba {

// Takes a base-128 number off the front; false where it does not end, or ends past 64 bits.
inline bool take_varint(std::string_view& bytes, uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 64 && !bytes.empty(); shift += 7) {
    const auto byte = uint8_t(bytes.front());
    bytes.remove_prefix(1);
    value |= uint64_t(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// One field of protobuf's wire format.
struct WireField {
  enum Kind { varint = 0, fixed64 = 1, bytes = 2 };
  int number = 0;
  int kind = 0;
  uint64_t value = 0;     // of a varint or eight bytes
  std::string_view text;  // of a text, or of a message within
};

// Takes a field off the front; false where there is none of these kinds, whole.
inline bool take_field(std::string_view& bytes, WireField& field) {
  uint64_t tag = 0;
  if (!take_varint(bytes, tag) || tag >> 3 > INT_MAX) return false;
  field = {.number = int(tag >> 3), .kind = int(tag & 7)};
  if (field.kind == WireField::varint) return take_varint(bytes, field.value);
  uint64_t size = 8;
  if (field.kind == WireField::bytes ? !take_varint(bytes, size) : field.kind != WireField::fixed64)
    return false;
  if (size > bytes.size()) return false;
  field.text = bytes.substr(0, size);
  bytes.remove_prefix(size);
  if (field.kind == WireField::bytes) return true;
  for (int i = 7; i >= 0; --i) field.value = field.value << 8 | uint8_t(field.text[size_t(i)]);
  field.text = {};
  return true;
}

// The field that begins at byte `at`. REQUIRES: it was found whole before, as all below.
inline WireField field_at(std::string_view bytes, size_t at) {
  WireField field;
  bytes.remove_prefix(at);
  take_field(bytes, field);
  return field;
}

// The fields of one number in a message whose fields are in the order of their numbers.
class WireFields {
 public:
  WireFields(std::string_view message, int number) : message_(message), number_(number) {}

  class Iterator {
   public:
    Iterator() = default;
    Iterator(std::string_view rest, int number) : rest_(rest) {
      do advance();
      while (there_ && field_.number < number);
      there_ = there_ && field_.number == number;
    }
    const WireField& operator*() const { return field_; }
    Iterator& operator++() {
      const int number = field_.number;
      advance();
      there_ = there_ && field_.number == number;
      return *this;
    }
    // Only of use against end().
    bool operator!=(const Iterator& other) const { return there_ != other.there_; }

   private:
    void advance() { there_ = take_field(rest_, field_); }
    std::string_view rest_;
    WireField field_;
    bool there_ = false;
  };
  Iterator begin() const { return {message_, number_}; }
  Iterator end() const { return {}; }

 private:
  std::string_view message_;
  int number_;
};

// The one field of that number; of number 0 where there is none.
inline WireField only_field(std::string_view message, int number) {
  const auto at = WireFields(message, number).begin();
  return at != WireFields::Iterator() ? *at : WireField{};
}

}  // namespace moemamba
