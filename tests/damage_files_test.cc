// Damage of every kind to checkpoints: it is found and named, an older one is taken, and where none
// is left nothing is touched.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "core/random.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// Two ranks, experts over both: a shard of values and one of moments from each.
SmallRun tiny_run(const std::string& folder) {
  return {.folder = folder,
          .ranks = 2,
          .expert = 2,
          .experts = 2,
          .steps = 8,
          .save_interval = 2,
          .vocabulary = 61,
          .keep_last = 4,
          .model = "width: 4 expert_hidden: 2 state: 2 conv: 2"};
}

std::string place(const SmallRun& run, int64_t step) {
  return join_path(checkpoints_folder(run.folder), checkpoint_name(step));
}

std::vector<std::string> names_of(const std::string& checkpoint) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(checkpoint))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

// "": it holds. Else what is wrong with it.
std::string problem_of(const std::string& checkpoint) {
  try {
    Checkpoint(checkpoint).verify_files();
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// One byte of a file, changed in place and put back.
class ChangedByte {
 public:
  ChangedByte(int file, int64_t at, uint8_t mask) : file_(file), at_(at) {
    if (::pread(file, &before_, 1, at) != 1) throw Error("cannot read");
    put(before_ ^ mask);
  }
  ~ChangedByte() { put(before_); }

 private:
  void put(uint8_t byte) {
    if (::pwrite(file_, &byte, 1, at_) != 1) std::abort();
  }
  int file_;
  int64_t at_;
  uint8_t before_ = 0;
};

struct OpenFile {
  explicit OpenFile(const std::string& path) : descriptor(::open(path.c_str(), O_RDWR)) {
    check(descriptor >= 0, path, ": cannot open");
  }
  ~OpenFile() { ::close(descriptor); }
  int descriptor;
};

// Flips bits `first`, `first` + 2, .. of each file of a checkpoint; returns how many were flipped,
// and adds those that went unnoticed, or were blamed on another file, to `missed`.
int64_t flip_every_other_bit(const std::string& checkpoint, int first,
                             std::vector<std::string>& missed) {
  int64_t flips = 0;
  for (const std::string& name : names_of(checkpoint)) {
    const std::string path = join_path(checkpoint, name);
    const int64_t bits = int64_t(fs::file_size(path)) * 8;
    const OpenFile file(path);
    for (int64_t bit = first; bit < bits; bit += 2, ++flips) {
      const ChangedByte change(file.descriptor, bit / 8, uint8_t(1 << bit % 8));
      const std::string problem = problem_of(checkpoint);
      if (problem.rfind(path + ": ", 0) != 0)
        missed.push_back(concat(name, " bit ", bit, ": \"", problem, "\""));
    }
  }
  return flips;
}

TEST(Damage, EveryBitOfACheckpoint) {
  TemporaryFolder folder;
  const SmallRun run = tiny_run(folder / "run");
  launch(run);
  uintmax_t bytes = 0;
  for (const std::string& name : names_of(place(run, 8)))
    bytes += fs::file_size(join_path(place(run, 8), name));
  ASSERT_LE(bytes, 32u << 10);
  ASSERT_EQ(names_of(place(run, 8)).size(), 8u);  // 2 of values, 4 of moments, index, manifest
  int64_t flips[2] = {};
  std::vector<std::string> missed[2];
  std::vector<std::thread> threads;
  for (int half : {0, 1})
    threads.emplace_back([&, half] {
      const std::string copy = folder / ("copy" + std::to_string(half)) + "/step-00000008";
      copy_tree(place(run, 8), copy);
      flips[half] = flip_every_other_bit(copy, half, missed[half]);
      EXPECT_EQ(problem_of(copy), "");
    });
  for (auto& thread : threads) thread.join();
  for (const auto& list : missed)
    EXPECT_TRUE(list.empty()) << list.size() << " flips were missed, the first: " << list.front();
  EXPECT_EQ(flips[0] + flips[1], int64_t(bytes) * 8);
  report_cases("P9 every bit of a checkpoint", flips[0] + flips[1]);
}

TEST(Damage, TruncatedAndExtendedFiles) {
  TemporaryFolder folder;
  const SmallRun run = tiny_run(folder / "run");
  launch(run);
  const std::string checkpoint = place(run, 8);
  int64_t cases = 0;
  for (const std::string& name : names_of(checkpoint)) {
    const std::string path = join_path(checkpoint, name), content = read_file(path);
    const int64_t size = int64_t(content.size()), step = name == kManifestName ? 1 : 37;
    for (int64_t bytes = 0; bytes <= size + 64; bytes += bytes < size ? step : 1, ++cases) {
      if (bytes == size) continue;
      fs::resize_file(path, uintmax_t(bytes));  // what is added is zero
      EXPECT_EQ(problem_of(checkpoint).rfind(path + ": ", 0), 0u) << name << " of " << bytes;
      std::ofstream(path, std::ios::binary) << content;
    }
  }
  EXPECT_EQ(problem_of(checkpoint), "");
  report_cases("P9 files of another length", cases);
}

// What else may become of one file of a checkpoint. Each returns whether it changed anything.
using Harm = bool (*)(const std::string& path, const std::string& other);
struct NamedHarm {
  const char* name;
  Harm harm;
};
const NamedHarm kHarms[] = {
    {"deleted", [](const std::string& path, const std::string&) { return fs::remove(path); }},
    {"emptied",
     [](const std::string& path, const std::string&) {
       fs::resize_file(path, 0);
       return true;
     }},
    {"a symlink to a true copy",
     [](const std::string& path, const std::string&) {
       fs::rename(path, path + ".moved");
       fs::create_symlink(path + ".moved", path);
       return true;
     }},
    {"a folder",
     [](const std::string& path, const std::string&) {
       fs::remove(path);
       return fs::create_directory(path);
     }},
    {"a pipe",
     [](const std::string& path, const std::string&) {
       fs::remove(path);
       return mkfifo(path.c_str(), 0600) == 0;
     }},
    {"another's file of that name",
     [](const std::string& path, const std::string& other) {
       if (read_file(path) == read_file(other)) return false;
       return fs::copy_file(other, path, fs::copy_options::overwrite_existing);
     }},
    {"a block of zeros",
     [](const std::string& path, const std::string&) {
       std::string content = read_file(path);
       const std::string zeros(std::min<size_t>(512, content.size()), '\0');
       if (content.compare(0, zeros.size(), zeros) == 0) return false;
       content.replace(0, zeros.size(), zeros);
       std::ofstream(path, std::ios::binary) << content;
       return true;
     }},
    {"two blocks swapped",
     [](const std::string& path, const std::string&) {
       std::string content = read_file(path);
       const size_t block = content.size() / 2;
       const std::string swapped =
           content.substr(block, block) + content.substr(0, block) + content.substr(2 * block);
       if (swapped == content) return false;
       std::ofstream(path, std::ios::binary) << swapped;
       return true;
     }},
};

TEST(Damage, EveryFileByEveryHarm) {
  TemporaryFolder folder;
  const SmallRun run = tiny_run(folder / "run");
  launch(run);
  SmallRun foreign = tiny_run(folder / "foreign");
  foreign.seed = 43;
  launch(foreign);
  int cases = 0;
  const auto expect_found = [&](const NamedHarm& harm, const std::string& name,
                                const std::string& other) {
    const std::string copy = folder / "copy/step-00000008", path = join_path(copy, name);
    copy_tree(place(run, 8), copy);
    if (harm.harm(path, other)) {
      const std::string problem = problem_of(copy);
      // A manifest of elsewhere is whole: then it is the files, or the step, that do not fit.
      const std::string blamed = name == kManifestName && other != "" ? copy : path + ": ";
      EXPECT_EQ(problem.rfind(blamed, 0), 0u) << name << ", " << harm.name << ": " << problem;
      ++cases;
    }
    fs::remove_all(copy);
  };
  const auto names = names_of(place(run, 8));
  for (const std::string& name : names)
    for (const NamedHarm& harm : kHarms) {
      if (std::string(harm.name).rfind("another", 0) != 0) {
        expect_found(harm, name, "");
        continue;
      }
      expect_found(harm, name, join_path(place(foreign, 8), name));  // of the same size
      expect_found(harm, name, join_path(place(run, 6), name));      // of two checkpoints
      for (const std::string& other : names)                         // of one
        if (other != name && name != kManifestName)
          expect_found(harm, name, join_path(place(run, 8), other));
    }
  EXPECT_GT(cases, 60);
  report_cases("P9 harms to one file", cases);
}

// A whole checkpoint under another step's name is none of that step.
TEST(Damage, ACheckpointUnderAnotherName) {
  TemporaryFolder folder;
  const SmallRun run = tiny_run(folder / "run");
  launch(run);
  fs::remove_all(place(run, 8));
  fs::rename(place(run, 6), place(run, 8));
  std::string said;
  const auto found = find_newest(run, &said);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->step(), 4);
  EXPECT_NE(said.find("the manifest inside is of step 6"), std::string::npos) << said;
}

// Files of a run's folder but those of the lease, which changes hands with every launch.
std::map<std::string, std::string> tree_without_lease(const std::string& run) {
  std::map<std::string, std::string> tree = tree_of(run);
  std::erase_if(tree, [](const auto& entry) { return entry.first.rfind("lease", 0) == 0; });
  return tree;
}

void harm_checkpoint(const SmallRun& run, int64_t step, const NamedHarm& harm, size_t which) {
  const auto names = names_of(place(run, step));
  const std::string name = names[which % names.size()];
  const std::string next = names[(which + 1) % names.size()];
  harm.harm(join_path(place(run, step), name), join_path(place(run, step), next));
}

TEST(Damage, OfTheNewestMakesTheNextOlderOneBeTaken) {
  TemporaryFolder folder;
  SmallRun whole = tiny_run(folder / "whole");
  whole.steps = 10;
  launch(whole);
  SmallRun part = tiny_run(folder / "part");
  part.steps = 10;
  part.launch_steps = 8;
  launch(part);
  int cases = 0, runs = 0;
  size_t which = 0;
  for (const NamedHarm& harm : kHarms)
    for (int64_t damaged = 1; damaged <= 4; ++damaged, ++cases) {
      SmallRun run = part;
      run.folder = folder / "run";
      run.launch_steps = 0;
      copy_tree(part.folder, run.folder);
      for (int64_t j = 0; j < damaged; ++j) harm_checkpoint(run, 8 - 2 * j, harm, which++);
      const auto before = tree_without_lease(run.folder);
      std::string said;
      if (damaged == 4) {
        const std::string why = message_of([&] { find_newest(run, &said); });
        EXPECT_NE(why.find("none of its checkpoints can be used"), std::string::npos) << why;
        EXPECT_NE(message_of([&] { launch(run); }), "");
        EXPECT_TRUE(tree_without_lease(run.folder) == before) << harm.name << ": files changed";
        fs::remove_all(run.folder);
        continue;
      }
      const auto found = find_newest(run, &said);
      ASSERT_TRUE(found) << harm.name << "\n" << said;
      EXPECT_EQ(found->step(), 8 - 2 * damaged) << harm.name << "\n" << said;
      for (int64_t j = 0; j < damaged; ++j) {
        const int64_t step = 8 - 2 * j;
        EXPECT_NE(said.find(concat("damaged    ", place(run, step))), std::string::npos) << said;
        EXPECT_FALSE(file_exists(place(run, step)));
        // Kept, under another name, as it was.
        const std::string kept = join_path(checkpoints_folder(run.folder), damaged_name(step, 7));
        const std::string prefix = "checkpoints/" + checkpoint_name(step);
        const auto after = tree_of(run.folder);
        for (const auto& [name, content] : before) {
          if (name.rfind(prefix + "/", 0) != 0) continue;
          const std::string renamed = damaged_name(step, 7) + name.substr(prefix.size());
          EXPECT_EQ(after.at("checkpoints/" + renamed), content) << name;
        }
      }
      // Training writes those steps again, and ends as if nothing had been.
      if (damaged == 1 + int64_t(which % 3) || harm.name == std::string("deleted")) {
        launch(run);
        EXPECT_EQ(steps_of(run.folder), steps_of(whole.folder)) << harm.name;
        EXPECT_EQ(newest_manifest(run.folder).chain(), newest_manifest(whole.folder).chain());
        EXPECT_EQ(newest_manifest(run.folder).state_hash(),
                  newest_manifest(whole.folder).state_hash());
        ++runs;
      }
      fs::remove_all(run.folder);
    }
  EXPECT_GE(runs, 5);
  std::printf("of them to their end: %d\n", runs);
  report_cases("P11, P12 newest 1 to 4 of 4 damaged", cases);
}

// A supervisor looks while the first save makes the folder.
TEST(Damage, AFolderThatIsJustBeingMadeIsAnEmptyOne) {
  TemporaryFolder folder;
  for (int i = 0; i < 2000 && !HasFailure(); ++i) {
    const std::string run = folder / concat("run", i), all = checkpoints_folder(run);
    fs::create_directory(run);
    std::atomic<bool> made = false;
    std::thread maker([&] {
      fs::create_directory(all);
      made = true;
    });
    do {
      EXPECT_NO_THROW(EXPECT_TRUE(list_checkpoints(run).empty()));
    } while (!made);
    maker.join();
  }
}

// A scratch disk that is not mounted, and the like: the run does not begin anew.
TEST(Damage, AFolderThatCannotBeListedIsNoEmptyOne) {
  TemporaryFolder folder;
  SmallRun run = tiny_run(folder / "run");
  run.launch_steps = 4;
  launch(run);
  run.launch_steps = 0;
  const fs::path all = checkpoints_folder(run.folder);
  fs::rename(all, folder / "scratch");
  const std::pair<const char*, std::function<void()>> kCases[] = {
      {"a dangling symlink", [&] { fs::create_directory_symlink(folder / "gone", all); }},
      {"a file", [&] { std::ofstream(all) << "scratch"; }},
      {"a folder that is not ours",
       [&] {
         fs::create_directory(all);
         fs::permissions(all, fs::perms::none);
       }}};
  int cases = 0;
  for (const auto& [name, change] : kCases) {
    change();
    if (fs::is_directory(all) && ::access(all.c_str(), R_OK) == 0) {
      std::printf("skipped: %s, for root may read it\n", name);
    } else {
      const std::string metrics = read_file(run.folder + "/metrics.jsonl");
      const std::string why = message_of([&] { launch(run); });
      EXPECT_NE(why.find("checkpoints: cannot be listed: "), std::string::npos) << name << why;
      EXPECT_EQ(read_file(run.folder + "/metrics.jsonl"), metrics) << name;
      EXPECT_FALSE(file_exists(run.folder + "/weights.tmp"));
      ++cases;
    }
    fs::remove(all);
  }
  fs::rename(folder / "scratch", all);
  launch(run);
  EXPECT_EQ(newest_manifest(run.folder).step(), 8);
  report_cases("P12 folders that cannot be listed", cases);
}

// A launch that may open no more files finds no damage: it ends, and nothing is renamed.
TEST(Damage, IsNotWhatALaunchWithoutDescriptorsFinds) {
  TemporaryFolder folder;
  const SmallRun run = tiny_run(folder / "run");
  launch(run);
  const auto before = tree_of(run.folder);
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const int next = dup(0);
  close(next);
  int refused = 0, found = 0;
  for (int more = 0; more < 12; ++more) {
    rlimit few = limit;
    few.rlim_cur = rlim_t(next + more);
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
    std::string said, why;
    std::optional<CheckpointManifest> newest;
    try {
      newest = find_newest(run, &said);
    } catch (const Error& error) {
      why = error.what();
    }
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    EXPECT_TRUE(tree_of(run.folder) == before) << more << " files: renamed\n" << said;
    if (newest) {
      EXPECT_EQ(newest->step(), 8) << said;
      ++found;
    } else {
      EXPECT_NE(why.find("Too many open files"), std::string::npos) << why;
      ++refused;
    }
  }
  EXPECT_GE(refused, 2);
  EXPECT_GE(found, 1);
  report_cases("P11 launches without descriptors", refused);
}

TEST(Damage, OtherPeoplesFilesAreHarmlessAndStay) {
  TemporaryFolder folder;
  SmallRun run = tiny_run(folder / "run");
  run.keep_last = 1;
  run.launch_steps = 4;
  launch(run);
  const std::string all = checkpoints_folder(run.folder);
  fs::create_directories(all + "/step-00000004/notes");
  for (const char* name :
       {"step-00000004/README", "step-00000004/notes/1", "notes.txt", "step-4", "step-000000099",
        "step-0000000x", "step-00000100", "step-00000004.damaged-x", "step-00000002.tmp-",
        "step-00000002.tmp-x-1", "LATEST.old", ".trash", "LATEST"})
    std::ofstream(all + "/" + name) << "step-99999999\n";
  fs::create_directory(all + "/step-00000002.bak");
  fs::create_directory_symlink(place(run, 4), all + "/step-00000200");
  fs::create_directory_symlink(folder / "elsewhere", all + "/step-00000300");
  const auto before = tree_of(all);
  run.launch_steps = 0;
  launch(run);
  EXPECT_EQ(newest_manifest(run.folder).step(), 8);
  const auto after = tree_of(all);
  int kept = 0;
  for (const auto& [name, content] : before) {
    if (name.rfind("step-00000004/", 0) == 0 || name == "step-00000004" || name == "LATEST")
      continue;  // its time has come
    ASSERT_TRUE(after.count(name)) << name << " is gone";
    EXPECT_EQ(after.at(name), content) << name;
    ++kept;
  }
  EXPECT_EQ(read_file(all + "/LATEST"), "step-00000008\n");
  report_cases("P18 files of others stay", kept);
}

// Random flips of a larger one, through the same door as a launch: quick a few, soak 10^6.
TEST(Damage, RandomBitsOfALargerCheckpoint) {
  TemporaryFolder folder;
  SmallRun run = tiny_run(folder / "run");
  run.model = "width: 48 blocks: 3";
  run.experts = 8;
  run.steps = 2;
  launch(run);
  const std::string checkpoint = place(run, 2);
  std::vector<std::string> paths;
  std::vector<int64_t> ends;  // bits up to the end of each file
  for (const std::string& name : names_of(checkpoint)) {
    paths.push_back(join_path(checkpoint, name));
    ends.push_back((ends.empty() ? 0 : ends.back()) + int64_t(fs::file_size(paths.back())) * 8);
  }
  const Random random(test_seed(), "flips");
  const auto start = std::chrono::steady_clock::now();
  const auto enough = std::chrono::seconds(soak_seconds());
  int64_t flips = 0;
  do {
    const int64_t bit = int64_t(random.uniform(uint64_t(flips)) * double(ends.back()));
    const size_t i = size_t(std::upper_bound(ends.begin(), ends.end(), bit) - ends.begin());
    const int64_t within = bit - (i ? ends[i - 1] : 0);
    const OpenFile file(paths[i]);
    const ChangedByte change(file.descriptor, within / 8, uint8_t(1 << within % 8));
    const std::string problem = problem_of(checkpoint);
    ASSERT_EQ(problem.rfind(paths[i] + ": ", 0), 0u)
        << "bit " << within << " of " << paths[i] << ": " << problem;
    ++flips;
  } while (flips < 300 || (flips < 1'000'000 && std::chrono::steady_clock::now() - start < enough));
  EXPECT_EQ(problem_of(checkpoint), "");
  report_cases(concat("P9 random bits of ", ends.back() >> 13, " KiB"), flips);
}

}  // namespace
}  // namespace moemamba
