#include "kernels/embedding.h"

#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/packs.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 32;  // of the tokens sorted by id: what one thread adds
constexpr int kAhead = 8;   // rows that are loaded before the first is needed
constexpr int kGroups = 8;  // of pieces that add_pieces() adds side by side

template <class Real, class TableReal>
struct Lookup {
  const int32_t* ids;
  Lines<TableReal> table;
  Lines<Real> y;
  int64_t T, D, packs;
};

// One pack of y per thread. Reads rows of the table, writes y: bound by memory.
template <int kCount, class Real, class TableReal>
__global__ void __launch_bounds__(kThreads) look_up(Lookup<Real, TableReal> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.packs);
  if (place.row >= o.T) return;
  const int64_t column = place.column * kCount;
  const TableReal* table = o.table.row(o.ids[place.row]) + column;
  for_pack<kCount>(o.D - column, [&](auto part) {
    float values[kCount];
    load<kCount>(table, part, values);
    store<kCount>(o.y.row(place.row) + column, part, values);
  });
}

// The sorted tokens are cut into pieces of kPiece. A run of one id that lies in one piece is summed
// there. Of a longer run every piece sums its part; then the parts are added in order.
template <class Real>
struct SortedRows {
  const int32_t *ids, *tokens;  // [T], sorted by id, then token
  Lines<Real> dy;
  Lines<float> dtable;
  float* parts;  // [pieces][2][columns]: of the run that began before; of that which goes on after
  int64_t T, D, packs, pieces, columns;  // columns: D, rounded up to whole packs
  bool accumulate;

  __device__ bool begins_before(int64_t at) const { return at > 0 && ids[at - 1] == ids[at]; }
  __device__ bool goes_on_after(int64_t end) const { return end < T && ids[end - 1] == ids[end]; }
};

template <int kCount, class Part>
__device__ __forceinline__ void add_to(float* to, Part part, bool accumulate,
                                       const float (&sum)[kCount]) {
  float total[kCount] = {};
  if (accumulate) load<kCount>(to, part, total);
#pragma unroll
  for (int i = 0; i < kCount; ++i) total[i] += sum[i];
  store<kCount>(to, part, total);
}

// The columns from `column` on of one piece's rows. Rows of parts have room for whole packs.
template <int kCount, class Real, class Part>
__device__ __forceinline__ void sum_piece(const SortedRows<Real>& o, int64_t piece, int64_t column,
                                          Part part) {
  const int64_t begin = piece * kPiece, end = min(o.T, begin + kPiece);
  float* parts = o.parts + piece * 2 * o.columns + column;
  bool from_before = o.begins_before(begin);
  float sum[kCount] = {};
  for (int64_t at = begin; at < end; at += kAhead) {
    float rows[kAhead][kCount];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)  // beyond the end the last one once more, for nothing
      load<kCount>(o.dy.row(o.tokens[min(at + j, end - 1)]) + column, part, rows[j]);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (at + j >= end) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += rows[j][i];
      const int64_t next = at + j + 1;
      const int32_t id = o.ids[next - 1];
      if (next < end && o.ids[next] == id) continue;
      if (from_before) store<kCount>(parts, Whole(), sum);
      else if (next == end && o.goes_on_after(end)) store<kCount>(parts + o.columns, Whole(), sum);
      else add_to<kCount>(o.dtable.row(id) + column, part, o.accumulate, sum);
      from_before = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] = 0;
    }
  }
}

// One pack of one piece per thread. Reads dy once, by rows that lie apart; writes a row of dtable
// for each id: bound by memory.
template <int kCount, class Real>
__global__ void __launch_bounds__(kThreads) sum_pieces(SortedRows<Real> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.packs);
  if (place.row >= o.pieces) return;
  const int64_t column = place.column * kCount;
  for_pack<kCount>(o.D - column,
                   [&](auto part) { sum_piece<kCount>(o, place.row, column, part); });
}

// Adds the parts of the pieces first, first + kGroups .. of the run of `id`. Ids are sorted: where
// one piece does not begin with it, none after does.
template <int kCount, class Real>
__device__ __forceinline__ void add_parts(const SortedRows<Real>& o, int64_t first, int32_t id,
                                          int64_t column, float (&sum)[kCount]) {
  bool goes_on = true;
  for (int64_t p = first; goes_on && p < o.pieces; p += 4 * kGroups) {
    int64_t at[4];
    float parts[4][kCount];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t piece = p + j * kGroups;
      goes_on = piece < o.pieces && o.ids[piece * kPiece] == id;
      at[j] = goes_on ? piece : -1;
    }
    if (at[0] < 0) break;
#pragma unroll
    for (int j = 0; j < 4; ++j)  // where the run has ended the first part once more, for nothing
      load<kCount>(o.parts + (at[j] < 0 ? at[0] : at[j]) * 2 * o.columns + column, Whole(),
                   parts[j]);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += at[j] < 0 ? 0.f : parts[j][i];
  }
}

// A block for every piece and strip of 32 packs; it works where a run that goes on begins in the
// piece. Group g (a warp) adds the parts of pieces 1 + g, 1 + g + 8 .. after it in order, then the
// first part and the groups are added in order. The latency of a long run's parts binds.
template <int kCount, class Real>
__global__ void __launch_bounds__(32 * kGroups) add_pieces(SortedRows<Real> o, int64_t strips) {
  __shared__ float sums[kGroups][32 * kCount];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t piece = blockIdx.x / strips;
  const int64_t column = (blockIdx.x % strips * 32 + lane) * kCount, count = o.D - column;
  const int64_t begin = piece * kPiece, end = min(o.T, begin + kPiece);
  const int32_t id = o.ids[end - 1];
  if (!o.goes_on_after(end) || (o.ids[begin] == id && o.begins_before(begin))) return;
  float sum[kCount] = {};
  if (count > 0) add_parts<kCount>(o, piece + 1 + group, id, column, sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[group][lane * kCount + i] = sum[i];
  __syncthreads();
  if (group > 0 || count <= 0) return;
  load<kCount>(o.parts + (piece * 2 + 1) * o.columns + column, Whole(), sum);
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += sums[g][lane * kCount + i];
  for_pack<kCount>(count, [&](auto part) {
    add_to<kCount>(o.dtable.row(id) + column, part, o.accumulate, sum);
  });
}

__global__ void __launch_bounds__(kThreads) count_up(int32_t* to, int64_t T) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < T) to[t] = int32_t(t);
}

// Parts of the workspace, each on a 256-byte border.
struct Space {
  size_t bytes = 0;
  size_t take(size_t more) {
    const size_t at = bytes;
    bytes += (more + 255) / 256 * 256;
    return at;
  }
};

// Sorts (ids, 0 .. T) by id; the radix sort is stable, so tokens of one id stay in order. With
// space == null only asks for its bytes.
void sort_tokens(Stream& stream, const EmbeddingBackward& op, void* space, size_t& bytes,
                 int32_t* numbers, int32_t* ids, int32_t* tokens) {
  int bits = 1;  // of the greatest id
  while (bits < 31 && (op.dtable.rows() - 1) >> bits > 0) ++bits;
  const auto* from = static_cast<const uint32_t*>(op.ids.data);
  const cudaError_t code = cub::DeviceRadixSort::SortPairs(
      space, bytes, from, reinterpret_cast<uint32_t*>(ids), static_cast<const int32_t*>(numbers),
      tokens, int(op.ids.elements()), 0, bits, native(stream));
  cuda_check(code, EmbeddingBackward::name);
}

template <int kCount, class Real>
void launch_sums(Stream& stream, SortedRows<Real> o) {
  o.packs = ceil_divide(o.D, kCount);
  const int64_t strips = ceil_divide(o.packs, 32);
  const cudaStream_t on = native(stream);
  sum_pieces<kCount, Real>
      <<<grid_of(ceil_divide(o.pieces * o.packs, kThreads)), kThreads, 0, on>>>(o);
  add_pieces<kCount, Real><<<grid_of(o.pieces * strips), 32 * kGroups, 0, on>>>(o, strips);
  cuda_check(cudaGetLastError(), EmbeddingBackward::name);
}

}  // namespace

void run_cuda(Stream& stream, const EmbeddingForward& op) {
  if (op.y.elements() == 0) return;
  const bool packed = rows_aligned(op.table) && rows_aligned(op.y);
  visit_real(op.y.dtype, [&]<class Real>() {
    visit_real(op.table.dtype, [&]<class TableReal>() {
      constexpr int kPack = 16 / int(sizeof(Real));
      Lookup<Real, TableReal> o{.ids = pointer<int32_t>(op.ids),
                                .table = lines<TableReal>(op.table),
                                .y = lines<Real>(op.y),
                                .T = op.y.rows(),
                                .D = op.y.cols()};
      o.packs = packed ? ceil_divide(o.D, kPack) : o.D;
      const auto kernel = packed ? look_up<kPack, Real, TableReal> : look_up<1, Real, TableReal>;
      const unsigned grid = grid_of(ceil_divide(o.T * o.packs, kThreads));
      kernel<<<grid, kThreads, 0, native(stream)>>>(o);
      cuda_check(cudaGetLastError(), EmbeddingForward::name);
    });
  });
}

// Workspace: the parts of pieces, the tokens' numbers, ids and tokens sorted, what sorting needs.
void run_cuda(Stream& stream, const EmbeddingBackward& op) {
  if (!op.accumulate) fill_zero(stream, op.dtable);  // the rows of ids that do not occur
  const int64_t T = op.ids.elements(), D = op.dtable.cols(), pieces = ceil_divide(T, kPiece);
  if (T == 0 || D == 0) return;
  check(T < int64_t{1} << 31, EmbeddingBackward::name, ": fewer than 2^31 tokens, found ", T);
  const int64_t columns = ceil_divide(D, 8) * 8;
  size_t sort_bytes = 0;
  sort_tokens(stream, op, nullptr, sort_bytes, nullptr, nullptr, nullptr);
  Space space;
  const size_t parts = space.take(size_t(pieces * 2 * columns) * sizeof(float));
  const size_t numbers = space.take(size_t(T) * sizeof(int32_t));
  const size_t ids = space.take(size_t(T) * sizeof(int32_t));
  const size_t tokens = space.take(size_t(T) * sizeof(int32_t));
  const size_t sort = space.take(std::max<size_t>(sort_bytes, 1));
  std::byte* base = stream.workspace(space.bytes);
  const auto integers = [&](size_t at) { return reinterpret_cast<int32_t*>(base + at); };
  count_up<<<grid_of(ceil_divide(T, kThreads)), kThreads, 0, native(stream)>>>(integers(numbers),
                                                                              T);
  sort_tokens(stream, op, base + sort, sort_bytes, integers(numbers), integers(ids),
              integers(tokens));
  const bool packed = rows_aligned(op.dy) && rows_aligned(op.dtable);
  visit_real(op.dy.dtype, [&]<class Real>() {
    const SortedRows<Real> o{.ids = integers(ids),
                             .tokens = integers(tokens),
                             .dy = lines<Real>(op.dy),
                             .dtable = lines<float>(op.dtable),
                             .parts = reinterpret_cast<float*>(base + parts),
                             .T = T,
                             .D = D,
                             .pieces = pieces,
                             .columns = columns,
                             .accumulate = op.accumulate};
    if (packed) launch_sums<16 / int(sizeof(Real))>(stream, o);
    else launch_sums<1>(stream, o);
  });
}

}  // namespace moemamba
