#include "kernels/matmul.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/grouped_mma.cuh"
#include "kernels/cuda/grouped_simt.cuh"
#include "kernels/cuda/grouped_wgmma.cuh"
#include "kernels/cuda/products.h"
#include "kernels/pointwise.h"

namespace moemamba {

namespace {

constexpr int kThreads = 256;
constexpr int kMostGroups = 4096;  // their first tiles lie in shared memory
constexpr bool kUseWgmma = true;   // false: grouped products go to mma.sync on every GPU

// to = from, or to += from, in f32. A warp takes a row, a lane four neighbours at a time. Reads and
// writes each element once. Bound by HBM.
template <class From, class To, bool kAdd>
__global__ void convert(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                        int64_t rows, int64_t cols, bool wide) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  from += row * from_stride;
  to += row * to_stride;
  const int64_t packs = wide ? cols / 4 : 0;
  for (int64_t i = threadIdx.x % 32; i < packs; i += 32) {
    const auto in = reinterpret_cast<const Pack<From, 4>*>(from)[i];
    Pack<To, 4> out;
    if constexpr (kAdd) out = reinterpret_cast<const Pack<To, 4>*>(to)[i];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out.at[j] = from_float<To>((kAdd ? to_float(out.at[j]) : 0.f) + to_float(in.at[j]));
    reinterpret_cast<Pack<To, 4>*>(to)[i] = out;
  }
  for (int64_t c = packs * 4 + threadIdx.x % 32; c < cols; c += 32)
    to[c] = from_float<To>((kAdd ? to_float(to[c]) : 0.f) + to_float(from[c]));
}

// Rows may be read four elements at a time.
bool in_fours(const Tensor& tensor) {
  const auto bytes = uintptr_t(4 * size_of(tensor.dtype));
  return reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 &&
         (tensor.rows() <= 1 || tensor.stride % 4 == 0);
}

template <class From, class To, bool kAdd>
void convert_rows(Stream& stream, const Tensor& from, const Tensor& to) {
  if (from.elements() == 0) return;
  convert<From, To, kAdd>
      <<<grid_of(ceil_divide(from.rows(), kThreads / 32)), kThreads, 0, native(stream)>>>(
          pointer<From>(from), from.stride, pointer<To>(to), to.stride, from.rows(), from.cols(),
          in_fours(from) && in_fours(to));
  cuda_check(cudaGetLastError(), "matmul, conversion");
}

// A dense f32 tensor like `like` in scratch, rows on 16-byte borders, and the scratch behind it.
int64_t padded_cols(const Tensor& like) { return (like.cols() + 3) / 4 * 4; }
int64_t f32_bytes(const Tensor& like) {
  return (like.rows() * padded_cols(like) * int64_t(sizeof(float)) + 63) / 64 * 64;
}
Tensor take_f32(const Tensor& like, std::byte*& scratch) {
  Tensor tensor = view(scratch, {like.rows(), like.cols()}, DType::f32, DeviceKind::cuda);
  tensor.stride = padded_cols(like);
  scratch += f32_bytes(like);
  return tensor;
}

// Rows that copies of 16 bytes may begin at; they may end anywhere.
bool in_sixteens(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
         (tensor.rows() <= 1 || tensor.stride * size_of(tensor.dtype) % 16 == 0);
}

template <GroupedKind kKind, class Out, bool kAligned>
void launch_mma(Stream& stream, const GroupedWork<__nv_bfloat16, Out>& work, int64_t tiles) {
  const auto kernel = grouped_mma::multiply<kKind, Out, kAligned>;
  const size_t bytes = grouped_mma::shared_bytes(kKind == GroupedKind::outer ? 0 : work.groups);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
             "cudaFuncSetAttribute");
  const unsigned blocks = grid_of(std::min<int64_t>(tiles, multiprocessors()));
  kernel<<<blocks, grouped_mma::kThreads, bytes, native(stream)>>>(work);
}

// TMA reads rows on 16-byte borders, and no empty tensors.
template <class Op>
bool tma_takes(const Op& op) {
  return in_sixteens(op.a) && in_sixteens(op.b) && op.a.elements() > 0 && op.b.elements() > 0;
}

template <GroupedKind kKind, class Out, class Op>
void launch_wgmma(Stream& stream, const Op& op, GroupedWork<__nv_bfloat16, Out> work,
                  int64_t tiles) {
  constexpr bool outer = kKind == GroupedKind::outer;
  work.wide_out = in_sixteens(op.out);
  const CUtensorMap a = hopper::tensor_map(op.a, 1, uint64_t(op.a.rows()), grouped_wgmma::kBoxCols,
                                           grouped_wgmma::a_box_rows(kKind));
  const CUtensorMap b = hopper::tensor_map(
      op.b, uint64_t(outer ? 1 : op.b.shape[0]), uint64_t(outer ? op.b.rows() : op.b.shape[1]),
      grouped_wgmma::kBoxCols, grouped_wgmma::b_box_rows(kKind));
  const auto kernel = grouped_wgmma::multiply<kKind, Out>;
  const size_t bytes = grouped_wgmma::shared_bytes(outer ? 0 : work.groups);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
             "cudaFuncSetAttribute");
  const unsigned blocks = grid_of(std::min<int64_t>(tiles, multiprocessors()));
  kernel<<<blocks, grouped_wgmma::kThreads, bytes, native(stream)>>>(a, b, work);
}

// At most this many tiles; how many there are depends on the groups' rows.
template <class Op>
int64_t most_tiles(const Op& op, int64_t rows, int64_t cols) {
  const int64_t E = op.offsets.cols() - 1, across = ceil_divide(op.out.cols(), cols);
  if constexpr (std::is_same_v<Op, GroupedOuter>)
    return E * ceil_divide(op.out.shape[1], rows) * across;
  else
    return (op.a.rows() + E * (rows - 1)) / rows * across;
}

template <class Real, class Out, class Op>
GroupedWork<Real, Out> work_of(const Op& op) {
  constexpr bool outer = std::is_same_v<Op, GroupedOuter>;
  const int64_t E = op.offsets.cols() - 1;
  const size_t store_bytes = std::is_same_v<Out, float> ? 8 : 16;
  const bool rows_fit = op.out.rows() <= 1 || op.out.stride * sizeof(Out) % store_bytes == 0;
  return {.a = pointer<Real>(op.a),
          .b = pointer<Real>(op.b),
          .out = pointer<Out>(op.out),
          .offsets = pointer<int32_t>(op.offsets),
          .a_stride = op.a.stride,
          .b_stride = op.b.stride,
          .out_stride = op.out.stride,
          .groups = int(E),
          .rows = int(op.a.rows()),
          .M = outer ? int(op.a.cols()) : 0,
          .N = int(op.out.cols()),
          .K = outer ? 0 : int(op.a.cols()),
          .accumulate = false,
          .wide_out = rows_fit && reinterpret_cast<uintptr_t>(op.out.data) % store_bytes == 0};
}

// Whether the product's kernel does what `op` wants beside the product.
template <class Out>
bool take_activation(const GroupedMatmul& op, GroupedWork<__nv_bfloat16, Out>& work) {
  if (op.positive && !in_sixteens(op.positive)) return false;
  work.relu = op.relu;
  work.positive = pointer<const __nv_bfloat16>(op.positive);
  work.positive_stride = op.positive.stride;
  return true;
}
template <class Out>
bool take_activation(const GroupedOuter&, GroupedWork<__nv_bfloat16, Out>&) { return true; }

// What it does not do.
void activate(Stream& stream, const GroupedMatmul& op) {
  const Tensor rows = grouped_rows(op.offsets);
  if (op.relu) run_cuda(stream, ActivationForward{.x = op.out, .rows = rows, .y = op.out});
  if (op.positive)
    run_cuda(stream,
             ActivationBackward{.x = op.positive, .dy = op.out, .rows = rows, .dx = op.out});
}
void activate(Stream&, const GroupedOuter&) {}

template <GroupedKind kKind, class Op>
void multiply_groups(Stream& stream, const Op& op, bool accumulate, bool wgmma) {
  constexpr bool outer = kKind == GroupedKind::outer;
  using Narrow = std::conditional_t<outer, float, __nv_bfloat16>;  // out's, for bf16 operands
  const bool narrow = op.a.dtype == DType::bf16;
  const int64_t rows = narrow ? grouped_mma::kRows : grouped_simt::kTile;
  const int64_t tiles = most_tiles(op, rows, narrow ? grouped_mma::kCols : grouped_simt::kTile);
  check(op.offsets.cols() - 1 <= kMostGroups && std::max(op.a.rows(), tiles) < INT32_MAX, op.name,
        ": at most ", kMostGroups, " groups and 2^31 rows or tiles, found ",
        op.offsets.cols() - 1, " groups, ", op.a.rows(), " rows, ", tiles, " tiles");
  if (tiles == 0) return;
  bool activated = false;
  if (narrow) {
    auto work = work_of<__nv_bfloat16, Narrow>(op);
    work.accumulate = accumulate;
    const bool fast = in_sixteens(op.a) && in_sixteens(op.b);
    if (wgmma && tma_takes(op) && hopper::runs_here(grouped_wgmma::multiply<kKind, Narrow>)) {
      activated = take_activation(op, work);
      launch_wgmma<kKind, Narrow>(stream, op, work, tiles);
    } else if (fast) launch_mma<kKind, Narrow, true>(stream, work, tiles);
    else launch_mma<kKind, Narrow, false>(stream, work, tiles);
  } else {
    auto work = work_of<float, float>(op);
    work.accumulate = accumulate;
    const unsigned blocks = grid_of(std::min<int64_t>(tiles, 2 * multiprocessors()));
    const size_t bytes = outer ? 0 : size_t(work.groups + 1) * sizeof(int);
    grouped_simt::multiply<kKind>
        <<<blocks, grouped_simt::kThreads, bytes, native(stream)>>>(work);
  }
  cuda_check(cudaGetLastError(), op.name);
  if (!activated) activate(stream, op);
}

void multiply_groups(Stream& stream, const GroupedMatmul& op, bool wgmma) {
  if (op.b_transposed)
    multiply_groups<GroupedKind::matmul_b_transposed>(stream, op, false, wgmma);
  else
    multiply_groups<GroupedKind::matmul>(stream, op, false, wgmma);
}

void multiply_groups(Stream& stream, const GroupedOuter& op, bool wgmma) {
  multiply_groups<GroupedKind::outer>(stream, op, op.accumulate, wgmma);
}

}  // namespace

int64_t widened_bytes(const Matmul& op) {
  return (op.a.dtype == DType::f32 ? 0 : f32_bytes(op.a)) +
         (op.b.dtype == DType::f32 ? 0 : f32_bytes(op.b)) +
         (op.out.dtype == DType::f32 ? 0 : f32_bytes(op.out));
}

void multiply_widened(Stream& stream, const Matmul& op, std::byte* scratch) {
  const auto widen = [&](const Tensor& tensor) {
    if (tensor.dtype == DType::f32) return tensor;
    const Tensor wide = take_f32(tensor, scratch);
    convert_rows<__nv_bfloat16, float, false>(stream, tensor, wide);
    return wide;
  };
  Matmul wide = op;
  wide.a = widen(op.a);
  wide.b = widen(op.b);
  const bool narrow_out = op.out.dtype == DType::bf16;
  if (narrow_out) {
    wide.out = take_f32(op.out, scratch);
    wide.accumulate = false;
  }
  check(multiply_by_blas(stream, wide), op.name, ": cuBLASLt has no f32 algorithm for out",
        to_string(op.out.shape));
  if (!narrow_out) return;
  if (op.accumulate) convert_rows<float, __nv_bfloat16, true>(stream, wide.out, op.out);
  else convert_rows<float, __nv_bfloat16, false>(stream, wide.out, op.out);
}

void run_cuda(Stream& stream, const Matmul& op) {
  if (op.out.elements() == 0) return;
  if ((op.a_transposed ? op.a.rows() : op.a.cols()) == 0) {  // an empty sum
    if (!op.accumulate) fill_zero(stream, op.out);
    return;
  }
  if (multiply_by_blas(stream, op)) return;
  multiply_widened(stream, op, stream.workspace(size_t(widened_bytes(op))));
}

void run_cuda(Stream& stream, const GroupedMatmul& op) { multiply_groups(stream, op, kUseWgmma); }

void run_cuda(Stream& stream, const GroupedOuter& op) { multiply_groups(stream, op, kUseWgmma); }

void multiply_by_mma(Stream& stream, const GroupedMatmul& op) {
  multiply_groups(stream, op, false);
}

void multiply_by_mma(Stream& stream, const GroupedOuter& op) { multiply_groups(stream, op, false); }

}  // namespace moemamba
