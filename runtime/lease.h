#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "core/file.h"

namespace moemamba {

// The right to write in a run's folder: files <run>/lease/GENERATION, of which the highest counts.
// Taking over is making the next one exclusively, so of several that try one succeeds. The owner
// counts upwards in its file while it lives; nobody reads a clock of somebody else's.
struct LeaseOwner {
  std::string host, boot_id;     // the latter with the namespace of its process numbers
  int64_t pid = 0, started = 0;  // the process and its start, in ticks since the boot
  bool released = false;
};

class Lease {
 public:
  struct Options {
    std::chrono::milliseconds lifetime{10000};  // silence after which an owner counts as gone
    // How long an owner elsewhere is watched for a sign of life before this one gives up.
    std::chrono::milliseconds patience{1500};
  };
  // Takes the lease, or throws an Error that names its owner: an owner of this boot whose process
  // is dead, and one that released it, are followed at once; one that shows signs of life within
  // `patience` is not; a silent one is followed after `lifetime`.
  Lease(FileSystem& files, std::string run, const Options& options);
  ~Lease();  // releases it
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  int64_t generation() const { return generation_; }
  // Takes the next one, without letting go of this one: who still works under it can write no more.
  // An Error where another has taken over.
  void advance();
  // Nobody has taken over. Reads the disk.
  bool ours() const;
  // Another has taken over, for certain: a folder that cannot be read says nothing of that.
  bool replaced() const;
  // Somebody has, as was seen at the latest beat. Reads nothing: for every step.
  bool lost() const { return lost_; }

 private:
  void take();
  void drop_older();
  void fence();  // what worked under older ones
  void release();
  void renew();
  void write(int64_t beats, bool released);

  FileSystem& files_;
  std::string run_;
  Options options_;
  int64_t generation_ = 0;
  std::unique_ptr<OutputFile> file_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ends_ = false;
  std::atomic<bool> lost_ = false;
  std::thread heart_;
};

// The highest generation in a run's folder; 0: none. For who works under the lease of another
// process, which tells it the generation.
int64_t newest_lease(const std::string& run);

// For messages: "process 123 on host" of a lease's file.
std::string describe(const LeaseOwner& owner);

}  // namespace moemamba
