#include "parallel/cuda/launch.cuh"
#include "parallel/device_work.h"

namespace moemamba::device_work {

namespace {

constexpr int kThreads = 256;

// kCount neighbours, loaded at once.
template <class Number, int kCount>
struct alignas(sizeof(Number) * kCount) Pack {
  Number at[kCount];
};

// One thread per pack: the ranks' parts in their order, the own one from where it lies. Reads N n
// numbers once, writes n: bound by memory. The same adds in the same order as on the CPU.
template <class Number, int kCount>
__global__ __launch_bounds__(kThreads) void add_up(const OrderedSum<Number> sum, int64_t packs) {
  using P = Pack<Number, kCount>;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= packs) return;
  const auto part = [&](int r) {
    const Number* begin = r == sum.rank ? sum.own : sum.parts + r * sum.stride;
    return reinterpret_cast<const P*>(begin)[i];
  };
  P total = part(0);
#pragma unroll 4
  for (int r = 1; r < sum.ranks; ++r) {
    const P next = part(r);
#pragma unroll
    for (int j = 0; j < kCount; ++j) total.at[j] += next.at[j];
  }
  reinterpret_cast<P*>(sum.own)[i] = total;
}

}  // namespace

template <class Number>
void ordered_sum(Stream& stream, const OrderedSum<Number>& sum) {
  if (sum.count == 0) return;
  constexpr int kWide = 16 / int(sizeof(Number));
  const bool wide = sum.count % kWide == 0 && sum.stride % kWide == 0 && on_16_bytes(sum.own) &&
                    on_16_bytes(sum.parts);
  const int64_t packs = wide ? sum.count / kWide : sum.count;
  const unsigned blocks = grid_of((packs + kThreads - 1) / kThreads);
  if (wide)
    add_up<Number, kWide><<<blocks, kThreads, 0, native(stream)>>>(sum, packs);
  else
    add_up<Number, 1><<<blocks, kThreads, 0, native(stream)>>>(sum, packs);
  check_launch("ordered_sum");
}

template void ordered_sum(Stream&, const OrderedSum<float>&);
template void ordered_sum(Stream&, const OrderedSum<double>&);
template void ordered_sum(Stream&, const OrderedSum<int64_t>&);

}  // namespace moemamba::device_work
