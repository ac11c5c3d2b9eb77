// P16 one writer, P17 a writer that lost its lease cannot commit.
#include "runtime/lease.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
void nap(int64_t ms) {
  std::this_thread::sleep_for(milliseconds(ms));
}

// 20 rounds, or 1,000 as far as there is time for them.
bool more_rounds(int done, Clock::time_point begun) {
  return done < 20 || (done < 1000 && since(begun) < double(soak_seconds()));
}

const std::string kOwnPid = "process " + std::to_string(getpid()) + " on ";

// Shared with children.
struct Board {
  std::atomic<int> ready, go, winners, losers, nameless, late, failures;
  std::atomic<int64_t> winner, generation;
};
struct SharedBoard {
  Board* board =
      new (mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
          Board{};
  ~SharedBoard() { munmap(board, sizeof(Board)); }
};

TEST(Lease, IsTakenByOneThreadOfMany) {
  std::mt19937_64 random(test_seed());
  int launches = 0, rounds = 0;
  for (const auto begun = Clock::now(); more_rounds(rounds, begun); ++rounds) {
    const int n = 2 + int(random() % 7);
    launches += n;
    MemoryFolder folder("lease");
    std::barrier start(n), all_tried(n);
    std::atomic<int> winners = 0;
    in_threads(n, [&](int) {
      start.arrive_and_wait();
      const auto from = Clock::now();
      std::unique_ptr<Lease> lease;
      try {
        lease = std::make_unique<Lease>(plain_disk(), folder / "run", Lease::Options{});
        ++winners;
        EXPECT_TRUE(lease->ours());
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(kOwnPid), std::string::npos) << error.what();
        EXPECT_LT(since(from), 2);
      }
      all_tried.arrive_and_wait();
    });
    EXPECT_EQ(winners, 1) << "round " << rounds << " of seed " << test_seed();
    if (HasFailure()) break;
  }
  std::printf("P16: %d rounds, %d launches as threads, seed %llu\n", rounds, launches,
              static_cast<unsigned long long>(test_seed()));
}

// One launch: waits for the others, tries, and says on the board how it went.
void compete(Board& board, int n, const std::string& run) {
  ++board.ready;
  while (!board.go) std::this_thread::yield();
  const auto from = Clock::now();
  std::string refusal;
  try {
    Lease lease(plain_disk(), run, Lease::Options{});
    board.winner = getpid();
    ++board.winners;
    while (board.winners + board.losers < n && since(from) < 15) nap(5);
    // Dies without a word in the end: its lease is not released.
    kill(getpid(), SIGKILL);
  } catch (const Error& error) {
    refusal = error.what();
  }
  if (since(from) > 2) ++board.late;
  ++board.losers;
  for (int i = 0; i < 400 && board.winner == 0; ++i) nap(5);
  if (refusal.find("process " + std::to_string(board.winner) + " on ") == std::string::npos) {
    std::fprintf(stderr, "%s\n", refusal.c_str());
    ++board.nameless;
  }
  _exit(0);
}

TEST(Lease, IsTakenByOneProcessOfMany) {
  std::mt19937_64 random(test_seed());
  int launches = 0, rounds = 0;
  MemoryFolder folder("lease");
  int dead_owners = 0;
  for (const auto begun = Clock::now(); more_rounds(rounds, begun) && !HasFailure(); ++rounds) {
    const int n = 2 + int(random() % 7);
    launches += n;
    // Every other round the folder is new; else the owners before are dead without a word.
    const std::string run = folder / ("run" + std::to_string(rounds / 2));
    dead_owners += rounds % 2;
    SharedBoard shared;
    std::fflush(nullptr);
    std::vector<pid_t> children;
    for (int i = 0; i < n; ++i) {
      const pid_t child = fork();
      if (child == 0) compete(*shared.board, n, run);
      children.push_back(child);
    }
    while (shared.board->ready < n) std::this_thread::yield();
    shared.board->go = 1;
    for (pid_t child : children) waitpid(child, nullptr, 0);
    EXPECT_EQ(shared.board->winners, 1) << "round " << rounds;
    EXPECT_EQ(shared.board->losers, n - 1);
    EXPECT_EQ(shared.board->late, 0);
    EXPECT_EQ(shared.board->nameless, 0);
  }
  std::printf("P16: %d rounds (%d with a dead owner before), %d launches as processes, seed %llu\n",
              rounds, dead_owners, launches, static_cast<unsigned long long>(test_seed()));
}

// Launches that take and leave at random: at most one has it at any time.
TEST(Lease, HasAtMostOneOwnerWhenManyComeAndGo) {
  MemoryFolder folder("lease");
  std::atomic<int> owners = 0, terms = 0, refusals = 0;
  const double seconds = soak_seconds() > 0 ? double(soak_seconds()) / 4 : 3;
  in_threads(6, [&](int t) {
    std::mt19937_64 random(test_seed() * 100 + uint64_t(t));
    for (const auto start = Clock::now(); since(start) < seconds;) {
      try {
        Lease lease(plain_disk(), folder / "run", Lease::Options{});
        EXPECT_EQ(++owners, 1);
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
        EXPECT_TRUE(lease.ours());
        --owners;
        ++terms;
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(kOwnPid), std::string::npos) << error.what();
        ++refusals;
      }
    }
  });
  EXPECT_GT(terms, 10);
  std::printf("P16: %d terms and %d refusals of six that come and go, seed %llu\n", terms.load(),
              refusals.load(), static_cast<unsigned long long>(test_seed()));
}

// A launch has seen that generation 1 is free to follow; before it does, two others have.
TEST(Lease, TakenTooLateIsGivenBack) {
  MemoryFolder folder("lease");
  const std::string run = folder / "run";
  { Lease first(plain_disk(), run, Lease::Options{}); }
  std::unique_ptr<Lease> third;
  SeamFiles slow;
  slow.before = [&](FileCall& call) {
    if (call.what != Call::open || third) return true;
    { Lease second(plain_disk(), run, Lease::Options{}); }
    third = std::make_unique<Lease>(plain_disk(), run, Lease::Options{});
    EXPECT_EQ(third->generation(), 3);
    return true;
  };
  EXPECT_NE(message_of([&] { Lease late(slow, run, Lease::Options{}); }).find(kOwnPid),
            std::string::npos);
  EXPECT_TRUE(third->ours());
}

TEST(Lease, OfADeadProcessOrAReleasedOneIsFollowedAtOnce) {
  MemoryFolder folder("lease");
  for (int i = 0; i < 10; ++i) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      Lease lease(plain_disk(), folder / "run", Lease::Options{});
      kill(getpid(), SIGKILL);
      pause();
    }
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    for (int again = 0; again < 2; ++again) {  // after a dead one, then after a released one
      const auto start = Clock::now();
      Lease lease(plain_disk(), folder / "run", Lease::Options{});
      EXPECT_LT(since(start), 0.5);
      EXPECT_EQ(lease.generation(), 3 * i + 2 + again);
    }
  }
  std::printf("P16: 10 dead owners and 10 released ones followed at once\n");
}

// Two containers of a host with one name, as MPI and NCCL like them: the owner's number is another
// process's here, or none's. It lives nevertheless, and its beats say so.
TEST(Lease, OfALivingOwnerAmongOtherProcessNumbersIsNotFollowed) {
  MemoryFolder folder("lease");
  SharedBoard shared;
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(CLONE_NEWPID | CLONE_NEWNS) != 0) _exit(77);
    const pid_t owner = fork();  // number 1 among those of its own
    if (owner == 0) {
      if (mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
          mount("proc", "/proc", "proc", 0, nullptr) != 0)
        _exit(77);
      Lease lease(plain_disk(), folder / "run", Lease::Options{});
      shared.board->ready = 1;
      for (int i = 0; i < 2000 && !shared.board->go; ++i) nap(5);
      shared.board->winners = lease.ours();
      _exit(0);
    }
    int status = 0;
    waitpid(owner, &status, 0);
    _exit(WEXITSTATUS(status));
  }
  int status = 0;
  while (shared.board->ready == 0 && waitpid(child, &status, WNOHANG) == 0) nap(5);
  if (shared.board->ready == 0)
    GTEST_SKIP() << "no right to a namespace of process numbers: exit code " << WEXITSTATUS(status);
  EXPECT_NE(message_of([&] { Lease second(plain_disk(), folder / "run", Lease::Options{}); })
                .find("process 1 on "),
            std::string::npos);
  shared.board->go = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(shared.board->winners, 1) << "a second launch has followed";
}

// A zombie is dead too: mpirun reaps late.
TEST(Lease, OfAZombieIsFollowedAtOnce) {
  MemoryFolder folder("lease");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    Lease lease(plain_disk(), folder / "run", Lease::Options{});
    kill(getpid(), SIGKILL);
    pause();
  }
  siginfo_t info{};
  ASSERT_EQ(waitid(P_PID, id_t(child), &info, WEXITED | WNOWAIT), 0);
  const auto start = Clock::now();
  { Lease lease(plain_disk(), folder / "run", Lease::Options{}); }
  EXPECT_LT(since(start), 0.5);
  waitpid(child, nullptr, 0);
}

// An owner on another host, or of another boot, is judged by its signs of life alone.
TEST(Lease, OfAnOwnerElsewhereIsFollowedAfterItsSilence) {
  MemoryFolder folder("lease");
  const Lease::Options options{.lifetime = milliseconds(600), .patience = milliseconds(200)};
  std::filesystem::create_directories(folder / "run/lease");
  std::string line = "elsewhere 00000000-0000-0000-0000-000000000000 17 4242 0 5";
  line.resize(511, ' ');
  std::ofstream(folder / "run/lease/00000007") << line << '\n';
  const auto start = Clock::now();
  Lease lease(plain_disk(), folder / "run", options);
  EXPECT_GE(since(start), 0.55);
  EXPECT_EQ(lease.generation(), 8);
}

TEST(Lease, GoesOnUnderTheNextGenerationWithoutLettingGo) {
  MemoryFolder folder("lease");
  const std::string run = folder / "run";
  {
    Lease lease(plain_disk(), run, {});
    const std::string attempt = join_path(checkpoints_folder(run), attempt_name(3, 1, 7));
    std::filesystem::create_directories(attempt);
    for (int64_t generation = 2; generation < 6; ++generation) {
      lease.advance();
      EXPECT_EQ(lease.generation(), generation);
      EXPECT_EQ(newest_lease(run), generation);
      EXPECT_FALSE(file_exists(attempt)) << "what worked under the one before can still write";
      try {
        Lease other(plain_disk(), run, {});
        ADD_FAILURE() << "two owners";
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(kOwnPid), std::string::npos) << error.what();
      }
    }
  }
  Lease next(plain_disk(), run, {});  // it was released as a whole
  EXPECT_EQ(next.generation(), 6);
  std::ofstream(join_path(run, "lease/00000009")) << "elsewhere boot 1 1 0 5\n";
  EXPECT_THROW(next.advance(), Error);
  EXPECT_EQ(next.generation(), 6);
}

// A disk that does not answer for a moment is no successor.
TEST(Lease, WhoseFolderCannotBeReadIsNotReplaced) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const Lease lease(files, folder / "run", {});
  std::filesystem::rename(folder / "run/lease", folder / "run/away");
  EXPECT_FALSE(lease.ours());
  EXPECT_FALSE(lease.replaced());
  std::filesystem::rename(folder / "run/away", folder / "run/lease");
  EXPECT_TRUE(lease.ours());
  folder.put("run/lease/99999999", "");
  EXPECT_FALSE(lease.ours());
  EXPECT_TRUE(lease.replaced());
}

TEST(Lease, NeedsNoClock) {
  // Times of files mean nothing, however they jump.
  MemoryFolder folder("lease");
  std::mt19937_64 random(test_seed());
  for (int i = 0; i < 5; ++i) {
    const auto start = Clock::now();
    Lease lease(plain_disk(), folder / "run", Lease::Options{});
    EXPECT_LT(since(start), 0.5);
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder / "run")) {
      const timespec when[2] = {{time_t(random() % (1ull << 32)), 0},
                                {time_t(random() % (1ull << 32)), 0}};
      EXPECT_EQ(utimensat(AT_FDCWD, entry.path().c_str(), when, 0), 0);
    }
    EXPECT_TRUE(lease.ours());
    EXPECT_NE(message_of([&] {
                Lease second(plain_disk(), folder / "run", Lease::Options{});
              }).find(kOwnPid),
              std::string::npos);
  }
  // And no source that decides about leases or checkpoints asks for the time of day.
  int sources = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(MOEMAMBA_SOURCE_DIR) + "/runtime")) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("lease", 0) != 0 && name.rfind("checkpoint", 0) != 0 &&
        name.rfind("run_folder", 0) != 0)
      continue;
    ++sources;
    const std::string text = read_file(entry.path().string());
    for (const char* clock : {"system_clock", "last_write_time", "time(nullptr)", "gettimeofday",
                              "CLOCK_REALTIME", "st_mtim", "file_clock"})
      EXPECT_EQ(text.find(clock), std::string::npos) << name << " asks for " << clock;
  }
  EXPECT_GT(sources, 8);
}

// The owner saves step 2 and is stopped at call `at` of rank 0; a second launch takes over and
// saves the same step, before the first goes on or after. Returns whether that was stopped.
bool stopped_owner(int64_t at, bool renames_new, bool saves_first, int64_t& committed_late) {
  MemoryFolder folder("lease-stop");
  const std::string run = folder / "run";
  const auto lifetime = milliseconds(80);
  std::filesystem::create_directories(run);
  write_file(plain_disk(), run + "/config.textproto", "train { steps: 9 }\n");
  EXPECT_EQ(save({.run = run, .step = 1, .generation = 0})[0], "");
  SharedBoard shared;
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    Lease lease(plain_disk(), run,
                {.lifetime = lifetime, .patience = lifetime});  // its own calls are not counted
    SeamFiles first, other;
    int64_t calls = 0;
    first.renames_new = renames_new;
    first.before = [&](FileCall&) {
      if (calls++ == at) raise(SIGSTOP);  // this thread stops here
      return true;
    };
    const auto verdicts =
        save({.run = run,
              .step = 2,
              .disks = [&](int r) -> FileSystem& { return r == 0 ? first : other; },
              .generation = lease.generation(),
              .may_write = [&] { return lease.ours(); }});
    shared.board->winners = verdicts[0].empty();
    shared.board->failures = verdicts[0] != verdicts[1];
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  if (!WIFSTOPPED(status)) {
    EXPECT_EQ(shared.board->winners, 1) << "nobody stopped it, but it did not save";
    return false;
  }
  int64_t found = 0;
  {
    Lease second(plain_disk(), run, {.lifetime = lifetime, .patience = lifetime});
    found = loaded_step(run, second.generation());
    EXPECT_TRUE(found == 1 || found == 2) << found;  // 2: stopped after its commit
    const auto save_next = [&] {
      EXPECT_EQ(save({.run = run,
                      .step = found + 1,
                      .generation = second.generation(),
                      .may_write = [&] { return second.ours(); }})[0],
                "");
    };
    if (saves_first) save_next();
    kill(child, SIGCONT);
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    EXPECT_TRUE(second.ours());
    if (!saves_first) save_next();
  }
  EXPECT_EQ(shared.board->failures, 0) << "two verdicts";
  // It may say "saved" only of what was there when the second launch looked.
  EXPECT_TRUE(!shared.board->winners || found == 2) << "a stale owner committed";
  committed_late += found == 2;
  EXPECT_EQ(loaded_step(run), found + 1);
  for (const CheckpointPlace& place : list_checkpoints(run))
    EXPECT_EQ(Checkpoint(place.path).manifest().facts().generation(), place.step <= 1       ? 0
                                                                      : place.step <= found ? 1
                                                                                            : 2)
        << place.path;
  return true;
}

TEST(Lease, ThatWasLostLetsNothingBeCommittedAtWhateverStepItsOwnerStood) {
  int64_t cases = 0, after_commit = 0;
  for (auto [renames_new, saves_first] : {std::pair{true, false}, {false, true}, {false, false}})
    for (int64_t at = 0; at < 300 && !HasFailure(); ++at, ++cases) {
      SCOPED_TRACE(concat(renames_new ? "rename" : "links", ", call ", at));
      if (!stopped_owner(at, renames_new, saves_first, after_commit)) break;
    }
  EXPECT_GT(cases, 40);
  EXPECT_GT(after_commit, 0);
  std::printf("P17: %lld owners stopped past their lease, %lld of them after their commit\n",
              static_cast<long long>(cases), static_cast<long long>(after_commit));
}

// The owner makes the run's first save, published by links, and is stopped at call `at`; a second
// launch takes over and dies before it saves; the first goes on, a third launch looks. Returns
// whether the first was stopped.
bool dying_successor(int64_t at, int64_t& published) {
  MemoryFolder folder("lease-half");
  const std::string run = folder / "run";
  const Lease::Options options{.lifetime = milliseconds(80), .patience = milliseconds(80)};
  SharedBoard shared;
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    Lease lease(plain_disk(), run, options);
    SeamFiles first;
    int64_t calls = 0;
    first.renames_new = false;
    first.before = [&](FileCall&) {
      if (calls++ == at) raise(SIGSTOP);
      return true;
    };
    const auto verdicts = save({.run = run,
                                .step = 1,
                                .disks = [&](int) -> FileSystem& { return first; },
                                .ranks = 1,
                                .expert = 1,
                                .generation = lease.generation(),
                                .may_write = {}});  // it has looked just before it was stopped
    shared.board->winners = verdicts[0].empty();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, WUNTRACED);
  if (!WIFSTOPPED(status)) return false;
  { const Lease second(plain_disk(), run, options); }
  kill(child, SIGCONT);
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  Lease third(plain_disk(), run, options);
  std::string why;
  const int64_t found = loaded_step(run, third.generation(), &why);
  EXPECT_EQ(found, shared.board->winners ? 1 : 0) << why;
  EXPECT_EQ(int64_t(list_checkpoints(run).size()), found) << "a half is left";
  published += found;
  EXPECT_EQ(save({.run = run, .step = found + 1, .generation = third.generation()})[0], "");
  EXPECT_EQ(loaded_step(run), found + 1);
  return true;
}

TEST(Lease, ThatWasLostLeavesNoHalfThoughItsSuccessorDiesBeforeItSaves) {
  int64_t cases = 0, published = 0;
  for (int64_t at = 0; at < 300 && !HasFailure(); ++at, ++cases) {
    SCOPED_TRACE(concat("call ", at));
    if (!dying_successor(at, published)) break;
  }
  EXPECT_GT(cases, 20);
  EXPECT_GT(published, 0);
  std::printf("P17: %lld owners stopped amid links whose successor died, %lld had committed\n",
              static_cast<long long>(cases), static_cast<long long>(published));
}

// What the folder looks like to an owner that has a successor.
void follow(const std::string& run) {
  std::ofstream(join_path(run, "lease/00000009")) << "elsewhere boot 1 1 0 5\n";
}

// Reading takes minutes; what is under a damaged one's name then may be the successor's.
TEST(Lease, ThatWasLostWhileLoadingLeavesDamagedOnesAlone) {
  MemoryFolder folder("lease-load");
  const std::string run = folder / "run";
  for (int64_t step : {1, 2}) EXPECT_EQ(save({.run = run, .step = step})[0], "");
  flip_bit(list_checkpoints(run)[0].path + "/model-00001-of-00002.safetensors", 999);
  Lease lease(plain_disk(), run, {});
  in_world(RankLayout(1, 1, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups);
    Stream stream = Stream::immediate();
    const std::string why = message_of([&] {
      load_newest(plain_disk(), groups, stream, holder.store,
                  {.run = run,
                   .generation = 1,
                   .say = [&](const std::string&) { follow(run); },  // of the damaged one
                   .may_write = [&] { return lease.ours(); }});
    });
    EXPECT_NE(why.find("another launch has taken over this run"), std::string::npos) << why;
  });
  EXPECT_EQ(list_checkpoints(run).size(), 2u) << "set aside by a stale owner";
}

// Seen by a beat between steps, or by nobody until the run's end.
TEST(Lease, ThatWasLostEndsTheRunBeforeItWritesMore) {
  for (bool at_the_end : {false, true}) {
    SCOPED_TRACE(at_the_end ? "at the end" : "between steps");
    TemporaryFolder folder;
    SmallRun run{.folder = folder / "run", .ranks = 2, .expert = 2, .steps = 8};
    run.before_step = [&](int rank, int64_t step) {
      if (rank != 0 || step != (at_the_end ? 7 : 3)) return;
      follow(run.folder);
      if (!at_the_end) nap(700);
    };
    run.change = [&](int, TrainRequest& request) {
      request.checkpoint.set_lease_seconds(at_the_end ? 60 : 1);
    };
    const std::string why = message_of([&] { launch(run); });
    EXPECT_NE(why.find("another launch has taken over this run"), std::string::npos) << why;
    EXPECT_LE(steps_of(run.folder).size(), at_the_end ? 8u : 3u);
    EXPECT_FALSE(file_exists(run.folder + "/weights"));
    EXPECT_TRUE(list_checkpoints(run.folder).empty());
  }
}

}  // namespace
}  // namespace moemamba
