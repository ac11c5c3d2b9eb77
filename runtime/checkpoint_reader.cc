#include "runtime/checkpoint_reader.h"

#include <algorithm>
#include <map>
#include <memory>

#include "core/digest.h"
#include "core/error.h"
#include "core/host_mirror.h"
#include "parallel/gather_blobs.h"
#include "runtime/checkpoint_digests.h"
#include "runtime/run_ends.h"

namespace moemamba {

namespace {

constexpr int64_t kMostManifestBytes = 64 << 20;  // what is longer is none

// Names and shapes of all tensors of the model, over all ranks.
std::map<std::string, std::pair<Shape, bool>> tensors_of(const ParameterStore& store) {
  std::map<std::string, std::pair<Shape, bool>> all;  // and whether it has moments
  for (const Parameter& p : store.parameters()) {
    const size_t at = p.name.find("{}");
    if (at == std::string::npos) {
      all[p.name] = {p.shape, true};
      continue;
    }
    for (int e = 0; e < store.groups().layout.experts(); ++e)
      all[p.name.substr(0, at) + std::to_string(e) + p.name.substr(at + 2)] = {
          {p.shape[1], p.shape[2]}, true};
  }
  for (const Parameter& state : store.states()) all[state.name] = {state.shape, false};
  return all;
}

std::string shorten(std::string text) {
  constexpr size_t kMost = 4000;
  if (text.size() > kMost) text = text.substr(0, text.rfind('\n', kMost)) + "\n  ... and more";
  return text;
}

// What all ranks say of one step of loading, on every rank: "" or the first problem.
std::string verdict(ProcessGroups& groups, Stream& stream, const std::string& own) {
  std::string worst;
  for (const std::string& problem : gather_blobs(*groups.control, stream, own))
    if (worst.empty()) worst = problem;
  return broadcast_blob(*groups.control, stream, worst);
}

// What is wrong with the checkpoint's files. What says nothing about these (no descriptor, memory
// or thread left) is no damage: it ends this rank, and so the launch, and nothing is touched.
template <class Work>
std::string problem_of(const std::string& path, Work&& work) {
  try {
    work();
    return "";
  } catch (const PeerLost&) {
    throw;
  } catch (const OtherFormat&) {  // every rank finds the same
    throw;
  } catch (const Unavailable&) {
    throw;
  } catch (const Error& error) {
    return *error.what() ? error.what() : "unknown";
  } catch (const std::exception& error) {
    throw Unavailable(concat(path, ": cannot be read now: ", error.what()));
  }
}

std::string layout_text(const CheckpointManifest& from, const RankLayout& to) {
  if (from.experts() == 0 || to.experts() == 0)
    return concat(from.ranks(), " ranks -> ", to.ranks());
  std::string shares;
  const int most = to.experts_of(0), least = to.experts_of(to.expert_size() - 1);
  shares = most == least ? concat(most, " each") : concat(least, " or ", most, " each");
  return concat(from.experts(), " experts: ", from.ranks(), " ranks -> ", to.ranks(), ", over ",
                from.expert_ranks(), " -> ", to.expert_size(), " of them, ", shares);
}

}  // namespace

Checkpoint::Checkpoint(const std::string& path)
    : path_(path),
      manifest_(unseal(read_regular_file(join_path(path, kManifestName), kMostManifestBytes),
                       join_path(path, kManifestName))) {
  const auto slash = path.find_last_of('/');
  const std::optional<int64_t> step =
      step_of_name(slash == std::string::npos ? path : path.substr(slash + 1));
  check(!step || *step == manifest_.facts().step(), path, ": the manifest inside is of step ",
        manifest_.facts().step());
  for (const auto& file : manifest_.files()) {
    const InputFile there(join_path(path, file.name()));
    check(there.bytes() == file.bytes(), there.path(), ": ", there.bytes(), " bytes, expected ",
          file.bytes());
  }
}

std::optional<Manifest::Tensor> Checkpoint::find(const std::string& tensor) const {
  return manifest_.find(tensor);
}

void Checkpoint::verify_files(int first, int stride, int sharing) const {
  std::vector<int> files;
  for (int i = first; i < manifest_.files_size(); i += stride) files.push_back(i);
  verify_files(files, digest_threads(sharing));
}

void Checkpoint::verify_files(const std::vector<int>& indices, int threads) const {
  std::vector<StoredFile> files;
  for (int i : indices) {
    const Manifest::File file = manifest_.files(i);
    files.push_back({join_path(path_, std::string(file.name())), file.bytes()});
  }
  const std::vector<std::string> digests = sha256_of_files(files, threads);
  for (size_t i = 0; i < files.size(); ++i)
    check(digests[i] == hex_of_bytes(manifest_.files(indices[i]).sha256()), files[i].path,
          ": damaged: its bytes do not have the digest in the manifest");
}

std::string Checkpoint::differences(const ParameterStore& store) const {
  std::string text;
  const auto wanted = tensors_of(store);
  for (const auto& [name, kind] : wanted) {
    const std::optional<Manifest::Tensor> stored = find(name);
    if (!stored)
      text += concat("\n  ", name, ": missing; the model wants ", to_string(kind.first));
    else if (!(stored->shape() == kind.first))
      text += concat("\n  ", name, ": ", to_string(stored->shape()), ", the model wants ",
                     to_string(kind.first));
    else if (kind.second == stored->exp_avg().empty() && kind.first.elements() > 0)
      text += concat("\n  ", name, kind.second ? ": without moments" : ": with moments");
  }
  for (const auto& tensor : manifest_.tensors())
    if (!wanted.count(tensor.name()))
      text += concat("\n  ", tensor.name(), ": the model has no such tensor");
  return shorten(text);
}

void Checkpoint::read(const StatePiece& piece) const {
  const std::optional<Manifest::Tensor> tensor = find(piece.tensor);
  check(tensor.has_value(), path_, ": no tensor ", piece.tensor);
  const Manifest::Pieces stored = piece.kind == StateKind::value     ? tensor->value()
                                  : piece.kind == StateKind::exp_avg ? tensor->exp_avg()
                                                                     : tensor->exp_avg_sq();
  for (const auto& part : stored) {
    const int64_t begin = std::max(part.begin(), piece.begin);
    const int64_t end = std::min(part.end(), piece.end);
    if (begin >= end) continue;
    const InputFile file(join_path(path_, manifest_.files(part.file()).name()));
    file.read_at(part.offset() + (begin - part.begin()) * 4, piece.data + (begin - piece.begin),
                 size_t(end - begin) * 4);
  }
}

void Checkpoint::load(const ParameterStore& store) const {
  const DeviceKind device = store.groups().device;
  HostMirror mirror(device);
  const auto load_piece = [&](StatePiece piece) {
    constexpr int64_t kMost = int64_t{1} << 22;  // elements that pass through the host at once
    const int64_t end = piece.end;
    for (; piece.begin < end; piece.begin = piece.end) {
      piece.end = device == DeviceKind::cpu ? end : std::min(end, piece.begin + kMost);
      const Tensor part = view(piece.data, {piece.end - piece.begin}, DType::f32, device);
      const Tensor host = mirror.blank(part);
      StatePiece there = piece;
      there.data = host.as<float>();
      read(there);
      mirror.write_back(host, part);
      piece.data += piece.end - piece.begin;
    }
  };
  for (const StatePiece& piece : held_values(store)) load_piece(piece);
  for (const StatePiece& piece : owned_moments(store)) load_piece(piece);
}

namespace {

// All ranks look at the same checkpoint; "" when every one of them found its share whole.
std::string judge(ProcessGroups& groups, Stream& stream, const std::string& path,
                  std::unique_ptr<Checkpoint>& checkpoint) {
  const std::string own = problem_of(path, [&] {
    checkpoint = std::make_unique<Checkpoint>(path);
    checkpoint->verify_files(groups.rank, groups.layout.ranks(), groups.ranks_of_machine);
  });
  return verdict(groups, stream, own);
}

// Out of the way of the step's next checkpoint, but kept. Reading took its time: what is there now
// may be a successor's.
void set_aside(FileSystem& files, const LoadRequest& request,
               const std::vector<CheckpointPlace>& damaged) {
  for (const CheckpointPlace& place : damaged) {
    check(!request.may_write || request.may_write(), request.run,
          ": another launch has taken over this run");
    files.rename(place.path, damaged_place(request.run, place.step, request.generation));
  }
  if (!damaged.empty()) files.sync_folder(checkpoints_folder(request.run));
}

void read_all(ProcessGroups& groups, Stream& stream, const ParameterStore& store,
              const Checkpoint& checkpoint) {
  const std::string other = checkpoint.differences(store);
  check(other.empty(), checkpoint.path(), ": this checkpoint belongs to another model:", other);
  const std::string problem =
      verdict(groups, stream, problem_of(checkpoint.path(), [&] { checkpoint.load(store); }));
  check(problem.empty(), problem);
}

}  // namespace

std::optional<CheckpointManifest> load_newest(FileSystem& files, ProcessGroups& groups,
                                              Stream& stream, const ParameterStore& store,
                                              const LoadRequest& request) {
  const auto say = [&](const std::string& text) {
    if (groups.rank == 0 && request.say) request.say(text);
  };
  std::vector<CheckpointPlace> places;
  if (groups.rank == 0) places = list_checkpoints(request.run);
  std::vector<CheckpointPlace> damaged;
  std::string reasons;
  for (size_t i = 0;; ++i) {
    const std::string path =
        broadcast_blob(*groups.control, stream, i < places.size() ? places[i].path : "");
    if (path.empty()) {
      if (!reasons.empty())
        throw RunEnds(concat(request.run, ": none of its checkpoints can be used; nothing was ",
                             "changed:", reasons, "\nrepair one, or choose another --run"));
      return std::nullopt;
    }
    std::unique_ptr<Checkpoint> checkpoint;
    const std::string problem = judge(groups, stream, path, checkpoint);
    if (!problem.empty()) {
      say("damaged    " + problem);
      reasons += "\n  " + problem;
      if (groups.rank == 0) damaged.push_back(places[i]);
      continue;
    }
    read_all(groups, stream, store, *checkpoint);
    if (groups.rank == 0) set_aside(files, request, damaged);
    const CheckpointManifest& m = checkpoint->manifest().facts();
    say(concat(request.heading, path, "; ", layout_text(m, groups.layout), "; next sample ",
               m.next_sample(), "; loss was ", m.loss()));
    return m;
  }
}

}  // namespace moemamba
