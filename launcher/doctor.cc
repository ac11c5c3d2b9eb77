#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cstdio>
#include <future>

#include "core/schema.h"
#include "launcher/ask.h"
#include "launcher/commands.h"
#include "launcher/doctor_checks.h"
#include "launcher/launch.h"

namespace moemamba {

namespace {

int probe(const DoctorOptions& options) {
  if (options.probe == "threads") return probe_threads();
  if (options.probe == "ranks") return probe_ranks();
  if (options.probe == "clocks") return probe_clocks();
  if (options.probe == "gpus") return probe_gpus();
  if (options.probe == "disk") return probe_disk(options);
  throw BadSettings(concat("--probe ", options.probe, ": there is none"));
}

int doctor(const DoctorOptions& options) {
  if (!options.probe.empty()) return probe(options);
  if (options.hostfile.empty()) {
    const HostReport report = examine_host(options);
    std::fputs((options.json ? report_json(report) : report_text(report)).c_str(), stdout);
    return worst(report.checks) == Health::fail ? 1 : 0;
  }
  const HostsReport report = examine_hosts(options);
  std::fputs((options.json ? report_json(report) : report_text(report)).c_str(), stdout);
  return worst(report) == Health::fail ? 1 : 0;
}

}  // namespace

HostReport ask_probe(const std::string& probe, const std::vector<std::string>& more, double seconds,
                     const std::string& name) {
  std::vector<std::string> words = probe_words(probe);
  words.insert(words.end(), more.begin(), more.end());
  const Answer answer = ask(words, seconds);
  try {
    check(answer.ok(),
          answer.late ? concat("no answer within ", seconds, " s: it hangs") : answer.gist());
    return read_report(answer.out);
  } catch (const Error& error) {
    const std::string what = error.what();
    return {.checks = {{name, Health::fail, what.substr(0, what.find('\n')),
                        "dmesg | tail (what the system says of it)"}}};
  }
}

HostReport examine_host(const DoctorOptions& options) {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  // Those that wait for other processes do so at the same time.
  const auto begin = [](auto check) {
    return std::async(std::launch::async, [check] {
      HostReport part;
      check(part);
      return part;
    });
  };
  std::future<HostReport> parts[] = {begin([](HostReport& part) { check_build(part); }),
                                     begin([](HostReport& part) { check_mpi(part); }),
                                     begin([&](HostReport& part) { check_machine(options, part); }),
                                     begin([&](HostReport& part) { check_limits(options, part); }),
                                     begin([](HostReport& part) { check_network(part); }),
                                     begin([&](HostReport& part) { check_gpus(options, part); }),
                                     begin([&](HostReport& part) { check_disk(options, part); })};
  HostReport report{.host = name.data()};
  for (auto& waited : parts) {
    const HostReport part = waited.get();
    report.checks.insert(report.checks.end(), part.checks.begin(), part.checks.end());
    report.facts.insert(report.facts.end(), part.facts.begin(), part.facts.end());
  }
  return report;
}

Command add_doctor(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand(
      "doctor", "What this machine, or each of several, lacks for training, and what mends it");
  auto options = std::make_shared<DoctorOptions>();
  command
      ->add_option("--run", options->run,
                   "Folder of the run that is planned; its disk is measured (default: the\n"
                   "working directory's)")
      ->type_name("FOLDER");
  command->add_option("--ranks", options->ranks, "Ranks that are to run on a machine")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
  command
      ->add_option("--hostfile", options->hostfile,
                   "Look at each of these machines through mpirun, and at what is between\n"
                   "them; one a line, as mpirun's --hostfile has them")
      ->type_name("FILE");
  command->add_flag("--json", options->json, "One JSON object for programs");
  command->add_option("--probe", options->probe)->group("");  // what the doctor asks itself
  command->add_option("--mark", options->mark)->group("");
  command->footer(
      "Prints a line for each check: ok, warn or fail, what was found, and the command that mends "
      "it.\n"
      "Takes less than ten seconds, and writes 64 MiB or less, which it deletes.\n"
      "Exit codes: 0 nothing fails; 1 something does; 2 usage.");
  return [options] { return doctor(*options); };
}

}  // namespace moemamba
