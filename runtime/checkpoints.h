#pragma once
#include <atomic>
#include <exception>
#include <thread>

#include "runtime/checkpoint_writer.h"

namespace moemamba {

// Saving during a run: at most one save is on its way behind the steps; failures are counted, and
// a run ends only after too many in a row, until lift_limit(). Every rank calls save() and finish()
// at the same steps. A checkpoint that is there is read again before older ones are deleted; one
// that does not hold counts as a failed save and is set aside.
class Checkpoints {
 public:
  struct Ended {
    int64_t step = 0;
    std::string problem;  // "": it is there
    double seconds = 0;   // from its step to its end, behind the steps for the most part
  };
  struct Options {
    CheckpointWriter::Options writer;
    bool asynchronous = true;
    bool verify = true;      // read each one again
    Retention retention;     // always: the newest that was read whole; see loaded()
    int64_t max_failed = 3;  // saves in a row
    // Rank 0, from the caller's thread: what became of a save. `warn`: of one that failed; empty:
    // as the others.
    std::function<void(const std::string&)> say, warn = {};
    // Rank 0, once for each save, and again for one that look_again() takes; empty: nobody.
    std::function<void(const Ended&)> on_end = {};
  };
  Checkpoints(FileSystem& files, ProcessGroups& groups, const ParameterStore& store,
              Options options);
  ~Checkpoints();  // waits; where an exception is on its way, the ranks are woken first

  // Values must be complete behind `compute` (Trainer::wait_weights; needed on a GPU). Returns when
  // training may go on, which must not change the state before the event is past.
  Event save(CheckpointFacts facts, Stream* compute = nullptr);
  void finish();  // no save is on its way any more
  // At the end of a run, of which more is to be kept than a checkpoint: failed saves, also those
  // before and one that is on its way, are now the caller's to judge. No more Errors for them.
  void lift_limit() { limited_ = false; }
  // Where the latest save was of this step and failed, its checkpoint may be there all the same: it
  // could not be read again, or set aside, or only the sync of its name failed. That is read once
  // more: one that holds counts as saved now; one that cannot be read stays, see unread(); any
  // other is set aside, so that the step can be saved anew. REQUIRES: no save is on its way.
  void look_again(int64_t step);
  // The latest save, of this step, is there, but nobody could read it.
  bool unread(int64_t step) const { return unread_ && facts_.step == step; }
  // The state is that of this step's checkpoint, which was read whole: it is the newest good one,
  // and stays until another one was. REQUIRES: no save is on its way.
  void loaded(int64_t step);
  // Says what became of the latest save, if it has ended. Between any steps, on this rank alone: it
  // waits for nobody.
  void announce();
  int64_t failed() const { return failed_; }  // in all, as far as announced
  // Step of the latest good one, saved or loaded, likewise; or -1.
  int64_t newest() const { return newest_; }
  // Why the latest save failed, likewise; "": it did not.
  const std::string& problem() const { return problem_; }
  double blocked_seconds() const { return blocked_; }  // of the latest save()

 private:
  void work();
  void check_is_ours(const std::string& path);
  std::string reread(bool may_be_anothers = false);
  std::string set_aside(const std::string& problem);
  void tidy();
  void tell();
  void conclude();

  FileSystem& files_;
  ProcessGroups& groups_;
  Options options_;
  CheckpointWriter writer_;
  CheckpointFacts facts_;
  std::thread thread_;
  bool running_ = false, told_ = false, limited_ = true, unread_ = false;
  std::atomic<bool> ended_ = false;  // what follows is the caller's to read
  std::string problem_, untidy_;
  std::exception_ptr error_;
  int64_t failed_ = 0, failed_in_a_row_ = 0, newest_ = -1;
  double blocked_ = 0, seconds_ = 0, reread_seconds_ = 0;
};

}  // namespace moemamba
