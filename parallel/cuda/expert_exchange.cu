#include <algorithm>

#include "parallel/cuda/launch.cuh"
#include "parallel/device_work.h"

namespace moemamba::device_work {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowsOfBlock = 4 * kWarps;
constexpr size_t kMostSegments = 192;  // tables travel as arguments, which end at 4 KiB
constexpr size_t kMostIntegers = 896;

// Rows as a run of `packs` units of 16, 4 or 2 bytes (or bytes), `stride` units from row to row.
struct Block {
  char* data;
  int64_t stride;
};

struct Table {
  int count;
  struct {
    int32_t first_block, from, to, rows;
  } at[kMostSegments];
};
struct Integers {
  int count;
  int32_t at[kMostIntegers];
};

template <class Unit>
__device__ void copy_row(Block from, int64_t from_row, Block to, int64_t to_row, int64_t units) {
  const auto* source = reinterpret_cast<const Unit*>(from.data) + from_row * from.stride;
  auto* target = reinterpret_cast<Unit*>(to.data) + to_row * to.stride;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < units; i += 32) target[i] = source[i];
}

// A block takes 32 rows of one segment, which it finds by bisection; a warp takes every eighth of
// them. Reads and writes each row once: bound by memory.
template <class Unit>
__global__ __launch_bounds__(kThreads) void copy_by_table(const __grid_constant__ Table table,
                                                          Block from, Block to, int64_t units) {
  int low = 0, high = table.count;  // the last segment that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.at[middle].first_block <= int(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  const int32_t begin = (int32_t(blockIdx.x) - table.at[low].first_block) * kRowsOfBlock;
  const int32_t end = min(begin + kRowsOfBlock, table.at[low].rows);
  for (int32_t r = begin + int32_t(threadIdx.x / 32); r < end; r += kWarps)
    copy_row<Unit>(from, int64_t(table.at[low].from) + r, to, int64_t(table.at[low].to) + r,
                   units);
}

// A warp per row below *count.
template <class Unit>
__global__ __launch_bounds__(kThreads) void copy_counted(const int32_t* count, Block from, Block to,
                                                         int64_t rows, int64_t units) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (r < rows && r < *count) copy_row<Unit>(from, r, to, r, units);
}

__global__ void write_out(const __grid_constant__ Integers values, int32_t* to) {
  for (int i = int(threadIdx.x); i < values.count; i += int(blockDim.x)) to[i] = values.at[i];
}

// Calls fn.operator()<Unit>(from, to, units of a row) with the widest unit that both tensors'
// rows are made of.
template <class Fn>
void visit_units(const Tensor& from, const Tensor& to, Fn&& fn) {
  const int64_t size = size_of(from.dtype), width = from.cols() * size;
  const auto fits = [&](int64_t bytes) {
    const auto one = [&](const Tensor& tensor) {
      return reinterpret_cast<uintptr_t>(tensor.data) % uintptr_t(bytes) == 0 &&
             (tensor.rows() <= 1 || tensor.stride * size % bytes == 0);
    };
    return width % bytes == 0 && one(from) && one(to);
  };
  const auto call = [&]<class Unit>() {
    const auto block = [&](const Tensor& tensor) {
      return Block{static_cast<char*>(tensor.data), tensor.stride * size / int64_t(sizeof(Unit))};
    };
    fn.template operator()<Unit>(block(from), block(to), width / int64_t(sizeof(Unit)));
  };
  if (fits(16)) return call.template operator()<uint4>();
  if (fits(4)) return call.template operator()<uint32_t>();
  if (fits(2)) return call.template operator()<uint16_t>();
  call.template operator()<uint8_t>();
}

}  // namespace

void copy_segments(Stream& stream, std::span<const Segment> segments, const Tensor& from,
                   const Tensor& to) {
  if (from.cols() == 0) return;
  for (size_t first = 0; first < segments.size(); first += kMostSegments) {
    const auto some = segments.subspan(first, std::min(kMostSegments, segments.size() - first));
    Table table{};
    int64_t blocks = 0;
    for (const Segment& segment : some) {
      if (segment.rows == 0) continue;
      auto& entry = table.at[table.count++];
      entry = {int32_t(blocks), segment.from, segment.to, segment.rows};
      blocks += (segment.rows + kRowsOfBlock - 1) / kRowsOfBlock;
    }
    if (blocks == 0) continue;
    visit_units(from, to, [&]<class Unit>(Block source, Block target, int64_t units) {
      copy_by_table<Unit><<<grid_of(blocks), kThreads, 0, native(stream)>>>(table, source, target,
                                                                            units);
    });
  }
  check_launch("copy_segments");
}

void copy_first_rows(Stream& stream, const Tensor& from, const int32_t* count, const Tensor& to) {
  const int64_t rows = std::min(from.rows(), to.rows());
  if (rows == 0 || from.cols() == 0) return;
  visit_units(from, to, [&]<class Unit>(Block source, Block target, int64_t units) {
    copy_counted<Unit><<<grid_of((rows + kWarps - 1) / kWarps), kThreads, 0, native(stream)>>>(
        count, source, target, rows, units);
  });
  check_launch("copy_first_rows");
}

void write_integers(Stream& stream, std::span<const int32_t> values, int32_t* to) {
  for (size_t first = 0; first < values.size(); first += kMostIntegers) {
    Integers some{};
    some.count = int(std::min(kMostIntegers, values.size() - first));
    std::copy_n(values.begin() + std::ptrdiff_t(first), some.count, some.at);
    write_out<<<1, 256, 0, native(stream)>>>(some, to + first);
  }
  check_launch("write_integers");
}

}  // namespace moemamba::device_work
