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

// Text to evaluate on: token files, and how many bytes of text they stand for (0: not known).
struct HeldOut {
  std::vector<TokenFile> files;
  int64_t bytes = 0;
  int64_t tokens() const;
};
// Opens the files; the number of bytes comes from the summary.json beside each of them.
HeldOut open_held_out(const std::vector<std::string>& paths);

struct EvaluatorOptions {
  int64_t routing_group = 1;
  int64_t most_tokens = 0;       // evaluates the first ones only; 0: all
  int32_t end_of_document = -1;  // -1: the tokens have none
};

// Loss on held-out text, in windows of session.length that begin anew at every file, spread over
// the ranks; the same result on every rank and, up to rounding, for every layout. There are no
// padding rows, so that counts and capacities are those of the text: a file's last window is as
// short as it is and a routing group of its own, and so is the last group of the full windows.
class Evaluator {
 public:
  Evaluator(Session& session, HeldOut held_out, const EvaluatorOptions& options);
  Evaluation run();
  const HeldOut& held_out() const { return held_out_; }

 private:
  struct Window {
    int32_t file;
    int64_t first;  // token; its `count` followers are predicted
    int64_t count;
  };
  struct Piece {  // windows of one length that a rank takes in at once
    size_t first_window;
    int64_t windows, length, routing_group;
  };
  void cut_windows(int64_t limit);
  void cut_pieces();
  void fill(const Piece& piece);
  void add_loss_of(const Piece& piece, RoutingFacts& routing);

  Session& session_;
  HeldOut held_out_;
  EvaluatorOptions options_;
  std::vector<Window> windows_;  // the full ones first
  std::vector<Piece> pieces_;    // number p goes to rank p mod ranks
  std::vector<int32_t> ids_, targets_, line_;
  std::vector<uint8_t> starts_;
  std::vector<double> facts_, gathered_;  // the sum of losses, and choices by router and expert
  Buffer device_facts_;  // the same where the model works, and RoutingFacts::sums
  Tensor loss_sum_;
  int64_t predicted_ = 0;
};

}  // namespace moemamba
