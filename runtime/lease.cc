#include "runtime/lease.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

#include "core/error.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr const char* kFolder = "lease";
constexpr const char* kDraft = "new-";
constexpr size_t kBytes = 512;  // of a lease's file: one line, padded, so that a write is whole

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Containers of one host may share its name and its boot, but not the numbers of processes: whom
// this one cannot see, it cannot call dead.
LeaseOwner this_process() {
  char host[256] = {}, numbers[64] = {};
  gethostname(host, sizeof host - 1);
  const ssize_t known = readlink("/proc/self/ns/pid", numbers, sizeof numbers - 1);
  return {.host = host,
          .boot_id = concat(boot_id(), "/", known > 0 ? numbers : "?"),
          .pid = getpid(),
          .started = process_start(getpid())};
}

std::string path_of(const std::string& run, int64_t generation) {
  char name[32];
  std::snprintf(name, sizeof name, "%08lld", static_cast<long long>(generation));
  return join_path(join_path(run, kFolder), name);
}

std::optional<int64_t> generation_of(const std::string& name) {
  if (name.empty() || name.size() > 18 || name.find_first_not_of("0123456789") != std::string::npos)
    return std::nullopt;
  return std::atoll(name.c_str());
}

struct LeaseState {
  LeaseOwner owner;
  int64_t beats = -1;  // -1: not written yet
};

LeaseState read_lease(const std::string& path) {
  LeaseState state;
  std::istringstream line(first_line(path));
  int released = 0;
  if (line >> state.owner.host >> state.owner.boot_id >> state.owner.pid >> state.owner.started >>
      released)
    line >> state.beats;
  state.owner.released = released != 0;
  return state;
}

bool dead_here(const LeaseOwner& owner) {
  const LeaseOwner self = this_process();
  return owner.boot_id == self.boot_id && owner.host == self.host && owner.pid > 0 &&
         process_start(owner.pid) != owner.started;
}

// For people: who holds the newest lease. It may be replaced while it is being read.
std::string newest_owner(const std::string& run) {
  LeaseOwner owner;
  for (int i = 0; i < 20 && owner.pid == 0; ++i)
    owner = read_lease(path_of(run, newest_lease(run))).owner;
  return describe(owner);
}

[[noreturn]] void refuse(const std::string& run) {
  throw Error(concat(run, ": ", newest_owner(run),
                     " is working on this run; wait for its end, or choose another --run"));
}

// Returns when the owner of `generation` may be followed; throws if it lives, or has a successor.
void wait_for_end(const std::string& run, int64_t generation, const Lease::Options& options) {
  const std::string path = path_of(run, generation);
  const LeaseState first = read_lease(path);
  const auto ended = [](const LeaseOwner& owner) { return owner.released || dead_here(owner); };
  if (ended(first.owner)) return;
  const auto start = Clock::now();
  for (bool said = false; Clock::now() - start < options.lifetime;) {
    std::this_thread::sleep_for(milliseconds(50));
    const LeaseState now = read_lease(path);
    if (ended(now.owner)) return;
    if (now.beats != first.beats || newest_lease(run) != generation) refuse(run);
    if (!said && Clock::now() - start > options.patience) {
      said = true;
      std::fprintf(stderr,
                   "%s: %s holds this run and gives no sign of life; taking over in %.0f s\n",
                   run.c_str(), describe(now.owner).c_str(),
                   std::chrono::duration<double>(options.lifetime - options.patience).count());
    }
  }
}

}  // namespace

int64_t newest_lease(const std::string& run) {
  int64_t newest = 0;
  std::error_code error;
  for (fs::directory_iterator at(join_path(run, kFolder), error), end; !error && at != end;
       at.increment(error))
    newest = std::max(newest, generation_of(at->path().filename().string()).value_or(0));
  return newest;
}

std::string describe(const LeaseOwner& owner) {
  return owner.pid > 0 ? concat("process ", owner.pid, " on ", owner.host) : "another launch";
}

Lease::Lease(FileSystem& files, std::string run, const Options& options)
    : files_(files), run_(std::move(run)), options_(options) {
  make_lasting_folders(files, join_path(run_, kFolder));
  const int64_t newest = newest_lease(run_);
  if (newest > 0) wait_for_end(run_, newest, options_);
  generation_ = newest + 1;
  take();
  try {
    fence();
  } catch (...) {
    release();
    throw;
  }
  heart_ = std::thread([this] { renew(); });
}

void Lease::fence() {
  fence_attempts(files_, run_, generation_, [this] { return ours(); });
  drop_older();
}

void Lease::advance() {
  std::lock_guard lock(mutex_);
  if (!ours()) refuse(run_);
  std::unique_ptr<OutputFile> before = std::move(file_);
  ++generation_;
  try {
    take();
  } catch (...) {
    --generation_;
    file_ = std::move(before);
    throw;
  }
  fence();
}

// The file comes to be whole, under a name that one of several gets: nobody sees half a lease.
void Lease::take() {
  const std::string draft = join_path(join_path(run_, kFolder), concat(kDraft, fresh_nonce()));
  const std::string path = path_of(run_, generation_);
  bool taken = false;
  try {
    file_ = files_.open(draft, OpenMode::create_new);
    write(0, false);
    if (!files_.rename_new(draft, path)) {
      files_.link(draft, path);
      files_.remove(draft);
    }
    taken = true;
  } catch (const Error&) {
    try {
      files_.remove(draft);
    } catch (const Error&) {  // the next owner does it
    }
    if (newest_lease(run_) < generation_) throw;  // not taken: the disk refuses
  }
  if (taken && !ours()) files_.remove(path);  // others have taken and left it since it was free
  if (!taken || !ours()) refuse(run_);
}

// Leases of owners before, and drafts of launches that died.
void Lease::drop_older() {
  const std::string folder = join_path(run_, kFolder);
  std::vector<std::string> old;
  std::error_code error;  // then the next owner does it
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    const std::string name = at->path().filename().string();
    const std::optional<int64_t> generation = generation_of(name);
    if ((generation && *generation < generation_) || name.rfind(kDraft, 0) == 0)
      old.push_back(at->path().string());
  }
  for (const std::string& path : old) files_.remove(path);
}

void Lease::release() {
  try {
    write(0, true);
  } catch (const Error&) {  // it ends by itself
  }
}

Lease::~Lease() {
  {
    std::lock_guard lock(mutex_);
    ends_ = true;
  }
  wake_.notify_all();
  heart_.join();
  release();
}

bool Lease::ours() const {
  return newest_lease(run_) == generation_;
}

bool Lease::replaced() const {
  return newest_lease(run_) > generation_;
}

void Lease::write(int64_t beats, bool released) {
  const LeaseOwner self = this_process();
  std::string line = concat(self.host, " ", self.boot_id, " ", self.pid, " ", self.started, " ",
                            int(released), " ", beats);
  line.resize(kBytes - 1, ' ');
  line += '\n';
  if (beats == 0 && !released)
    file_->write(line.data(), line.size());
  else
    file_->write_at(0, line.data(), line.size());
}

void Lease::renew() {
  // Often enough for a second launch to see it within its patience, however long a lease lives.
  const auto pause = std::clamp(options_.lifetime / 20, milliseconds(20), milliseconds(500));
  std::unique_lock lock(mutex_);
  for (int64_t beats = 1; !wake_.wait_for(lock, pause, [this] { return ends_; }); ++beats) {
    try {
      write(beats, false);
    } catch (const Error&) {  // a full disk: silence, and perhaps a successor, who is obeyed
    }
    if (newest_lease(run_) > generation_) lost_ = true;
  }
}

}  // namespace moemamba
