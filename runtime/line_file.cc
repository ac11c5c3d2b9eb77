#include "runtime/line_file.h"

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace moemamba {

namespace {

int64_t size_of_file(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? 0 : int64_t(size);
}

}  // namespace

LineFile::LineFile(FileSystem& files, std::string path, std::string what)
    : files_(files), path_(std::move(path)), what_(std::move(what)) {
  open();
}

void LineFile::open() {
  file_ = files_.open(path_, OpenMode::append);
  bytes_ = size_of_file(path_);
  torn_ = false;
}

void LineFile::add(const char* line, size_t length) {
  try {
    if (torn_) file_->truncate(bytes_);
    torn_ = true;
    file_->write(line, length);
    torn_ = false;
    bytes_ += int64_t(length);
  } catch (const Error& error) {
    if (++lost_lines_ == 1)  // said once
      std::fprintf(stderr, "%s: %s; training goes on without these lines\n", what_.c_str(),
                   error.what());
    drop_torn_line();
  }
}

void LineFile::drop_torn_line() {
  try {
    file_->truncate(bytes_);
    torn_ = false;
  } catch (const Error&) {  // the next line tries again
  }
}

void LineFile::cut(int64_t step) {
  file_.reset();
  cut_lines(files_, path_, step);
  open();
}

void cut_lines(FileSystem& files, const std::string& path, int64_t step) {
  if (!file_exists(path)) return;
  const std::string content = read_file(path);
  std::string kept;
  for (size_t begin = 0, end = 0; (end = content.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    const std::string line = content.substr(begin, end + 1 - begin);
    const auto row = nlohmann::json::parse(line, nullptr, false);
    if (row.is_object() && row.contains("step") && row["step"].is_number_integer() &&
        row["step"].get<int64_t>() < step)
      kept += line;
  }
  if (kept != content) write_file(files, path, kept);
}

}  // namespace moemamba
