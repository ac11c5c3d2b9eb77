#include "kernels/norm.h"

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/sums.cuh"
#include "kernels/gpu_limits.h"

namespace moemamba {

namespace {

// kLanes threads share a row and hold kHeld packs of it each, so that every element is read once.
// A block has as many rows side by side as fit into kThreads.
constexpr int kThreads = 256;
constexpr int64_t kWidest = kWidestNormOnGpu;  // columns
constexpr int64_t kParts = 264;    // blocks of backward at most, two for each multiprocessor

template <int kLanes>
constexpr int kBlockThreads = std::max(kLanes, kThreads);

// The packs of one row that this thread holds, as they lie in memory; 0 beyond the row. Loads of
// whole packs come first, and so are all under way before one of them is needed.
template <int kLanes, class Real, int kCount, int kHeld>
__device__ __forceinline__ void load_row(const Real* row, int D, int lane,
                                         Pack<Real, kCount> (&packs)[kHeld]) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (lane + k * kLanes) * kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) packs[k].at[i] = from_float<Real>(0.f);
    if (column + kCount <= D)
      packs[k] = *reinterpret_cast<const Pack<Real, kCount>*>(row + column);
  }
  if constexpr (kCount > 1) {
    if (D % kCount == 0) return;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = (lane + k * kLanes) * kCount;
      if (column >= D || column + kCount <= D) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (column + i < D) packs[k].at[i] = row[column + i];
    }
  }
}

// The sum over a row's lanes, in a fixed order, on all of them.
template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
  if constexpr (kLanes == 32) return warp_sum(x);
  else return block_sum<kLanes>(x);
}

template <class Real>
struct ForwardRows {
  Lines<Real> x, residual, sum, y;
  const float *weight, *bias;
  float *mean, *rstd;
  int64_t T;
  int D;
  float eps;
};

// A warp or a block per row. Reads x (and residual), writes y (and sum) once: bound by memory. The
// weights come from the first-level cache.
template <int kCount, int kLanes, int kHeld, class Real>
__global__ void __launch_bounds__(kBlockThreads<kLanes>) forward(ForwardRows<Real> o) {
  const int lane = threadIdx.x % kLanes;
  const int64_t t =
      int64_t(blockIdx.x) * (kBlockThreads<kLanes> / kLanes) + threadIdx.x / kLanes;
  if (t >= o.T) return;  // all lanes of the row
  Pack<Real, kCount> s[kHeld];
  load_row<kLanes>(o.x.row(t), o.D, lane, s);
  if (o.residual.data) {
    Pack<Real, kCount> residual[kHeld];
    load_row<kLanes>(o.residual.row(t), o.D, lane, residual);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = (lane + k * kLanes) * kCount;
      float total[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        total[i] = to_float(s[k].at[i]) + to_float(residual[k].at[i]);
        s[k].at[i] = from_float<Real>(total[i]);
      }
      store<kCount>(o.sum.row(t) + column, o.D - column, total);
    }
  }
  float total = 0, squares = 0;
  if (o.bias) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k)
#pragma unroll
      for (int i = 0; i < kCount; ++i) total += to_float(s[k].at[i]);
    total = row_sum<kLanes>(total);
  }
  const float mean = total / float(o.D);
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float a = to_float(s[k].at[i]) - mean;
      if ((lane + k * kLanes) * kCount + i < o.D) squares = fmaf(a, a, squares);
    }
  const float rstd = 1.f / sqrtf(row_sum<kLanes>(squares) / float(o.D) + o.eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (lane + k * kLanes) * kCount, count = o.D - column;
    float weight[kCount], y[kCount] = {};
    load<kCount>(o.weight + column, count, weight);
    if (o.bias) load<kCount>(o.bias + column, count, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      y[i] = fmaf((to_float(s[k].at[i]) - mean) * rstd, weight[i], y[i]);
    store<kCount>(o.y.row(t) + column, count, y);
  }
  if (lane > 0) return;
  if (o.bias) o.mean[t] = mean;
  o.rstd[t] = rstd;
}

template <class Real>
struct BackwardRows {
  Lines<Real> dy, x, dsum, dx;
  const float *weight, *mean, *rstd;
  float* parts;  // [blocks][dweight, dbias (layer only)][D]
  int64_t T, block_rows;
  int D;
};

// What a thread holds while it walks down its rows.
template <int kCount, int kHeld>
struct Held {
  float weight[kHeld][kCount], dweight[kHeld][kCount], dbias[kHeld][kCount];
};

// dx of one row; adds to the sums of the weights' gradients. dx may be dsum or dy: every element
// is read by the thread that writes it, before.
template <int kCount, int kLanes, bool kLayer, class Real, int kHeld>
__device__ __forceinline__ void backward_row(const BackwardRows<Real>& o, int64_t t, int lane,
                                             Held<kCount, kHeld>& held) {
  Pack<Real, kCount> dy[kHeld], x[kHeld], dsum[kHeld];
  load_row<kLanes>(o.dy.row(t), o.D, lane, dy);
  load_row<kLanes>(o.x.row(t), o.D, lane, x);
  if (o.dsum.data) load_row<kLanes>(o.dsum.row(t), o.D, lane, dsum);
  const float mean = kLayer ? o.mean[t] : 0.f, rstd = o.rstd[t];
  float total = 0, projected = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // dy is 0 beyond the row, so that nothing counts there
      const float d = to_float(dy[k].at[i]), g = d * held.weight[k][i];
      const float n = (to_float(x[k].at[i]) - mean) * rstd;
      if (kLayer) total += g, held.dbias[k][i] += d;
      projected = fmaf(g, n, projected);
      held.dweight[k][i] = fmaf(d, n, held.dweight[k][i]);
    }
  const float mean_g = kLayer ? row_sum<kLanes>(total) / float(o.D) : 0.f;
  const float mean_gn = row_sum<kLanes>(projected) / float(o.D);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (lane + k * kLanes) * kCount;
    float dx[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float n = (to_float(x[k].at[i]) - mean) * rstd;
      dx[i] = rstd * (to_float(dy[k].at[i]) * held.weight[k][i] - mean_g - n * mean_gn);
      if (o.dsum.data) dx[i] += to_float(dsum[k].at[i]);
    }
    store<kCount>(o.dx.row(t) + column, o.D - column, dx);
  }
}

// Adds the sums of a block's groups in their order and writes them to part[D].
template <int kCount, int kLanes, int kHeld>
__device__ void add_groups(const float (&sums)[kHeld][kCount], int lane, int D, float* part) {
  constexpr int kGroups = kBlockThreads<kLanes> / kLanes, kWidth = kLanes * kHeld * kCount;
  __shared__ float groups[kGroups][kWidth];
  __syncthreads();  // the last call's readers are done
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      groups[threadIdx.x / kLanes][(lane + k * kLanes) * kCount + i] = sums[k][i];
  __syncthreads();
  for (int column = threadIdx.x; column < D; column += kBlockThreads<kLanes>) {
    float total = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total += groups[g][column];
    part[column] = total;
  }
}

// A block has block_rows rows; its groups of kLanes threads take them in turn, and each thread
// keeps its columns of dweight and dbias in registers. Reads dy, x (and dsum), writes dx once:
// bound by memory; the parts are small beside them.
template <int kCount, int kLanes, int kHeld, bool kLayer, class Real>
__global__ void __launch_bounds__(kBlockThreads<kLanes>) backward(BackwardRows<Real> o) {
  constexpr int kGroups = kBlockThreads<kLanes> / kLanes;
  static_assert(kLanes == 32 || kGroups == 1);  // row_sum() is of a warp or of the block
  const int lane = threadIdx.x % kLanes;
  const int64_t begin = blockIdx.x * o.block_rows, end = min(o.T, begin + o.block_rows);
  Held<kCount, kHeld> held;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (lane + k * kLanes) * kCount;
    load<kCount>(o.weight + column, o.D - column, held.weight[k]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) held.dweight[k][i] = held.dbias[k][i] = 0;
  }
  for (int64_t t = begin + threadIdx.x / kLanes; t < end; t += kGroups)
    backward_row<kCount, kLanes, kLayer>(o, t, lane, held);
  float* part = o.parts + blockIdx.x * int64_t{o.D} * (kLayer ? 2 : 1);
  add_groups<kCount, kLanes>(held.dweight, lane, o.D, part);
  if (kLayer) add_groups<kCount, kLanes>(held.dbias, lane, o.D, part + o.D);
}

template <int kCount, int kLanes, int kHeld, class Real>
void launch_forward(Stream& stream, const ForwardRows<Real>& o) {
  const int64_t blocks = ceil_divide(o.T, kBlockThreads<kLanes> / kLanes);
  forward<kCount, kLanes, kHeld><<<grid_of(blocks), kBlockThreads<kLanes>, 0, native(stream)>>>(o);
  cuda_check(cudaGetLastError(), NormForward::name);
}

template <int kCount, class Real>
void choose_forward(Stream& stream, const ForwardRows<Real>& o) {
  if (o.D <= 512) return launch_forward<kCount, 32, 16 / kCount>(stream, o);
  if (o.D <= 1024) return launch_forward<kCount, 32, 32 / kCount>(stream, o);
  launch_forward<kCount, 256, 32 / kCount>(stream, o);
}

template <int kCount, int kLanes, bool kLayer, class Real>
void launch_backward(Stream& stream, const BackwardRows<Real>& o) {
  constexpr int kRowThreads = kBlockThreads<kLanes>;
  const auto kernel = backward<kCount, kLanes, 16 / kCount, kLayer, Real>;
  kernel<<<grid_of(ceil_divide(o.T, o.block_rows)), kRowThreads, 0, native(stream)>>>(o);
  cuda_check(cudaGetLastError(), NormBackward::name);
}

template <int kCount, bool kLayer, class Real>
void choose_backward(Stream& stream, const BackwardRows<Real>& o) {
  if (o.D <= 512) return launch_backward<kCount, 32, kLayer>(stream, o);
  if (o.D <= 4096) return launch_backward<kCount, 256, kLayer>(stream, o);
  launch_backward<kCount, 512, kLayer>(stream, o);
}

void check_width(int64_t D) {
  check(D <= kWidest, "norm: a GPU normalises rows of up to ", kWidest, " columns, found ", D,
        "; use --device=cpu");
}

}  // namespace

void run_cuda(Stream& stream, const NormForward& op) {
  const auto [T, D] = dims<2>("x[T, D]", op.x);
  check_width(D);
  if (T == 0) return;
  const Tensor sum = op.residual ? op.sum : Tensor();
  bool packed = true;
  for (const Tensor& tensor : {op.x, op.residual, sum, op.y, op.weight, op.bias})
    packed = packed && rows_aligned(tensor);
  visit_real(op.x.dtype, [&, T = T, D = D]<class Real>() {
    const ForwardRows<Real> o{.x = lines<Real>(op.x),
                              .residual = lines<Real>(op.residual),
                              .sum = lines<Real>(sum),
                              .y = lines<Real>(op.y),
                              .weight = pointer<float>(op.weight),
                              .bias = pointer<float>(op.bias),
                              .mean = pointer<float>(op.mean),
                              .rstd = pointer<float>(op.rstd),
                              .T = T,
                              .D = int(D),
                              .eps = op.eps};
    if (packed) choose_forward<16 / int(sizeof(Real))>(stream, o);
    else choose_forward<1>(stream, o);
  });
}

// Workspace: every block's sums of dweight (and dbias), which are added in the blocks' order.
void run_cuda(Stream& stream, const NormBackward& op) {
  const auto [T, D] = dims<2>("x[T, D]", op.x);
  check_width(D);
  const bool layer = op.kind == NormKind::layer;
  const int64_t block_rows = std::max<int64_t>(8, ceil_divide(ceil_divide(T, kParts), 8) * 8);
  const int64_t blocks = ceil_divide(T, block_rows), columns = layer ? 2 * D : D;
  float* parts = nullptr;
  if (T > 0) {
    parts = reinterpret_cast<float*>(
        stream.workspace(size_t(blocks * columns) * sizeof(float)));
    bool packed = true;
    for (const Tensor& tensor : {op.dy, op.x, op.dsum, op.dx, op.weight})
      packed = packed && rows_aligned(tensor);
    visit_real(op.x.dtype, [&, T = T, D = D]<class Real>() {
      const BackwardRows<Real> o{.dy = lines<Real>(op.dy),
                                 .x = lines<Real>(op.x),
                                 .dsum = lines<Real>(op.dsum),
                                 .dx = lines<Real>(op.dx),
                                 .weight = pointer<float>(op.weight),
                                 .mean = pointer<float>(op.mean),
                                 .rstd = pointer<float>(op.rstd),
                                 .parts = parts,
                                 .T = T,
                                 .block_rows = block_rows,
                                 .D = int(D)};
      constexpr int kPack = 16 / int(sizeof(Real));
      if (packed && layer) choose_backward<kPack, true>(stream, o);
      else if (packed) choose_backward<kPack, false>(stream, o);
      else if (layer) choose_backward<1, true>(stream, o);
      else choose_backward<1, false>(stream, o);
    });
  }
  sum_parts(stream, parts, blocks, columns,
            {pointer<float>(op.dweight), pointer<float>(op.dbias), D}, op.accumulate);
}

}  // namespace moemamba
