#include "parallel/world.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <sstream>
#include <thread>

#include "core/gpu.h"
#include "parallel/communicator_mpi.h"
#include "parallel/communicator_nccl.h"
#include "parallel/gather_blobs.h"
#include "parallel/gpu_choice.h"

namespace moemamba {

namespace {

constexpr const char* kAbsent = "(nothing)";
constexpr size_t kMostDifferences = 10;  // named one by one

std::vector<int> all_ranks(int size) {
  std::vector<int> ranks(static_cast<size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

// Fields with their lengths in front, so that any text may stand in them.
std::string pack(const Facts& facts) {
  std::string text;
  for (const auto& [name, value] : facts)
    text += concat(name.size(), ' ', value.size(), '\n') + name + value;
  return text;
}

Facts unpack(const std::string& text) {
  Facts facts;
  for (size_t at = 0; at < text.size();) {
    char* end = nullptr;
    const size_t name = std::strtoull(text.c_str() + at, &end, 10);
    const size_t value = std::strtoull(end, &end, 10);
    at = size_t(end - text.c_str()) + 1;
    check(at <= text.size() && name <= text.size() - at && value <= text.size() - at - name,
          "what another rank told of itself is cut short; are all ranks of the same build?");
    facts.emplace_back(text.substr(at, name), text.substr(at + name, value));
    at += name + value;
  }
  return facts;
}

uint64_t digest(const std::string& text) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (char c : text) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
  return hash;
}

// "rank 3" or "ranks 0 1 2 and 5 more"
std::string name_ranks(const std::vector<int>& ranks) {
  constexpr size_t kMost = 8;
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < std::min(ranks.size(), kMost); ++i) text += concat(' ', ranks[i]);
  if (ranks.size() > kMost) text += concat(" and ", ranks.size() - kMost, " more");
  return text;
}

// Names in the order in which they first occur.
std::vector<std::string> all_names(const std::vector<Facts>& of_ranks) {
  std::vector<std::string> names;
  std::map<std::string, bool> seen;
  for (const Facts& facts : of_ranks)
    for (const auto& [name, value] : facts)
      if (!std::exchange(seen[name], true)) names.push_back(name);
  return names;
}

}  // namespace

std::string describe_differences(const std::vector<Facts>& of_ranks) {
  std::string text;
  size_t count = 0;
  for (const std::string& name : all_names(of_ranks)) {
    std::vector<std::pair<std::string, std::vector<int>>> holders;  // value -> ranks
    for (size_t r = 0; r < of_ranks.size(); ++r) {
      const auto fact = std::ranges::find(of_ranks[r], name, &Facts::value_type::first);
      const std::string value = fact == of_ranks[r].end() ? kAbsent : fact->second;
      auto holder = std::ranges::find(holders, value, [](const auto& h) { return h.first; });
      if (holder == holders.end()) holder = holders.insert(holders.end(), {value, {}});
      holder->second.push_back(int(r));
    }
    if (holders.size() == 1 || ++count > kMostDifferences) continue;
    text += "\n  " + name + ":";
    for (size_t i = 0; i < holders.size(); ++i)
      text += (i ? ", " : " ") + name_ranks(holders[i].second) + " \"" + holders[i].first + '"';
  }
  if (count > kMostDifferences) text += concat("\n  and ", count - kMostDifferences, " more");
  return text;
}

std::string mpi_library() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  MPI_Get_library_version(text.data(), &length);
  const std::string whole(text.data(), size_t(length));
  return whole.substr(0, whole.find_first_of(",\n"));
}

std::string mpi_thread_level(bool* enough) {
  int level = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level);
  MPI_Finalize();
  *enough = level >= MPI_THREAD_SERIALIZED;
  return level == MPI_THREAD_MULTIPLE     ? "MPI_THREAD_MULTIPLE"
         : level == MPI_THREAD_SERIALIZED ? "MPI_THREAD_SERIALIZED"
         : level == MPI_THREAD_FUNNELED   ? "MPI_THREAD_FUNNELED"
                                          : "MPI_THREAD_SINGLE";
}

World::World() : exceptions_(std::uncaught_exceptions()) {
  int level = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
  check(level >= MPI_THREAD_SERIALIZED,
        "this MPI cannot be used by more than one thread; expected MPI_THREAD_SERIALIZED");
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  MPI_Comm node;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node);
  MPI_Comm_rank(node, &node_rank_);
  MPI_Comm_size(node, &node_size_);
  MPI_Comm_free(&node);
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  hostname_ = name.data();
}

World::~World() {
  if (std::uncaught_exceptions() > exceptions_) return;
  std::lock_guard lock(*mpi_);
  MPI_Finalize();
}

std::unique_ptr<Communicator> World::make_group(const char* name, std::vector<int> members,
                                                std::chrono::milliseconds deadline) {
  if (members.size() == 1)
    return std::move(make_thread_group(1, name, deadline, std::move(members)).front());
  return make_mpi_communicator(mpi_, std::move(members), name, deadline);
}

// The group of the host's memory that stands beside NCCL's carries its unique id and its aborts.
std::unique_ptr<Communicator> World::make_gpu_group(const char* name, std::vector<int> members,
                                                    std::chrono::milliseconds deadline,
                                                    int exit_code) {
  const bool alone = members.size() == 1;
  auto beside = make_group(name, members, deadline);
  if (alone) return beside;
  return make_nccl_communicator(std::move(beside), std::move(members), deadline, exit_code);
}

ProcessGroups World::make_groups(const RankLayout& layout, std::chrono::milliseconds deadline,
                                 DeviceKind device, int stuck_exit_code) {
  check(layout.ranks() == size_, "the layout has ", layout.ranks(), " ranks, but ", size_,
        " were started");
  ProcessGroups groups{
      .layout = layout, .rank = rank_, .ranks_of_machine = node_size_, .device = device};
  const auto make = [&](const char* name, std::vector<int> members) {
    return device == DeviceKind::cuda
               ? make_gpu_group(name, std::move(members), deadline, stuck_exit_code)
               : make_group(name, std::move(members), deadline);
  };
  groups.data = make("data", all_ranks(size_));
  groups.control = make_group("control", all_ranks(size_), deadline);
  groups.checkpoint = make_group("checkpoint", all_ranks(size_), deadline);
  groups.expert = make("expert", layout.expert_group(rank_));
  groups.expert_data = make("expert_data", layout.expert_data_group(rank_));
  return groups;
}

void World::agree(const Facts& facts, std::chrono::milliseconds deadline) {
  const auto group = make_group("agreement", all_ranks(size_), deadline);
  Stream stream = Stream::immediate();
  struct Summary {
    uint64_t bytes, digest;
    bool operator==(const Summary&) const = default;
  };
  std::string mine = pack(facts);
  const Summary own{mine.size(), digest(mine)};
  std::vector<Summary> summaries(static_cast<size_t>(size_));
  group->all_gather(stream, &own, summaries.data(), sizeof own);
  if (std::ranges::all_of(summaries, [&](const Summary& s) { return s == own; })) return;

  // The texts themselves, only now: at thousands of ranks they are many.
  const uint64_t longest = std::ranges::max(summaries, {}, &Summary::bytes).bytes;
  mine.resize(longest);
  std::string texts(longest * size_t(size_), '\0');
  group->all_gather(stream, mine.data(), texts.data(), int64_t(longest));
  std::vector<Facts> of_ranks;
  for (size_t r = 0; r < summaries.size(); ++r)
    of_ranks.push_back(unpack(texts.substr(r * longest, summaries[r].bytes)));
  throw Error("the ranks do not agree; start all of them with the same build and settings:" +
              describe_differences(of_ranks));
}

// One line a field: a rank that sees no GPU says so here, and not before the others.
int World::choose_gpu(const std::string& visible, std::chrono::milliseconds deadline) {
  std::string own = hostname_ + '\n' + visible + '\n', why;
  for (const gpu::Facts& gpu : gpu::devices(&why)) own += gpu.uuid + '\n';
  const auto group = make_group("gpus", all_ranks(size_), deadline);
  Stream stream = Stream::immediate();
  Facts all;  // (rank, what it sees)
  for (const std::string& text : gather_blobs(*group, stream, own)) all.emplace_back("", text);
  std::vector<SeenGpus> of_ranks;
  for (const auto& [none, text] : unpack(broadcast_blob(*group, stream, pack(all)))) {
    std::istringstream lines(text);
    SeenGpus& seen = of_ranks.emplace_back();
    std::getline(lines, seen.hostname);
    std::getline(lines, seen.visible);
    for (std::string line; std::getline(lines, line);) seen.gpus.push_back(line);
  }
  check(why.empty(), "no GPU: ", why, "; use --device=cpu");
  const int chosen = choose_gpus(of_ranks)[size_t(rank_)];
  gpu::use(chosen);
  return chosen;
}

void World::abort(int exit_code) noexcept {
  // A thread that hangs within MPI must not keep this one from ending the job.
  for (int i = 0; i < 1000 && !mpi_->try_lock(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace moemamba
