// The parts of the supervisor that meet files, processes and machines.
#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "core/schema.h"
#include "launcher/supervisor/command_output.h"
#include "launcher/supervisor/event_log.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/job.h"
#include "launcher/supervisor/job_state.h"
#include "launcher/supervisor/leftovers.h"
#include "launcher/supervisor/outlet.h"
#include "launcher/supervisor/stack_text.h"
#include "runtime/process_facts.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::string slots_text(const std::vector<HostSlots>& hosts) {
  std::string text;
  for (const HostSlots& host : hosts) text += concat(host.name, ":", host.slots, " ");
  return text;
}

TEST(Hosts, AreReadAsMpirunReadsThem) {
  TemporaryFolder folder;
  const std::string file = folder.put(
      "hosts",
      "# all\nnode1 slots=8\n\n  node2.cluster slots=4 max_slots=8 # half\nnode3\nnode3\n");
  const auto hosts = read_hostfile(file);
  EXPECT_EQ(slots_text(hosts), "node1:8 node2.cluster:4 node3:2 ");
  EXPECT_EQ(slots_text(read_hostfile(folder.put("again", hostfile_text(hosts)))),
            slots_text(hosts));
}

TEST(Hosts, AFileThatIsNoneIsRefusedWithItsLine) {
  TemporaryFolder folder;
  for (const char* text :
       {"node1 slots=0\n", "node1 slots=x\n", "node1 slots=\n", "node1 cores=4\n", "slots=4\n", "",
        "# nothing\n", "node1 slots=5000\n"}) {
    try {
      read_hostfile(folder.put("hosts", text));
      ADD_FAILURE() << text;
    } catch (const BadSettings& error) {
      EXPECT_NE(std::string(error.what()).find("hostfile "), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(read_hostfile(folder / "missing"), BadSettings);
}

TEST(Hosts, AreTheSameWithOrWithoutTheirDomain) {
  EXPECT_TRUE(same_host("node1", "node1"));
  EXPECT_TRUE(same_host("node1", "node1.cluster"));
  EXPECT_TRUE(same_host("node1.cluster", "node1"));
  EXPECT_FALSE(same_host("node1.east", "node1.west"));
  EXPECT_FALSE(same_host("node1", "node2"));
  EXPECT_FALSE(same_host("10.0.0.1", "10.0.0.2"));
  EXPECT_FALSE(same_host("10", "10.0.0.2"));
  EXPECT_TRUE(is_this_host(this_host()));
}

TEST(Hosts, TheControlAddressIsLocalWhereAllRanksAre) {
  EXPECT_EQ(control_address("", {}), "127.0.0.1");
  EXPECT_EQ(control_address("", {{this_host(), 4}, {"localhost", 2}}), "127.0.0.1");
  EXPECT_EQ(control_address("10.1.2.3", {}), "10.1.2.3");
  EXPECT_THROW(control_address("", {{"no-such-host.invalid", 1}}), BadSettings);
}

TEST(Hosts, SlurmsListOfTasksIsRead) {
  EXPECT_EQ(tasks_per_node("8"), (std::vector<int>{8}));
  EXPECT_EQ(tasks_per_node("8(x2),4"), (std::vector<int>{8, 8, 4}));
  for (const char* text : {"", "x", "8(x", "8(x2)y", "-1", "8(x0)"})
    EXPECT_TRUE(tasks_per_node(text).empty()) << text;
}

// Without --ntasks there is no SLURM_NTASKS.
TEST(Hosts, AnAllocationSaysHowManyRanksItTakes) {
  namespace fs = std::filesystem;
  TemporaryFolder folder;
  for (const auto& [tool, does] : {std::pair("scontrol", "echo n1; echo n2"), {"srun", "exit 0"}})
    fs::permissions(folder.put(tool, concat("#!/bin/sh\n", does, "\n")), fs::perms::owner_all);
  struct Case {
    const char *tasks, *per_node;
    int ranks;
    const char* hosts;
  };
  for (const Case& c : {Case{"6", "3(x2)", 6, "n1:3 n2:3 "},
                        {nullptr, "8(x2)", 16, "n1:8 n2:8 "},
                        {nullptr, "8,4", 12, "n1:8 n2:4 "},
                        {nullptr, nullptr, 0, ""}}) {
    const pid_t child = fork();  // for an environment of its own
    if (child != 0) {
      int status = -1;
      waitpid(child, &status, 0);
      EXPECT_EQ(status, 0) << c.ranks << " ranks";
      continue;
    }
    setenv("PATH", folder.path().c_str(), 1);
    for (const auto& [name, value] : {std::pair("SLURM_JOB_ID", "7"),
                                      {"SLURM_NTASKS", c.tasks},
                                      {"SLURM_TASKS_PER_NODE", c.per_node},
                                      {"SLURM_JOB_NODELIST", "n[1-2]"}})
      value ? setenv(name, value, 1) : unsetenv(name);
    const auto allocation = slurm_allocation();
    const bool right =
        allocation && allocation->ranks == c.ranks && slots_text(allocation->hosts) == c.hosts;
    unsetenv("SLURM_JOB_ID");
    _exit(right && !slurm_allocation() ? 0 : 1);
  }
}

TEST(State, IsReadBackAndOthersAreNone) {
  TemporaryFolder folder;
  PosixFileSystem files;
  EXPECT_FALSE(read_job_state(folder.path()));
  JobState state{.running = true,
                 .resumes = true,
                 .job = "00ff",
                 .attempt = 7,
                 .host = "node\"1",
                 .boot_id = "b",
                 .pid = 4711,
                 .started = 12345678901,
                 .ranks = 8,
                 .expert = 4,
                 .steps_lost = 3,
                 .step_limit_ms = 1500,
                 .command = {"train", "--data.train=a b\n", "8"}};
  state.memory.crashes[12] = 2;
  write_job_state(files, folder.path(), state);
  const auto read = read_job_state(folder.path());
  ASSERT_TRUE(read);
  EXPECT_TRUE(read->running);
  EXPECT_TRUE(read->resumes);
  EXPECT_EQ(read->job, state.job);
  EXPECT_EQ(read->attempt, 7);
  EXPECT_EQ(read->host, state.host);
  EXPECT_EQ(read->started, state.started);
  EXPECT_EQ(read->expert, 4);
  EXPECT_EQ(read->steps_lost, 3);
  EXPECT_EQ(read->step_limit_ms, 1500);
  EXPECT_EQ(read->command, state.command);
  EXPECT_EQ(read->memory.crashes.at(12), 2);
  const std::string text = read_file(folder / "state.json");
  for (size_t size = 0; size + 1 < text.size(); ++size) {
    folder.put("state.json", text.substr(0, size));
    EXPECT_FALSE(read_job_state(folder.path())) << size;
  }
  folder.put("state.json", "{\"version\":2}");
  EXPECT_FALSE(read_job_state(folder.path()));
}

TEST(Events, AreWholeLinesBehindATornOneAndWaitWhileTheyAreHeld) {
  TemporaryFolder folder;
  folder.put("events.jsonl", "{\"time\":1}\n{\"tim");
  RunView view;
  view.job = "00ff";
  Outlet nowhere(-1);
  bool hold = true;
  EventLog log(folder.path(), view, nowhere, [&] { return hold; });
  log.note({.kind = "saved", .step = 12, .text = "one \"line\"\nand more", .seconds = 0.5});
  EXPECT_EQ(read_file(folder / "events.jsonl"), "{\"time\":1}\n{\"tim");
  hold = false;
  log.say({.kind = "done", .text = "end"});
  const std::string text = read_file(folder / "events.jsonl");
  EXPECT_EQ(text.rfind("{\"time\":1}\n{\"tim\n{\"time\":", 0), 0u) << text;
  EXPECT_NE(text.find(R"("kind":"saved","step":12,"seconds":0.5,"job":"00ff",)"
                      R"("text":"one \"line\"\nand more"})"
                      "\n"),
            std::string::npos)
      << text;
  ASSERT_EQ(view.events.size(), 2u);
  EXPECT_EQ(view.events[1].kind, "done");
  for (int i = 0; i < 500; ++i) log.note({.kind = "saved", .step = i, .text = ""});
  EXPECT_EQ(view.events.size(), 200u);
  EXPECT_EQ(view.events.back().step, 499);
}

TEST(Events, OfEarlierSupervisorsAreRecalled) {
  TemporaryFolder folder;
  Outlet nowhere(-1);
  RunView before;
  EventLog first(folder.path(), before, nowhere, [] { return false; });
  for (int i = 0; i < 300; ++i)
    first.note({.kind = "saved", .step = i, .text = std::string(2000, 'x'), .seconds = 0.5});
  first.note({.kind = "lost", .text = "rank 1 \"has\" died"});
  folder.put("events.jsonl", read_file(folder / "events.jsonl") + "[1]\n{\"time\":\n{\"tim");
  RunView view;
  EventLog(folder.path(), view, nowhere, [] { return false; }).recall();
  ASSERT_GT(view.events.size(), 100u);  // as many as the end of the file has
  const EventView &last = view.events.back(), &other = view.events[view.events.size() - 2];
  EXPECT_EQ(last.kind, "lost");
  EXPECT_EQ(last.text, "rank 1 \"has\" died");
  EXPECT_EQ(last.step, -1);
  EXPECT_EQ(last.wall_seconds, before.events.back().wall_seconds);
  EXPECT_EQ(other.step, 299);
  for (int i = 0; i < 300; ++i) first.note({.kind = "saved", .step = i, .text = ""});
  EventLog(folder.path(), view, nowhere, [] { return false; }).recall();
  EXPECT_EQ(view.events.size(), 200u);
  RunView none;
  EventLog(folder / "missing", none, nowhere, [] { return false; }).recall();
  EXPECT_TRUE(none.events.empty());
}

// A terminal that was stopped with Ctrl-S, a pipe that nobody reads.
TEST(Outlet, NeverWaitsForItsReaderAndLosesTheOldest) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  Outlet outlet(ends[1]);
  const auto begin = Clock::now();
  const std::string line(999, 'x');
  for (int i = 0; i < 4000; ++i) outlet.write(line + "\n");
  outlet.say("the last");
  EXPECT_LT(since(begin), 20);
  std::string read_back;
  char bytes[65536];
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  for (int i = 0; i < 1000; ++i) {
    const ssize_t got = read(ends[0], bytes, sizeof bytes);
    if (got > 0) read_back.append(bytes, size_t(got));
    outlet.pump();
  }
  close(ends[0]);
  close(ends[1]);
  EXPECT_LT(read_back.size(), 2u << 20);
  EXPECT_EQ(read_back.substr(read_back.size() - 10), "\nthe last\n");
}

TEST(Outlet, BeginsALineOfItsOwnBehindAnOpenOne) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  Outlet outlet(ends[1]);
  outlet.write("\rstep 3");
  outlet.say("moemamba: lost");
  outlet.say("moemamba: restarting");
  outlet.finish(5);
  close(ends[1]);
  char bytes[200];
  const ssize_t got = read(ends[0], bytes, sizeof bytes);
  close(ends[0]);
  EXPECT_EQ(std::string(bytes, size_t(std::max<ssize_t>(got, 0))),
            "\rstep 3\nmoemamba: lost\nmoemamba: restarting\n");
}

TEST(Command, IsKilledWhenItsTimeIsOver) {
  const auto begin = Clock::now();
  const auto in = [](double seconds) {
    return Clock::now() + std::chrono::milliseconds(int64_t(seconds * 1e3));
  };
  EXPECT_EQ(output_of({"sh", "-c", "echo a; echo b >&2; exec sleep 600"}, in(1)), "a\n");
  EXPECT_LT(since(begin), 60);
  EXPECT_EQ(output_of({"sh", "-c", "echo b >&2"}, in(60), /*errors_too=*/true), "b\n");
  EXPECT_EQ(output_of({"/no/such/program"}, in(60)), "");
}

extern "C" __attribute__((noinline, visibility("default"))) int a_function_to_be_named(int x) {
  return x + 1;
}

TEST(StackText, NamesFunctionsWhereItCan) {
  Dl_info facts{};  // where this program lies in memory
  ASSERT_NE(dladdr(reinterpret_cast<void*>(&a_function_to_be_named), &facts), 0);
  const auto base = reinterpret_cast<uint64_t>(facts.dli_fbase);
  char frame[600];
  std::snprintf(
      frame, sizeof frame, "%s+0x%llx", std::filesystem::read_symlink("/proc/self/exe").c_str(),
      static_cast<unsigned long long>(reinterpret_cast<uint64_t>(&a_function_to_be_named) - base));
  const std::string text = stack_text({"poll", frame, "/no/such/file+0x12", "odd+0xzz"}, 30);
  EXPECT_EQ(text.rfind("    poll\n", 0), 0u) << text;
  EXPECT_NE(text.find("    /no/such/file+0x12\n    odd+0xzz\n"), std::string::npos) << text;
  if (output_of({"addr2line", "--version"}, Clock::now() + std::chrono::seconds(30)).empty())
    GTEST_SKIP() << "addr2line is not installed";
  EXPECT_NE(text.find("    a_function_to_be_named"), std::string::npos) << text;
  EXPECT_EQ(stack_text({}, 1), "");
}

TEST(Job, EndsWithItsCodeAndPrintsIntoItsFile) {
  TemporaryFolder folder;
  boost::asio::io_context context;
  const std::pair<const char*, int> cases[] = {
      {"echo out; echo err >&2; exit 7", 7}, {"kill -9 $$", 128 + 9}, {"exit 0", 0}};
  for (const auto& [command, code] : cases) {
    Job job(context);
    bool ended = false;
    job.start({"sh", "-c", command}, folder / "log", [&] { ended = true; });
    EXPECT_TRUE(job.runs());
    context.run();
    context.restart();
    EXPECT_TRUE(ended);
    EXPECT_FALSE(job.runs());
    EXPECT_EQ(job.code(), code);
  }
  EXPECT_EQ(read_file(folder / "log"), "out\nerr\n");
  Job job(context);
  job.start({"/no/such/program"}, folder / "log", [] {});
  context.run();
  EXPECT_EQ(job.code(), 127);
  EXPECT_NE(read_file(folder / "log").find("/no/such/program: No such file"), std::string::npos);
}

TEST(Job, LeadsASessionAndInheritsNothingOpen) {
  TemporaryFolder folder;
  const int open_here = open("/dev/null", O_RDONLY);  // without O_CLOEXEC
  boost::asio::io_context context;
  Job job(context);
  job.start({"sh", "-c", "cut -d' ' -f6 /proc/$$/stat; echo $$; ls /proc/$$/fd | wc -l"},
            folder / "log", [] {});
  const pid_t pid = job.pid();
  context.run();
  close(open_here);
  EXPECT_EQ(read_file(folder / "log"), concat(pid, "\n", pid, "\n3\n"));
}

TEST(Job, OfAnotherProcessIsTakenOverIfItIsStillTheSameOne) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t parent = fork();  // whose child is a stranger to this process
  if (parent == 0) {
    const pid_t child = fork();
    if (child == 0) {
      pause();
      _exit(3);
    }
    if (write(ends[1], &child, sizeof child) != sizeof child) _exit(1);
    _exit(0);
  }
  pid_t child = 0;
  ASSERT_EQ(read(ends[0], &child, sizeof child), ssize_t(sizeof child));
  waitpid(parent, nullptr, 0);
  boost::asio::io_context context;
  Job job(context);
  const int64_t started = process_start(child);
  EXPECT_FALSE(job.adopt(child, started + 1, [] {}));
  bool ended = false;
  ASSERT_TRUE(job.adopt(child, started, [&] { ended = true; }));
  context.poll();
  EXPECT_FALSE(ended);
  job.signal(SIGKILL);
  context.restart();
  context.run();
  EXPECT_TRUE(ended);
  EXPECT_FALSE(job.code());
  EXPECT_FALSE(job.adopt(child, started, [] {}));
  close(ends[0]);
  close(ends[1]);
}

// A process with the environment that Open MPI gives its ranks.
pid_t fake_rank(const std::string& session, uint32_t job) {
  const pid_t child = fork();
  if (child != 0) return child;
  const std::string a = "OMPI_MCA_orte_jobfam_session_dir=" + session,
                    b = concat("PMIX_NAMESPACE=", job);
  execle("/bin/sleep", "sleep", "600", nullptr,
         std::vector<const char*>{a.c_str(), b.c_str(), nullptr}.data());
  _exit(99);
}

TEST(Leftovers, OfTheJobAtHandAreRemovedAndNothingElse) {
  namespace fs = std::filesystem;
  TemporaryFolder folder;
  const std::string top = folder / "ompi.here.0";
  const std::string session = top + "/pid.123", other = top + "/pid.124";
  for (const std::string& path : {session, other}) {
    fs::create_directories(path + "/0/1");
    folder.put("victim", "");
  }
  const uint32_t job = 0xfe000000u + uint32_t(getpid());
  char name[300];
  std::snprintf(name, sizeof name, "/dev/shm/vader_segment.%s.%u.%x.", this_host().c_str(),
                unsigned(getuid()), job);
  const std::string own = std::string(name) + "0";
  std::snprintf(name, sizeof name, "/dev/shm/vader_segment.%s.%u.%x1.", this_host().c_str(),
                unsigned(getuid()), job);
  const std::string foreign = std::string(name) + "0";
  for (const std::string& path : {own, foreign}) std::ofstream(path) << "x";
  const pid_t rank = fake_rank(session, job);
  const pid_t odd = fake_rank(folder / "elsewhere", 1);
  fs::create_directories(folder / "elsewhere");
  const auto begin = Clock::now();
  const auto has_begun = [](pid_t pid) {
    std::ifstream file(concat("/proc/", pid, "/comm"));
    std::string program;
    return bool(file >> program) && program == "sleep";
  };
  while ((!has_begun(rank) || !has_begun(odd)) && since(begin) < 60) usleep(1000);
  Leftovers leftovers;
  leftovers.learn_from_rank(rank);
  leftovers.learn_from_rank(odd);  // its folder is no session of Open MPI
  for (const pid_t pid : {rank, odd}) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
  leftovers.remove();
  EXPECT_FALSE(fs::exists(session));
  EXPECT_TRUE(fs::exists(other));
  EXPECT_TRUE(fs::exists(folder / "elsewhere"));
  EXPECT_FALSE(fs::exists(own));
  EXPECT_TRUE(fs::exists(foreign));
  fs::remove(own);
  fs::remove(foreign);
}

// The attempt after it has no process of it to ask.
TEST(Leftovers, AreKnownToTheNextAttemptByTheirFile) {
  namespace fs = std::filesystem;
  TemporaryFolder folder;
  const std::string one = folder / "ompi.here.0/pid.123", two = folder / "ompi.here.0/pid.124";
  const std::string odd = folder / "elsewhere";
  const uint32_t job = 0xfd000000u + uint32_t(getpid());
  char name[300];
  std::snprintf(name, sizeof name, "vader_segment.%s.%u.%x.", this_host().c_str(),
                unsigned(getuid()), job);
  const std::string segment = concat("/dev/shm/", name, "3");
  for (const std::string& path : {one, two, odd}) fs::create_directories(path);
  std::ofstream(segment) << "x";
  const std::string file = folder.put("leftovers", one + "\n" + two + "\n" + name + "\n" + odd +
                                                       "\nompi.x/../pid\n\nvader_segment.\n");
  Leftovers first, own, again;
  first.learn_from_file(file);
  own.learn_from_file(folder.put("own", two + "\n"));
  PosixFileSystem files;
  first.save(files, folder / "again");
  again.learn_from_file(folder / "again");
  again.learn_from_file(folder / "missing");
  again.spare(own);
  again.remove();
  EXPECT_FALSE(fs::exists(one));
  EXPECT_TRUE(fs::exists(two));
  EXPECT_TRUE(fs::exists(odd));
  EXPECT_FALSE(fs::exists(segment));
  fs::remove(segment);
}

}  // namespace
}  // namespace moemamba
