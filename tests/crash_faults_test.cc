// P4 errors of the disk are contained, P5 a failed sync is final, P6 a full disk, P20 runs go on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <map>
#include <thread>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/soak.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"

namespace {

// What the next system calls of this process meet. The calls below are this program's own versions
// of those in libc: the real one, or the error that is due.
struct Injection {
  std::atomic<bool> armed = false;
  std::atomic<int64_t> calls = 0, at = 0;
  std::atomic<int> error = 0;  // 0: a short write
  std::atomic<bool> sticky = false;
  std::atomic<std::thread::id> subject;  // calls of other threads are real
  std::atomic<int64_t> direct = 0, refused_direct = 0;  // its writes past the page cache, due ones
  bool concerns() const { return armed && subject.load() == std::this_thread::get_id(); }
};
Injection injection;

// Whether this call meets the fault.
bool due() {
  if (!injection.concerns()) return false;
  const int64_t call = injection.calls++;
  return injection.sticky ? call >= injection.at : call == injection.at;
}
bool fails() {
  if (!due() || injection.error == 0) return false;
  errno = injection.error;
  return true;
}

}  // namespace

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#pragma GCC visibility push(default)
extern "C" {
ssize_t write(int fd, const void* data, size_t bytes) {
  if (injection.concerns()) {
    const bool now = due(), direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    injection.direct += direct;
    injection.refused_direct += direct && now;
    if (now && injection.error != 0) return errno = injection.error, -1;
    if (now) bytes = (bytes + 1) / 2;
  }
  return syscall(SYS_write, fd, data, bytes);
}
int fsync(int fd) {
  return fails() ? -1 : int(syscall(SYS_fsync, fd));
}
int ftruncate(int fd, off_t bytes) noexcept {
  return fails() ? -1 : int(syscall(SYS_ftruncate, fd, bytes));
}
int open(const char* path, int flags, ...) {
  if ((flags & O_ACCMODE) != O_RDONLY && fails()) return -1;
  return int(syscall(SYS_openat, AT_FDCWD, path, flags, 0666));
}
int open64(const char* path, int flags, ...) {
  if ((flags & O_ACCMODE) != O_RDONLY && fails()) return -1;
  return int(syscall(SYS_openat, AT_FDCWD, path, flags, 0666));
}
int mkdir(const char* path, mode_t mode) noexcept {
  return fails() ? -1 : int(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}
int renameat2(int from_fd, const char* from, int to_fd, const char* to, unsigned flags) noexcept {
  return fails() ? -1 : int(syscall(SYS_renameat2, from_fd, from, to_fd, to, flags));
}
int rename(const char* from, const char* to) noexcept {
  return fails() ? -1 : int(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
int remove(const char* path) noexcept {
  if (fails()) return -1;
  const int done = int(syscall(SYS_unlinkat, AT_FDCWD, path, 0));
  if (done != 0 && (errno == EISDIR || errno == EPERM))
    return int(syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
  return done;
}
}
#pragma GCC visibility pop
#endif

namespace moemamba {
namespace {

namespace fs = std::filesystem;

void new_run(const std::string& run, StateSize size = StateSize::tiny) {
  fs::remove_all(run);
  fs::create_directories(run);
  write_file(plain_disk(), run + "/config.textproto", "train { steps: 9 }\n");
  ASSERT_EQ(save({.run = run, .step = 1, .generation = 0, .size = size})[0], "");
}

// A save of step 2 met a fault: one verdict; old or new is there, whole; step 3 can be saved.
void expect_contained(const std::string& run, const std::vector<std::string>& verdicts,
                      StateSize size = StateSize::tiny) {
  for (const std::string& verdict : verdicts) EXPECT_EQ(verdict, verdicts[0]);
  const int64_t found = loaded_step(run, 1, nullptr, size);
  EXPECT_TRUE(found == 2 || (found == 1 && !verdicts[0].empty()))
      << found << " \"" << verdicts[0] << "\"";
  EXPECT_EQ(save({.run = run, .step = 3, .generation = 1, .size = size})[0], "");
  EXPECT_EQ(loaded_step(run, 2, nullptr, size), 3);
}

struct Fault {
  const char* name;
  int error;  // 0: a short write
};
constexpr Fault kFaults[] = {{"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT},
                             {"EROFS", EROFS},   {"ESTALE", ESTALE}, {"EINTR", EINTR},
                             {"EINVAL", EINVAL}, {"EFAULT", EFAULT}, {"short", 0}};

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
bool can_be_direct(const std::string& folder) {
  const std::string path = folder + "/direct";
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_DIRECT, 0600);
  if (file >= 0) close(file);
  fs::remove(path);
  return file >= 0;
}

// Every system call of one rank's part of a save, each with every error.
TEST(DiskError, AtAnySystemCallIsContained) {
  MemoryFolder folder("crash-faults");
  const std::string run = folder / "run";
  int64_t cases = 0, kept = 0, at_values = 0;
  injection.direct = injection.refused_direct = 0;
  // Values past the page cache where the file system can do that, and through it, in parts of
  // blocks.
  for (const auto& [size, block] :
       {std::pair(StateSize::large, 8 * kDirectBlock), {StateSize::tiny, kDirectBlock / 8}})
    for (const Fault& fault : kFaults)
      for (int victim : {0, 1})
        for (bool sticky : {false, true}) {
          if (sticky && soak_seconds() == 0 && fault.error != ENOSPC) continue;
          if (sticky && fault.error == EINTR) continue;  // no signal interrupts for ever
          for (int64_t at = 0; at < 400 && !HasFailure(); ++at, ++cases) {
            SCOPED_TRACE(concat(fault.name, " at call ", at, " of rank ", victim,
                                sticky ? " and all later ones" : "",
                                size == StateSize::large ? ", large" : ""));
            new_run(run, size);
            injection.calls = 0, injection.at = at, injection.error = fault.error;
            injection.sticky = sticky;
            const auto disks = [&](int rank) -> FileSystem& {
              if (rank == victim) injection.subject = std::this_thread::get_id();
              injection.armed = true;
              return plain_disk();
            };
            const auto verdicts =
                save({.run = run, .step = 2, .disks = disks, .block_bytes = block, .size = size});
            injection.armed = false;
            const bool reached = injection.calls > at;
            EXPECT_TRUE((reached && fault.error != 0) || verdicts[0].empty()) << verdicts[0];
            if (reached && fault.error == EINTR && verdicts[0].empty()) ++kept;
            expect_contained(run, verdicts, size);
            EXPECT_EQ(shards_on_borders(run), size == StateSize::large ? 6 : 0);
            if (size == StateSize::large) at_values = injection.refused_direct;
            if (!reached) break;
          }
        }
  EXPECT_GT(cases, 300);
  if (can_be_direct(folder.path()))
    EXPECT_GT(at_values, 100) << "of " << injection.direct << " direct writes";
  else
    std::printf("skipped: direct writes, which this file system has not\n");
  EXPECT_GT(kept, 0) << "no interrupted write went on";
  std::printf(
      "P4: %lld faults at system calls (%lld at direct writes; %lld interrupted ones went on)\n",
      static_cast<long long>(cases), static_cast<long long>(at_values),
      static_cast<long long>(kept));
}
#endif

// Every call of the seam, also those whose failure the system only pretends (close).
TEST(DiskError, AtAnyCallOfTheSeamIsContained) {
  MemoryFolder folder("crash-faults");
  const std::string run = folder / "run";
  int64_t cases = 0;
  for (bool renames_new : {true, false})
    for (int victim : {0, 1})
      for (bool sticky : {false, true}) {
        bool reached = true;
        for (int64_t at = 0; reached && at < 400 && !HasFailure(); ++at, ++cases) {
          SCOPED_TRACE(concat("call ", at, " of rank ", victim, sticky ? " and all later" : "",
                              renames_new ? "" : ", by links"));
          new_run(run);
          reached = false;
          int64_t calls = 0;
          SeamFiles bad, good;
          bad.renames_new = good.renames_new = renames_new;
          bad.before = [&](FileCall& call) {
            const bool now = sticky ? calls >= at : calls == at;
            ++calls;
            reached |= now;
            if (now && call.what == Call::write) call.bytes /= 2;  // half of it is written
            check(!now || call.what == Call::write, call.path, ": no space left (injected)");
            return true;
          };
          bad.after = [&](const FileCall& call) {
            check(call.what != Call::write || !(sticky ? calls > at : calls == at + 1), call.path,
                  ": no space left (injected)");
          };
          expect_contained(run, save({.run = run, .step = 2, .disks = [&](int rank) -> FileSystem& {
                                        return rank == victim ? bad : good;
                                      }}));
        }
      }
  std::printf("P4: %lld faults at calls of the seam\n", static_cast<long long>(cases));
}

// A sync that failed has told all there is to tell: the next one would say "fine" of lost bytes.
TEST(DiskError, OfASyncIsFinalForTheAttempt) {
  MemoryFolder folder("crash-faults");
  const std::string run = folder / "run";
  int64_t cases = 0;
  for (int victim : {0, 1})
    for (int64_t nth = 0; nth < 50; ++nth) {
      new_run(run);
      int64_t syncs = 0;
      std::string failed;
      bool again = false, used = false;
      SeamFiles bad, good;
      bad.before = [&](FileCall& call) {
        const bool is_sync = call.what == Call::sync || call.what == Call::sync_folder;
        used |= call.what == Call::rename_new && !failed.empty();
        if (!is_sync) return true;
        again |= call.path == failed;
        if (syncs++ != nth) return true;
        failed = call.path;
        throw Error(call.path + ": cannot sync: Input/output error (injected)");
      };
      const auto verdicts = save({.run = run, .step = 2, .disks = [&](int rank) -> FileSystem& {
                                    return rank == victim ? bad : good;
                                  }});
      if (failed.empty()) break;
      ++cases;
      EXPECT_FALSE(again) << "synced again: " << failed;
      EXPECT_FALSE(used) << "committed though a sync had failed: " << failed;
      EXPECT_NE(verdicts[0].find("Input/output error"), std::string::npos) << verdicts[0];
      expect_contained(run, verdicts);
    }
  EXPECT_GE(cases, 8);
  std::printf("P5: %lld failed syncs\n", static_cast<long long>(cases));
}

// A disk whose sync number `nth` of files fails once and drops what it had not written yet, as
// Linux does: the pages count as clean from then on, and the next sync says "fine".
class ForgetfulFiles : public SeamFiles {
 public:
  explicit ForgetfulFiles(int64_t nth) {
    before = [this, nth](FileCall& call) {
      if (call.what != Call::sync || syncs++ != nth) return true;
      fs::resize_file(call.path, 0);
      failed = call.path;
      throw Error(call.path + ": cannot sync: Input/output error (injected)");
    };
  }
  int64_t syncs = 0;
  std::string failed;
};

// What a writer must not be: one that tries a failed sync again and believes the second answer, or
// does not look how many bytes a write took.
class CarelessFiles : public FileSystem {
 public:
  explicit CarelessFiles(FileSystem& disk) : disk_(disk) {}
  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override {
    return std::make_unique<File>(disk_.open(path, mode));
  }
  void rename(const std::string& from, const std::string& to) override { disk_.rename(from, to); }
  void remove(const std::string& path) override { disk_.remove(path); }
  void make_folders(const std::string& path) override { disk_.make_folders(path); }
  void sync_folder(const std::string& path) override { disk_.sync_folder(path); }
  void make_folder(const std::string& path) override { disk_.make_folder(path); }
  bool rename_new(const std::string& from, const std::string& to) override {
    return disk_.rename_new(from, to);
  }
  void link(const std::string& from, const std::string& to) override { disk_.link(from, to); }
  int64_t free_bytes(const std::string& path) override { return disk_.free_bytes(path); }

 private:
  class File : public OutputFile {
   public:
    explicit File(std::unique_ptr<OutputFile> file) : file_(std::move(file)) {}
    void write(const void* data, size_t bytes) override {
      try {
        file_->write(data, bytes);
      } catch (const Error&) {  // a part of it
      }
    }
    void write_at(int64_t offset, const void* data, size_t bytes) override {
      file_->write_at(offset, data, bytes);
    }
    void truncate(int64_t bytes) override { file_->truncate(bytes); }
    void sync() override {
      try {
        file_->sync();
      } catch (const Error&) {
        file_->sync();
      }
    }
    void close() override { file_->close(); }

   private:
    std::unique_ptr<OutputFile> file_;
  };
  FileSystem& disk_;
};

// The test of the test above: a writer that syncs again says "saved" of what is lost.
TEST(DiskError, OfASyncIsFatalWhereItIsTriedAgain) {
  MemoryFolder folder("crash-faults");
  const std::string run = folder / "run";
  int64_t syncs = 0, lost = 0, contained = 0;
  for (bool careless : {false, true})
    for (int victim : {0, 1})
      for (int64_t nth = 0; nth < 50; ++nth) {
        SCOPED_TRACE(concat("sync ", nth, " of rank ", victim, careless ? ", tried again" : ""));
        new_run(run);
        ForgetfulFiles bad(nth);
        CarelessFiles tries_again(bad);
        const auto verdicts = save({.run = run, .step = 2, .disks = [&](int rank) -> FileSystem& {
                                      if (rank != victim) return plain_disk();
                                      return careless ? static_cast<FileSystem&>(tries_again) : bad;
                                    }});
        if (bad.failed.empty()) break;
        const int64_t found = loaded_step(run, 1);
        if (careless) {
          ++syncs;
          lost += verdicts[0].empty() && found != 2;
          EXPECT_EQ(verdicts[0], "");
          EXPECT_NE(found, 2) << "not noticed: a second sync of " << bad.failed;
        } else {
          ++contained;
          EXPECT_NE(verdicts[0].find("Input/output error"), std::string::npos) << verdicts[0];
          EXPECT_EQ(found, 1);
        }
      }
  EXPECT_GE(syncs, 6);
  EXPECT_EQ(contained, syncs);
  std::printf("P5: %lld failed syncs that drop data; a writer that tries again loses %lld\n",
              static_cast<long long>(contained), static_cast<long long>(lost));
}

// Saves fail for a while, then the disk is repaired. Returns the lines said.
std::vector<std::string> troubled_saves(const std::string& run, bool asynchronous, int64_t bad_from,
                                        int64_t bad_to, int64_t last, int64_t max_failed,
                                        int64_t& failed) {
  std::vector<std::string> said;
  in_world(RankLayout(2, 2, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups);
    SeamFiles files;
    std::atomic<bool> bad = false;
    files.before = [&](FileCall& call) {
      check(!bad, call.path, ": no space left (injected)");
      return true;
    };
    Checkpoints checkpoints(files, groups, holder.store,
                            {.writer = {.run = run, .generation = 1, .may_write = {}},
                             .asynchronous = asynchronous,
                             .retention = {},
                             .max_failed = max_failed,
                             .say = [&](const std::string& text) { said.push_back(text); }});
    for (int64_t step = 1; step <= last; ++step) {
      checkpoints.finish();
      bad = step >= bad_from && step <= bad_to && groups.rank == 1;
      holder.fill(uint64_t(step));
      checkpoints.save(facts_of(step));
      holder.fill(777);  // the next step changes all that is being saved
    }
    checkpoints.finish();
    if (groups.rank == 0) failed = checkpoints.failed();
  });
  return said;
}

TEST(DiskError, OfManySavesIsCountedAndSaidAndTheRunGoesOn) {
  for (bool asynchronous : {false, true}) {
    MemoryFolder folder("crash-faults");
    const std::string run = folder / "run";
    int64_t failed = 0;
    const auto said = troubled_saves(run, asynchronous, 3, 12, 14, 11, failed);
    EXPECT_EQ(failed, 10);
    ASSERT_EQ(said.size(), 14u);
    EXPECT_NE(said[2].find("NOT saved  after step 3"), std::string::npos) << said[2];
    EXPECT_NE(said[11].find("10 failed so far"), std::string::npos) << said[11];
    EXPECT_EQ(said[13].find("NOT"), std::string::npos) << said[13];
    EXPECT_EQ(loaded_step(run), 14);
    EXPECT_EQ(list_checkpoints(run).size(), 2u);
  }
  std::printf("P20: 2 x 10 failing saves, then repaired\n");
}

TEST(DiskError, OfTooManySavesInARowEndsTheRun) {
  for (bool asynchronous : {false, true}) {
    MemoryFolder folder("crash-faults");
    const std::string run = folder / "run";
    int64_t failed = 0;
    const std::string end =
        message_of([&] { troubled_saves(run, asynchronous, 3, 99, 14, 4, failed); });
    EXPECT_NE(end.find("4 saves in a row failed (checkpoint.max_failed_saves)"), std::string::npos)
        << end;
    EXPECT_EQ(loaded_step(run), 2);
  }
}

class SmallDisk {
 public:
  explicit SmallDisk(const std::string& path) : path_(path) {
    fs::create_directories(path);
    mounted_ = mount("tmpfs", path.c_str(), "tmpfs", 0, "size=4k") == 0;
  }
  ~SmallDisk() {
    if (mounted_) umount2(path_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }
  void resize(int64_t bytes) {
    const std::string size = "size=" + std::to_string(bytes);
    ASSERT_EQ(mount("tmpfs", path_.c_str(), "tmpfs", MS_REMOUNT, size.c_str()), 0);
  }

 private:
  std::string path_;
  bool mounted_ = false;
};

// The disk's room is `pages` beside what is there; `lies`: it says that there is much, so that it
// fills up in the middle.
TEST(DiskError, OfAFullDiskLetsTrainingGoOnWhateverItsSize) {
  MemoryFolder folder("crash-faults");
  SmallDisk disk(folder / "disk");
  if (!disk.mounted())
    GTEST_SKIP() << "no right to mount a tmpfs: " << std::generic_category().message(errno);
  struct Liar : PosixFileSystem {
    int64_t free_bytes(const std::string&) override { return int64_t{1} << 40; }
  } liar;
  const std::string run = folder / "disk/run";
  int64_t cases = 0, failed_first = 0, saved_first = 0;
  // Of the large one, blocks that go past the page cache: so many at once that few sizes will do.
  for (auto [size, lies] : {std::pair(StateSize::tiny, false),
                            {StateSize::tiny, true},
                            {StateSize::large, false},
                            {StateSize::large, true}}) {
    int64_t fine = 0;
    for (int64_t pages = 0; fine < 3; pages += size == StateSize::large ? 7 : 1, ++cases) {
      ASSERT_LT(pages, 300);
      SCOPED_TRACE(concat(pages, " pages", lies ? ", unforeseen" : "",
                          size == StateSize::large ? ", large" : ""));
      disk.resize(8 << 20);
      new_run(run, size);
      struct statvfs about {};
      ASSERT_EQ(statvfs(run.c_str(), &about), 0);
      disk.resize((int64_t(about.f_blocks - about.f_bfree) + pages) * int64_t(about.f_frsize));
      const auto disks = [&, lies = lies](int) -> FileSystem& {
        return lies ? liar : plain_disk();
      };
      const auto verdicts = save({.run = run, .step = 2, .disks = disks, .size = size});
      verdicts[0].empty() ? ++saved_first, ++fine : ++failed_first;
      EXPECT_TRUE(lies || verdicts[0].empty() ||
                  verdicts[0].find("the disk has") != std::string::npos)
          << verdicts[0];
      EXPECT_EQ(loaded_step(run, 1, nullptr, size), verdicts[0].empty() ? 2 : 1);
      disk.resize(8 << 20);
      expect_contained(run, verdicts, size);
      EXPECT_EQ(shards_on_borders(run), size == StateSize::large ? 6 : 0);
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(failed_first, 20);
  std::printf("P6: %lld sizes of a disk in steps of 4 and 28 KiB, %lld too small for the save\n",
              static_cast<long long>(cases), static_cast<long long>(failed_first));
}

// The test of the test above: a writer that does not look how much of a write was taken says
// "saved" of what a full disk has cut off.
TEST(DiskError, OfAFullDiskIsFatalWhereShortWritesAreTaken) {
  MemoryFolder folder("crash-faults");
  SmallDisk disk(folder / "disk");
  if (!disk.mounted())
    GTEST_SKIP() << "no right to mount a tmpfs: " << std::generic_category().message(errno);
  struct Liar : PosixFileSystem {
    int64_t free_bytes(const std::string&) override { return int64_t{1} << 40; }
  } liar;
  CarelessFiles careless(liar);
  const std::string run = folder / "disk/run";
  int64_t sizes = 0, lost = 0;
  for (int64_t pages = 0; pages < 24; ++pages, ++sizes) {
    disk.resize(8 << 20);
    new_run(run);
    struct statvfs about {};
    ASSERT_EQ(statvfs(run.c_str(), &about), 0);
    disk.resize((int64_t(about.f_blocks - about.f_bfree) + pages) * int64_t(about.f_frsize));
    const auto verdicts =
        save({.run = run, .step = 2, .disks = [&](int) -> FileSystem& { return careless; }});
    lost += verdicts[0].empty() && loaded_step(run, 1) != 2;
  }
  EXPECT_GT(lost, 0) << "not noticed: short writes";
  std::printf("P6: %lld sizes of a disk; a writer that takes short writes loses %lld saves\n",
              static_cast<long long>(sizes), static_cast<long long>(lost));
}

// The same with steps of a real training around the saves: they are those of an undisturbed one.
TEST(DiskError, OfAFullDiskDoesNotChangeTheSteps) {
  MemoryFolder folder("crash-faults");
  SmallDisk disk(folder / "disk");
  if (!disk.mounted())
    GTEST_SKIP() << "no right to mount a tmpfs: " << std::generic_category().message(errno);
  const TrainerOptions options = trainer_options({.experts = 3, .steps = 6});
  std::vector<double> quiet, troubled;
  int64_t failed = 0;
  for (bool full : {false, true})
    in_world(RankLayout(2, 2, 3), [&](ProcessGroups& groups) {
      Trainer trainer(groups, options);
      PosixFileSystem files;
      const std::string run = full ? folder / "disk/run" : folder / "run";
      Checkpoints checkpoints(files, groups, trainer.session().store,
                              {.writer = {.run = run, .generation = 1, .may_write = {}},
                               .asynchronous = true,
                               .retention = {},
                               .max_failed = 9,
                               .say = {}});
      for (int64_t k = 0; k < 6; ++k) {
        const double loss = trainer.step(k).loss;
        trainer.wait_weights();
        checkpoints.finish();
        if (groups.rank == 0) (full ? troubled : quiet).push_back(loss);
        if (groups.rank == 0 && full && k == 4) disk.resize(16 << 20);
        checkpoints.save(facts_of(k + 1));
      }
      checkpoints.finish();
      if (groups.rank == 0 && full) failed = checkpoints.failed();
      EXPECT_TRUE(groups.rank != 0 || list_checkpoints(run)[0].step == 6);
    });
  EXPECT_EQ(quiet, troubled);
  EXPECT_EQ(failed, 4);
}

}  // namespace
}  // namespace moemamba
