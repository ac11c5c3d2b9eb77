#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: B sequences, L length, T = B L tokens, H heads, Hkv key/value
                      // heads (Hkv divides H), dh width of a head
                      // qkv, y, cache and their gradients: f32 or bf16, all alike

// Causal softmax attention. Head h reads key/value head h / (H / Hkv); for the token at place t of
// its sequence, over the visible keys j = first(t) .. t:
//   s[j] = q_t . k_j / sqrt(dh),   lse = log sum_j exp(s[j]),   y_t = sum_j exp(s[j] - lse) v_j
// first(t) is the newest document start at or before t (starts[t] != 0), else the sequence's first.
//
// With a cache the sequence goes on from earlier calls: `filled` tokens lie there, the keys and
// values of these L are appended behind them (slots filled .. filled + L; the caller then counts
// filled up by L), and places count from slot 0.
struct AttentionForward {
  static constexpr auto name = "attention_forward";
  Tensor qkv;     // [T, (H + 2 Hkv) dh] read: q heads | k heads | v heads; rows may be strided
  Tensor starts;  // [T] u8 read, optional
  Tensor y;       // [T, H dh] written; rows may be strided
  Tensor lse;     // [T, H] written, optional, f32; backward needs it
  Tensor cache;   // [B, slots, 2 Hkv dh] read and written, optional: k heads | v heads of a token
  Tensor first;   // [B] i32 read and written, optional: the first slot that a sequence still sees;
                  // needed where documents start in a sequence with a cache
  int64_t sequences = 1;  // B
  int64_t heads = 1;      // H
  int64_t kv_heads = 1;   // Hkv
  int64_t filled = 0;     // slots of the cache that hold earlier tokens, in each sequence
  static constexpr auto reads() {
    return std::tuple(&AttentionForward::qkv, &AttentionForward::starts);
  }
  static constexpr auto writes() {
    return std::tuple(&AttentionForward::y, &AttentionForward::lse, &AttentionForward::cache,
                      &AttentionForward::first);
  }
  void check() const;
};

// Of forward without a cache. The probabilities are computed again from lse, tile by tile.
struct AttentionBackward {
  static constexpr auto name = "attention_backward";
  Tensor qkv;     // [T, (H + 2 Hkv) dh] read, as in forward
  Tensor starts;  // [T] u8 read, optional
  Tensor y;       // [T, H dh] read: what forward wrote
  Tensor lse;     // [T, H] read, f32
  Tensor dy;      // [T, H dh] read; rows may be strided
  Tensor dqkv;    // [T, (H + 2 Hkv) dh] written; rows may be strided
  int64_t sequences = 1;
  int64_t heads = 1;
  int64_t kv_heads = 1;
  static constexpr auto reads() {
    return std::tuple(&AttentionBackward::qkv, &AttentionBackward::starts, &AttentionBackward::y,
                      &AttentionBackward::lse, &AttentionBackward::dy);
  }
  static constexpr auto writes() { return std::tuple(&AttentionBackward::dqkv); }
  void check() const;
};

void run_cpu(Stream&, const AttentionForward&);
void run_cpu(Stream&, const AttentionBackward&);
void run_cuda(Stream&, const AttentionForward&);
void run_cuda(Stream&, const AttentionBackward&);

}  // namespace moemamba
