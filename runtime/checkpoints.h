#pragma once
#include <exception>
#include <thread>

#include "runtime/checkpoint_writer.h"

namespace moemamba {

// Saving during a run: at most one save is on its way behind the steps; failures are counted, and
// a run ends only after too many in a row. Every rank calls save() and finish() at the same steps.
class Checkpoints {
 public:
  struct Options {
    CheckpointWriter::Options writer;
    bool asynchronous = true;
    Retention retention;
    int64_t max_failed = 3;                       // saves in a row
    std::function<void(const std::string&)> say;  // rank 0, from the caller's thread
  };
  Checkpoints(FileSystem& files, ProcessGroups& groups, const ParameterStore& store,
              Options options);
  ~Checkpoints();  // waits; where an exception is on its way, the ranks are woken first

  // Values must be complete (Trainer::wait_weights). Returns when training may go on.
  void save(CheckpointFacts facts);
  void finish();                                       // no save is on its way any more
  int64_t failed() const { return failed_; }           // in all
  double blocked_seconds() const { return blocked_; }  // of the latest save()

 private:
  void work();
  void tidy();
  void conclude();

  FileSystem& files_;
  ProcessGroups& groups_;
  Options options_;
  CheckpointWriter writer_;
  CheckpointFacts facts_;
  std::thread thread_;
  bool running_ = false;
  std::string problem_, untidy_;
  std::exception_ptr error_;
  int64_t failed_ = 0, failed_in_a_row_ = 0;
  double blocked_ = 0, seconds_ = 0;
};

}  // namespace moemamba
