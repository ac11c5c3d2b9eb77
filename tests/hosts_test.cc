// Machines made of network namespaces: that they are what tests take them for, and the
// communicator's suite across two of them.
#include "tests/support/hosts.h"

#include <signal.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "runtime/process_facts.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

class HostsTest : public ProgramTest {
 protected:
  void SetUp() override {
    if (const std::string why = Hosts::cannot_be_made(); !why.empty()) GTEST_SKIP() << why;
  }
};

TEST_F(HostsTest, HaveNamesAndReachEachOtherUnlessACableIsOut) {
  Hosts hosts(*this / "", 3, 1);
  const auto reaches = [&](int from, int to) {
    // TCP to a port where nobody listens: refused at once by a host that is there.
    const Result tried =
        shell(hosts.on(from) + "timeout 2 bash -c 'echo > /dev/tcp/" + hosts.name(to) + "/9'");
    return count(tried.err, "refused") > 0;
  };
  EXPECT_EQ(shell(hosts.on(1) + "hostname").out, "h1\n");
  EXPECT_EQ(shell(hosts.on(2) + "hostname -I").out, hosts.address(2) + " \n");
  EXPECT_TRUE(reaches(0, 1));
  EXPECT_TRUE(reaches(2, 1));
  hosts.cut(1);
  EXPECT_FALSE(reaches(0, 1));
  EXPECT_FALSE(reaches(1, 2));
  EXPECT_TRUE(reaches(0, 2));
  EXPECT_TRUE(reaches(1, 1));
  hosts.mend(1);
  EXPECT_TRUE(reaches(0, 1));
}

TEST_F(HostsTest, MpirunStartsADaemonOnEachOther) {
  Hosts hosts(*this / "", 2, 2);
  std::thread job([&] {
    const Result result = shell(hosts.on(0) + "mpirun --hostfile " + hosts.hostfile() + " -n 4 " +
                                "sh -c 'echo \"$(hostname) $TMPDIR ${OF_THE_TEST:-nothing}\"; "
                                "while [ ! -e go ]; do sleep 0.1; done'");
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(count(result.out, "h0 " + *this / "hosts/tmp-h0 "), 2) << result.out;
    EXPECT_EQ(count(result.out, "h1 " + *this / "hosts/tmp-h1 nothing"), 2) << result.out;
  });
  // A child of the daemon has its name until it becomes one of the job's processes.
  const auto daemon_and_ranks = [&] {
    return hosts.processes(1, "orted").size() == 1 && hosts.processes(1, "sleep").size() == 2;
  };
  bool up = false;
  for (int i = 0; i < 600 && !up; ++i, std::this_thread::sleep_for(std::chrono::milliseconds(50)))
    up = daemon_and_ranks();
  EXPECT_TRUE(up);
  EXPECT_EQ(hosts.processes(0, "orted").size(), 0u);
  EXPECT_EQ(hosts.processes(0, "mpirun").size(), 1u);
  put("go", "");
  job.join();
}

TEST_F(HostsTest, LeaveNothingBehind) {
  pid_t sleeper = 0;
  const auto spaces = [&] { return shell("ip netns list; ls /run/moemamba-hosts").out; };
  std::string prefix;
  {
    Hosts hosts(*this / "", 2, 1);
    Hosts others(*this / "", 1, 1);
    prefix = "moemamba-" + std::to_string(getpid());
    EXPECT_EQ(count(spaces(), prefix), 2 + 1 + 2 + 1 + 1 + 1);  // with two bridges
    std::thread([&] { shell("(" + hosts.on(1) + "sleep 1000) &"); }).join();
    for (int i = 0; i < 200 && hosts.processes(1, "sleep").empty(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ASSERT_EQ(hosts.processes(1).size(), 1u);
    EXPECT_EQ(hosts.processes(0).size(), 0u);
    sleeper = hosts.processes(1)[0];
  }
  EXPECT_EQ(count(spaces(), prefix), 0);
  EXPECT_EQ(process_start(sleeper), 0);
}

TEST_F(HostsTest, ThoseOfADeadProcessAreRemovedByTheNext) {
  const std::string dead = "moemamba-1-" + std::to_string(getpid()) + "-0-h0";
  // Process 1 began at another time.
  ASSERT_EQ(shell("ip netns add " + dead).code, 0);
  Hosts hosts(*this / "", 1, 1);
  EXPECT_EQ(count(shell("ip netns list").out, dead), 0);
}

TEST_F(HostsTest, CommunicatorsKeepTheirPromisesTwoRanksEach) {
  Hosts hosts(*this / "", 2, 2);
  const Result result =
      shell(hosts.on(0) + "timeout 300 mpirun --bind-to none --hostfile " + hosts.hostfile() +
            " -n 4 -x ASAN_OPTIONS=detect_leaks=0 " + MOEMAMBA_BINARY_DIR "/communicator_mpi_test");
  EXPECT_EQ(result.code, 0) << result.out << result.err;
}

}  // namespace
}  // namespace moemamba
