#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/field_options.pb.h"
#include "core/schema.h"
#include "core/schema_parts.h"

namespace moemamba {

namespace pb = google::protobuf;

namespace {

std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = char(c - 'A' + 'a');
  return text;
}

template <class Number>
std::string shortest(Number value) {
  char text[64];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

std::string expected(const std::string& what, const Given& given) {
  if (given.form == Given::quoted) return concat("expected ", what, ", found a text in quotes");
  if (given.value.empty()) return concat("expected ", what, ", found nothing");
  return concat("expected ", what, ", found \"", given.value.substr(0, 60), '"');
}

// limits: of the field's type, where the schema gives no range.
std::string out_of_range(const pb::FieldDescriptor& field, const std::string& limits,
                         const Given& given) {
  const std::string range = range_text(field);
  return concat("out of range: must be ", range.empty() ? limits : range, ", found ",
                given.value.substr(0, 60));
}

// Bounds are compared in the field's own type, so that 0.1 in a file is not above a bound of 0.1.
template <class Number>
bool in_range(const pb::FieldDescriptor& field, Number value) {
  const Range& range = field.options().GetExtension(moemamba::range);
  if constexpr (std::is_integral_v<Number>) {
    const auto wide = static_cast<long double>(value);
    return (!range.has_min() || wide >= range.min()) && (!range.has_max() || wide <= range.max());
  } else {
    return (!range.has_min() || value >= Number(range.min())) &&
           (!range.has_max() || value <= Number(range.max()));
  }
}

template <class Number>
std::string parse_integer(const pb::FieldDescriptor& field, const Given& given, Number& value) {
  using Limits = std::numeric_limits<Number>;
  std::string_view digits = given.value;
  const bool negative = !digits.empty() && digits[0] == '-';
  if (negative) digits.remove_prefix(1);
  int base = 10;
  if (digits.size() > 2 && digits[0] == '0' && (digits[1] | 32) == 'x') {
    base = 16;
    digits.remove_prefix(2);
  }
  uint64_t magnitude = 0;
  const char* end = digits.data() + digits.size();
  const auto result = std::from_chars(digits.data(), end, magnitude, base);
  const bool too_large = result.ec == std::errc::result_out_of_range;
  if (given.form == Given::quoted || (result.ec != std::errc() && !too_large) || result.ptr != end)
    return expected("a whole number", given);
  const uint64_t most = negative ? (Limits::is_signed ? uint64_t(Limits::max()) + 1 : 0)
                                 : uint64_t(Limits::max());
  const std::string limits = concat(Limits::min(), " to ", Limits::max());
  if (too_large || magnitude > most) return out_of_range(field, limits, given);
  value = Number(negative ? 0 - magnitude : magnitude);
  return in_range(field, value) ? "" : out_of_range(field, limits, given);
}

template <class Number>
std::string parse_real(const pb::FieldDescriptor& field, const Given& given, Number& value) {
  std::string_view digits = given.value;
  if (digits.size() > 1 && digits.back() == 'f' && digits[digits.size() - 2] != 'n')
    digits.remove_suffix(1);  // 1.5f, but not inf
  double wide = 0;
  const char* end = digits.data() + digits.size();
  const auto result = std::from_chars(digits.data(), end, wide);
  const bool out = result.ec == std::errc::result_out_of_range;
  if (given.form == Given::quoted || (result.ec != std::errc() && !out) || result.ptr != end)
    return expected("a number", given);
  if (out || !std::isfinite(wide) || !std::isfinite(Number(wide)))
    return concat("must be a finite number that a ", field.cpp_type_name(), " can hold, found ",
                  given.value);
  value = Number(wide);
  return in_range(field, value) ? "" : out_of_range(field, "", given);
}

std::string parse_bool(const Given& given, bool& value) {
  const std::string text = lower(given.value);
  if (given.form == Given::quoted || (text != "true" && text != "false"))
    return expected("true or false", given);
  value = text == "true";
  return "";
}

std::string parse_enum(const pb::FieldDescriptor& field, const Given& given,
                       const pb::EnumValueDescriptor*& value) {
  const pb::EnumDescriptor& type = *field.enum_type();
  std::vector<std::string> names;
  for (int i = 0; i < type.value_count(); ++i) {
    names.push_back(type.value(i)->name());
    if (lower(names.back()) == lower(given.value)) value = type.value(i);
  }
  if (value && given.form != Given::quoted) return "";
  std::string list;
  for (size_t i = 0; i < names.size(); ++i)
    list += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + names[i];
  const std::string near = value ? value->name() : nearest(given.value, names);
  return expected(list, given) + (near.empty() ? "" : concat("; did you mean ", near, "?"));
}

template <class Value>
void store(pb::Message& message, const pb::FieldDescriptor& field, const Value& value,
           void (pb::Reflection::*set)(pb::Message*, const pb::FieldDescriptor*, Value) const,
           void (pb::Reflection::*add)(pb::Message*, const pb::FieldDescriptor*, Value) const) {
  (message.GetReflection()->*(field.is_repeated() ? add : set))(&message, &field, value);
}

template <class Number>
std::string assign_number(pb::Message& message, const pb::FieldDescriptor& field,
                          const Given& given,
                          void (pb::Reflection::*set)(pb::Message*, const pb::FieldDescriptor*,
                                                      Number) const,
                          void (pb::Reflection::*add)(pb::Message*, const pb::FieldDescriptor*,
                                                      Number) const) {
  Number value{};
  std::string wrong;
  if constexpr (std::is_same_v<Number, bool>) wrong = parse_bool(given, value);
  else if constexpr (std::is_same_v<Number, const pb::EnumValueDescriptor*>)
    wrong = parse_enum(field, given, value);
  else if constexpr (std::is_integral_v<Number>) wrong = parse_integer(field, given, value);
  else wrong = parse_real(field, given, value);
  if (wrong.empty()) store(message, field, value, set, add);
  return wrong;
}

// Levenshtein's distance.
size_t edits(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string number_text(double value) { return shortest(value); }
std::string number_text(float value) { return shortest(value); }

std::string too_many_elements() {
  return concat("all lists together hold at most ", Settings::kMostElements,
                " values; prepare fewer, longer token files");
}

std::string range_text(const pb::FieldDescriptor& field) {
  const Range& range = field.options().GetExtension(moemamba::range);
  if (range.has_min() && range.has_max())
    return concat(number_text(range.min()), " to ", number_text(range.max()));
  if (range.has_min()) return concat("at least ", number_text(range.min()));
  if (range.has_max()) return concat("at most ", number_text(range.max()));
  return "";
}

std::string assign(pb::Message& message, const pb::FieldDescriptor& field, Given given) {
  using R = pb::Reflection;
  using F = pb::FieldDescriptor;
  switch (field.cpp_type()) {
    case F::CPPTYPE_INT32:
      return assign_number<int32_t>(message, field, given, &R::SetInt32, &R::AddInt32);
    case F::CPPTYPE_INT64:
      return assign_number<int64_t>(message, field, given, &R::SetInt64, &R::AddInt64);
    case F::CPPTYPE_UINT32:
      return assign_number<uint32_t>(message, field, given, &R::SetUInt32, &R::AddUInt32);
    case F::CPPTYPE_UINT64:
      return assign_number<uint64_t>(message, field, given, &R::SetUInt64, &R::AddUInt64);
    case F::CPPTYPE_FLOAT:
      return assign_number<float>(message, field, given, &R::SetFloat, &R::AddFloat);
    case F::CPPTYPE_DOUBLE:
      return assign_number<double>(message, field, given, &R::SetDouble, &R::AddDouble);
    case F::CPPTYPE_BOOL:
      return assign_number<bool>(message, field, given, &R::SetBool, &R::AddBool);
    case F::CPPTYPE_ENUM:
      return assign_number<const pb::EnumValueDescriptor*>(message, field, given, &R::SetEnum,
                                                           &R::AddEnum);
    case F::CPPTYPE_STRING:
      if (given.form == Given::word) return expected("a text in quotes", given);
      (message.GetReflection()->*(field.is_repeated() ? &R::AddString : &R::SetString))(
          &message, &field, std::move(given.value));
      return "";
    case F::CPPTYPE_MESSAGE: break;
  }
  return concat("is a group of settings, not a value; write ",
                given.form == Given::option ? concat("--", field.name(), ".NAME=VALUE")
                                            : concat(field.name(), " { ... }"));
}

std::string nearest(const std::string& name, const std::vector<std::string>& candidates) {
  std::string best;
  size_t fewest = std::max<size_t>(1, std::min<size_t>(3, name.size() / 2)) + 1;
  if (name.size() > 100) return best;
  for (const std::string& candidate : candidates) {
    const size_t count = edits(lower(name), lower(candidate));
    if (count < fewest) {
      fewest = count;
      best = candidate;
    }
  }
  return best;
}

namespace {

// Full names of the settings below `message` whose last part is `name`.
void find_elsewhere(const pb::Descriptor& message, const std::string& prefix,
                    const std::string& name, int depth, std::vector<std::string>& found) {
  if (depth == 0) return;
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (field.name() == name) found.push_back(prefix + name);
    if (field.message_type() && !field.is_repeated())
      find_elsewhere(*field.message_type(), prefix + field.name() + ".", name, depth - 1, found);
  }
}

}  // namespace

std::string no_such_setting(const pb::Descriptor& root, const pb::Descriptor& message,
                            const std::string& prefix, const std::string& name,
                            const std::string& mark) {
  const std::string full = mark.empty() ? "" : mark + prefix;
  std::vector<std::string> names, elsewhere;
  std::string list;
  for (int i = 0; i < message.field_count(); ++i) {
    names.push_back(message.field(i)->name());
    list += (i ? ", " : "") + names.back();
  }
  const std::string near = nearest(name, names);
  find_elsewhere(root, "", name, 8, elsewhere);
  std::string hint = concat("; there are ", list);
  if (!elsewhere.empty()) hint = concat("; did you mean \"", mark, elsewhere.front(), "\"?");
  if (!near.empty()) hint = concat("; did you mean \"", full, near, "\"?");
  return "no such setting" + hint;
}

}  // namespace moemamba
