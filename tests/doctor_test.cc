// `moemamba doctor` as people and programs call it, on machines with and without something missing.
#include <sys/mount.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "core/file.h"
#include "tests/support/hosts.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

class Doctor : public ProgramTest {
 protected:
  // name -> line. Every line is a check, and says what mends it where it is not ok.
  std::map<std::string, std::string> lines_of(const Result& result) const {
    static const std::regex check(
        "(ok   |warn |fail ) ([A-Za-z][A-Za-z0-9 ]*[A-Za-z0-9])  +[^ ].*");
    std::map<std::string, std::string> lines;
    std::istringstream text(result.out);
    for (std::string line; std::getline(text, line);) {
      std::smatch match;
      if (!std::regex_match(line, match, check)) {
        ADD_FAILURE() << "no check: " << line;
        continue;
      }
      EXPECT_EQ(match[1] == "ok   ", line.find("; mend: ") == std::string::npos) << line;
      lines[match[2]] = line;
    }
    EXPECT_EQ(result.code == 1, result.out.find("fail ") != std::string::npos) << result.out;
    return lines;
  }
  // The programs named, of this machine, and scripts of the test, in a PATH of their own.
  std::string path_with(const std::map<std::string, std::string>& scripts) const {
    const std::string folder = *this / "path";
    fs::create_directories(folder);
    for (const auto& [name, script] : scripts) {
      const std::string file = put("path/" + name, "#!/bin/sh\n" + script + "\n");
      fs::permissions(file, fs::perms::owner_all);
    }
    return folder;
  }
};

bool starts(const std::string& line, const std::string& verdict) {
  return line.compare(0, verdict.size(), verdict) == 0;
}

TEST_F(Doctor, SaysALineForEachCheck) {
  const Result result = shell("$moemamba doctor");
  EXPECT_TRUE(result.code == 0 || result.code == 1) << result.err;
  const auto lines = lines_of(result);
  for (const char* name :
       {"moemamba",  "compiler",        "MPI",    "MPI threads", "mpirun",        "ranks",
        "user",      "cores",           "slots",  "NUMA",        "memory",        "shared memory",
        "SIMD",      "temporary files", "clock",  "open files",  "locked memory", "core files",
        "stack",     "network",         "driver", "CUDA",        "folder",        "free space",
        "new names", "fsync",           "disk"})
    EXPECT_TRUE(lines.contains(name)) << name << " in\n" << result.out;
  // The tests' own machine has what training needs. MPI may be late once where much else goes on.
  for (const char* name : {"MPI", "MPI threads", "mpirun", "ranks", "SIMD", "new names"}) {
    auto found = lines;
    for (int i = 0; i < 3 && !starts(found[name], "ok"); ++i)
      found = lines_of(shell("$moemamba doctor"));
    EXPECT_TRUE(starts(found[name], "ok")) << found[name];
  }
  for (const auto& entry : fs::directory_iterator(folder_of(run())))
    EXPECT_EQ(entry.path().filename().string().find("moemamba-doctor"), std::string::npos) << entry;
}

TEST_F(Doctor, PrintsOneObjectForPrograms) {
  const Result result = shell("$moemamba doctor --json --ranks 2");
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(count(result.out, "\n"), 1);
  EXPECT_FALSE(json.at("host").get<std::string>().empty());
  EXPECT_EQ(json.at("verdict") == "fail", result.code == 1);
  EXPECT_GT(json.at("checks").size(), 20u);
  for (const auto& check : json.at("checks"))
    EXPECT_EQ(check.at("verdict") == "ok", !check.contains("mend")) << check;
  for (const char* fact : {"moemamba", "MPI", "mpirun", "cores", "SIMD", "BLAS", "addresses"})
    EXPECT_TRUE(json.at("facts").contains(fact)) << fact;
}

TEST_F(Doctor, RefusesWhatItDoesNotKnow) {
  put("hosts", "node1 slot=8\n");
  for (const char* words : {"--ranks 0", "--ranks x", "much", "--json=maybe", "--hostfile missing",
                            "--hostfile hosts", "--probe nothing"})
    EXPECT_EQ(shell(std::string("$moemamba doctor ") + words).code, 2) << words;
  EXPECT_NE(shell("$moemamba doctor --hostfile hosts").err.find("hosts:1: \"slot=8\""),
            std::string::npos);
}

TEST_F(Doctor, FailsWithoutMpirunAndSaysWhatInstallsIt) {
  const Result result = shell("PATH=" + path_with({}) + " $moemamba doctor");
  EXPECT_EQ(result.code, 1) << result.err;
  const auto lines = lines_of(result);
  EXPECT_TRUE(starts(lines.at("mpirun"), "fail")) << lines.at("mpirun");
  EXPECT_NE(lines.at("mpirun").find("mend: apt-get install openmpi-bin"), std::string::npos);
  EXPECT_FALSE(lines.contains("ranks"));
}

TEST_F(Doctor, TellsAnotherMpirunFromItsOwn) {
  const std::string path = path_with({{"mpirun", "echo 'mpirun (Open MPI) 1.2.3'"}});
  const auto lines = lines_of(shell("PATH=" + path + ":$PATH $moemamba doctor"));
  EXPECT_TRUE(starts(lines.at("mpirun"), "fail")) << lines.at("mpirun");
  EXPECT_NE(lines.at("mpirun").find("1.2.3"), std::string::npos);
}

TEST_F(Doctor, WaitsForNothingThatHangs) {
  const std::string path = path_with(
      {{"mpirun", "[ \"$1\" = --version ] && exec /usr/bin/mpirun --version; exec sleep 1000"},
       {"nvidia-smi", "exec sleep 1000"}});
  const auto start = std::chrono::steady_clock::now();
  const auto lines = lines_of(shell("PATH=" + path + ":$PATH $moemamba doctor"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  if (lines.contains("ranks")) {  // an mpirun lies in /usr/bin
    EXPECT_TRUE(starts(lines.at("ranks"), "fail")) << lines.at("ranks");
  }
}

TEST_F(Doctor, SeesADriverThatTheBuildDoesNotUse) {
  const std::string path =
      path_with({{"nvidia-smi", "case \"$*\" in *query-gpu*) echo '535.129.03, 4, 0' ;; esac"}});
  const auto lines = lines_of(shell("PATH=" + path + ":$PATH $moemamba doctor"));
  EXPECT_NE(lines.at("driver").find("NVIDIA 535.129.03"), std::string::npos);
  // A build without CUDA says how to make one with it; one with CUDA finds no GPU, or has one.
  if (lines.at("CUDA").find("not in this build") != std::string::npos) {
    EXPECT_NE(lines.at("CUDA").find("mend: sh scripts/build.sh cuda-release"), std::string::npos);
  }
}

TEST_F(Doctor, MeasuresLimits) {
  const auto lines = lines_of(shell("ulimit -n 100; ulimit -s 512; $moemamba doctor --ranks 4000"));
  EXPECT_TRUE(starts(lines.at("open files"), "fail")) << lines.at("open files");
  EXPECT_TRUE(starts(lines.at("stack"), "warn")) << lines.at("stack");
  EXPECT_TRUE(starts(lines.at("slots"), "warn")) << lines.at("slots");
}

TEST_F(Doctor, NamesAFolderThatIsNone) {
  put("file", "text");
  const auto lines = lines_of(shell("$moemamba doctor --run file"));
  EXPECT_TRUE(starts(lines.at("folder"), "fail")) << lines.at("folder");
}

TEST_F(Doctor, WarnsOfADiskThatIsSmallAndInMemory) {
  const std::string disk = *this / "disk";
  fs::create_directories(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=12m") != 0)
    GTEST_SKIP() << "a small file system cannot be mounted: needs root and CAP_SYS_ADMIN";
  const auto small = lines_of(shell("$moemamba doctor --run disk/a/run"));
  put("disk/full", std::string(12 << 20, 'x'));
  const auto full = lines_of(shell("$moemamba doctor --run disk/a/run"));
  EXPECT_TRUE(fs::is_empty(disk) || !fs::exists(disk + "/a"));
  umount(disk.c_str());
  EXPECT_TRUE(starts(small.at("folder"), "warn")) << small.at("folder");
  EXPECT_TRUE(starts(small.at("free space"), "warn")) << small.at("free space");
  EXPECT_TRUE(starts(full.at("free space"), "fail")) << full.at("free space");
  EXPECT_TRUE(starts(full.at("disk"), "fail")) << full.at("disk");
  EXPECT_NE(full.at("disk").find("No space left"), std::string::npos) << full.at("disk");
}

TEST_F(Doctor, LooksAtEveryHostAndBetweenThem) {
  if (const std::string why = Hosts::cannot_be_made(); !why.empty()) GTEST_SKIP() << why;
  Hosts hosts(*this / "", 2, 2);
  const Result result = shell(hosts.on(0) + "$moemamba doctor --hostfile " + hosts.hostfile() +
                              " --run runs/new --json");
  const auto json = nlohmann::json::parse(result.out);
  ASSERT_EQ(json.at("hosts").size(), 2u);
  EXPECT_EQ(json.at("hosts")[0].at("host"), "h0");
  EXPECT_GT(json.at("hosts")[1].at("checks").size(), 20u);
  std::map<std::string, nlohmann::json> between;
  for (const auto& check : json.at("between")) between[check.at("name")] = check;
  for (const char* name : {"messages", "clocks", "alike"})
    ASSERT_TRUE(between.contains(name)) << name << " in " << result.out;
  EXPECT_EQ(between.at("messages").at("verdict"), "ok") << result.out;
  EXPECT_EQ(between.at("clocks").at("verdict"), "ok") << result.out;
  EXPECT_NE(between.at("alike").at("found").get<std::string>().find("moemamba, MPI"),
            std::string::npos)
      << result.out;
  bool shared = false;
  for (const auto& check : json.at("hosts")[1].at("checks"))
    shared = shared || (check.at("name") == "shared folder" && check.at("verdict") == "ok");
  EXPECT_TRUE(shared) << result.out;
  EXPECT_FALSE(fs::exists(*this / "runs"));
}

TEST_F(Doctor, NamesTheHostThatIsNotReached) {
  put("hosts", "localhost\nno-such-host.invalid slots=2\n");
  const Result result = shell("$moemamba doctor --hostfile hosts");
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.out.find("fail  reach             no-such-host.invalid: "), std::string::npos)
      << result.out << result.err;
  EXPECT_NE(result.out.find("mend: ssh no-such-host.invalid"), std::string::npos) << result.out;
}

}  // namespace
}  // namespace moemamba
