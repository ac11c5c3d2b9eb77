// What `moemamba doctor` says, from what it was given.
#include "runtime/doctor_report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "launcher/ask.h"
#include "launcher/doctor_checks.h"
#include "parallel/clocks.h"

namespace moemamba {
namespace {

HostReport host(const std::string& name, const std::string& sources, const std::string& cores,
                const std::string& addresses) {
  return {.host = name,
          .checks = {{"mpirun", Health::ok, "4.1.4", ""}},
          .facts = {{"moemamba", sources}, {"cores", cores}, {"addresses", addresses}}};
}

Check find(const std::vector<Check>& checks, const std::string& name) {
  for (const Check& check : checks)
    if (check.name == name) return check;
  ADD_FAILURE() << "no check " << name;
  return {};
}

TEST(DoctorReport, ComesBackFromItsText) {
  HostReport report = host("a", "0.1 \"x\"\n", "2", "10.0.0.1");
  report.checks.push_back({"disk", Health::fail, "it is \\ full", "rm"});
  const HostReport read = read_report("words of mpirun\n" + report_json(report) + "more\n");
  EXPECT_EQ(read.host, "a");
  EXPECT_EQ(read.facts, report.facts);
  ASSERT_EQ(read.checks.size(), 2u);
  EXPECT_EQ(read.checks[1].verdict, Health::fail);
  EXPECT_EQ(read.checks[1].found, "it is \\ full");
  EXPECT_EQ(read.checks[1].mend, "rm");
  EXPECT_EQ(read.checks[0].mend, "");
  for (const char* text : {"", "{\"host\":", "{\"host\":1}", "{\"host\":\"a\",\"checks\":[{}]}"})
    EXPECT_THROW(read_report(text), Error) << text;
}

TEST(DoctorReport, NamesWhatDiffersBetweenHostsAndHowMuchItMatters) {
  const auto checks =
      compare_hosts({host("a", "x", "8", "10.0.0.1"), host("b", "x", "4", "10.0.0.2"),
                     host("c", "y", "8", "10.0.0.3")});
  const Check build = find(checks, "moemamba");
  EXPECT_EQ(build.verdict, Health::fail);
  EXPECT_NE(build.found.find("a, b: \"x\", c: \"y\""), std::string::npos) << build.found;
  EXPECT_NE(build.mend, "");
  EXPECT_EQ(find(checks, "cores").verdict, Health::warn);
  EXPECT_EQ(find(checks, "addresses").verdict, Health::ok);
}

TEST(DoctorReport, FindsAddressesThatTwoHostsHave) {
  const auto checks = compare_hosts(
      {host("a", "x", "8", "10.0.0.1 172.17.0.1"), host("b", "x", "8", "10.0.0.2 172.17.0.1")});
  EXPECT_EQ(find(checks, "addresses").verdict, Health::warn);
  EXPECT_NE(find(checks, "addresses").found.find("a, b all have 172.17.0.1"), std::string::npos);
  EXPECT_EQ(find(checks, "alike").found, "moemamba, cores");
}

TEST(DoctorReport, SaysATroubleOfManyHostsOnce) {
  HostsReport report;
  for (const char* name : {"a", "b", "c"}) {
    report.hosts.push_back(host(name, "x", "8", ""));
    report.hosts.back().checks.push_back({"user", Health::warn, "root", "export X"});
  }
  const std::string text = report_text(report);
  EXPECT_NE(text.find("a, b, c: root; mend: export X\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("root"), text.rfind("root"));
  EXPECT_EQ(worst(report), Health::warn);
}

// Clocks of three members that are 0, 5 and -2.5 s ahead, whatever their messages take.
TEST(DoctorClocks, AreComparedWithinHalfARoundTrip) {
  constexpr int kMembers = 3;
  const double ahead[kMembers] = {0, 5, -2.5};
  auto seats = make_thread_group(kMembers, "clocks", std::chrono::seconds(60));
  std::vector<ClockReading> readings;
  std::vector<std::thread> members;
  for (int m = 0; m < kMembers; ++m)
    members.emplace_back([&, m] {
      const auto clock = [&] {
        return ahead[m] +
               std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
                   .count();
      };
      auto found = compare_clocks(*seats[size_t(m)], 50, clock);
      if (m == 0)
        readings = std::move(found);
      else
        EXPECT_TRUE(found.empty());
    });
  for (std::thread& member : members) member.join();
  ASSERT_EQ(readings.size(), size_t(kMembers));
  for (int m = 0; m < kMembers; ++m) {
    const ClockReading& reading = readings[size_t(m)];
    EXPECT_GT(reading.round_trip, 0);
    EXPECT_LE(std::abs(reading.offset - ahead[m]), reading.round_trip / 2 + 1e-6) << m;
  }
}

TEST(DoctorParts, FindVersionsAndLinks) {
  EXPECT_EQ(version_in("mpirun (Open MPI) 4.1.4"), "4.1.4");
  EXPECT_EQ(version_in("Open MPI v5.0.0rc12"), "5.0.0rc12");
  EXPECT_EQ(version_in("none"), "");
  EXPECT_EQ(gpu_links("\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\n"
                      "GPU0\t X \tNV18\tPIX\t0-15\nGPU1\tNV18\t X \tSYS\t0-15\n"),
            "NV18 between all 2");
  EXPECT_EQ(gpu_links("GPU0\t X \tPIX\tSYS\nGPU1\tPIX\t X \tSYS\nGPU2\tSYS\tSYS\t X \n"),
            "PIX: 1 pairs (0-1), SYS: 2 pairs (0-2, ...)");
  EXPECT_EQ(gpu_links("no such command"), "");
}

TEST(Ask, SaysHowACommandEnded) {
  const Answer well = ask({"sh", "-c", "echo out; echo err >&2; exit 7"}, 60);
  EXPECT_EQ(well.code, 7);
  EXPECT_EQ(well.out, "out\n");
  EXPECT_EQ(well.err, "err\n");
  EXPECT_EQ(ask({"sh", "-c", "kill -9 $$"}, 60).code, 128 + 9);
  EXPECT_TRUE(ask({"no-such-program-anywhere"}, 60).missing);
  EXPECT_EQ(ask({"sh", "-c", "echo $NAME"}, 60, {{"NAME", "value"}}).out, "value\n");
}

TEST(Ask, EndsWhatIsLateWithAllThatItStarted) {
  const auto start = std::chrono::steady_clock::now();
  const Answer late = ask({"sh", "-c", "echo first; sleep 1000 & sleep 1000"}, 0.5);
  EXPECT_TRUE(late.late);
  EXPECT_EQ(late.code, -1);
  EXPECT_EQ(late.out, "first\n");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(Ask, FindsTheSentenceBetweenTheFrames) {
  EXPECT_EQ(
      (Answer{.err = "[vm:1] ERROR_LOG\n-----\nIt cannot be\nreached: gone.\n\nMore.\n"}).gist(),
      "It cannot be reached: gone.");
  EXPECT_EQ((Answer{.err = "[vm:1] *** An error\n"}).gist(), "[vm:1] *** An error");
  EXPECT_EQ((Answer{.out = "moemamba: no\n"}).gist(), "moemamba: no");
  EXPECT_EQ(Answer{}.gist(), "it said nothing");
}

}  // namespace
}  // namespace moemamba
