#include <cmath>
#include <nlohmann/json.hpp>

#include "core/digest.h"
#include "runtime/inspect.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

using Json = nlohmann::ordered_json;

// Paths and texts of files may hold any bytes.
std::string text_of(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

Json number(double value) {
  return std::isfinite(value) ? Json(value) : Json(nullptr);
}

Json pieces_json(const Manifest& manifest, const Manifest::Pieces& pieces) {
  Json list = Json::array();
  for (const auto& piece : pieces)
    list.push_back({{"begin", piece.begin()},
                    {"end", piece.end()},
                    {"file", manifest.files(piece.file()).name()},
                    {"offset", piece.offset()}});
  return list;
}

Json tensors_json(const Manifest& manifest) {
  Json list = Json::array();
  for (const auto& tensor : manifest.tensors()) {
    Json shape = Json::array();
    for (int d = 0; d < tensor.shape().dims; ++d) shape.push_back(tensor.shape()[d]);
    list.push_back({{"name", tensor.name()},
                    {"shape", shape},
                    {"value", pieces_json(manifest, tensor.value())},
                    {"exp_avg", pieces_json(manifest, tensor.exp_avg())},
                    {"exp_avg_sq", pieces_json(manifest, tensor.exp_avg_sq())}});
  }
  return list;
}

Json places_json(const std::vector<CheckpointPlace>& places) {
  Json list = Json::array();
  for (const CheckpointPlace& place : places)
    list.push_back({{"step", place.step}, {"path", place.path}});
  return list;
}

}  // namespace

std::string list_json(const std::string& run, const std::vector<ListedCheckpoint>& list) {
  Json entries = Json::array();
  for (const ListedCheckpoint& c : list) {
    Json entry = {{"name", c.name}, {"kind", name_of(c.kind)}, {"bytes", c.bytes}};
    if (c.step >= 0) entry["step"] = c.step;
    if (c.kind == NameKind::checkpoint) {
      entry["complete"] = c.problem.empty();
      if (!c.problem.empty()) {
        entry["problem"] = c.problem;
      } else {
        entry["ranks"] = c.ranks;
        entry["expert_ranks"] = c.expert_ranks;
        entry["experts"] = c.experts;
        entry["next_sample"] = c.next_sample;
        entry["loss"] = number(c.loss);
      }
    }
    entries.push_back(entry);
  }
  return text_of({{"run", run}, {"checkpoints", entries}});
}

std::string show_json(const Checkpoint& checkpoint, bool tensors) {
  const CheckpointManifest& m = checkpoint.manifest().facts();
  Json files = Json::array();
  for (const auto& file : checkpoint.manifest().files())
    files.push_back(
        {{"name", file.name()}, {"bytes", file.bytes()}, {"sha256", hex_of_bytes(file.sha256())}});
  Json json = {{"path", checkpoint.path()},
               {"format", m.format()},
               {"run_id", m.run_id()},
               {"generation", m.generation()},
               {"step", m.step()},
               {"ranks", m.ranks()},
               {"expert_ranks", m.expert_ranks()},
               {"experts", m.experts()},
               {"next_sample", m.next_sample()},
               {"loss", number(m.loss())},
               {"chain", m.chain()},
               {"state_hash", state_hash_text(m.state_hash())},
               {"tokenizer", m.tokenizer()},
               {"build", m.build()},
               {"config", m.config()},
               {"files", files},
               {"tensor_count", checkpoint.manifest().tensors_size()}};
  if (tensors) json["tensors"] = tensors_json(checkpoint.manifest());
  return text_of(json);
}

std::string verify_json(const std::vector<CheckpointVerdict>& verdicts) {
  Json list = Json::array();
  bool good = true;
  for (const CheckpointVerdict& v : verdicts) {
    good = good && v.problems.empty();
    list.push_back({{"path", v.path},
                    {"step", v.step},
                    {"good", v.problems.empty()},
                    {"files", v.files},
                    {"tensors", v.tensors},
                    {"bytes", v.bytes},
                    {"problems", v.problems},
                    {"notes", v.notes}});
  }
  return text_of({{"good", good}, {"checkpoints", list}});
}

std::string diff_json(const Checkpoint& a, const Checkpoint& b,
                      const CheckpointDifference& difference,
                      const std::vector<FactDifference>& facts, bool equal) {
  Json tensors = Json::array(), others = Json::array();
  for (const TensorDifference& t : difference.tensors) {
    Json entry = {{"name", t.name}, {"kind", kStateNames[int(t.kind)]}};
    if (!t.problem.empty()) {
      entry["problem"] = t.problem;
    } else {
      entry["elements"] = t.elements;
      entry["differing"] = t.differing;
      entry["max_abs"] = number(t.largest);
      entry["relative"] = number(t.relative);
    }
    tensors.push_back(entry);
  }
  for (const FactDifference& fact : facts)
    others.push_back({{"name", fact.name}, {"a", fact.a}, {"b", fact.b}, {"counts", fact.counts}});
  return text_of({{"a", a.path()},
                  {"b", b.path()},
                  {"equal", equal},
                  {"compared", difference.compared},
                  {"tensors", tensors},
                  {"facts", others}});
}

std::string reshard_json(const Checkpoint& from, const Resharded& made) {
  const CheckpointManifest& m = from.manifest().facts();
  const auto layout = [](int ranks, int expert_ranks) {
    return Json{{"ranks", ranks}, {"expert_ranks", expert_ranks}};
  };
  Json json = {{"output", made.output},
               {"step", m.step()},
               {"weights_only", made.weights_only},
               {"source", from.path()},
               {"from", layout(m.ranks(), m.expert_ranks())}};
  if (!made.weights_only) json["to"] = layout(made.ranks, made.expert_ranks);
  return text_of(json);
}

std::string prune_json(const Pruned& pruned) {
  return text_of({{"run", pruned.run},
                  {"dry_run", pruned.dry_run},
                  {"deleted", places_json(pruned.deleted)},
                  {"kept", places_json(pruned.kept)}});
}

}  // namespace moemamba
