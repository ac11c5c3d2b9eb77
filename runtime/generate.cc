#include "runtime/generate.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"

namespace moemamba {

Sampler::Sampler(const SamplingOptions& options, int64_t vocabulary) : options_(options) {
  check(options.temperature >= 0, "temperature: at least 0, found ", options.temperature);
  check(options.top_k >= 0, "top-k: at least 0, found ", options.top_k);
  check(options.top_p > 0 && options.top_p <= 1, "top-p: above 0, at most 1, found ",
        options.top_p);
  order_.resize(size_t(vocabulary));
  weights_.resize(size_t(vocabulary));
}

int32_t Sampler::choose(const float* logits, uint64_t index) {
  const size_t V = order_.size();
  // What is no number has no place in an order; it is taken for the least likely.
  for (size_t v = 0; v < V; ++v)
    order_[v] = {std::isnan(logits[v]) ? -INFINITY : logits[v], int32_t(v)};
  // Likeliest first; equal logits by id, so that the choice is the same everywhere.
  std::sort(order_.begin(), order_.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  if (options_.temperature == 0) return order_[0].second;
  size_t kept = options_.top_k > 0 ? std::min(V, size_t(options_.top_k)) : V;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i)
    sum += weights_[i] =
        std::exp((double(order_[i].first) - order_[0].first) / options_.temperature);
  double reached = 0;
  for (size_t i = 0; i < kept; ++i) {
    reached += weights_[i];
    if (reached >= options_.top_p * sum) kept = i + 1;
  }
  double left = Random(options_.seed, "sampling").uniform(index) * reached;
  for (size_t i = 0; i < kept; ++i)
    if ((left -= weights_[i]) < 0) return order_[i].second;
  return order_[kept - 1].second;
}

Decoder::Decoder(Session& session, int64_t most_tokens)
    : session_(session),
      states_(Arena::measure("state")),
      most_tokens_(most_tokens),
      mirror_(session.groups.device) {
  const ModelSizes& sizes = session.model.sizes();
  check(sizes.learned_positions == 0 || most_tokens <= sizes.learned_positions,
        "the model has learned ", sizes.learned_positions, " positions (train.sequence_length), ",
        most_tokens, " tokens are asked for; ask for fewer, or take a model with other positions");
  take_states();
  states_ = Arena("state", session.groups.device, states_.peak());
  reset();
  logits_ = Buffer(session.groups.device, sizes.V * 4);
}

void Decoder::take_states() {
  before_ = session_.model.take_states(session_.compute, states_, 1);
  after_ = session_.model.take_states(session_.compute, states_, 1);
  caches_ = session_.model.take_caches(states_, 1, most_tokens_);
}

int64_t Decoder::planned_bytes(Session& session, int64_t most_tokens) {
  Arena states = Arena::measure("state");
  for (int i = 0; i < 2; ++i) session.model.take_states(session.compute, states, 1);
  session.model.take_caches(states, 1, most_tokens);
  return states.peak() + session.model.sizes().V * 4;
}

void Decoder::reset() {
  states_.give_back(0);
  position_ = 0;
  take_states();
}

const float* Decoder::feed_piece(std::span<const int32_t> ids) {
  ids_.assign(ids.begin(), ids.end());
  const int64_t T = int64_t(ids_.size());
  Step step = session_.begin(1, 1);
  step.initial = &before_;
  step.final = &after_;
  step.caches = &caches_;
  step.position = position_;
  step.dropless = true;
  const Tensor logits = view(logits_, 0, {1, session_.model.sizes().V}, DType::f32);
  const Tensor tokens = session_.upload(step, view(ids_.data(), {T}));
  session_.model.forward(step, tokens, session_.saved, nullptr);
  session_.model.logits(step, session_.saved.x.row_range(T - 1, T), logits);
  std::swap(before_, after_);
  position_ += T;
  session_.compute.synchronize();
  return mirror_.read(logits).as<float>();
}

const float* Decoder::feed(std::span<const int32_t> ids) {
  check(!ids.empty(), "there is no token to go on from; give a prompt");
  check(position_ + int64_t(ids.size()) <= most_tokens_, "decoding was made for ", most_tokens_,
        " tokens, ", position_ + int64_t(ids.size()), " are fed");
  const float* logits = nullptr;
  while (!ids.empty()) {
    const size_t piece = std::min(ids.size(), size_t(session_.length));
    logits = feed_piece(ids.first(piece));
    ids = ids.subspan(piece);
  }
  return logits;
}

namespace {
// Where the last character begins, if there is more of it to come; else the end.
size_t end_of_whole_characters(std::string_view text) {
  constexpr size_t kLongestCharacter = 4;  // bytes of UTF-8
  for (size_t back = 1; back < kLongestCharacter && back <= text.size(); ++back) {
    const auto byte = uint8_t(text[text.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;  // not a first byte
    const size_t bytes = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return bytes > back ? text.size() - back : text.size();
  }
  return text.size();
}
}  // namespace

void TextStream::add(int32_t token) {
  text_ += decode_(std::span(&token, 1));
  show_until(std::max(shown_, end_of_whole_characters(text_)));
}

void TextStream::finish() {
  show_until(text_.size());
}

void TextStream::show_until(size_t end) {
  if (end > shown_) show_(std::string_view(text_).substr(shown_, end - shown_));
  shown_ = end;
}

std::string generate(Session& session, const Tokenizer& tokenizer, std::string_view prompt,
                     const SamplingOptions& options,
                     const std::function<void(std::string_view)>& piece) {
  std::vector<int32_t> ids = tokenizer.encode(prompt);
  if (ids.empty()) ids.push_back(tokenizer.end_of_document());
  Decoder decoder(session, int64_t(ids.size()) + options.tokens);
  return generate(session, decoder, tokenizer, ids, options, piece);
}

std::string generate(Session& session, Decoder& decoder, const Tokenizer& tokenizer,
                     std::span<const int32_t> prompt, const SamplingOptions& options,
                     const std::function<void(std::string_view)>& piece) {
  Communicator& control = *session.groups.control;
  Sampler sampler(options, session.model.sizes().V);
  std::vector<int32_t> tokens(size_t(control.size()));
  TextStream text([&](std::span<const int32_t> made) { return tokenizer.decode(made); },
                  [&](std::string_view part) {
                    if (session.groups.rank == 0) piece(part);
                  });
  decoder.reset();
  const float* logits = decoder.feed(prompt);
  for (int64_t i = 0; i < options.tokens; ++i) {
    // Everybody follows rank 0: rows may be rounded differently where their neighbours differ.
    const int32_t own = sampler.choose(logits, uint64_t(i));
    control.all_gather(session.host, &own, tokens.data(), 4);
    const int32_t token = tokens[0];
    if (token == tokenizer.end_of_document()) break;
    text.add(token);
    logits = decoder.feed(std::span(&token, 1));
  }
  text.finish();
  return text.text();
}

}  // namespace moemamba
