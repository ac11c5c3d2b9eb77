#pragma once
#include "runtime/evaluate.h"
#include "runtime/generate.h"

namespace moemamba {

struct SamplesOptions {
  int64_t tokens = 48;  // of a text, at most
  std::string prompt;   // empty: the first words of the held-out text
  uint64_t seed = 42;
};

// Tokens that prompt and text have room for together, in a run with sequences of `length`.
constexpr int64_t kMostPromptTokens = 128;
constexpr int64_t sample_room(int64_t tokens, int64_t length) {
  return std::min(length, tokens + kMostPromptTokens);
}

// What the model says between two steps, to one prompt, with the same random numbers each time. It
// works in the memory of the trainer's session and changes nothing that a step reads.
class Samples {
 public:
  // An Error where the prompt is too long.
  Samples(Session& session, const Tokenizer& tokenizer, const HeldOut& held_out,
          const SamplesOptions& options);
  const std::string& prompt() const { return prompt_; }
  std::string take();  // what follows the prompt; every rank calls it, rank 0's is meant
  int64_t bytes() const { return decoder_.bytes(); }

 private:
  Session& session_;
  Tokenizer tokenizer_;
  SamplingOptions sampling_;
  std::vector<int32_t> ids_;
  std::string prompt_;
  Decoder decoder_;
};

// A line of samples.jsonl. Bytes that are no UTF-8 become U+FFFD.
std::string sample_line(int64_t step, const std::string& prompt, const std::string& text);

}  // namespace moemamba
