#include "runtime/lease.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include "core/error.h"
#include "runtime/checkpoint_folder.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kBytes = 512;  // of a lease's file: one line, padded, so that a write is whole

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Ticks between the boot and the start of a process; 0: there is no such process, or a dead one.
int64_t start_of(int64_t pid) {
  const std::string line = first_line(concat("/proc/", pid, "/stat"));
  const size_t name_end = line.rfind(')');  // the name may hold anything
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(line.substr(name_end + 1));
  std::string field;
  fields >> field;
  if (field == "Z" || field == "X") return 0;
  for (int i = 4; i <= 22; ++i) fields >> field;
  return std::atoll(field.c_str());
}

LeaseOwner this_process() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return {.host = host,
          .boot_id = first_line("/proc/sys/kernel/random/boot_id"),
          .pid = getpid(),
          .started = start_of(getpid())};
}

std::string path_of(const std::string& run, int64_t generation) {
  char name[32];
  std::snprintf(name, sizeof name, "%08lld", static_cast<long long>(generation));
  return join_path(join_path(run, "lease"), name);
}

// The highest generation there is; 0: none.
int64_t newest_generation(const std::string& run) {
  int64_t newest = 0;
  std::error_code error;
  for (fs::directory_iterator at(join_path(run, "lease"), error), end; !error && at != end;
       at.increment(error)) {
    const std::string name = at->path().filename().string();
    if (name.find_first_not_of("0123456789") == std::string::npos)
      newest = std::max<int64_t>(newest, std::atoll(name.c_str()));
  }
  return newest;
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
         start_of(owner.pid) != owner.started;
}

// Returns when `path`'s owner may be followed; throws if it lives.
void wait_for_end(const std::string& run, const std::string& path, const Lease::Options& options) {
  const LeaseState first = read_lease(path);
  if (first.owner.released || dead_here(first.owner)) return;
  const auto start = Clock::now();
  for (bool said = false; Clock::now() - start < options.lifetime;) {
    std::this_thread::sleep_for(milliseconds(50));
    const LeaseState now = read_lease(path);
    if (now.owner.released || dead_here(now.owner)) return;
    check(now.beats == first.beats, run, ": ", describe(now.owner),
          " is working on this run; wait for its end, or choose another --run");
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

std::string describe(const LeaseOwner& owner) {
  return owner.pid > 0 ? concat("process ", owner.pid, " on ", owner.host) : "another launch";
}

Lease::Lease(FileSystem& files, std::string run, const Options& options)
    : files_(files), run_(std::move(run)), options_(options) {
  files.make_folders(join_path(run_, "lease"));
  const int64_t newest = newest_generation(run_);
  if (newest > 0) wait_for_end(run_, path_of(run_, newest), options_);
  generation_ = newest + 1;
  try {
    file_ = files.open(path_of(run_, generation_), OpenMode::create_new);
  } catch (const Error&) {
    if (newest_generation(run_) < generation_) throw;  // not taken: the disk refuses
    throw Error(concat(run_, ": ", describe(read_lease(path_of(run_, generation_)).owner),
                       " has just started to work on this run; wait for its end, or choose "
                       "another --run"));
  }
  write(0, false);
  fence_attempts(files, run_, generation_);
  for (int64_t old = newest; old > 0 && file_exists(path_of(run_, old)); --old)
    files.remove(path_of(run_, old));
  heart_ = std::thread([this] { renew(); });
}

Lease::~Lease() {
  {
    std::lock_guard lock(mutex_);
    ends_ = true;
  }
  wake_.notify_all();
  heart_.join();
  try {
    write(0, true);
  } catch (const Error&) {  // it ends by itself
  }
}

bool Lease::ours() const {
  return newest_generation(run_) == generation_;
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
  const auto pause = std::max(milliseconds(20), options_.lifetime / 20);
  std::unique_lock lock(mutex_);
  for (int64_t beats = 1; !wake_.wait_for(lock, pause, [this] { return ends_; }); ++beats) {
    try {
      write(beats, false);
    } catch (const Error&) {  // a full disk: silence, and perhaps a successor, who is obeyed
    }
  }
}

}  // namespace moemamba
