#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: B sequences, L length, T = B L tokens, D channels, N states

// Steps between two kept states: backward recomputes the states of one such chunk at a time.
inline constexpr int64_t kScanChunk = 32;  // on the CPU
inline constexpr int64_t kScanTile = 14;   // on a GPU: kernels/cuda/scan_tiles.cuh says why

// The selective scan of Mamba (Gu & Dao 2023; ZOH for A, Euler for B), token-major:
//   delta = softplus(dt + dt_bias),  A = -exp(a_log)
//   h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] b_t[n] u_t[d]
//   p_t[d]    = sum_n c_t[n] h_t[d, n] + skip[d] u_t[d]
//   y_t[d]    = p_t[d] * silu(z_t[d])           (y = p without z)
// h starts at `initial` (else 0); at a token with starts[t] != 0 the state before it is zero.
// u, dt, b, c, z, y and their gradients are activations: all f32 or all bf16.
struct ScanForward {
  static constexpr auto name = "scan_forward";
  Tensor u;        // [T, D] read
  Tensor dt;       // [T, D] read, before bias and softplus
  Tensor dt_bias;  // [D] read, f32
  Tensor a_log;    // [D, N] read, f32, N <= 64
  Tensor b;        // [T, N] read; rows may be strided (a part of the projection's output)
  Tensor c;        // [T, N] read; likewise
  Tensor skip;     // [D] read, f32
  Tensor z;        // [T, D] read, optional; rows may be strided
  Tensor initial;  // [B, D, N] read, optional, f32
  Tensor starts;   // [T] u8 read, optional
  Tensor y;        // [T, D] written
  Tensor states;   // [scan_state_elements()] written, optional, f32: what backward recomputes from;
                   // its inner layout belongs to the backend
  Tensor final;    // [B, D, N] written, optional, f32
  int64_t sequences = 1;  // B
  static constexpr auto reads() {
    return std::tuple(&ScanForward::u, &ScanForward::dt, &ScanForward::dt_bias, &ScanForward::a_log,
                      &ScanForward::b, &ScanForward::c, &ScanForward::skip, &ScanForward::z,
                      &ScanForward::initial, &ScanForward::starts);
  }
  static constexpr auto writes() {
    return std::tuple(&ScanForward::y, &ScanForward::states, &ScanForward::final);
  }
  // Tensors whose size and layout belong to the backend, and how many elements it wants.
  static constexpr auto privates() { return std::tuple(&ScanForward::states); }
  int64_t private_elements(DeviceKind device) const;
  void check() const;
};

// CPU: B ceil(L / kScanChunk) round_up(D, 16) N. GPU: B ceil(L / kScanTile) times 1024 for every
// 2048 / M channels, where M is N rounded up to 8, 16, 32 or 64.
int64_t scan_state_elements(int64_t B, int64_t L, int64_t D, int64_t N,
                            DeviceKind device = DeviceKind::cpu);

struct ScanBackward {
  static constexpr auto name = "scan_backward";
  Tensor u, dt, dt_bias, a_log, b, c, skip, z, initial, starts;  // read, as in forward
  Tensor states;    // read: what forward wrote on the same backend
  Tensor dy;        // [T, D] read
  Tensor dfinal;    // [B, D, N] read, optional
  Tensor du;        // [T, D] written
  Tensor ddt;       // [T, D] written: gradient of dt (before bias and softplus)
  Tensor db;        // [T, N] written; rows may be strided
  Tensor dc;        // [T, N] written; rows may be strided
  Tensor dz;        // [T, D] written, with z; rows may be strided
  Tensor da_log;    // [D, N] written (or added to), f32
  Tensor ddt_bias;  // [D] written (or added to), f32
  Tensor dskip;     // [D] written (or added to), f32
  Tensor dinitial;  // [B, D, N] written, optional, f32
  int64_t sequences = 1;
  bool accumulate = false;  // add to da_log, ddt_bias, dskip
  static constexpr auto reads() {
    return std::tuple(&ScanBackward::u, &ScanBackward::dt, &ScanBackward::dt_bias,
                      &ScanBackward::a_log, &ScanBackward::b, &ScanBackward::c,
                      &ScanBackward::skip, &ScanBackward::z, &ScanBackward::initial,
                      &ScanBackward::starts, &ScanBackward::states, &ScanBackward::dy,
                      &ScanBackward::dfinal);
  }
  static constexpr auto writes() {
    return std::tuple(&ScanBackward::du, &ScanBackward::ddt, &ScanBackward::db, &ScanBackward::dc,
                      &ScanBackward::dz, &ScanBackward::da_log, &ScanBackward::ddt_bias,
                      &ScanBackward::dskip, &ScanBackward::dinitial);
  }
  static constexpr auto privates() { return std::tuple(&ScanBackward::states); }
  int64_t private_elements(DeviceKind device) const;
  void check() const;
};

void run_cpu(Stream&, const ScanForward&);
void run_cpu(Stream&, const ScanBackward&);
void run_cuda(Stream&, const ScanForward&);
void run_cuda(Stream&, const ScanBackward&);

}  // namespace moemamba
