#pragma once
#include <functional>
#include <string>

#include "core/host_mirror.h"
#include "runtime/session.h"
#include "runtime/tokenizer.h"

namespace moemamba {

struct SamplingOptions {
  int64_t tokens = 200;    // at most; an end of document ends sooner
  double temperature = 1;  // 0: the most likely token
  int64_t top_k = 0;       // 0: all
  double top_p = 1;        // the fewest tokens whose probabilities reach this
  uint64_t seed = 42;
};

// Next-token choice from logits [V]: a pure function of (seed, index).
class Sampler {
 public:
  Sampler(const SamplingOptions& options, int64_t vocabulary);
  int32_t choose(const float* logits, uint64_t index);

 private:
  SamplingOptions options_;
  std::vector<std::pair<float, int32_t>> order_;
  std::vector<double> weights_;
};

// Recurrent decoding: the state of every Mamba layer is carried from token to token, so that time
// and memory per token do not grow; attention layers look back on all keys and values so far.
// Every rank calls it; experts stay where they are. The session must hold one sequence of at least
// one token; longer prompts are read piece by piece. No token is beyond an expert's capacity, which
// shares out a batch: here every token is alone.
class Decoder {
 public:
  // most_tokens: fed at most before reset(); matters to attention and learned positions alone.
  Decoder(Session& session, int64_t most_tokens);
  void reset();
  // What it allocates where the model works; and would, for a session that is only planned.
  int64_t bytes() const { return states_.capacity() + logits_.bytes(); }
  static int64_t planned_bytes(Session& session, int64_t most_tokens);
  // Takes in `ids`; returns the logits [V] after the last of them.
  const float* feed(std::span<const int32_t> ids);

 private:
  void take_states();
  const float* feed_piece(std::span<const int32_t> ids);
  Session& session_;
  Arena states_;
  std::vector<MambaState> before_, after_;
  std::vector<Tensor> caches_;
  int64_t most_tokens_, position_ = 0;
  std::vector<int32_t> ids_;
  Buffer logits_;
  HostMirror mirror_;
};

// Text of tokens as they come: every token is decoded once, and what has been shown ends with a
// whole character of UTF-8 (one may take several tokens), as far as the text is UTF-8.
class TextStream {
 public:
  using Decode = std::function<std::string(std::span<const int32_t>)>;
  using Show = std::function<void(std::string_view)>;
  TextStream(Decode decode, Show show) : decode_(std::move(decode)), show_(std::move(show)) {}
  void add(int32_t token);
  void finish();  // shows what is held back
  const std::string& text() const { return text_; }

 private:
  void show_until(size_t end);
  Decode decode_;
  Show show_;
  std::string text_;
  size_t shown_ = 0;
};

// Continues the tokens of a prompt, from the decoder's beginning; piece(text) as below.
std::string generate(Session& session, Decoder& decoder, const Tokenizer& tokenizer,
                     std::span<const int32_t> prompt, const SamplingOptions& options,
                     const std::function<void(std::string_view)>& piece);

// Continues `prompt`; piece(text) is called on rank 0 as text appears. Returns the new text.
std::string generate(Session& session, const Tokenizer& tokenizer, std::string_view prompt,
                     const SamplingOptions& options,
                     const std::function<void(std::string_view)>& piece);

}  // namespace moemamba
