#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: T = B L tokens, F columns, D width, P positions
                      // x, y, dy: f32 or bf16, all of one operator alike

// y[t] = x[t] + bias.
struct AddBias {
  static constexpr auto name = "add_bias";
  Tensor x;     // [T, F] read
  Tensor bias;  // [F] read, f32
  Tensor y;     // [T, F] written; may be x
  static constexpr auto reads() { return std::tuple(&AddBias::x, &AddBias::bias); }
  static constexpr auto writes() { return std::tuple(&AddBias::y); }
  void check() const;
};

// dbias = sum of dy[t] (+ dbias), over fixed blocks of rows in block order; dx is dy.
struct BiasBackward {
  static constexpr auto name = "bias_backward";
  Tensor dy;     // [T, F] read
  Tensor dbias;  // [F] written (or added to), f32
  bool accumulate = false;
  static constexpr auto reads() { return std::tuple(&BiasBackward::dy); }
  static constexpr auto writes() { return std::tuple(&BiasBackward::dbias); }
  void check() const;
};

// Learned positions: y[b L + l] = x[b L + l] + table[first_position + l].
struct AddPositions {
  static constexpr auto name = "add_positions";
  Tensor x;                    // [T, D] read
  Tensor table;                // [P, D] read, f32 or bf16, first_position + L <= P
  Tensor y;                    // [T, D] written; may be x
  int64_t sequences = 1;       // B
  int64_t first_position = 0;  // decoding goes on from there
  static constexpr auto reads() { return std::tuple(&AddPositions::x, &AddPositions::table); }
  static constexpr auto writes() { return std::tuple(&AddPositions::y); }
  void check() const;
};

// dtable[l] = sum over b of dy[b L + l] in the sequences' order (+ dtable[l]), of positions that
// began at 0; rows of positions that do not occur are 0 (+ dtable[l]).
struct PositionsBackward {
  static constexpr auto name = "positions_backward";
  Tensor dy;      // [T, D] read
  Tensor dtable;  // [P, D] written (or added to), f32, L <= P
  int64_t sequences = 1;
  bool accumulate = false;
  static constexpr auto reads() { return std::tuple(&PositionsBackward::dy); }
  static constexpr auto writes() { return std::tuple(&PositionsBackward::dtable); }
  void check() const;
};

void run_cpu(Stream&, const AddBias&);
void run_cpu(Stream&, const BiasBackward&);
void run_cpu(Stream&, const AddPositions&);
void run_cpu(Stream&, const PositionsBackward&);
void run_cuda(Stream&, const AddBias&);
void run_cuda(Stream&, const BiasBackward&);
void run_cuda(Stream&, const AddPositions&);
void run_cuda(Stream&, const PositionsBackward&);

}  // namespace moemamba
