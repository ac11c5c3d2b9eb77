#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <future>
#include <iomanip>
#include <sstream>

#include "core/file.h"
#include "core/schema.h"
#include "launcher/ask.h"
#include "launcher/doctor_checks.h"
#include "launcher/supervisor/hosts.h"

namespace moemamba {

namespace {

constexpr double kHostSeconds = 30;   // for what one host says, ssh and all
constexpr double kClockSeconds = 30;  // for messages between all of them
constexpr size_t kAtOnce = 16;        // hosts that are asked at the same time
constexpr double kSkew = 0.1;         // seconds: what confuses people who read two logs

std::vector<std::string> mpirun_words(std::initializer_list<std::string> more) {
  std::vector<std::string> words{"mpirun"};
  if (getuid() == 0) words.emplace_back("--allow-run-as-root");
  words.insert(words.end(), {"--bind-to", "none"});
  words.insert(words.end(), more);
  return words;
}

// Of mpirun itself, several of which run beside each other here: daemons on other hosts have their
// own there, and ranks that start MPI must not look for theirs in it.
std::vector<std::pair<std::string, std::string>> local_sessions(const SessionFolder& folder) {
  return {{"OMPI_MCA_orte_local_tmpdir_base", folder.path()}};
}

HostReport ask_host(const DoctorOptions& options, const HostSlots& host) {
  std::vector<std::string> words = mpirun_words({"--host", host.name + ":1", "-n", "1"});
  words.insert(words.end(), {own_program(), "doctor", "--json"});
  if (!options.run.empty()) words.insert(words.end(), {"--run", options.run});
  if (!options.mark.empty()) words.insert(words.end(), {"--mark", options.mark});
  words.insert(words.end(), {"--ranks", concat(options.ranks > 0 ? options.ranks : host.slots)});
  const SessionFolder folder;
  const Answer answer = ask(words, kHostSeconds, local_sessions(folder));
  HostReport report;
  try {
    report = read_report(answer.out);
  } catch (const Error&) {
    const std::string why = answer.missing ? "mpirun is not in PATH"
                            : answer.late  ? concat("no word within ", kHostSeconds, " s")
                                           : answer.gist();
    report.checks.push_back({"reach", Health::fail,
                             "mpirun does not start this program there: " + why,
                             answer.missing ? "apt-get install openmpi-bin"
                                            : concat("ssh ", host.name, " ", own_program(),
                                                     " doctor (it must work without a password)")});
  }
  report.host = host.name;
  return report;
}

std::vector<HostReport> ask_hosts(const DoctorOptions& options,
                                  const std::vector<HostSlots>& hosts) {
  std::vector<HostReport> reports(hosts.size());
  std::atomic<size_t> next = 0;
  std::vector<std::future<void>> askers;
  for (size_t i = 0; i < std::min(kAtOnce, hosts.size()); ++i)
    askers.push_back(std::async(std::launch::async, [&] {
      for (size_t at = next++; at < hosts.size(); at = next++)
        reports[at] = ask_host(options, hosts[at]);
    }));
  for (auto& asker : askers) asker.get();
  return reports;
}

struct HostClock {
  std::string host;
  double offset = 0, round_trip = 0;
};

std::string milliseconds(double seconds) {
  std::ostringstream text;
  text << std::setprecision(3) << seconds * 1e3 << " ms";
  return text.str();
}

Check check_clocks(const std::vector<HostClock>& clocks) {
  const auto off = [](const HostClock& c) { return std::abs(c.offset); };
  const HostClock& worst_one = *std::ranges::max_element(clocks, {}, off);
  Check check{"clocks", Health::ok,
              concat(worst_one.host, " differs most from ", clocks[0].host, ": ",
                     milliseconds(off(worst_one)), worst_one.offset < 0 ? " behind" : " ahead",
                     ", right within ", milliseconds(worst_one.round_trip / 2)),
              ""};
  if (off(worst_one) - worst_one.round_trip / 2 > kSkew) {
    check.verdict = Health::warn;
    check.found += "; nothing is decided by clocks, but logs of the hosts will not fit together";
    check.mend = "timedatectl set-ntp true on all hosts, or apt-get install chrony";
  }
  return check;
}

// A rank on each host, and messages between them.
void check_messages(const std::string& hostfile, size_t hosts, HostsReport& report) {
  std::vector<std::string> words =
      mpirun_words({"--hostfile", hostfile, "--map-by", "ppr:1:node", "-n", concat(hosts)});
  const std::vector<std::string> probe = probe_words("clocks");
  words.insert(words.end(), probe.begin(), probe.end());
  const Answer answer = ask(words, kClockSeconds);
  std::vector<HostClock> clocks;
  std::istringstream lines(answer.out);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string word;
    HostClock clock;
    if (fields >> word >> clock.host >> clock.offset >> clock.round_trip && word == "clock")
      clocks.push_back(clock);
  }
  if (!answer.ok() || clocks.size() != hosts) {
    report.between.push_back(
        {"messages", Health::fail,
         answer.late ? concat("ranks on all hosts have not met within ", kClockSeconds, " s")
                     : "a rank on each host: " + answer.gist(),
         "export OMPI_MCA_btl_tcp_if_include=NETWORK/BITS OMPI_MCA_oob_tcp_if_include=NETWORK/BITS "
         "of the network that joins them, with no firewall between them"});
    return;
  }
  report.between.push_back(
      {"messages", Health::ok,
       concat("from the first host to all and back in ", milliseconds(clocks[0].round_trip)), ""});
  report.between.push_back(check_clocks(clocks));
}

// A file by which other hosts know the folder of the run. Without --run there is none to know.
class Mark {
 public:
  explicit Mark(const std::string& run) {
    if (run.empty()) return;
    try {
      const std::string folder = nearest_folder(run);
      name_ = concat("moemamba-doctor-mark-", getpid());
      path_ = join_path(folder, name_);
      files_.open(path_, OpenMode::create)->close();
      files_.sync_folder(folder);
    } catch (const Error&) {  // this host's own report says why
      name_.clear();
      path_.clear();
    }
  }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  ~Mark() {
    if (!path_.empty()) unlink(path_.c_str());
  }
  const std::string& name() const { return name_; }

 private:
  PosixFileSystem files_;
  std::string name_, path_;
};

}  // namespace

HostsReport examine_hosts(const DoctorOptions& options) {
  const std::vector<HostSlots> hosts = read_hostfile(options.hostfile);
  const Mark mark(options.run);
  DoctorOptions of_host = options;
  of_host.mark = mark.name();
  HostsReport report{.hosts = ask_hosts(of_host, hosts)};
  const bool all_answer =
      std::ranges::none_of(report.hosts, [](const HostReport& host) { return host.facts.empty(); });
  if (hosts.size() < 2) return report;
  if (all_answer) check_messages(options.hostfile, hosts.size(), report);
  std::vector<HostReport> answered;
  for (const HostReport& host : report.hosts)
    if (!host.facts.empty()) answered.push_back(host);
  if (answered.size() > 1)
    for (const Check& check : compare_hosts(answered)) report.between.push_back(check);
  return report;
}

}  // namespace moemamba
