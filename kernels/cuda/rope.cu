#include "kernels/rope.h"

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/starts.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 256;

template <class Real>
struct Rotation {
  Lines<Real> x, y;
  const double* speeds;   // [half]: w_i
  const int32_t* newest;  // [T]: place of the newest document start, -1 for none; or null
  int64_t T, L, first_position;
  int half, heads;
  bool inverse;
};

__global__ void fill_speeds(double* speeds, int half, double base) {
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i < half) speeds[i] = pow(base, -double(i) / double(half));
}

// One thread turns one pair of every head of a token. The angle is taken in double, so that large
// positions are as exact as small ones, and depends on the position alone: its bits are the same in
// every call. Reads x and writes y once; with few heads the double arithmetic binds (about 200
// instructions a pair of a token), with many memory does.
template <class Real>
__global__ void __launch_bounds__(kThreads) rotate(Rotation<Real> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.half);
  if (place.row >= o.T) return;
  const int64_t at = place_of(place.row, o.L).column;
  int64_t position = o.first_position + at;
  if (o.newest && o.newest[place.row] >= 0) position = at - o.newest[place.row];
  double sine, cosine;
  sincos(double(position) * o.speeds[place.column], &sine, &cosine);
  const float c = float(cosine), s = o.inverse ? -float(sine) : float(sine);
  const Real* x = o.x.row(place.row) + place.column;
  Real* y = o.y.row(place.row) + place.column;
#pragma unroll 4
  for (int head = 0; head < o.heads; ++head) {
    const int64_t i = int64_t(head) * 2 * o.half;
    const float a = to_float(x[i]), b = to_float(x[i + o.half]);
    y[i] = from_float<Real>(a * c - b * s);
    y[i + o.half] = from_float<Real>(b * c + a * s);
  }
}

}  // namespace

// Workspace: the speeds, and with `starts` the place of each token's document start.
void run_cuda(Stream& stream, const Rope& op) {
  if (op.x.elements() == 0) return;
  const int64_t T = op.x.rows(), L = T / op.sequences, half = op.head_width / 2;
  const size_t bytes = size_t(half) * sizeof(double);
  std::byte* space = stream.workspace(bytes + (op.starts ? size_t(T) * sizeof(int32_t) : 0));
  auto* speeds = reinterpret_cast<double*>(space);
  int32_t* newest = op.starts ? reinterpret_cast<int32_t*>(space + bytes) : nullptr;
  const cudaStream_t on = native(stream);
  fill_speeds<<<grid_of(ceil_divide(half, kThreads)), kThreads, 0, on>>>(speeds, int(half),
                                                                         op.base);
  if (newest)
    find_starts(stream, {.starts = op.starts, .none = -1, .B = op.sequences, .L = L}, newest);
  visit_real(op.x.dtype, [&]<class Real>() {
    const Rotation<Real> o{.x = lines<Real>(op.x),
                           .y = lines<Real>(op.y),
                           .speeds = speeds,
                           .newest = newest,
                           .T = T,
                           .L = L,
                           .first_position = op.first_position,
                           .half = int(half),
                           .heads = int(op.x.cols() / op.head_width),
                           .inverse = op.inverse};
    rotate<<<grid_of(ceil_divide(T * half, kThreads)), kThreads, 0, on>>>(o);
  });
  cuda_check(cudaGetLastError(), Rope::name);
}

}  // namespace moemamba
