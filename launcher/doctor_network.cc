#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>

#include "core/error.h"
#include "launcher/doctor_checks.h"

namespace moemamba {

namespace {

struct Interface {
  std::string name, address;  // IPv4
  int bits = 0;               // of its network
  bool up = false, loopback = false;
};

struct FreeAddresses {
  void operator()(ifaddrs* list) const { freeifaddrs(list); }
};

// Those with an IPv4 address.
std::vector<Interface> find_interfaces() {
  ifaddrs* got = nullptr;
  if (getifaddrs(&got) != 0) return {};
  const std::unique_ptr<ifaddrs, FreeAddresses> list(got);
  std::vector<Interface> found;
  for (const ifaddrs* at = list.get(); at; at = at->ifa_next) {
    if (!at->ifa_addr || at->ifa_addr->sa_family != AF_INET || !at->ifa_netmask) continue;
    std::array<char, INET_ADDRSTRLEN> text{};
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(at->ifa_addr)->sin_addr, text.data(),
              text.size());
    const auto* mask = reinterpret_cast<const sockaddr_in*>(at->ifa_netmask);
    found.push_back({.name = at->ifa_name,
                     .address = text.data(),
                     .bits = std::popcount(mask->sin_addr.s_addr),
                     .up = (at->ifa_flags & IFF_UP) && (at->ifa_flags & IFF_RUNNING),
                     .loopback = (at->ifa_flags & IFF_LOOPBACK) != 0});
  }
  return found;
}

// Made by containers and virtual machines for themselves: leads to no other host.
bool is_local_bridge(const std::string& name) {
  for (const char* prefix : {"docker", "br-", "virbr", "veth", "cni", "podman", "lxc", "lxdbr"})
    if (name.starts_with(prefix)) return true;
  return false;
}

std::string speed_of(const std::string& name) {
  int megabits = 0;
  std::ifstream file("/sys/class/net/" + name + "/speed");
  return file >> megabits && megabits > 0 ? concat(" ", megabits, " Mbit/s") : "";
}

std::string infiniband() {
  std::string names;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/infiniband", none))
    names += " " + entry.path().filename().string();
  return names.empty() ? "" : "; InfiniBand:" + names;
}

}  // namespace

void check_network(HostReport& report) {
  const std::vector<Interface> interfaces = find_interfaces();
  std::string text, addresses, best;
  bool loopback = false, bridges = false;
  for (const Interface& i : interfaces) {
    loopback = loopback || (i.loopback && i.up);
    if (i.loopback) continue;
    text += concat(text.empty() ? "" : ", ", i.name, " ", i.address, "/", i.bits,
                   i.up ? " up" : " down", speed_of(i.name));
    if (!i.up) continue;
    addresses += (addresses.empty() ? "" : " ") + i.address;
    bridges = bridges || is_local_bridge(i.name);
    if (best.empty() && !is_local_bridge(i.name)) best = i.name;
  }
  report.facts.emplace_back("addresses", addresses);
  if (!loopback) {
    report.checks.push_back({"network", Health::fail, "the loopback is down, and mpirun needs it",
                             "ip link set lo up"});
    return;
  }
  const char* chosen = std::getenv("OMPI_MCA_btl_tcp_if_include");
  Check check{"network", Health::ok, text.empty() ? "nothing but the loopback" : text, ""};
  check.found += infiniband();
  if (chosen) {
    check.found += concat("; Open MPI takes ", chosen, ", as it was told");
  } else if (bridges && !best.empty()) {
    check.verdict = Health::warn;
    check.found += "; with several hosts Open MPI tries them all, bridges of containers too";
    check.mend =
        concat("export OMPI_MCA_btl_tcp_if_include=", best, " OMPI_MCA_oob_tcp_if_include=", best);
  } else if (!best.empty()) {
    check.found += "; Open MPI takes all that are up";
  }
  report.checks.push_back(check);
}

}  // namespace moemamba
