#include "launcher/supervisor/hosts.h"

#include <unistd.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/udp.hpp>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <sstream>

#include "core/error.h"
#include "core/file.h"
#include "core/schema.h"
#include "launcher/supervisor/command_output.h"

namespace moemamba {

namespace {

constexpr auto kSlurmPatience = std::chrono::seconds(30);
constexpr const char* kLoopback = "127.0.0.1";
constexpr unsigned short kAnyPort = 9;  // nothing is sent: the system only chooses a way

[[noreturn]] void refuse(const std::string& place, const std::string& problem) {
  throw BadSettings(concat(place, ": ", problem, "; a line is \"NAME slots=RANKS\""));
}

int slots_of(const std::string& place, const std::string& word) {
  const size_t equals = word.find('=');
  int slots = 0;
  const char* end = word.data() + word.size();
  const auto read = std::from_chars(word.data() + equals + 1, end, slots);
  if (read.ec != std::errc() || read.ptr != end || slots < 1 || slots > 4096)
    refuse(place, concat(word, ": expected 1 to 4096 ranks"));
  return slots;
}

}  // namespace

std::string this_host() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

bool same_host(const std::string& a, const std::string& b) {
  const auto is_address = [](const std::string& name) {
    return name.find_first_not_of("0123456789.:") == std::string::npos;
  };
  if (a == b) return true;
  if (is_address(a) || is_address(b)) return false;
  const std::string short_a = a.substr(0, a.find('.')), short_b = b.substr(0, b.find('.'));
  return short_a == short_b && (short_a == a || short_b == b);
}

bool is_this_host(const std::string& name) {
  return name == "localhost" || name == kLoopback || same_host(name, this_host());
}

std::vector<HostSlots> read_hostfile(const std::string& path) {
  std::vector<HostSlots> hosts;
  std::string text;
  try {
    text = read_file(path);
  } catch (const Error& error) {
    throw BadSettings(concat("hostfile: ", error.what()));
  }
  std::istringstream lines(text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string place = concat("hostfile ", path, ":", ++number);
    std::istringstream words(line.substr(0, line.find('#')));
    HostSlots host{.name = "", .slots = 0};
    for (std::string word; words >> word;) {
      if (host.name.empty())
        host.name = word;
      else if (word.rfind("slots=", 0) == 0)
        host.slots = slots_of(place, word);
      else if (word.rfind("max_slots=", 0) != 0 && word.rfind("max-slots=", 0) != 0)
        refuse(place, concat("\"", word, "\" is not known"));
    }
    if (host.name.empty()) continue;
    if (host.name.find('=') != std::string::npos) refuse(place, "it begins with no name");
    host.slots = std::max(1, host.slots);
    const auto known = std::find_if(hosts.begin(), hosts.end(), [&](const HostSlots& other) {
      return other.name == host.name;
    });
    if (known == hosts.end())
      hosts.push_back(host);
    else
      known->slots += host.slots;
  }
  if (hosts.empty()) throw BadSettings(concat("hostfile ", path, ": it names no machine"));
  return hosts;
}

std::string hostfile_text(const std::vector<HostSlots>& hosts) {
  std::string text;
  for (const HostSlots& host : hosts) text += concat(host.name, " slots=", host.slots, "\n");
  return text;
}

std::vector<int> tasks_per_node(const std::string& text) {
  std::vector<int> tasks;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int count = 0, times = 1, end = 0;
    const bool repeated = std::sscanf(part.c_str(), "%d(x%d)%n", &count, &times, &end) == 2;
    if (!repeated && std::sscanf(part.c_str(), "%d%n", &count, &end) != 1) return {};
    if (size_t(end) != part.size() || count < 1 || times < 1 || times > 100000) return {};
    tasks.insert(tasks.end(), size_t(times), count);
  }
  return tasks;
}

std::optional<Allocation> slurm_allocation() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  if (variable("SLURM_JOB_ID").empty()) return std::nullopt;
  const std::vector<int> slots = tasks_per_node(variable("SLURM_TASKS_PER_NODE"));
  Allocation allocation{.ranks = std::atoi(variable("SLURM_NTASKS").c_str())};
  if (allocation.ranks < 1) allocation.ranks = std::accumulate(slots.begin(), slots.end(), 0);
  if (allocation.ranks < 1) return allocation;
  const auto end = std::chrono::steady_clock::now() + kSlurmPatience;
  std::istringstream names(
      output_of({"scontrol", "show", "hostnames", variable("SLURM_JOB_NODELIST")}, end));
  for (std::string name; std::getline(names, name);)
    allocation.hosts.push_back({.name = name, .slots = 1});
  if (allocation.hosts.size() != slots.size()) allocation.hosts.clear();
  for (size_t i = 0; i < allocation.hosts.size(); ++i) allocation.hosts[i].slots = slots[i];
  std::istringstream words(output_of({"srun", "--mpi=list"}, end, /*errors_too=*/true));
  for (std::string word; words >> word;)
    if (word == "pmix") allocation.srun_options = {"--mpi=pmix"};
  if (!allocation.srun_options.empty() &&
      output_of({"srun", "--help"}, end).find("--overlap") != std::string::npos)
    allocation.srun_options.emplace_back("--overlap");
  return allocation;
}

std::string control_address(const std::string& wanted, const std::vector<HostSlots>& hosts) {
  if (!wanted.empty()) return wanted;
  const auto other = std::find_if(hosts.begin(), hosts.end(),
                                  [](const HostSlots& host) { return !is_this_host(host.name); });
  if (other == hosts.end()) return kLoopback;
  namespace asio = boost::asio;
  asio::io_context context;
  boost::system::error_code error;
  asio::ip::udp::resolver resolver(context);
  for (const auto& found : resolver.resolve(other->name, std::to_string(kAnyPort), error)) {
    asio::ip::udp::socket socket(context);
    socket.connect(found.endpoint(), error);
    if (error) continue;
    const auto address = socket.local_endpoint(error).address();
    if (!error && !address.is_unspecified()) return address.to_string();
  }
  throw BadSettings(concat("launch.control_address: there is no way from this machine to ",
                           other->name, " (", error.message(),
                           "); set the address that ranks can connect to"));
}

}  // namespace moemamba
