#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/support/processes.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {

// How often `part` occurs in `text`.
int count(const std::string& text, const std::string& part);

// The numbers of one field ("loss") of metrics.jsonl, a line each.
std::vector<double> numbers_of(const std::string& metrics, const std::string& field);

// Tests that run the binary of this build as a user does: messages, exit codes, what it leaves.
class ProgramTest : public testing::Test {
 protected:
  struct Result {
    int code;  // -1: ended by a signal
    std::string out, err;
  };
  // `command` is for the shell; $moemamba is the program, $mpirun starts it as root and with more
  // ranks than cores. The test's own folder is the working directory.
  Result shell(const std::string& command) const;

  std::string operator/(const std::string& name) const { return folder_ / name; }
  std::string put(const std::string& name, const std::string& text) const {
    return folder_.put(name, text);
  }
  // Token files of a small text in tokens/, and the words that make a training of seconds of it
  // into the folder run.
  std::string small_training(int64_t steps) const;
  std::string run() const { return folder_ / "run"; }

  // Starts an endless training with two ranks and `words`, calls `act` after its first steps, and
  // expects that all of its processes end within 20 s. Returns what the launcher left behind.
  Result while_training(const std::string& words, std::function<void(const Processes&)> act) const;

 private:
  TemporaryFolder folder_;
};

}  // namespace moemamba
