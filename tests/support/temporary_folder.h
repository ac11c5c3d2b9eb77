#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "core/error.h"

namespace moemamba {

// An empty folder of one test, gone when it ends. A test that has several gives them suffixes.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& suffix = "") {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    const std::string name = std::string("moemamba-") + test->test_suite_name() + "-" +
                             test->name() + "-" + std::to_string(getpid()) + suffix;
    path_ = std::filesystem::temp_directory_path() / name;
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }

  std::string path() const { return path_.string(); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string put(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return *this / name;
  }

 private:
  std::filesystem::path path_;
};

// The message of the Error that `call` throws; fails (EXPECT) where it throws none.
template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "expected an Error";
  return {};
}

}  // namespace moemamba
