#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/dynamic_message.h>

#include <cctype>

#include "core/field_options.pb.h"
#include "core/schema.h"
#include "core/schema_parts.h"

namespace moemamba {

namespace pb = google::protobuf;

namespace {

std::string quoted(const std::string& text) {
  static constexpr char kHex[] = "01234567";
  std::string out = "\"";
  for (char c : text) {
    const auto byte = uint8_t(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (byte < 32 || byte == 127) {
      out += {'\\', kHex[byte >> 6], kHex[(byte >> 3) & 7], kHex[byte & 7]};
    } else {
      out += c;
    }
  }
  return out + "\"";
}

// Element `index` of a list, or (index -1) the value or default of a single field.
std::string value_text(const pb::Message& message, const pb::FieldDescriptor& field, int index) {
  const pb::Reflection& r = *message.GetReflection();
  const bool one = index < 0;
  const auto* f = &field;
  using F = pb::FieldDescriptor;
  switch (field.cpp_type()) {
    case F::CPPTYPE_INT32:
      return concat(one ? r.GetInt32(message, f) : r.GetRepeatedInt32(message, f, index));
    case F::CPPTYPE_INT64:
      return concat(one ? r.GetInt64(message, f) : r.GetRepeatedInt64(message, f, index));
    case F::CPPTYPE_UINT32:
      return concat(one ? r.GetUInt32(message, f) : r.GetRepeatedUInt32(message, f, index));
    case F::CPPTYPE_UINT64:
      return concat(one ? r.GetUInt64(message, f) : r.GetRepeatedUInt64(message, f, index));
    case F::CPPTYPE_FLOAT:
      return number_text(one ? r.GetFloat(message, f) : r.GetRepeatedFloat(message, f, index));
    case F::CPPTYPE_DOUBLE:
      return number_text(one ? r.GetDouble(message, f) : r.GetRepeatedDouble(message, f, index));
    case F::CPPTYPE_BOOL:
      return (one ? r.GetBool(message, f) : r.GetRepeatedBool(message, f, index)) ? "true"
                                                                                   : "false";
    case F::CPPTYPE_ENUM:
      return (one ? r.GetEnum(message, f) : r.GetRepeatedEnum(message, f, index))->name();
    case F::CPPTYPE_STRING:
      return quoted(one ? r.GetString(message, f) : r.GetRepeatedString(message, f, index));
    case F::CPPTYPE_MESSAGE: break;
  }
  return "";
}

// Everything that is set or has a default, in both forms.
struct Resolved {
  std::string text;
  std::vector<std::pair<std::string, std::string>> values;
  std::string indent, prefix;

  void add(const std::string& name, const std::string& value) {
    text += concat(indent, name, ": ", value, "\n");
    values.emplace_back(prefix + name, value);
  }
  void add_message(const pb::Message& message);
  void add_group(const std::string& name, const std::string& path, const pb::Message& group);
};

void Resolved::add_group(const std::string& name, const std::string& path,
                         const pb::Message& group) {
  text += concat(indent, name, " {\n");
  const std::string outer_indent = indent, outer_prefix = prefix;
  indent += "  ";
  prefix += path + ".";
  add_message(group);
  indent = outer_indent;
  prefix = outer_prefix;
  text += indent + "}\n";
}

// A text without a default that nobody set is left out; so is a group that holds its own kind.
void Resolved::add_message(const pb::Message& message) {
  const pb::Reflection& reflection = *message.GetReflection();
  const pb::Descriptor& type = *message.GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const pb::FieldDescriptor& field = *type.field(i);
    const bool group = field.message_type() != nullptr;
    if (field.is_repeated()) {
      for (int k = 0; k < reflection.FieldSize(message, &field); ++k) {
        if (group)
          add_group(field.name(), concat(field.name(), "[", k, "]"),
                    reflection.GetRepeatedMessage(message, &field, k));
        else
          add(field.name(), value_text(message, field, k));
      }
    } else if (group) {
      if (reflection.HasField(message, &field) || field.message_type() != &type)
        add_group(field.name(), field.name(), reflection.GetMessage(message, &field));
    } else if (reflection.HasField(message, &field) || field.has_default_value() ||
               field.cpp_type() != pb::FieldDescriptor::CPPTYPE_STRING) {
      add(field.name(), value_text(message, field, -1));
    }
  }
}

std::string trimmed(const std::string& text) {
  std::string out;  // one line, single blanks
  for (char c : text) {
    const bool blank = std::isspace(uint8_t(c));
    if (!blank) out += c;
    else if (!out.empty() && out.back() != ' ') out += ' ';
  }
  while (!out.empty() && out.back() == ' ') out.pop_back();
  return out;
}

template <class Descriptor>
std::string comment_of(const Descriptor& descriptor) {
  pb::SourceLocation location;
  if (!descriptor.GetSourceLocation(&location)) return "";
  return trimmed(location.leading_comments + " " + location.trailing_comments);
}

// A schema that knows its comments.
struct Schema {
  pb::DescriptorPool pool;
  pb::DynamicMessageFactory factory;
  const pb::Descriptor* root;

  Schema(std::string_view descriptors, const std::string& name) {
    pb::FileDescriptorSet set;
    check(set.ParseFromArray(descriptors.data(), int(descriptors.size())),
          "the embedded descriptors are no FileDescriptorSet; build again");
    for (const auto& file : set.file())
      check(pool.BuildFile(file) != nullptr, "the embedded descriptors of ", file.name(),
            " do not fit the others; build again");
    root = pool.FindMessageTypeByName(name);
    check(root != nullptr, "the embedded descriptors do not know ", name);
  }

  std::string default_of(const pb::FieldDescriptor& field) {
    if (field.is_repeated()) return "(none)";
    if (field.cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING && !field.has_default_value())
      return "(none)";
    return value_text(*factory.GetPrototype(field.containing_type()), field, -1);
  }
};

std::string type_of(const pb::FieldDescriptor& field) {
  using F = pb::FieldDescriptor;
  std::string name;
  switch (field.cpp_type()) {
    case F::CPPTYPE_FLOAT:
    case F::CPPTYPE_DOUBLE: name = "number"; break;
    case F::CPPTYPE_BOOL: name = "true or false"; break;
    case F::CPPTYPE_STRING: name = "text"; break;
    case F::CPPTYPE_ENUM:
      for (int i = 0; i < field.enum_type()->value_count(); ++i)
        name += (i ? ", " : "") + field.enum_type()->value(i)->name();
      break;
    default: name = "whole number";
  }
  return field.is_repeated() ? "list of " + name : name;
}

// "0 to 4096 tokens", or what else may stand there.
std::string values_of(const pb::FieldDescriptor& field) {
  const std::string range = range_text(field);
  const std::string unit = field.options().GetExtension(moemamba::unit);
  std::string text = type_of(field);
  if (!range.empty()) text += ", " + range;
  if (!unit.empty()) text += (range.empty() ? ", " : " ") + unit;
  return text;
}

// Its comment, and those of an enum's values.
std::string meaning_of(const pb::FieldDescriptor& field) {
  std::string text = comment_of(field);
  if (!field.enum_type()) return text;
  for (int i = 0; i < field.enum_type()->value_count(); ++i) {
    const auto& value = *field.enum_type()->value(i);
    const std::string comment = comment_of(value);
    if (!comment.empty()) text += concat(" ", value.name(), ": ", comment, ".");
  }
  return text;
}

std::string in_table(const std::string& text) {
  std::string out;
  for (char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

void write_page(Schema& schema, const pb::Descriptor& message, const std::string& prefix,
                std::string& out) {
  out += concat("\n## ", prefix.empty() ? "Run" : prefix.substr(0, prefix.size() - 1), "\n\n",
                comment_of(message), "\n\n| setting | default | values | meaning |\n",
                "|---|---|---|---|\n");
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (!field.message_type())
      out += concat("| `", prefix, field.name(), "` | ", in_table(schema.default_of(field)), " | ",
                    in_table(values_of(field)), " | ", in_table(meaning_of(field)), " |\n");
  }
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (field.message_type() && field.message_type() != &message)
      write_page(schema, *field.message_type(), prefix + field.name() + ".", out);
  }
}

// `text` in lines of at most 90 characters behind `indent`.
std::string wrapped(const std::string& text, const std::string& indent) {
  std::istringstream words(text);
  std::string word, line = indent, out;
  while (words >> word) {
    if (line.size() > indent.size() && line.size() + 1 + word.size() > 90) {
      out += line + "\n";
      line = indent;
    }
    line += (line.size() > indent.size() ? " " : "") + word;
  }
  return line.size() > indent.size() ? out + line + "\n" : out;
}

void write_help(Schema& schema, const pb::Descriptor& message, const std::string& prefix,
                std::string& out) {
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (!field.message_type())
      out += concat("  --", prefix, field.name(), "=", schema.default_of(field), "  (",
                    values_of(field), ")\n", wrapped(meaning_of(field), "        "));
  }
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (!field.message_type() || field.message_type() == &message) continue;
    out += "\n" + wrapped(comment_of(*field.message_type()), "");
    write_help(schema, *field.message_type(), prefix + field.name() + ".", out);
  }
}

}  // namespace

std::string resolved_text(const pb::Message& message) {
  Resolved resolved;
  resolved.add_message(message);
  return resolved.text;
}

std::vector<std::pair<std::string, std::string>> resolved_values(const pb::Message& message) {
  Resolved resolved;
  resolved.add_message(message);
  return resolved.values;
}

std::string reference_page(std::string_view descriptors, const std::string& message) {
  Schema schema(descriptors, message);
  std::string out =
      "# Settings\n\nWritten by `moemamba settings`; a test compares the two. Give a setting in a"
      " file (`--config FILE`,\nprotobuf text format, repeatable: later files win and replace"
      " lists) or as an option\n(`--model.experts=32`), which wins over files.\n";
  write_page(schema, *schema.root, "", out);
  return out;
}

std::string settings_help(std::string_view descriptors, const std::string& message) {
  Schema schema(descriptors, message);
  std::string out;
  write_help(schema, *schema.root, "", out);
  return out;
}

}  // namespace moemamba
