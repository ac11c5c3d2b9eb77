#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <future>
#include <optional>
#include <regex>

#include "launcher/ask.h"
#include "launcher/build_facts.h"
#include "launcher/doctor_checks.h"
#include "parallel/clocks.h"
#include "parallel/gather_blobs.h"

namespace moemamba {

namespace {

constexpr double kPatience = 6;  // seconds for a process that looks at MPI
constexpr std::chrono::milliseconds kDeadline(5000);
constexpr int kClockRounds = 200;
constexpr const char* kInPath =
    "apt-get install openmpi-bin, or export PATH=/FOLDER/OF/OPENMPI/bin:$PATH";
constexpr const char* kInstall = "apt-get install --reinstall openmpi-bin libopenmpi3";

// What moemamba's own mpirun gives to its ranks, and a folder for its sessions.
std::vector<std::pair<std::string, std::string>> rank_environment(const SessionFolder& folder) {
  return {{"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
          {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
          {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
          {"OPENBLAS_NUM_THREADS", "1"},
          {"TMPDIR", folder.path()}};
}

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

Check check_compiler() {
  const Answer answer = ask({"c++", "--version"}, 3);
  const std::string built = concat("built with ", build_compiler(), ", ", build_flags());
  Check check{"compiler", Health::ok,
              built + (answer.ok() ? "; c++ in PATH: " + first_line(answer.out)
                                   : "; none in PATH, which only building would need"),
              ""};
  if (build_flags().find("-fsanitize") != build_flags().npos ||
      build_flags().find("-O0") != build_flags().npos) {
    check.verdict = Health::warn;
    check.found += "; that is a build for finding bugs, several times slower";
    check.mend = "sh scripts/build.sh cpu-release";
  }
  return check;
}

Check check_threads() {
  const SessionFolder folder;
  const Answer answer = ask(probe_words("threads"), kPatience, rank_environment(folder));
  const std::string said = first_line(answer.out);
  if (answer.ok()) return {"MPI threads", Health::ok, said, ""};
  if (answer.code == 3)
    return {"MPI threads", Health::fail, said + ", but MPI_THREAD_SERIALIZED is needed",
            "an MPI that is built with threads: apt-get install libopenmpi3"};
  if (find_program("orted").empty() && find_program("prted").empty())
    return {"MPI threads", Health::fail,
            "MPI does not start, not even for one rank: its orted is not in PATH", kInPath};
  return {"MPI threads", Health::fail,
          answer.late ? concat("MPI has not started within ", kPatience, " s")
                      : "MPI does not start: " + answer.gist(),
          kInstall};
}

// What Open MPI was told by the environment; "": nothing.
std::string told_open_mpi() {
  std::string names;
  for (char** at = environ; *at; ++at) {
    const std::string line = *at;
    if (line.starts_with("OMPI_MCA_")) names += " " + line.substr(0, line.find('='));
  }
  return names;
}

// Two ranks that find each other.
Check check_ranks() {
  std::vector<std::string> words = {"mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2"};
  const std::vector<std::string> probe = probe_words("ranks");
  words.insert(words.end(), probe.begin(), probe.end());
  const SessionFolder folder;
  const Answer answer = ask(words, kPatience, rank_environment(folder));
  if (answer.ok() && answer.out.starts_with("2 "))
    return {"ranks", Health::ok, first_line(answer.out), ""};
  return {"ranks", Health::fail,
          answer.late   ? concat("two ranks under mpirun have not met within ", kPatience, " s")
          : answer.ok() ? "ranks under mpirun do not find each other: it is not this MPI's mpirun"
                        : "two ranks under mpirun: " + answer.gist(),
          told_open_mpi().empty() ? kInstall : "unset" + told_open_mpi()};
}

Check check_mpirun(const std::string& library, HostReport& report) {
  const std::string path = find_program("mpirun");
  if (path.empty())
    return {"mpirun", Health::fail, "not in PATH, so nothing starts more than one rank", kInPath};
  const Answer answer = ask({path, "--version"}, 2);
  const std::string said = first_line(answer.out);
  if (!answer.ok())
    return {"mpirun", Health::fail, concat(path, " --version: ", answer.gist()), kInstall};
  report.facts.emplace_back("mpirun", version_in(said));
  if (said.find("Open MPI") == said.npos || version_in(said) != version_in(library))
    return {"mpirun", Health::fail,
            concat(path, ": \"", said, "\", but this program is linked with ", library,
                   ": each rank would be alone"),
            "export PATH=/FOLDER/OF/THAT/OPENMPI/bin:$PATH"};
  return {"mpirun", Health::ok, concat(path, ", ", version_in(said)), ""};
}

// Nothing where there is no srun.
std::optional<Check> check_slurm() {
  if (find_program("srun").empty()) return std::nullopt;
  const Answer answer = ask({"srun", "--mpi=list"}, 5);
  const bool inside = std::getenv("SLURM_JOB_ID") != nullptr;
  const std::string said = answer.out + answer.err;
  if (answer.ok() && said.find("pmix") != said.npos)
    return Check{"Slurm", Health::ok, "srun --mpi=pmix can start ranks", ""};
  if (!inside) return Check{"Slurm", Health::ok, "srun is installed, but no Slurm answers it", ""};
  return Check{"Slurm", Health::fail,
               answer.ok() ? "srun has no PMIx, so ranks that it starts do not find each other"
                           : "srun --mpi=list: " + answer.gist(),
               "apt-get install slurm-wlm-basic-plugins on all nodes (it has mpi_pmix), or mpirun"};
}

double wall_seconds() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

}  // namespace

std::string version_in(const std::string& text) {
  static const std::regex version("[0-9]+(\\.[0-9]+)+[0-9a-z.-]*");
  std::smatch found;
  return std::regex_search(text, found, version) ? found.str() : "";
}

std::vector<std::string> probe_words(const std::string& probe) {
  return {own_program(), "doctor", "--probe", probe};
}

void check_build(HostReport& report) {
  report.checks.push_back(
      {"moemamba", Health::ok,
       concat(build_version(), ", sources ", build_sources(), ", ", own_program()), ""});
  report.facts.emplace_back("moemamba", concat(build_version(), " ", build_sources(), " ",
                                               build_compiler(), " ", build_flags()));
  report.checks.push_back(check_compiler());
}

void check_mpi(HostReport& report) {
  const std::string library = mpi_library();
  report.facts.emplace_back("MPI", library);
  Check mpi{"MPI", Health::ok, library, ""};
  if (library.find("Open MPI") == library.npos) {
    mpi.verdict = Health::warn;
    mpi.found += "; only Open MPI is tested, and --ranks and launch want its mpirun";
    mpi.mend = "apt-get install libopenmpi-dev, and build again";
  }
  report.checks.push_back(mpi);
  auto slurm = std::async(std::launch::async, check_slurm);
  auto threads = std::async(std::launch::async, check_threads);
  const Check mpirun = check_mpirun(library, report);
  const bool starts = mpirun.verdict == Health::ok;
  const Check ranks = starts ? check_ranks() : Check();
  report.checks.insert(report.checks.end(), {threads.get(), mpirun});
  if (starts) report.checks.push_back(ranks);
  if (const auto found = slurm.get()) report.checks.push_back(*found);
}

int probe_threads() {
  bool enough = false;
  const std::string level = mpi_thread_level(&enough);
  std::printf("%s\n", level.c_str());
  return enough ? 0 : 3;
}

int probe_ranks() {
  World world;
  const auto groups = world.make_groups(RankLayout(world.size(), 1, 0), kDeadline);
  Stream stream = Stream::immediate();
  const auto start = std::chrono::steady_clock::now();
  barrier(*groups.control, stream);
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  if (world.rank() == 0)
    std::printf("%d started by mpirun have met in %.2f ms\n", world.size(), took.count());
  return 0;
}

// "clock HOST OFFSET ROUND-TRIP", a line each.
int probe_clocks() {
  World world;
  const auto groups = world.make_groups(RankLayout(world.size(), 1, 0), kDeadline);
  Stream stream = Stream::immediate();
  const auto names = gather_blobs(*groups.control, stream, world.hostname());
  const auto readings = compare_clocks(*groups.control, kClockRounds, wall_seconds);
  for (size_t i = 0; i < readings.size(); ++i)
    std::printf("clock %s %.9f %.9f\n", names[i].c_str(), readings[i].offset,
                readings[i].round_trip);
  return 0;
}

}  // namespace moemamba
