#include "runtime/doctor_report.h"

#include <algorithm>
#include <array>
#include <iomanip>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"

namespace moemamba {

namespace {

using Json = nlohmann::ordered_json;
constexpr std::array kVerdicts{Health::ok, Health::warn, Health::fail};
constexpr const char* kAddresses = "addresses";  // a fact that should differ

// What it means that a fact differs. Facts of other names: hosts that differ, no more.
struct FactMeaning {
  const char* name;
  Health verdict;
  const char* why;
  const char* mend;
};
constexpr FactMeaning kMeanings[] = {
    {"moemamba", Health::fail, "ranks of other builds refuse to start",
     "give all hosts the same build: one shared folder, or rsync build/ to all"},
    {"BLAS", Health::fail, "ranks refuse to start, for products would have other bits",
     "export OPENBLAS_CORETYPE=Haswell on all hosts"},
    {"SIMD", Health::fail, "ranks refuse to start", "leave one kind of host out of the hostfile"},
    {"MPI", Health::fail, "other versions do not speak with each other",
     "apt-get install openmpi-bin libopenmpi3 of one version on all hosts"},
    {"mpirun", Health::fail, "other versions do not speak with each other",
     "apt-get install openmpi-bin of one version on all hosts"},
    {"NCCL", Health::fail, "other versions do not speak with each other",
     "apt-get install libnccl2 of one version on all hosts"},
    {"driver", Health::warn, "speed and bugs differ", "install one driver on all hosts"},
    {"GPUs", Health::warn, "the slowest sets the pace of all",
     "leave one kind of host out of the hostfile"},
    {"cores", Health::warn, "the slowest sets the pace of all",
     "slots= of the hostfile in proportion to the cores"},
};

FactMeaning meaning_of(const std::string& name) {
  for (const FactMeaning& meaning : kMeanings)
    if (name == meaning.name) return meaning;
  return {"", Health::warn, "they differ", ""};
}

std::string value_in(const HostReport& report, const std::string& name) {
  const auto fact = std::ranges::find(report.facts, name, [](const auto& f) { return f.first; });
  return fact == report.facts.end() ? "nothing" : fact->second;
}

// "a, b, c and 5 more"
std::string names_of(const std::vector<std::string>& hosts) {
  constexpr size_t kMost = 8;
  std::string text;
  for (size_t i = 0; i < std::min(hosts.size(), kMost); ++i) text += (i ? ", " : "") + hosts[i];
  if (hosts.size() > kMost) text += concat(" and ", hosts.size() - kMost, " more");
  return text;
}

// What hosts have of one fact, in the order of the first that has it.
std::vector<std::pair<std::string, std::vector<std::string>>> holders_of(
    const std::vector<HostReport>& hosts, const std::string& name) {
  std::vector<std::pair<std::string, std::vector<std::string>>> holders;
  for (const HostReport& host : hosts) {
    const std::string value = value_in(host, name);
    auto holder = std::ranges::find(holders, value, [](const auto& h) { return h.first; });
    if (holder == holders.end()) holder = holders.insert(holders.end(), {value, {}});
    holder->second.push_back(host.host);
  }
  return holders;
}

Check shared_addresses(const std::vector<HostReport>& hosts) {
  std::map<std::string, std::vector<std::string>> holders;
  for (const HostReport& host : hosts) {
    std::istringstream addresses(value_in(host, kAddresses));
    for (std::string address; addresses >> address;)
      if (address.find('.') != std::string::npos) holders[address].push_back(host.host);
  }
  for (const auto& [address, names] : holders)
    if (names.size() > 1)
      return {kAddresses, Health::warn,
              concat(names_of(names), " all have ", address,
                     " (a bridge of containers?): Open MPI may try it and hang"),
              "--mca btl_tcp_if_include NETWORK/BITS --mca oob_tcp_if_include NETWORK/BITS of the "
              "network that joins them"};
  return {kAddresses, Health::ok, "no address is on two hosts", ""};
}

Json json_of(const Check& check) {
  Json json = {{"name", check.name}, {"verdict", name_of(check.verdict)}, {"found", check.found}};
  if (!check.mend.empty()) json["mend"] = check.mend;
  return json;
}

Json json_of(const std::vector<Check>& checks) {
  Json list = Json::array();
  for (const Check& check : checks) list.push_back(json_of(check));
  return list;
}

Json json_of(const HostReport& report) {
  Json facts = Json::object();
  for (const auto& [name, value] : report.facts) facts[name] = value;
  return {{"host", report.host},
          {"verdict", name_of(worst(report.checks))},
          {"checks", json_of(report.checks)},
          {"facts", facts}};
}

std::string text_of(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string line_of(const Check& check, const std::string& about = "") {
  std::ostringstream line;
  line << std::left << std::setw(6) << name_of(check.verdict) << std::setw(18) << check.name
       << about << check.found;
  if (!check.mend.empty()) line << "; mend: " << check.mend;
  line << "\n";
  return line.str();
}

Health verdict_of(const std::string& name) {
  for (Health verdict : kVerdicts)
    if (name == name_of(verdict)) return verdict;
  throw Error(concat("no verdict: ", name));
}

HostReport report_of(const Json& json) {
  HostReport report{.host = json.at("host")};
  for (const Json& check : json.at("checks"))
    report.checks.push_back({check.at("name"), verdict_of(check.at("verdict")), check.at("found"),
                             check.value("mend", std::string())});
  for (const auto& [name, value] : json.at("facts").items())
    report.facts.emplace_back(name, value.get<std::string>());
  return report;
}

}  // namespace

const char* name_of(Health verdict) {
  return verdict == Health::ok ? "ok" : verdict == Health::warn ? "warn" : "fail";
}

Health worst(const std::vector<Check>& checks) {
  Health verdict = Health::ok;
  for (const Check& check : checks) verdict = std::max(verdict, check.verdict);
  return verdict;
}

Health worst(const HostsReport& report) {
  Health verdict = worst(report.between);
  for (const HostReport& host : report.hosts) verdict = std::max(verdict, worst(host.checks));
  return verdict;
}

std::vector<Check> compare_hosts(const std::vector<HostReport>& hosts) {
  std::vector<std::string> names;
  for (const HostReport& host : hosts)
    for (const auto& [name, value] : host.facts)
      if (name != kAddresses && std::ranges::find(names, name) == names.end())
        names.push_back(name);
  std::vector<Check> checks;
  std::string alike;
  for (const std::string& name : names) {
    const auto holders = holders_of(hosts, name);
    if (holders.size() == 1) {
      alike += (alike.empty() ? "" : ", ") + name;
      continue;
    }
    const FactMeaning meaning = meaning_of(name);
    std::string found;
    for (const auto& [value, holding] : holders)
      found += concat(found.empty() ? "" : ", ", names_of(holding), ": \"", value, '"');
    checks.push_back({name, meaning.verdict, concat(found, ": ", meaning.why), meaning.mend});
  }
  checks.push_back({"alike", Health::ok, alike.empty() ? "nothing" : alike, ""});
  checks.push_back(shared_addresses(hosts));
  return checks;
}

std::string report_text(const HostReport& report) {
  std::string text;
  for (const Check& check : report.checks) text += line_of(check);
  return text;
}

std::string report_text(const HostsReport& report) {
  std::vector<std::pair<Check, std::vector<std::string>>> troubles;
  int well = 0;
  for (const HostReport& host : report.hosts)
    for (const Check& check : host.checks) {
      well += check.verdict == Health::ok;
      if (check.verdict == Health::ok) continue;
      auto same = std::ranges::find_if(troubles, [&](const auto& t) {
        return t.first.name == check.name && t.first.found == check.found;
      });
      if (same == troubles.end()) same = troubles.insert(troubles.end(), {check, {}});
      same->second.push_back(host.host);
    }
  std::string text =
      concat(name_of(Health::ok), "    ", report.hosts.size(), " hosts: ", well, " checks\n");
  for (const auto& [check, hosts] : troubles) text += line_of(check, names_of(hosts) + ": ");
  for (const Check& check : report.between) text += line_of(check);
  return text;
}

std::string report_json(const HostReport& report) {
  return text_of(json_of(report));
}

std::string report_json(const HostsReport& report) {
  Json hosts = Json::array();
  for (const HostReport& host : report.hosts) hosts.push_back(json_of(host));
  return text_of({{"verdict", name_of(worst(report))},
                  {"hosts", hosts},
                  {"between", json_of(report.between)}});
}

HostReport read_report(std::string_view text) {
  const size_t begin = text.find("{\"host\":");
  check(begin != std::string_view::npos, "no report of a host in it");
  const std::string_view line = text.substr(begin, text.find('\n', begin) - begin);
  try {
    return report_of(Json::parse(line));
  } catch (const Json::exception& error) {
    throw Error(concat("no report of a host: ", error.what()));
  }
}

}  // namespace moemamba
