#pragma once
#include <functional>
#include <optional>

#include "runtime/session.h"
#include "runtime/token_files.h"

namespace moemamba {

struct Evaluation {
  double loss = 0;                      // cross-entropy, nats per token
  int64_t tokens = 0;                   // that were predicted
  double loss_sum = 0;                  // nats
  std::optional<double> bits_per_byte;  // where the text's length in bytes is known
  std::vector<double> counts;           // [routers, E] choices
};

// Held-out text: token files, and how many bytes of text they stand for (0: not known).
struct HeldOut {
  std::vector<TokenFile> files;
  int64_t bytes = 0;
  int64_t tokens() const;
};
// Opens the files; the number of bytes comes from the summary.json beside each of them.
HeldOut open_held_out(const std::vector<std::string>& paths);

// Loss on the first `most_tokens` (0: all) tokens, in windows of session.length, spread over the
// ranks; the same result on every rank and, up to rounding, for every layout.
class Evaluator {
 public:
  Evaluator(Session& session, HeldOut held_out, int64_t routing_group, int64_t most_tokens);
  Evaluation run();
  const HeldOut& held_out() const { return held_out_; }

 private:
  struct Window {
    int32_t file;
    int64_t first;  // token; its `length` followers are predicted
    int64_t count;
  };
  void fill(int64_t first_window, int64_t count);
  Session& session_;
  HeldOut held_out_;
  int64_t routing_group_;
  std::vector<Window> windows_;
  std::vector<int32_t> ids_, targets_, line_;
  std::vector<uint8_t> starts_;
  std::vector<double> facts_, gathered_;
  int64_t predicted_ = 0;
};

}  // namespace moemamba
