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

namespace {

constexpr size_t kMostProblems = 100;      // a binary file has no end of them
constexpr size_t kProblemBytes = 1 << 14;  // of all, about; those of a large group list its names
constexpr size_t kLargestFile = 1 << 20;   // bytes; the largest of ours has one in a thousand
constexpr size_t kLongestShown = 200;      // bytes of an option in a problem or a place

}  // namespace

void Settings::add_problem(std::string problem) {
  if (problems_.size() == kMostProblems || problem_bytes_ >= kProblemBytes) return;
  problem_bytes_ += problem.size();
  problems_.push_back(std::move(problem));
}

void Settings::read_file(const std::string& path) {
  if (std::filesystem::is_directory(path)) {
    add_problem(concat(path, ": is a folder; give the path of a settings file in it"));
    return;
  }
  std::ifstream file(path, std::ios::binary);
  std::string text;
  if (file) {
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);  // none of a pipe
    text.resize(error || size > kLargestFile ? kLargestFile + 1 : size_t(size) + 1);
    file.read(text.data(), std::streamsize(text.size()));
    text.resize(size_t(file.gcount()));
  }
  if (!file.eof() && !(file && text.size() > kLargestFile)) {
    add_problem(concat(path, ": cannot be read (", std::strerror(errno),
                       "); is this the path of a settings file?"));
    return;
  }
  if (text.size() > kLargestFile)
    return add_problem(concat(path, ": more than ", kLargestFile,
                              " bytes; is this the path of a settings file?"));
  read_text(path, text);
}

void Settings::read_text(const std::string& name, std::string_view text) {
  names_.push_back(name);
  TextReader(*this, name, text).read();
}

void Settings::read_option(const std::string& option) {
  const size_t equals = std::min(option.find('='), option.size());
  if (option.rfind("--", 0) != 0 || equals < 3 || option[2] == '-') {
    add_problem(concat(option.substr(0, kLongestShown),
                       ": expected an option like --model.experts=32"));
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
    places_[path] = {.option = option.substr(0, kLongestShown)};
  else
    add_problem(concat(option.substr(0, kLongestShown), ": ", wrong));
}

void Settings::clear_list(pb::Message& message, const pb::FieldDescriptor& list) {
  elements_ -= message.GetReflection()->FieldSize(message, &list);
  message.GetReflection()->ClearField(&message, &list);
}

// "" or what is wrong.
std::string Settings::assign_option(const std::string& path, std::string value) {
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
      const bool list = field->is_repeated();
      if (list && option_lists_.insert(path).second) clear_list(*message, *field);
      if (list && elements_ == kMostElements) return too_many_elements();
      elements_ += list;
      return assign(*message, *field, Given{.value = std::move(value), .form = Given::option});
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
  if (found == places_.end()) return "";
  const Place& place = found->second;
  if (place.reading == 0) return place.option;
  return concat(names_[place.reading - 1], ":", place.line, ":", place.column);
}

void Settings::throw_problems() const {
  if (problems_.empty()) return;
  std::string all;
  for (const std::string& problem : problems_) all += (all.empty() ? "" : "\n") + problem;
  throw BadSettings(all);
}

}  // namespace moemamba
