#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: T tokens, V vocabulary, D width

// y[t] = table[ids[t]]. REQUIRES: 0 <= ids < V (batches are checked when they are made).
struct EmbeddingForward {
  static constexpr auto name = "embedding_forward";
  Tensor ids;    // [T] i32 read
  Tensor table;  // [V, D] read, f32 or bf16
  Tensor y;      // [T, D] written, f32 or bf16, whatever the table is
  static constexpr auto reads() {
    return std::tuple(&EmbeddingForward::ids, &EmbeddingForward::table);
  }
  static constexpr auto writes() { return std::tuple(&EmbeddingForward::y); }
  void check() const;
};

// dtable[v] = sum of dy[t] over ids[t] == v in token order (+ dtable[v]); on a GPU over fixed
// pieces of the tokens sorted by id, in order.
struct EmbeddingBackward {
  static constexpr auto name = "embedding_backward";
  Tensor ids;     // [T] i32 read
  Tensor dy;      // [T, D] read, f32 or bf16
  Tensor dtable;  // [V, D] written (or added to), f32
  bool accumulate = false;
  static constexpr auto reads() {
    return std::tuple(&EmbeddingBackward::ids, &EmbeddingBackward::dy);
  }
  static constexpr auto writes() { return std::tuple(&EmbeddingBackward::dtable); }
  void check() const;
};

void run_cpu(Stream&, const EmbeddingForward&);
void run_cpu(Stream&, const EmbeddingBackward&);
void run_cuda(Stream&, const EmbeddingForward&);
void run_cuda(Stream&, const EmbeddingBackward&);

}  // namespace moemamba
