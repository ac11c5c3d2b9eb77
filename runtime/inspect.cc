#include "runtime/inspect.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>

#include "core/error.h"
#include "runtime/checkpoint_shard.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

std::string without_slash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

int64_t bytes_within(const std::string& folder) {
  int64_t bytes = 0;
  std::error_code error;
  for (fs::recursive_directory_iterator at(folder, error), end; !error && at != end;
       at.increment(error))
    if (at->symlink_status(error).type() == fs::file_type::regular)
      bytes += int64_t(at->file_size(error));
  return bytes;
}

ListedCheckpoint look_at(const std::string& folder, const std::string& name) {
  ListedCheckpoint listed{.name = name, .kind = kind_of_name(name)};
  const std::string path = join_path(folder, name);
  listed.step = step_of_name(name.substr(0, name.find('.'))).value_or(-1);
  listed.bytes = bytes_within(path);
  if (listed.kind != NameKind::checkpoint) return listed;
  try {
    const Checkpoint checkpoint(path);
    const CheckpointManifest& m = checkpoint.manifest().facts();
    listed.ranks = m.ranks();
    listed.expert_ranks = m.expert_ranks();
    listed.experts = m.experts();
    listed.next_sample = m.next_sample();
    listed.loss = m.loss();
  } catch (const std::exception& error) {
    listed.problem = error.what();
  }
  return listed;
}

// Reads a piece part by part from both and takes the measure of what differs.
class Comparison {
 public:
  Comparison(const Checkpoint& a, const Checkpoint& b) : a_(a), b_(b) {}

  TensorDifference compare(const StatePiece& whole) {
    TensorDifference difference{.name = whole.tensor, .kind = whole.kind, .elements = whole.end};
    double squares = 0, squares_of_a = 0;
    for_parts(whole, values_a_, [&](StatePiece part) {
      const size_t count = size_t(part.end - part.begin);
      values_b_.resize(count);
      a_.read(part);
      part.data = values_b_.data();
      b_.read(part);
      for (size_t i = 0; i < count; ++i) {
        const double x = values_a_[i], distance = std::fabs(x - double(values_b_[i]));
        squares_of_a += x * x;
        if (std::memcmp(&values_a_[i], &values_b_[i], sizeof(float)) == 0) continue;
        ++difference.differing;
        squares += distance * distance;
        if (!(distance <= difference.largest)) difference.largest = distance;  // a NaN stays
      }
    });
    difference.relative = squares == 0 ? 0 : std::sqrt(squares / squares_of_a);
    return difference;
  }

 private:
  const Checkpoint &a_, &b_;
  std::vector<float> values_a_, values_b_;
};

bool has(const Manifest::Tensor& tensor, StateKind kind) {
  return kind == StateKind::value || !tensor.exp_avg().empty();
}

}  // namespace

std::string find_checkpoint(const std::string& place, std::optional<int64_t> step) {
  const std::string folder = without_slash(place);
  if (file_exists(join_path(folder, kManifestName))) {
    const std::optional<int64_t> own =
        step_of_name(fs::path(folder).lexically_normal().filename().string());
    check(!step || !own || *step == *own, place, ": is a checkpoint of step ", own.value_or(0),
          ", not of ", step.value_or(0));
    return folder;
  }
  const std::vector<CheckpointPlace> places = list_checkpoints(folder);
  check(!places.empty(), place, ": no checkpoint is there; expected a run's folder or one with ",
        kManifestName);
  if (!step) return places.front().path;
  std::string steps;
  for (const CheckpointPlace& found : places) {
    if (found.step == *step) return found.path;
    steps += concat(steps.empty() ? "" : ", ", found.step);
  }
  throw Error(concat(place, ": no checkpoint of step ", *step, "; there are those of ", steps));
}

const char* name_of(NameKind kind) {
  static constexpr const char* kNames[] = {"checkpoint", "attempt", "damaged", "trash", "other"};
  return kNames[int(kind)];
}

std::vector<ListedCheckpoint> list_run(const std::string& run) {
  const std::string folder = checkpoints_folder(without_slash(run));
  std::vector<ListedCheckpoint> list;
  for (const std::string& name : names_in(folder)) {
    std::error_code error;
    if (fs::symlink_status(join_path(folder, name), error).type() == fs::file_type::directory)
      list.push_back(look_at(folder, name));
  }
  std::sort(list.begin(), list.end(), [](const auto& a, const auto& b) {
    return a.step != b.step ? a.step > b.step : a.name < b.name;
  });
  return list;
}

CheckpointDifference compare_checkpoints(const Checkpoint& a, const Checkpoint& b) {
  CheckpointDifference difference;
  std::set<std::string> names;
  for (const Checkpoint* checkpoint : {&a, &b})
    for (const auto& tensor : checkpoint->manifest().tensors()) names.insert(tensor.name());
  Comparison comparison(a, b);
  for (const std::string& name : names) {
    const auto of_a = a.find(name), of_b = b.find(name);
    const auto object = [&](StateKind kind, const std::string& problem) {
      difference.tensors.push_back({.name = name, .kind = kind, .problem = problem});
    };
    if (!of_a || !of_b) {
      object(StateKind::value, of_a ? "only in A" : "only in B");
      continue;
    }
    const Shape shape = of_a->shape();
    if (!(shape == of_b->shape())) {
      object(StateKind::value,
             concat(to_string(shape), " in A, ", to_string(of_b->shape()), " in B"));
      continue;
    }
    for (StateKind kind : {StateKind::value, StateKind::exp_avg, StateKind::exp_avg_sq}) {
      const bool in_a = has(*of_a, kind), in_b = has(*of_b, kind);
      if (in_a != in_b) object(kind, in_a ? "only in A" : "only in B");
      if (!in_a || !in_b) continue;
      ++difference.compared;
      TensorDifference one = comparison.compare({name, shape, kind, 0, shape.elements(), nullptr});
      if (one.differing > 0) difference.tensors.push_back(std::move(one));
    }
  }
  return difference;
}

}  // namespace moemamba
