#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moemamba {

// What `moemamba doctor` found, and how it is told to people, programs and other hosts.

enum class Health { ok, warn, fail };
const char* name_of(Health verdict);  // "ok"

struct Check {
  std::string name;  // "open files"; the same in every version
  Health verdict = Health::ok;
  std::string found;  // one line
  std::string mend;   // the command that mends it; "" where all is well
};
Health worst(const std::vector<Check>& checks);

struct HostReport {
  std::string host;
  std::vector<Check> checks;
  // (name, value): what is compared between hosts.
  std::vector<std::pair<std::string, std::string>> facts;
};

// Several hosts, and what they are to each other.
struct HostsReport {
  std::vector<HostReport> hosts;
  std::vector<Check> between;
};
Health worst(const HostsReport& report);

// One check for each fact that not all hosts have alike, one that names those that all share, and
// one where hosts have an address in common by which they cannot tell each other apart. REQUIRES:
// two hosts or more.
std::vector<Check> compare_hosts(const std::vector<HostReport>& hosts);

// One line a check: verdict, name, what was found, the command. Of several hosts those that are not
// ok, each once, with the hosts that it is about, then what is between them.
std::string report_text(const HostReport& report);
std::string report_text(const HostsReport& report);

// One object in one line; read_report() takes what report_json() of a host wrote, behind whatever
// else stands in the text (mpirun's own words), or throws an Error.
std::string report_json(const HostReport& report);
std::string report_json(const HostsReport& report);
HostReport read_report(std::string_view text);

}  // namespace moemamba
