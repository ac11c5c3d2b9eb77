#include "core/schema.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/schema_parts.h"
#include "core/schema_text.h"

namespace moemamba {

namespace pb = google::protobuf;

void Settings::read_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) {
    problems_.push_back(concat(path, ": is a folder; give the path of a settings file in it"));
    return;
  }
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  // An empty file inserts nothing, which also sets failbit on `text`: ask the file alone.
  if (file) text << file.rdbuf();
  if (!file || file.bad()) {
    problems_.push_back(concat(path, ": cannot be read (", std::strerror(errno),
                               "); is this the path of a settings file?"));
    return;
  }
  read_text(path, text.str());
}

void Settings::read_text(const std::string& name, std::string_view text) {
  TextReader(*this, name, text).read();
}

void Settings::read_option(const std::string& option) {
  const size_t equals = std::min(option.find('='), option.size());
  if (option.rfind("--", 0) != 0 || equals < 3 || option[2] == '-') {
    problems_.push_back(concat(option, ": expected an option like --model.experts=32"));
    return;
  }
  std::string path = option.substr(2, equals - 2);
  std::replace(path.begin(), path.end(), '-', '_');
  std::string wrong;
  if (equals == option.size())
    wrong = concat("needs a value: --", path, "=VALUE");
  else
    wrong = assign_option(path, option.substr(equals + 1));
  if (wrong.empty())
    places_[path] = option;
  else
    problems_.push_back(concat(option, ": ", wrong));
}

// "" or what is wrong.
std::string Settings::assign_option(const std::string& path, const std::string& value) {
  pb::Message* message = &target_;
  size_t begin = 0;
  for (;;) {
    const size_t dot = std::min(path.find('.', begin), path.size());
    const std::string name = path.substr(begin, dot - begin);
    const pb::FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
    if (!field)
      return no_such_setting(*target_.GetDescriptor(), *message->GetDescriptor(),
                             path.substr(0, begin), name, "--");
    const pb::Reflection& reflection = *message->GetReflection();
    if (dot == path.size()) {
      if (field->is_repeated() && option_lists_.insert(path).second)
        reflection.ClearField(message, field);
      return assign(*message, *field, Given{.value = value, .form = Given::option});
    }
    const std::string until = path.substr(0, dot);
    if (!field->message_type()) return concat("\"", until, "\" is one setting, not a group");
    if (field->is_repeated())
      return concat("\"", until, "\" is a list of groups; give it in a file");
    message = reflection.MutableMessage(message, field);
    begin = dot + 1;
  }
}

void Settings::object(const std::string& setting, const std::string& message) {
  const std::string place = place_of(setting);
  const bool option = place.rfind("--", 0) == 0;
  problems_.push_back(
      concat(place, place.empty() ? "" : ": ", option ? "" : setting + ": ", message));
}

std::string Settings::place_of(const std::string& setting) const {
  const auto found = places_.find(setting);
  return found == places_.end() ? "" : found->second;
}

void Settings::throw_problems() const {
  if (problems_.empty()) return;
  std::string all;
  for (const std::string& problem : problems_) all += (all.empty() ? "" : "\n") + problem;
  throw BadSettings(all);
}

}  // namespace moemamba
