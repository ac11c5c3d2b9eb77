#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/timex.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iomanip>

#include "core/error.h"
#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/simd/level.h"
#include "launcher/control_groups.h"
#include "launcher/doctor_checks.h"
#include "launcher/machine.h"

namespace moemamba {

namespace {

constexpr double kMiB = 1 << 20, kGiB = 1 << 30;
// Of /dev/shm, that Open MPI takes for a rank's messages to others of its machine.
constexpr double kSharedPerRank = 4 * kMiB;
// And NCCL for a GPU's.
constexpr double kSharedPerGpu = 32 * kMiB;

std::string counted(int number, const char* what) {
  return concat(number, " ", what, number == 1 ? "" : "s");
}

Check check_user() {
  if (getuid() != 0) return {"user", Health::ok, "not root", ""};
  if (std::getenv("OMPI_ALLOW_RUN_AS_ROOT") && std::getenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"))
    return {"user", Health::ok, "root, and mpirun allows it", ""};
  return {"user", Health::warn, "root: --ranks and launch allow it, an mpirun of yours refuses",
          "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"};
}

Check check_cores(const Processors& found) {
  Check check{
      "cores", Health::ok,
      concat(found.usable_cores, " for this process; the machine: ", counted(found.cores, "core"),
             ", ", counted(found.threads, "thread"), ", ", counted(found.packages, "package"),
             found.model.empty() ? "" : ", " + found.model),
      ""};
  const std::optional<double> limit = group_core_limit();
  if (limit && *limit + 0.01 < found.usable_cores) {
    check.verdict = Health::warn;
    check.found += concat("; but its control group gives it the time of ", *limit);
    check.mend = concat("--train.threads=", std::max(1, int(*limit)),
                        " for all ranks together, or docker run --cpus=", found.usable_cores);
  }
  return check;
}

Check check_slots(const DoctorOptions& options, const Processors& found) {
  if (options.ranks <= found.usable_cores)
    return {"slots", Health::ok,
            options.ranks > 0 ? concat(options.ranks, " ranks on ", found.usable_cores, " cores")
                              : concat("a core each for up to ", found.usable_cores, " ranks"),
            ""};
  return {
      "slots", Health::warn,
      concat(options.ranks, " ranks share ", found.usable_cores,
             " cores: they wait for each other's turns"),
      concat("slots=", found.usable_cores, " in the hostfile, or --ranks ", found.usable_cores)};
}

Check check_simd(HostReport& report) {
  try {
    const std::string level = name_of(simd_level()), blas = blas_core();
    report.facts.emplace_back("SIMD", level);
    report.facts.emplace_back("BLAS", blas);
    return {"SIMD", Health::ok, concat(level, "; ", blas), ""};
  } catch (const std::exception& error) {
    return {"SIMD", Health::fail, error.what(), "another machine: one with AVX2 and FMA"};
  }
}

// Bytes of a line of /proc/meminfo; 0: there is none.
double memory_of(const std::string& line) {
  std::ifstream file("/proc/meminfo");
  for (std::string name, rest; file >> name; std::getline(file, rest))
    if (double kilobytes = 0; name == line && file >> kilobytes) return kilobytes * 1024;
  return 0;
}

Check check_memory() {
  const std::optional<int64_t> limit = group_memory_limit();
  double available = memory_of("MemAvailable:");
  Check check{
      "memory", Health::ok,
      concat(bytes_text(memory_of("MemTotal:")), ", ", bytes_text(available), " of it available"),
      ""};
  if (limit) {
    check.found += concat("; the control group allows ", bytes_text(double(*limit)));
    available = std::min(available, double(*limit));
  }
  if (available < kGiB) {
    check.verdict = available < kGiB / 8 ? Health::fail : Health::warn;
    check.mend = "ps aux --sort=-rss | head (who has it), or docker run --memory=32g";
  }
  return check;
}

Check check_shared_memory(const DoctorOptions& options, const Processors& found) {
  struct statvfs about {};
  if (statvfs("/dev/shm", &about) != 0 || access("/dev/shm", W_OK) != 0)
    return {"shared memory", Health::fail, "/dev/shm is not there, or not to be written to",
            "mount -t tmpfs -o mode=1777 tmpfs /dev/shm"};
  const double free = double(about.f_bavail) * double(about.f_frsize);
  const int ranks = options.ranks > 0 ? options.ranks : std::max(2, found.usable_cores);
  const bool gpus = access("/dev/nvidiactl", F_OK) == 0;
  const double needed = ranks * (kSharedPerRank + (gpus ? kSharedPerGpu : 0));
  Check check{"shared memory", Health::ok,
              concat("/dev/shm: ", bytes_text(free), " free of ",
                     bytes_text(double(about.f_blocks) * double(about.f_frsize))),
              ""};
  if (free < needed) {
    check.verdict = free < 2 * kSharedPerRank ? Health::fail : Health::warn;
    check.found += concat("; ", ranks, " ranks want ", bytes_text(needed));
    check.mend = "mount -o remount,size=8g /dev/shm, or docker run --shm-size=8g";
  }
  return check;
}

Check check_temporary_files() {
  const char* set = std::getenv("TMPDIR");
  const std::string folder = set && *set ? set : "/tmp";
  Check check{"temporary files", Health::ok, folder, ""};
  std::string probe = folder + "/moemamba-doctor-XXXXXX";
  const int file = mkstemp(probe.data());
  if (file < 0)
    return {"temporary files", Health::fail,
            concat(folder, ": no file can be made there, and mpirun wants to"),
            "export TMPDIR=/tmp, or chmod 1777 /tmp"};
  close(file);
  unlink(probe.c_str());
  struct statvfs about {};
  statvfs(folder.c_str(), &about);
  const double free = double(about.f_bavail) * double(about.f_frsize);
  check.found += concat(": ", bytes_text(free), " free");
  if (folder.size() > 64) {  // names of sockets have at most 108 characters
    check.verdict = Health::warn;
    check.found += "; its name is so long that names of sockets in it may not fit";
    check.mend = "export TMPDIR=/tmp";
  } else if (free < 64 * kMiB) {
    check.verdict = Health::warn;
    check.mend = concat("du -sh ", folder, "/* (what fills it), or export TMPDIR=ELSEWHERE");
  }
  return check;
}

Check check_clock() {
  timespec boot{};
  if (clock_gettime(CLOCK_BOOTTIME, &boot) != 0)
    return {"clock", Health::fail, "no CLOCK_BOOTTIME, by which ranks fence themselves",
            "a kernel of 2.6.39 or later"};
  timex state{};
  if (adjtimex(&state) != TIME_ERROR && (state.status & STA_UNSYNC) == 0)
    return {"clock", Health::ok,
            concat("synchronised, off by at most ", double(state.maxerror) / 1e3, " ms"), ""};
  return {"clock", Health::warn,
          "nothing synchronises it: times in the logs of several hosts will not fit together",
          "timedatectl set-ntp true, or apt-get install chrony"};
}

std::string limit_text(rlim_t limit, bool bytes) {
  if (limit == RLIM_INFINITY) return "unlimited";
  return bytes ? bytes_text(double(limit)) : concat(limit);
}

Check check_open_files(const DoctorOptions& options) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  // mpirun has a few for each of its ranks, a rank one for each rank elsewhere that it talks with.
  const rlim_t wanted = rlim_t(256 + 16 * options.ranks);
  Check check{"open files", Health::ok,
              concat("ulimit -n: ", limit_text(limit.rlim_cur, false), ", at most ",
                     limit_text(limit.rlim_max, false)),
              ""};
  if (limit.rlim_cur < wanted) {
    check.verdict = limit.rlim_cur < 128 ? Health::fail : Health::warn;
    check.found += concat("; ", wanted, " or more are wanted");
    check.mend = "ulimit -n 65536; to last: nofile in /etc/security/limits.conf";
  }
  return check;
}

Check check_locked_memory() {
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  const bool wanted =
      access("/sys/class/infiniband", F_OK) == 0 || access("/dev/nvidiactl", F_OK) == 0;
  Check check{"locked memory", Health::ok,
              concat("ulimit -l: ", limit_text(limit.rlim_cur, true),
                     wanted ? "" : "; only InfiniBand and GPUs lock memory, and there are none"),
              ""};
  if (wanted && limit.rlim_cur < rlim_t(64 * kMiB)) {
    check.verdict = Health::warn;
    check.found += "; InfiniBand and GPUs lock more";
    check.mend = "ulimit -l unlimited; to last: memlock in /etc/security/limits.conf";
  }
  return check;
}

Check check_core_files() {
  rlimit limit{};
  getrlimit(RLIMIT_CORE, &limit);
  std::string pattern;
  std::getline(std::ifstream("/proc/sys/kernel/core_pattern"), pattern);
  return {"core files", Health::ok,
          limit.rlim_cur == 0 ? "ulimit -c: 0, a crash leaves none"
                              : concat("ulimit -c: ", limit_text(limit.rlim_cur, true),
                                       ", a crash leaves the memory of its rank in ", pattern),
          ""};
}

Check check_stack() {
  rlimit limit{};
  getrlimit(RLIMIT_STACK, &limit);
  Check check{"stack", Health::ok, "ulimit -s: " + limit_text(limit.rlim_cur, true), ""};
  if (limit.rlim_cur < rlim_t(kMiB)) {
    check.verdict = Health::warn;
    check.found += "; 1 MiB or more is wanted";
    check.mend = "ulimit -s 8192";
  }
  return check;
}

}  // namespace

std::string bytes_text(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1024;
  std::ostringstream text;
  text << std::fixed << std::setprecision(unit == 0 || bytes >= 100 ? 0 : 1) << bytes << " "
       << kUnits[unit];
  return text.str();
}

void check_machine(const DoctorOptions& options, HostReport& report) {
  report.checks.push_back(check_user());
  try {
    const Processors found = find_processors();
    report.checks.push_back(check_cores(found));
    report.checks.push_back(check_slots(options, found));
    report.checks.push_back({"NUMA", Health::ok, counted(found.memory_nodes, "memory node"), ""});
    report.checks.push_back(check_memory());
    report.checks.push_back(check_shared_memory(options, found));
    report.facts.emplace_back("cores", concat(found.usable_cores));
  } catch (const std::exception& error) {  // hwloc cannot read this machine
    report.checks.push_back({"cores", Health::fail, error.what(), "--train.threads=N"});
  }
  report.checks.push_back(check_simd(report));
  report.checks.push_back(check_temporary_files());
  report.checks.push_back(check_clock());
}

void check_limits(const DoctorOptions& options, HostReport& report) {
  report.checks.push_back(check_open_files(options));
  report.checks.push_back(check_locked_memory());
  report.checks.push_back(check_core_files());
  report.checks.push_back(check_stack());
}

}  // namespace moemamba
