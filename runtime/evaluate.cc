#include "runtime/evaluate.h"

#include <algorithm>
#include <cmath>

#include "runtime/prepare.h"

namespace moemamba {

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
    const std::string folder = folder_of(path);
    if (known && file_exists(join_path(folder, "summary.json")) &&
        read_summary(folder).validation.tokens == held_out.files.back().size())
      held_out.bytes += read_summary(folder).validation.bytes;
    else
      known = false;
  }
  if (!known) held_out.bytes = 0;
  return held_out;
}

Evaluator::Evaluator(Session& session, HeldOut held_out, int64_t routing_group, int64_t most_tokens)
    : session_(session), held_out_(std::move(held_out)), routing_group_(routing_group) {
  const int64_t L = session.length, T = session.sequences * L;
  const int64_t limit = most_tokens > 0 ? most_tokens : held_out_.tokens();
  for (size_t f = 0; f < held_out_.files.size(); ++f) {
    const int64_t last = held_out_.files[f].size() - 1;  // the last token predicts nothing
    for (int64_t first = 0; first < last && predicted_ < limit; first += L) {
      const int64_t count = std::min({L, last - first, limit - predicted_});
      windows_.push_back({int32_t(f), first, count});
      predicted_ += count;
    }
  }
  check(!windows_.empty(), "data.validation: the held-out text has fewer than two tokens");
  ids_.resize(size_t(T));
  targets_.resize(size_t(T));
  starts_.resize(size_t(T));
  line_.resize(size_t(L + 1));
  const ModelSizes& sizes = session.model.sizes();
  facts_.resize(size_t(1 + sizes.routers() * sizes.E));
  gathered_.resize(facts_.size() * size_t(session.groups.layout.ranks()));
}

void Evaluator::fill(int64_t first_window, int64_t count) {
  const int64_t L = session_.length, V = session_.model.sizes().V;
  std::fill(ids_.begin(), ids_.end(), 0);
  std::fill(targets_.begin(), targets_.end(), -1);
  std::fill(starts_.begin(), starts_.end(), uint8_t(0));
  for (int64_t w = 0; w < count; ++w) {
    const Window& window = windows_[size_t(first_window + w)];
    const TokenFile& file = held_out_.files[size_t(window.file)];
    file.read(window.first, window.count + 1, line_.data());
    for (int64_t t = 0; t <= window.count; ++t)
      check(line_[size_t(t)] >= 0 && line_[size_t(t)] < V, file.place(window.first + t), ": id ",
            line_[size_t(t)], " is outside the vocabulary of ", V,
            "; was the file made with another tokenizer?");
    std::copy_n(line_.begin(), window.count, ids_.begin() + w * L);
    std::copy_n(line_.begin() + 1, window.count, targets_.begin() + w * L);
  }
}

Evaluation Evaluator::run() {
  const int64_t L = session_.length, B = session_.sequences;
  const int64_t ranks = session_.groups.layout.ranks(), rank = session_.groups.rank;
  const int64_t all = int64_t(windows_.size());
  RoutingFacts routing;
  routing.counts.assign(facts_.size() - 1, 0.0);
  double sum = 0;
  for (int64_t round = 0; round * ranks * B < all; ++round) {
    const int64_t first = (round * ranks + rank) * B;
    const int64_t windows = std::clamp<int64_t>(all - first, 0, B);
    // Whole routing groups, so that capacities mean what they meant in training.
    const int64_t count = (windows + routing_group_ - 1) / routing_group_ * routing_group_;
    fill(first, windows);
    Step step = session_.begin(count, routing_group_);
    step.facts = &routing;
    if (session_.model.sizes().reset_at_documents) step.starts = view(starts_.data(), {count * L});
    const Tensor loss = step.arena.take({count * L}, DType::f32, "loss");
    session_.model.forward(step, view(ids_.data(), {count * L}), session_.saved, nullptr);
    session_.model.loss(step, view(targets_.data(), {count * L}), loss, 1, false, session_.saved);
    for (int64_t t = 0; t < count * L; ++t) sum += double(loss.as<float>()[t]);
  }
  facts_[0] = sum;
  std::copy(routing.counts.begin(), routing.counts.end(), facts_.begin() + 1);
  const int64_t n = int64_t(facts_.size());
  all_reduce_sum(*session_.groups.control, session_.compute, view(facts_.data(), {n}),
                 view(gathered_.data(), {ranks, n}));
  session_.exchange.take_seconds();
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
