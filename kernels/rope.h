#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: B sequences, L length, T = B L tokens, dh width of a head

// Rotary positions (Su et al. 2021), halves paired: every head of a row at position p becomes
//   y[i]          = x[i] cos(p w_i) - x[i + dh/2] sin(p w_i),      w_i = base^(-2 i / dh),
//   y[i + dh/2]   = x[i + dh/2] cos(p w_i) + x[i] sin(p w_i),      0 <= i < dh/2
// A rotation's transpose is its inverse, so dx = Rope{.x = dy, .inverse = true}.
// q and k heads of AttentionForward lie side by side: one call on these columns turns both.
struct Rope {
  static constexpr auto name = "rope";
  Tensor x;                // [T, F] read, f32 or bf16, F a multiple of dh; rows may be strided
  Tensor starts;           // [T] u8 read, optional: positions begin again at 0 where starts[t] != 0
  Tensor y;                // [T, F] written, like x; may be x; rows may be strided
  int64_t sequences = 1;   // B
  int64_t head_width = 2;  // dh, even
  int64_t first_position = 0;  // of each sequence's first row (decoding goes on from there)
  double base = 10000;
  bool inverse = false;
  static constexpr auto reads() { return std::tuple(&Rope::x, &Rope::starts); }
  static constexpr auto writes() { return std::tuple(&Rope::y); }
  void check() const;
};

void run_cpu(Stream&, const Rope&);
void run_cuda(Stream&, const Rope&);

}  // namespace moemamba
