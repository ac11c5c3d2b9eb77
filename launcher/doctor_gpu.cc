#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>
#include <map>
#include <regex>
#include <sstream>

#include "core/error.h"
#include "core/gpu_architectures.h"
#include "launcher/ask.h"
#include "launcher/doctor_checks.h"
#include "parallel/communicator_nccl.h"

namespace moemamba {

namespace {

constexpr double kPatience = 6;

// NVIDIA's cards that the machine has, with a driver or without.
int count_cards() {
  int cards = 0;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/bus/pci/devices", none)) {
    std::string vendor, kind;
    std::ifstream(entry.path() / "vendor") >> vendor;
    std::ifstream(entry.path() / "class") >> kind;
    cards += vendor == "0x10de" && kind.starts_with("0x03");
  }
  return cards;
}

struct SmiGpu {
  std::string driver;
  double used_mib = 0;
  std::string errors;  // of its memory, not corrected; "[N/A]" where it does not count them
};

std::vector<SmiGpu> ask_smi() {
  const Answer answer =
      ask({"nvidia-smi", "--format=csv,noheader,nounits",
           "--query-gpu=driver_version,memory.used,ecc.errors.uncorrected.volatile.total"},
          kPatience);
  std::vector<SmiGpu> gpus;
  std::istringstream lines(answer.ok() ? answer.out : "");
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    SmiGpu gpu;
    std::string used;
    std::getline(fields, gpu.driver, ',');
    std::getline(fields, used, ',');
    std::getline(fields >> std::ws, gpu.errors);
    gpu.used_mib = std::atof(used.c_str());
    gpus.push_back(gpu);
  }
  return gpus;
}

// "" where there is none.
std::string find_driver(const std::vector<SmiGpu>& smi) {
  if (!smi.empty()) return smi[0].driver;
  std::ifstream file("/proc/driver/nvidia/version");
  std::string line;
  return std::getline(file, line) ? version_in(line) : "";
}

Check check_driver(const std::string& driver) {
  if (!driver.empty()) return {"driver", Health::ok, "NVIDIA " + driver, ""};
  const int cards = count_cards();
  if (cards == 0) return {"driver", Health::ok, "no NVIDIA card, no driver", ""};
  return {"driver", Health::warn, concat(cards, " NVIDIA cards, but no driver that is seen here"),
          "apt-get install nvidia-driver, or docker run --gpus all"};
}

Check check_multicast() {
  const char* set = std::getenv("NCCL_NVLS_ENABLE");
  if (!set || std::string(set) == "0")
    return {"NVLink multicast", Health::ok, "off, as it has to be", ""};
  return {
      "NVLink multicast", Health::fail,
      concat("NCCL_NVLS_ENABLE is \"", set, "\": sums would depend on what was allocated before"),
      "unset NCCL_NVLS_ENABLE"};
}

// Of the GPU that both know under this number.
void add_smi(const SmiGpu& smi, Check& check) {
  check.found += concat("; ", bytes_text(smi.used_mib * (1 << 20)), " in use");
  if (smi.used_mib > 2048) {
    check.verdict = Health::warn;
    check.found += ", by others";
    check.mend = "nvidia-smi (lists the processes)";
  }
  if (std::atof(smi.errors.c_str()) > 0) {
    check.verdict = Health::warn;
    check.found += concat("; ", smi.errors, " errors of its memory that were not corrected");
    check.mend = "nvidia-smi -q -d ECC,ROW_REMAPPER; leave the host out until it was reset";
  }
}

}  // namespace

std::string gpu_links(const std::string& topology) {
  // The heading's colours; then rows "GPU0  X  NV18  SYS  ...", a column for each GPU first.
  const std::string plain = std::regex_replace(topology, std::regex("\x1b\\[[0-9;]*m"), "");
  std::vector<std::vector<std::string>> rows;
  std::istringstream lines(plain);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    if (!line.starts_with("GPU") || !(words >> name)) continue;
    rows.emplace_back();
    for (std::string word; words >> word;) rows.back().push_back(word);
  }
  std::map<std::string, std::vector<std::string>> pairs;  // link -> "0-1"
  for (size_t i = 0; i < rows.size(); ++i)
    for (size_t j = i + 1; j < rows.size() && j < rows[i].size(); ++j)
      pairs[rows[i][j]].push_back(concat(i, "-", j));
  if (pairs.size() == 1) return concat(pairs.begin()->first, " between all ", rows.size());
  std::string text;
  for (const auto& [link, which] : pairs)
    text += concat(text.empty() ? "" : ", ", link, ": ", which.size(), " pairs (", which[0],
                   which.size() > 1 ? ", ...)" : ")");
  return text;
}

int probe_gpus() {
  HostReport report;
  std::string why;
  const std::vector<gpu::Facts> gpus = gpu::devices(&why);
  const bool built = gpu::build() != "no CUDA";
  report.facts.emplace_back("CUDA", gpu::build());
  report.facts.emplace_back("NCCL", nccl_version());
  report.facts.emplace_back("why", why);
  report.checks.push_back(
      {"CUDA", Health::ok,
       built ? gpu::build() + (gpus.empty() ? ", no GPU: " + why : "") : "not in this build", ""});
  if (built && nccl_version().empty())
    report.checks.push_back({"NCCL", gpus.size() > 1 ? Health::warn : Health::ok,
                             "not in this build: a run on GPUs has one rank",
                             gpus.size() > 1 ? "apt-get install libnccl-dev; sh scripts/build.sh "
                                               "cuda-release"
                                             : ""});
  else if (built)
    report.checks.push_back({"NCCL", Health::ok, nccl_version(), ""});
  for (size_t i = 0; i < gpus.size(); ++i) {
    const gpu::Facts& gpu = gpus[i];
    Check check{concat("GPU ", i), Health::ok,
                concat(gpu.name, ", ", bytes_text(double(gpu.bytes)), ", ", gpu.multiprocessors,
                       " multiprocessors, compute capability ", gpu.capability / 10, ".",
                       gpu.capability % 10),
                ""};
    if (!gpu::runs_on(gpu::architectures(), gpu.capability)) {
      check.verdict = Health::fail;
      check.found += concat("; this build has no kernels for it (", gpu::architectures(), ")");
      check.mend =
          concat("--device=CPU, or build with -DCMAKE_CUDA_ARCHITECTURES=", gpu.capability);
    }
    report.checks.push_back(check);
  }
  std::cout << report_json(report);
  return 0;
}

void check_gpus(const DoctorOptions& options, HostReport& report) {
  auto found_later =
      std::async(std::launch::async, [] { return ask_probe("gpus", {}, kPatience, "CUDA"); });
  auto topology = std::async(std::launch::async, [] {
    return ask({"nvidia-smi", "topo", "-m"}, kPatience).out;
  });
  const std::vector<SmiGpu> smi = ask_smi();
  const std::string driver = find_driver(smi);
  report.checks.push_back(check_driver(driver));
  report.facts.emplace_back("driver", driver);
  HostReport found = found_later.get();
  std::string names;
  size_t gpus = 0;
  for (const Check& check : found.checks) gpus += check.name.starts_with("GPU ");
  for (Check& check : found.checks) {
    if (check.name == "CUDA" && check.verdict == Health::ok && !driver.empty() && gpus == 0) {
      check.verdict = Health::warn;
      check.mend = check.found == "not in this build" ? "sh scripts/build.sh cuda-release"
                                                      : "a driver that is new enough for it";
    }
    if (check.name.starts_with("GPU ")) {
      names += (names.empty() ? "" : ", ") + check.found.substr(0, check.found.find(','));
      const auto number = size_t(std::atoi(check.name.c_str() + 4));
      if (smi.size() == gpus && !std::getenv("CUDA_VISIBLE_DEVICES")) add_smi(smi[number], check);
    }
    report.checks.push_back(check);
  }
  for (const auto& [name, value] : found.facts)
    if (name != "why") report.facts.emplace_back(name, value);
  report.facts.emplace_back("GPUs", names);
  const std::string links = gpu_links(topology.get());
  if (gpus > 1)
    report.checks.push_back({"GPU links", Health::ok, links.empty() ? "not known" : links, ""});
  if (gpus > 0) report.checks.push_back(check_multicast());
  if (gpus > 0 && size_t(options.ranks) > gpus)
    report.checks.push_back(
        {"GPU slots", Health::fail,
         concat(options.ranks, " ranks, but ", gpus, " GPUs, one for each rank"),
         concat("slots=", gpus, " in the hostfile, or --ranks ", gpus)});
}

}  // namespace moemamba
