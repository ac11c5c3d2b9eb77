// P3 order: every state that a power cut may leave of the calls of one save, from their record.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <set>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/seam_files.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kNever = int64_t{1} << 60;

struct Recorded {
  FileCall call;
  std::string data;
};

// What a file system promises, and no more: bytes of a file last when it was synced, entries of a
// folder when that was synced, in any order and any subset before. A rename is one change.
class Disk {
 public:
  explicit Disk(const std::string& root) : root_(root) { nodes_.push_back({.folder = true}); }

  // All that is under the root now, as lasting.
  void begin() {
    for (const auto& entry : fs::recursive_directory_iterator(root_)) {
      const int node = make_node(entry.is_directory());
      if (!entry.is_directory()) nodes_[size_t(node)].data = read_file(entry.path().string());
      set_entry(now_, entry.path().string(), node);
    }
    base_ = now_;
  }
  void add(const Recorded& recorded, int64_t time) {
    const FileCall& call = recorded.call;
    switch (call.what) {
      case Call::open:
        if (call.mode != OpenMode::append) enter(time, "", call.path, make_node(false));
        break;
      case Call::write: {
        const int node = find(call.path);
        changes_.push_back(
            {.time = time, .node = node, .data = recorded.data, .offset = sizes_[node]});
        sizes_[node] += int64_t(recorded.data.size());
        break;
      }
      case Call::write_at:
        changes_.push_back(
            {.time = time, .node = find(call.path), .data = recorded.data, .offset = call.offset});
        break;
      case Call::sync:
      case Call::sync_folder: {
        const int node = find(call.path);
        for (Change& change : changes_)
          if (change.node == node) change.lasts = std::min(change.lasts, time);
        break;
      }
      case Call::make_folder:
        enter(time, "", call.path, make_node(true));
        break;
      case Call::make_folders:
        for (fs::path path = fs::path(root_);
             const auto& part : fs::path(call.path).lexically_relative(root_)) {
          path /= part;
          if (part != "." && find(path.string()) < 0)
            enter(time, "", path.string(), make_node(true));
        }
        break;
      case Call::rename:
      case Call::rename_new:
        enter(time, call.path, call.to, find(call.path));
        break;
      case Call::link:
        enter(time, "", call.to, find(call.path));
        break;
      case Call::remove:
        if (find(call.path) >= 0) enter(time, call.path, "", -1);
        break;
      case Call::truncate:
      case Call::close:
      case Call::free_bytes:
        break;
    }
  }

  // Changes that are on their way at `time`.
  std::vector<size_t> pending(int64_t time) const {
    std::vector<size_t> list;
    for (size_t i = 0; i < changes_.size(); ++i)
      if (changes_[i].time <= time && changes_[i].lasts > time) list.push_back(i);
    return list;
  }
  bool is_write(size_t change) const { return changes_[change].is_write(); }
  size_t bytes(size_t change) const { return changes_[change].data.size(); }

  // path -> content of every file (folders: "/"), when power fails at `time` and of what was on its
  // way `kept` has arrived; `torn` of it only up to `torn_bytes`.
  using Tree = std::map<std::string, std::string>;
  Tree state(int64_t time, const std::set<size_t>& kept, size_t torn, size_t torn_bytes) const {
    std::vector<Node> nodes = nodes_;
    Entries entries = base_;
    for (size_t i = 0; i < changes_.size(); ++i) {
      const Change& change = changes_[i];
      if (change.time > time || (change.lasts > time && !kept.count(i))) continue;
      if (change.is_write()) {
        std::string& data = nodes[size_t(change.node)].data;
        const size_t bytes =
            i == torn ? std::min(torn_bytes, change.data.size()) : change.data.size();
        if (data.size() < size_t(change.offset) + bytes)
          data.resize(size_t(change.offset) + bytes, '\0');
        data.replace(size_t(change.offset), bytes, change.data, 0, bytes);
        continue;
      }
      if (!change.gone.empty()) entries[change.gone_from].erase(change.gone);
      if (!change.name.empty()) entries[change.node][change.name] = change.target;
    }
    Tree tree;
    collect(nodes, entries, 0, "", tree);
    return tree;
  }

 private:
  struct Node {
    bool folder = false;
    std::string data = {};
  };
  using Entries = std::map<int, std::map<std::string, int>>;
  struct Change {
    int64_t time;
    int node;  // the file, or the folder whose entries change and which lasts when it is synced
    std::string data = {};
    int64_t offset = 0;
    std::string gone = {}, name = {};  // entries that go and come
    int target = -1;
    int gone_from = -1;  // the folder that `gone` goes from
    int64_t lasts = kNever;
    bool is_write() const { return gone.empty() && name.empty(); }
  };

  int make_node(bool folder) {
    nodes_.push_back({.folder = folder});
    return int(nodes_.size()) - 1;
  }
  // -1: not there (or outside).
  int find(const std::string& path) const {
    int node = 0;
    for (const auto& part : fs::path(path).lexically_relative(root_)) {
      if (part == ".") continue;
      const auto folder = now_.find(node);
      if (folder == now_.end() || !folder->second.count(part.string())) return -1;
      node = folder->second.at(part.string());
    }
    return node;
  }
  int folder_node(const std::string& path) const { return find(fs::path(path).parent_path()); }
  void set_entry(Entries& entries, const std::string& path, int node) {
    entries[folder_node(path)][fs::path(path).filename()] = node;
  }
  void enter(int64_t time, const std::string& gone, const std::string& come, int target) {
    const int folder = folder_node(come.empty() ? gone : come);
    const int from = gone.empty() ? -1 : folder_node(gone);
    ASSERT_GE(folder, 0) << gone << come;
    changes_.push_back({.time = time,
                        .node = folder,
                        .gone = gone.empty() ? "" : fs::path(gone).filename().string(),
                        .name = come.empty() ? "" : fs::path(come).filename().string(),
                        .target = target,
                        .gone_from = from});
    if (!gone.empty()) now_[from].erase(fs::path(gone).filename());
    if (!come.empty()) now_[folder][fs::path(come).filename()] = target;
  }
  static void collect(const std::vector<Node>& nodes, const Entries& entries, int node,
                      const std::string& path, Tree& tree) {
    const auto folder = entries.find(node);
    if (folder == entries.end()) return;
    for (const auto& [name, child] : folder->second) {
      const bool is_folder = nodes[size_t(child)].folder;
      tree[path + name] = is_folder ? "/" : nodes[size_t(child)].data;
      if (is_folder) collect(nodes, entries, child, path + name + "/", tree);
    }
  }

  std::string root_;
  std::vector<Node> nodes_;
  Entries base_, now_;
  std::map<int, int64_t> sizes_;
  std::vector<Change> changes_;
};

// One save and its clean-up, as recorded.
struct Trace {
  std::string root;
  int64_t old_step = 0;  // 0: no checkpoint before
  std::vector<Recorded> calls;
  size_t committed = 0;  // calls made when write() returned
};

Trace record(const std::string& root, int64_t old_step, bool renames_new, int ranks) {
  Trace trace{.root = root, .old_step = old_step};
  const std::string run = root + "/run";
  fs::create_directories(run);
  write_file(plain_disk(), run + "/config.textproto", "train { steps: 9 }\n");
  if (old_step > 0) {
    EXPECT_EQ(save({.run = run, .step = old_step, .ranks = ranks, .expert = 1})[0], "");
  }
  fs::remove_all(root + "-before");
  fs::copy(root, root + "-before", fs::copy_options::recursive);
  std::mutex mutex;
  SeamFiles files;
  files.renames_new = renames_new;
  files.after = [&](const FileCall& call) {
    std::lock_guard lock(mutex);
    const bool writes = call.what == Call::write || call.what == Call::write_at;
    trace.calls.push_back(
        {call, writes ? std::string(static_cast<const char*>(call.data), call.bytes) : ""});
  };
  const auto verdicts = save({.run = run,
                              .step = old_step + 1,
                              .disks = [&](int) -> FileSystem& { return files; },
                              .ranks = ranks,
                              .expert = 1});
  EXPECT_EQ(verdicts[0], "");
  trace.committed = trace.calls.size();
  const std::string folder = checkpoints_folder(run);
  write_file(files, folder + "/LATEST", checkpoint_name(old_step + 1) + "\n");
  collect_garbage(files, run, 1, {.keep_last = 1});
  fs::remove_all(root);
  fs::rename(root + "-before", root);
  return trace;
}

struct Outcome {
  int64_t states = 0, different = 0, violations = 0;
  std::string first;  // violation
};

class PowerCuts {
 public:
  PowerCuts(const Trace& trace, std::function<bool(const FileCall&)> left_out, uint64_t seed)
      : trace_(trace), disk_(trace.root), random_(seed) {
    disk_.begin();
    for (size_t i = 0; i < trace.calls.size(); ++i)
      if (!left_out || !left_out(trace.calls[i].call)) disk_.add(trace.calls[i], int64_t(i));
  }
  // At every call; of what is on its way all subsets where it is at most `exhaustive` changes, else
  // the most telling ones and `samples` drawn.
  Outcome run(size_t exhaustive, int samples) {
    for (size_t k = 0; k < trace_.calls.size(); ++k) {
      const std::vector<size_t> pending = disk_.pending(int64_t(k));
      if (pending.size() <= exhaustive) {
        for (uint64_t bits = 0; bits < (uint64_t{1} << pending.size()); ++bits)
          cut(k, pending, [&](size_t i) { return bits >> i & 1; });
        continue;
      }
      cut(k, pending, [](size_t) { return false; });
      cut(k, pending, [](size_t) { return true; });
      for (size_t j = 0; j < pending.size(); ++j) {
        cut(k, pending, [&](size_t i) { return i == j; });
        cut(k, pending, [&](size_t i) { return i != j; });
      }
      for (int s = 0; s < samples; ++s) {
        const uint64_t one = random_() % 4;  // from few to most of them
        cut(k, pending, [&](size_t) { return random_() % 4 <= one; });
      }
    }
    return outcome_;
  }

 private:
  template <class Keep>
  void cut(size_t k, const std::vector<size_t>& pending, Keep&& keep) {
    std::set<size_t> kept;
    size_t last = SIZE_MAX;
    for (size_t i = 0; i < pending.size(); ++i) {
      if (!keep(i)) continue;
      kept.insert(pending[i]);
      if (disk_.is_write(pending[i])) last = pending[i];
    }
    judge(k, disk_.state(int64_t(k), kept, SIZE_MAX, 0));
    if (last == SIZE_MAX) return;
    for (size_t bytes : {size_t{0}, size_t{512}, size_t{4096}})
      if (bytes < disk_.bytes(last)) judge(k, disk_.state(int64_t(k), kept, last, bytes));
  }
  void judge(size_t k, const Disk::Tree& tree) {
    ++outcome_.states;
    Sha256 digest;
    for (const auto& [path, content] : tree) {
      digest.add(concat(path.size(), " ", content.size(), " ", path));
      digest.add(content);
    }
    auto [at, is_new] = found_.try_emplace(digest.hex(), 0);
    if (is_new) {
      ++outcome_.different;
      at->second = load(tree);
    }
    const bool committed = k + 1 >= trace_.committed;
    const bool good =
        at->second == trace_.old_step + 1 || (at->second == trace_.old_step && !committed);
    if (good) return;
    ++outcome_.violations;
    if (outcome_.first.empty())
      outcome_.first = concat("power cut after call ", k, " (", trace_.calls[k].call.path,
                              ") leaves step ", at->second, committed ? ", though committed" : "");
  }
  int64_t load(const Disk::Tree& tree) const {
    const MemoryFolder folder("crash-order-state");
    for (const auto& [path, content] : tree) {
      if (content == "/")
        fs::create_directories(folder / path);
      else
        std::ofstream(folder / path, std::ios::binary) << content;
    }
    return loaded_step(folder / "run");
  }

  const Trace& trace_;
  Disk disk_;
  std::mt19937_64 random_;
  std::map<std::string, int64_t> found_;
  Outcome outcome_;
};

TEST(PowerCut, AtAnyCallInAnyOrderLeavesTheOldOrTheNewCheckpoint) {
  Outcome sum;
  uint64_t seed = test_seed();
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int64_t old_step : {1, 0})
      for (bool renames_new : {true, false})
        for (int ranks : {1, 2}) {
          MemoryFolder folder("crash-order");
          const Trace trace = record(folder / "disk", old_step, renames_new, ranks);
          const bool soaks = soak_seconds() > 0;
          const Outcome outcome = PowerCuts(trace, {}, seed).run(soaks ? 8 : 4, soaks ? 40 : 6);
          EXPECT_EQ(outcome.violations, 0)
              << outcome.first << "; old " << old_step << ", ranks " << ranks << ", seed " << seed
              << (renames_new ? "" : ", by links");
          sum.states += outcome.states;
          sum.different += outcome.different;
        }
    ++seed;
  } while (!HasFailure() &&
           std::chrono::steady_clock::now() - start < std::chrono::seconds(soak_seconds()));
  std::printf("P3: %lld states after a power cut, %lld of them different, seed %llu\n",
              static_cast<long long>(sum.states), static_cast<long long>(sum.different),
              static_cast<unsigned long long>(test_seed()));
}

// The test of the test: without any one of the syncs it finds what gets lost.
TEST(PowerCut, IsFatalWithoutAnyOneSync) {
  struct Mutation {
    const char* name;
    std::function<bool(const FileCall&)> left_out;
    int64_t old_step = 1;
  };
  const auto file_sync = [](const char* part) {
    return [part](const FileCall& call) {
      return call.what == Call::sync && call.path.find(part) != std::string::npos;
    };
  };
  const auto folder_sync = [](auto fits) {
    return
        [fits](const FileCall& call) { return call.what == Call::sync_folder && fits(call.path); };
  };
  const Mutation mutations[] = {
      {"weights' shard", file_sync("/model-")},
      {"optimizer's shard", file_sync("/optimizer-")},
      {"index", file_sync("index.json")},
      {"manifest", file_sync("MANIFEST.pb")},
      {"attempt's folder",
       folder_sync([](const std::string& p) { return p.find(".tmp-") != std::string::npos; })},
      {"checkpoints' folder",
       folder_sync([](const std::string& p) { return p.ends_with("/checkpoints"); })},
      {"run's folder", folder_sync([](const std::string& p) { return p.ends_with("/run"); }), 0},
  };
  for (const Mutation& mutation : mutations) {
    MemoryFolder folder("crash-order");
    const Trace trace = record(folder / "disk", mutation.old_step, true, 2);
    const Outcome outcome = PowerCuts(trace, mutation.left_out, test_seed()).run(3, 1);
    EXPECT_GT(outcome.violations, 0) << "not noticed: no sync of the " << mutation.name;
    std::printf("  without the sync of the %-20s %4lld of %5lld states lose it: %s\n",
                mutation.name, static_cast<long long>(outcome.violations),
                static_cast<long long>(outcome.states),
                outcome.first.substr(0, outcome.first.find(" (")).c_str());
  }
}

}  // namespace
}  // namespace moemamba
