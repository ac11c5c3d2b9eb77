#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>

#include "core/arena.h"
#include "core/file.h"
#include "launcher/ask.h"
#include "launcher/doctor_checks.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr int64_t kBlock = 4 << 20, kMostBytes = 64 << 20;
constexpr int64_t kFull = 1 << 20;
constexpr double kMostSeconds = 1.5;  // of each of the two measurements
constexpr double kPatience = 6;       // then the disk hangs
constexpr double kSlowBytes = 50e6;   // a second
constexpr double kSlowSync = 0.05;    // seconds

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string kind_of(const std::string& folder) {
  struct statfs about {};
  if (statfs(folder.c_str(), &about) != 0) return "unknown";
  switch (uint64_t(about.f_type)) {
    case 0x01021994:
      return "tmpfs";
    case 0x858458f6:
      return "ramfs";
    case 0x794c7630:
      return "overlay";
    case 0xef53:
      return "ext4";
    case 0x58465342:
      return "xfs";
    case 0x9123683e:
      return "btrfs";
    case 0x2fc12fc1:
      return "zfs";
    case 0x6969:
      return "nfs";
    case 0x0bd00bd0:
      return "lustre";
    case 0x47504653:
      return "gpfs";
    case 0x19830326:
      return "beegfs";
    case 0x00c36400:
      return "ceph";
    case 0x65735546:
      return "fuse";
    default:
      return concat("of kind 0x", std::hex, about.f_type);
  }
}

Check check_folder(const std::string& run, const std::string& folder) {
  std::error_code ignored;
  if (!run.empty() && fs::exists(run, ignored) && !fs::is_directory(run, ignored))
    return {"folder", Health::fail, run + ": is no folder", "--run=FOLDER"};
  const std::string kind = kind_of(folder);
  Check check{"folder", Health::ok, concat(folder, " (", kind, ")"), ""};
  if (kind == "tmpfs" || kind == "ramfs") {
    check.verdict = Health::warn;
    check.found += ": in memory, and gone with the next boot";
    check.mend = "--run=FOLDER on a disk";
  } else if (kind == "overlay") {
    check.found += ": a container's own, and gone with it; mount a folder of the host for runs";
  }
  return check;
}

Check check_free(FileSystem& files, const std::string& folder) {
  const auto free = double(files.free_bytes(folder));
  Check check{"free space", Health::ok, bytes_text(free), ""};
  if (free < double(1 << 30)) {
    check.verdict = free < double(kFull) ? Health::fail : Health::warn;
    check.found +=
        ": a checkpoint has 12 bytes a parameter, and three of them lie beside each other";
    check.mend = concat("du -xsh ", folder, "/* (what fills it), or --run=FOLDER elsewhere");
  }
  return check;
}

// Written to the disk itself, four MiB at a time, so that it can end when it has taken long enough.
Check check_speed(FileSystem& files, const std::string& folder) {
  Buffer buffer(DeviceKind::cpu, kBlock + int64_t(kDirectBlock));
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  std::byte* data = buffer.data() + (kDirectBlock - address % kDirectBlock) % kDirectBlock;
  for (int64_t i = 0; i < kBlock; ++i) data[i] = std::byte(uint64_t(i) * 2654435761u >> 13);
  const auto file = files.open(join_path(folder, "speed"), OpenMode::create_direct);
  const int64_t most = std::min(kMostBytes, files.free_bytes(folder) / 4);
  const auto start = Clock::now();
  int64_t done = 0;
  while (done + kBlock <= most && seconds_since(start) < kMostSeconds) {
    file->write(data, size_t(kBlock));
    file->sync();
    done += kBlock;
  }
  const double speed = double(done) / std::max(1e-9, seconds_since(start));
  if (done == 0) return {"disk", Health::warn, "too full to be measured", "free some space"};
  Check check{"disk", Health::ok,
              concat(bytes_text(speed), "/s are written (", bytes_text(double(done)), " measured)"),
              ""};
  if (speed < kSlowBytes) {
    check.verdict = Health::warn;
    check.found += ": saves take long, though training goes on behind them";
    check.mend = "--run=FOLDER on a faster disk, or a larger --train.save_interval";
  }
  return check;
}

Check check_sync(FileSystem& files, const std::string& folder) {
  const auto file = files.open(join_path(folder, "sync"), OpenMode::create);
  const std::string line(512, 'x');
  std::vector<double> times;
  const auto start = Clock::now();
  while (times.size() < 50 && seconds_since(start) < kMostSeconds) {
    const auto begin = Clock::now();
    file->write(line.data(), line.size());
    file->sync();
    times.push_back(seconds_since(begin));
  }
  std::ranges::sort(times);
  const double median = times[times.size() / 2];
  const auto ms = [](double seconds) { return std::round(seconds * 1e5) / 100; };
  Check check{"fsync", Health::ok,
              concat(ms(median), " ms, at most ", ms(times.back()), " of ", times.size()), ""};
  if (median > kSlowSync) {
    check.verdict = Health::warn;
    check.found += ": a save syncs each file and folder";
    check.mend = "--run=FOLDER on another disk";
  }
  return check;
}

// What a checkpoint and a lease appear by.
Check check_new_names(FileSystem& files, const std::string& folder) {
  const auto make = [&](const char* name) {
    const std::string path = join_path(folder, name);
    files.open(path, OpenMode::create)->close();
    return path;
  };
  const std::string from = make("from"), taken = make("taken");
  const std::string why = "two launches on one folder could not be kept apart";
  try {
    if (files.rename_new(from, join_path(folder, "to")))
      return {"new names", Health::ok, "rename() without replacing", ""};
  } catch (const Error& error) {
    return {"new names", Health::fail, error.what() + (": " + why), "--run=FOLDER elsewhere"};
  }
  try {
    files.link(from, join_path(folder, "to"));
  } catch (const Error& error) {
    return {"new names", Health::fail,
            concat("neither rename() without replacing nor link(): ", why),
            "--run=FOLDER elsewhere"};
  }
  return {"new names", Health::ok, "no rename() without replacing, but link(), which does", ""};
}

void measure(const std::string& folder, HostReport& report) {
  PosixFileSystem files;
  report.checks.push_back(check_free(files, folder));
  const std::string scratch = join_path(folder, concat("moemamba-doctor-", getpid()));
  try {
    files.make_folder(scratch);
    report.checks.push_back(check_new_names(files, scratch));
    report.checks.push_back(check_sync(files, scratch));
    report.checks.push_back(check_speed(files, scratch));
  } catch (const Error& error) {
    report.checks.push_back({"disk", Health::fail, error.what(),
                             concat("ls -ld ", folder, "; df -h ", folder,
                                    " (who may write, what is free), or --run=FOLDER elsewhere")});
  }
  remove_tree(files, scratch);
}

}  // namespace

std::string nearest_folder(const std::string& run) {
  std::error_code ignored;
  fs::path path = run.empty() ? fs::current_path(ignored) : fs::absolute(run, ignored);
  while (!fs::is_directory(path, ignored) && path.has_relative_path()) path = path.parent_path();
  return path.string();
}

int probe_disk(const DoctorOptions& options) {
  HostReport report;
  const std::string folder = nearest_folder(options.run);
  report.checks.push_back(check_folder(options.run, folder));
  if (!options.mark.empty())
    report.checks.push_back(
        file_exists(join_path(folder, options.mark))
            ? Check{"shared folder", Health::ok, "the first host's is the same one", ""}
            : Check{"shared folder", Health::fail,
                    concat(folder, " is not the first host's: a run's folder is one for all"),
                    "mount the same folder on all hosts, or --run=FOLDER that is on all"});
  measure(folder, report);
  std::cout << report_json(report);
  return 0;
}

void check_disk(const DoctorOptions& options, HostReport& report) {
  std::vector<std::string> more;
  if (!options.run.empty()) more = {"--run", options.run};
  if (!options.mark.empty()) more.insert(more.end(), {"--mark", options.mark});
  const HostReport found = ask_probe("disk", more, kPatience, "disk");
  report.checks.insert(report.checks.end(), found.checks.begin(), found.checks.end());
}

}  // namespace moemamba
