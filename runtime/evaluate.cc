#include "runtime/evaluate.h"

#include <algorithm>
#include <cmath>

#include "kernels/pointwise.h"
#include "runtime/prepare.h"

namespace moemamba {

namespace {
// Of the text that a prepared file was made of; the part is known by its number of tokens.
std::optional<int64_t> bytes_of(const TokenFile& file) {
  const std::string folder = folder_of(file.path());
  if (!file_exists(join_path(folder, "summary.json"))) return {};
  const PrepareSummary summary = read_summary(folder);
  for (const SplitSummary& part : {summary.validation, summary.train})
    if (part.tokens == file.size()) return part.bytes;
  return {};
}
}  // namespace

int64_t HeldOut::tokens() const {
  int64_t sum = 0;
  for (const TokenFile& file : files) sum += file.size();
  return sum;
}

HeldOut open_held_out(const std::vector<std::string>& paths) {
  HeldOut held_out;
  bool known = true;
  for (const std::string& path : paths) {
    held_out.files.emplace_back(path);
    const std::optional<int64_t> bytes = bytes_of(held_out.files.back());
    known = known && bytes.has_value();
    held_out.bytes += bytes.value_or(0);
  }
  if (!known) held_out.bytes = 0;
  return held_out;
}

Evaluator::Evaluator(Session& session, HeldOut held_out, const EvaluatorOptions& options)
    : session_(session), held_out_(std::move(held_out)), options_(options) {
  cut_windows(options.most_tokens > 0 ? options.most_tokens : held_out_.tokens());
  check(!windows_.empty(), "data.validation: the held-out text has fewer than two tokens");
  cut_pieces();
  const auto T = size_t(session.sequences * session.length);
  ids_.resize(T);
  targets_.resize(T);
  starts_.resize(T);
  line_.resize(size_t(session.length + 1));
  const ModelSizes& sizes = session.model.sizes();
  facts_.resize(size_t(1 + sizes.routers() * sizes.E));
  gathered_.resize(facts_.size() * size_t(session.groups.layout.ranks()));
  device_facts_ = Buffer(session.groups.device, int64_t(facts_.size() + 4) * 8);
}

void Evaluator::cut_windows(int64_t limit) {
  const int64_t L = session_.length;
  for (size_t f = 0; f < held_out_.files.size(); ++f) {
    const int64_t last = held_out_.files[f].size() - 1;  // the last token predicts nothing
    for (int64_t first = 0; first < last && predicted_ < limit; first += L) {
      const int64_t count = std::min({L, last - first, limit - predicted_});
      windows_.push_back({int32_t(f), first, count});
      predicted_ += count;
    }
  }
  std::stable_partition(windows_.begin(), windows_.end(),
                        [L](const Window& window) { return window.count == L; });
}

void Evaluator::cut_pieces() {
  const int64_t L = session_.length, group = options_.routing_group;
  const auto full = int64_t(std::ranges::count(windows_, L, &Window::count));
  for (int64_t first = 0; first < full;) {
    int64_t windows = std::min(full - first, session_.sequences);
    if (windows > group) windows -= windows % group;
    pieces_.push_back({size_t(first), windows, L, std::min(windows, group)});
    first += windows;
  }
  for (size_t w = size_t(full); w < windows_.size(); ++w)
    pieces_.push_back({w, 1, windows_[w].count, 1});
}

void Evaluator::fill(const Piece& piece) {
  const int64_t V = session_.model.sizes().V;
  for (int64_t w = 0; w < piece.windows; ++w) {
    const Window& window = windows_[piece.first_window + size_t(w)];
    const TokenFile& file = held_out_.files[size_t(window.file)];
    const int64_t at = w * piece.length;
    file.read(window.first, window.count + 1, line_.data());
    for (int64_t t = 0; t <= window.count; ++t)
      check(line_[size_t(t)] >= 0 && line_[size_t(t)] < V, file.place(window.first + t), ": id ",
            line_[size_t(t)], " is outside the vocabulary of ", V,
            "; was the file made with another tokenizer?");
    std::copy_n(line_.begin(), window.count, ids_.begin() + at);
    std::copy_n(line_.begin() + 1, window.count, targets_.begin() + at);
    file.mark_starts(window.first, window.count, options_.end_of_document, &starts_[size_t(at)]);
  }
}

// Every rank calls it equally often, for experts are shared.
void Evaluator::add_loss_of(const Piece& piece, RoutingFacts& routing) {
  const int64_t T = piece.windows * piece.length;
  fill(piece);
  Step step = session_.begin(piece.windows, piece.routing_group);
  step.facts = &routing;
  if (session_.model.sizes().reset_at_documents)
    step.starts = session_.upload(step, view(starts_.data(), {T}));
  const Tensor ids = session_.upload(step, view(ids_.data(), {T}));
  const Tensor targets = session_.upload(step, view(targets_.data(), {T}));
  const Tensor loss = step.arena.take({T}, DType::f32, "loss");
  session_.model.forward(step, ids, session_.saved, nullptr);
  session_.model.loss(step, targets, loss, 1, false, session_.saved);
  moemamba::run(step.stream, Sum{.x = loss, .sum = loss_sum_, .accumulate = true});
  session_.compute.synchronize();  // the host's tokens may change now
}

Evaluation Evaluator::run() {
  const size_t ranks = size_t(session_.groups.layout.ranks()), rank = size_t(session_.groups.rank);
  const ModelSizes& sizes = session_.model.sizes();
  const int64_t n = int64_t(facts_.size());
  const Tensor facts = view(device_facts_, 0, {n}, DType::f64);
  RoutingFacts routing{.choices = {}, .sums = view(device_facts_, n * 8, {4}, DType::f64)};
  if (n > 1) routing.choices = view(device_facts_, 8, {sizes.routers(), sizes.E}, DType::f64);
  const InPhase in_phase(session_.groups.activity, Phase::evaluation);
  loss_sum_ = view(device_facts_, 0, {1}, DType::f64);
  fill_zero(session_.compute, view(device_facts_, 0, {n + 4}, DType::f64));
  for (size_t first = 0; first < pieces_.size(); first += ranks) {
    const bool takes_part = first + rank < pieces_.size();
    add_loss_of(takes_part ? pieces_[first + rank] : Piece{0, 0, 1, 1}, routing);
  }
  copy(session_.compute, facts, view(facts_.data(), {n}));
  session_.compute.synchronize();
  all_reduce_sum(*session_.groups.control, session_.host, view(facts_.data(), {n}),
                 view(gathered_.data(), {int64_t(ranks), n}));
  session_.exchange.take_seconds();
  session_.exchange.take_rows();
  Evaluation result;
  result.loss_sum = facts_[0];
  result.tokens = predicted_;
  result.loss = facts_[0] / double(predicted_);
  result.counts.assign(facts_.begin() + 1, facts_.end());
  if (held_out_.bytes > 0) {
    const double share =
        double(predicted_) / double(held_out_.tokens() - int64_t(held_out_.files.size()));
    result.bits_per_byte = facts_[0] / M_LN2 / (double(held_out_.bytes) * share);
  }
  return result;
}

}  // namespace moemamba
