#include "kernels/bias.h"

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/sums.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 8;         // of rows that a block of sum_rows() adds side by side
constexpr int64_t kParts = 264;    // of rows at most, two for each multiprocessor
constexpr int64_t kLeastRows = 64; // of a part

// y[t] = x[t] + table[first + t mod L], row by row of the table; a bias is a table of one row.
template <class Real, class TableReal>
struct AddedRows {
  Lines<Real> x, y;
  Lines<TableReal> table;
  int64_t T, F, packs, first, L;
};

// One pack per thread. Reads x, writes y once, the table comes from the caches: bound by memory.
template <int kCount, class Real, class TableReal>
__global__ void __launch_bounds__(kThreads) add_rows(AddedRows<Real, TableReal> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.packs);
  if (place.row >= o.T) return;
  const int64_t column = place.column * kCount;
  const TableReal* table = o.table.row(o.first + place_of(place.row, o.L).column) + column;
  for_pack<kCount>(o.F - column, [&](auto part) {
    float x[kCount], added[kCount];
    load<kCount>(o.x.row(place.row) + column, part, x);
    load<kCount>(table, part, added);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += added[i];
    store<kCount>(o.y.row(place.row) + column, part, x);
  });
}

struct Added {
  const Tensor &x, &table, &y;
  int64_t first, L;
};
void launch_add_rows(Stream& stream, const Added& op) {
  if (op.x.elements() == 0) return;
  const bool packed = rows_aligned(op.x) && rows_aligned(op.y) && rows_aligned(op.table);
  visit_real(op.x.dtype, [&]<class Real>() {
    visit_real(op.table.dtype, [&]<class TableReal>() {
      constexpr int kPack = 16 / int(sizeof(Real));
      AddedRows<Real, TableReal> o{.x = lines<Real>(op.x),
                                   .y = lines<Real>(op.y),
                                   .table = lines<TableReal>(op.table),
                                   .T = op.x.rows(),
                                   .F = op.x.cols(),
                                   .first = op.first,
                                   .L = op.L};
      o.packs = packed ? ceil_divide(o.F, kPack) : o.F;
      const auto kernel = packed ? add_rows<kPack, Real, TableReal> : add_rows<1, Real, TableReal>;
      const unsigned grid = grid_of(ceil_divide(o.T * o.packs, kThreads));
      kernel<<<grid, kThreads, 0, native(stream)>>>(o);
      cuda_check(cudaGetLastError(), "add_rows");
    });
  });
}

template <class Real>
struct SummedRows {
  Lines<Real> x;
  float* parts;  // [parts][F]
  int64_t T, F, part_rows, strips;
};

// A block sums one part of the rows in a strip of 32 packs: group g (a warp) adds rows g, g + 8 ..
// in order, then the groups are added in order. Reads x once: bound by memory.
template <int kCount, class Real>
__global__ void __launch_bounds__(32 * kGroups) sum_rows(SummedRows<Real> o) {
  __shared__ float sums[kGroups][32 * kCount];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t part = blockIdx.x / o.strips, strip = blockIdx.x % o.strips;
  const int64_t begin = part * o.part_rows, end = min(o.T, begin + o.part_rows);
  const int64_t first = strip * 32 * kCount, column = first + lane * kCount;
  float total[kCount] = {};
  for_pack<kCount>(o.F - column, [&](auto part) {
    if (column >= o.F) return;
#pragma unroll 4
    for (int64_t t = begin + group; t < end; t += kGroups) {
      float x[kCount];
      load<kCount>(o.x.row(t) + column, part, x);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += x[i];
    }
  });
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[group][lane * kCount + i] = total[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kCount && first + i < o.F; i += 32 * kGroups) {
    float sum = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sum += sums[g][i];
    o.parts[part * o.F + first + i] = sum;
  }
}

template <class Real>
struct SummedSequences {
  Lines<Real> dy;
  Lines<float> dtable;
  int64_t P, D, packs, B, L;
  bool accumulate;
};

// One pack of one position per thread, which adds the sequences in their order. Reads dy and writes
// dtable once: bound by memory.
template <int kCount, class Real>
__global__ void __launch_bounds__(kThreads) sum_sequences(SummedSequences<Real> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.packs);
  if (place.row >= o.P) return;
  const int64_t column = place.column * kCount, sequences = place.row < o.L ? o.B : 0;
  float* to = o.dtable.row(place.row) + column;
  for_pack<kCount>(o.D - column, [&](auto part) {
    float total[kCount] = {};
    if (o.accumulate) load<kCount>(to, part, total);
#pragma unroll 4
    for (int64_t b = 0; b < sequences; ++b) {
      float dy[kCount];
      load<kCount>(o.dy.row(b * o.L + place.row) + column, part, dy);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] += dy[i];
    }
    store<kCount>(to, part, total);
  });
}

}  // namespace

void run_cuda(Stream& stream, const AddBias& op) {
  launch_add_rows(stream, {op.x, op.bias, op.y, 0, 1});
}

// Workspace: the sums of the parts, which are added in their order.
void run_cuda(Stream& stream, const BiasBackward& op) {
  const int64_t T = op.dy.rows(), F = op.dy.cols();
  const int64_t part_rows = std::max(kLeastRows, ceil_divide(T, kParts));
  const int64_t blocks = ceil_divide(T, part_rows);
  float* parts = nullptr;
  if (T > 0 && F > 0) {
    parts = reinterpret_cast<float*>(stream.workspace(size_t(blocks * F) * sizeof(float)));
    visit_real(op.dy.dtype, [&]<class Real>() {
      constexpr int kPack = 16 / int(sizeof(Real));
      const bool packed = rows_aligned(op.dy);
      const int64_t strips = ceil_divide(F, 32 * (packed ? kPack : 1));
      const SummedRows<Real> o{lines<Real>(op.dy), parts, T, F, part_rows, strips};
      const auto kernel = packed ? sum_rows<kPack, Real> : sum_rows<1, Real>;
      kernel<<<grid_of(blocks * strips), 32 * kGroups, 0, native(stream)>>>(o);
      cuda_check(cudaGetLastError(), BiasBackward::name);
    });
  }
  sum_parts(stream, parts, blocks, F, {pointer<float>(op.dbias), nullptr, F}, op.accumulate);
}

void run_cuda(Stream& stream, const AddPositions& op) {
  const int64_t L = op.sequences ? op.x.rows() / op.sequences : 0;
  launch_add_rows(stream, {op.x, op.table, op.y, op.first_position, L});
}

void run_cuda(Stream& stream, const PositionsBackward& op) {
  if (op.dtable.elements() == 0) return;
  const bool packed = rows_aligned(op.dy) && rows_aligned(op.dtable);
  visit_real(op.dy.dtype, [&]<class Real>() {
    constexpr int kPack = 16 / int(sizeof(Real));
    SummedSequences<Real> o{.dy = lines<Real>(op.dy),
                            .dtable = lines<float>(op.dtable),
                            .P = op.dtable.rows(),
                            .D = op.dtable.cols(),
                            .B = op.sequences,
                            .L = op.sequences ? op.dy.rows() / op.sequences : 0,
                            .accumulate = op.accumulate};
    o.packs = packed ? ceil_divide(o.D, kPack) : o.D;
    const auto kernel = packed ? sum_sequences<kPack, Real> : sum_sequences<1, Real>;
    const unsigned grid = grid_of(ceil_divide(o.P * o.packs, kThreads));
    kernel<<<grid, kThreads, 0, native(stream)>>>(o);
    cuda_check(cudaGetLastError(), PositionsBackward::name);
  });
}

}  // namespace moemamba
