#include "launcher/inspect_text.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "core/digest.h"
#include "core/error.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

template <class... Values>
std::string printed(const char* format, Values... values) {
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(), format, values...);
  return text.data();
}

std::string layout_text(int ranks, int expert_ranks, int experts) {
  if (experts == 0) return concat(ranks, ranks == 1 ? " rank" : " ranks");
  return concat(ranks, ranks == 1 ? " rank" : " ranks", ", experts over ", expert_ranks);
}

// "name        first line\n            second line\n"
std::string paragraph(const char* name, const std::string& text) {
  constexpr int kIndent = 12;
  std::string out = printed("%-*s", kIndent, name);
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    out += (at == 0 ? "" : std::string(kIndent, ' ')) + text.substr(at, end - at) + "\n";
    at = end + 1;
  }
  return text.empty() ? out + "\n" : out;
}

std::string tensors_text(const Manifest& manifest) {
  std::string text;
  for (const auto& tensor : manifest.tensors()) {
    text += concat("  ", tensor.name_view(), " ", to_string(tensor.shape()));
    const auto add = [&](const char* kind, const auto& pieces) {
      if (pieces.empty()) return;
      text += concat("\n    ", kind);
      for (const auto& piece : pieces)
        text += concat(" ", manifest.files(piece.file()).name(), "[", piece.begin(), ":",
                       piece.end(), "]");
    };
    add("value", tensor.value());
    add("exp_avg", tensor.exp_avg());
    add("exp_avg_sq", tensor.exp_avg_sq());
    text += "\n";
  }
  return text;
}

}  // namespace

std::string list_text(const std::vector<ListedCheckpoint>& list) {
  std::string text = printed("%10s %14s  %-28s %10s  %s\n", "step", "bytes", "layout", "loss", "");
  for (const ListedCheckpoint& c : list) {
    const std::string step = c.step >= 0 ? std::to_string(c.step) : "-";
    const bool whole = c.kind == NameKind::checkpoint && c.problem.empty();
    const std::string layout = whole ? layout_text(c.ranks, c.expert_ranks, c.experts) : "-";
    const std::string loss = whole ? printed("%.4f", c.loss) : "-";
    text += printed("%10s %14lld  %-28s %10s  ", step.c_str(), static_cast<long long>(c.bytes),
                    layout.c_str(), loss.c_str());
    if (whole)
      text += "complete\n";
    else if (c.kind == NameKind::checkpoint)
      text += c.problem + "\n";
    else
      text += concat(name_of(c.kind), ": ", c.name, "\n");
  }
  return text;
}

std::string show_text(const Checkpoint& checkpoint, bool tensors) {
  const CheckpointManifest& m = checkpoint.manifest().facts();
  std::string text = paragraph("checkpoint", checkpoint.path());
  text += paragraph("format", std::to_string(m.format()));
  text += paragraph("run", concat(m.run_id(), ", generation ", m.generation()));
  text += paragraph("step", std::to_string(m.step()));
  text += paragraph("layout", layout_text(m.ranks(), m.expert_ranks(), m.experts()) +
                                  (m.experts() ? concat(", ", m.experts(), " of them") : ""));
  text += paragraph("next sample", std::to_string(m.next_sample()));
  text += paragraph("loss", printed("%.17g", m.loss()));
  text += paragraph("chain", m.chain());
  text += paragraph("state hash", state_hash_text(m.state_hash()));
  text += paragraph("tokenizer", m.tokenizer());
  text += paragraph("build", m.build());
  text += "files\n";
  for (const auto& file : checkpoint.manifest().files())
    text += printed("  %-36s %14lld  ", file.name().substr(0, 128).c_str(),
                    static_cast<long long>(file.bytes())) +
            hex_of_bytes(file.sha256()) + "\n";
  text += paragraph("tensors", std::to_string(checkpoint.manifest().tensors_size()));
  return tensors ? text + tensors_text(checkpoint.manifest()) : text;
}

std::string verdict_text(const CheckpointVerdict& verdict) {
  std::string text = concat(verdict.path, ": ",
                            verdict.problems.empty()
                                ? concat("good: ", verdict.files, " files, ", verdict.bytes,
                                         " bytes, ", verdict.tensors, " tensors")
                                : concat(verdict.problems.size(),
                                         verdict.problems.size() == 1 ? " problem" : " problems"),
                            "\n");
  for (const std::string& problem : verdict.problems) text += "  " + problem + "\n";
  for (const std::string& note : verdict.notes) text += "  note: " + note + "\n";
  return text;
}

std::string diff_text(const CheckpointDifference& difference,
                      const std::vector<FactDifference>& facts, bool equal) {
  std::string text;
  for (const FactDifference& fact : facts)
    text += concat(fact.name, ": ", fact.a, " in A, ", fact.b, " in B",
                   fact.counts ? "" : " (does not count)", "\n");
  for (const TensorDifference& t : difference.tensors) {
    text += concat(t.name, " ", kStateNames[int(t.kind)], ": ");
    if (!t.problem.empty())
      text += t.problem + "\n";
    else
      text += concat(t.differing, " of ", t.elements, " elements, ") +
              printed("at most %.3g, relative to the norm %.3g\n", t.largest, t.relative);
  }
  return text + concat(equal ? "equal" : "different", ": ", difference.compared,
                       " tensors of values and moments compared, ", difference.tensors.size(),
                       " differ\n");
}

}  // namespace moemamba
