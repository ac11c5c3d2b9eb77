#include "parallel/ordered_sum.h"

#include <algorithm>

#include "parallel/device_work.h"

namespace moemamba {

namespace {
// Sums of a block stay in the first-level cache while the parts stream by.
constexpr int64_t kBlock = 1024;

template <class Number>
void add_up(const OrderedSum<Number>& sum) {
  Number total[kBlock];
  for (int64_t begin = 0; begin < sum.count; begin += kBlock) {
    const int64_t length = std::min(kBlock, sum.count - begin);
    for (int r = 0; r < sum.ranks; ++r) {
      const Number* part = (r == sum.rank ? sum.own : sum.parts + r * sum.stride) + begin;
      if (r == 0) {
        std::copy_n(part, length, total);
      } else if (length == kBlock) {  // a constant trip count, which the compiler vectorises
        for (int64_t i = 0; i < kBlock; ++i) total[i] += part[i];
      } else {
        for (int64_t i = 0; i < length; ++i) total[i] += part[i];
      }
    }
    std::copy_n(total, length, sum.own + begin);
  }
}

}  // namespace

template <class Number>
void ordered_sum(Stream& stream, const OrderedSum<Number>& sum) {
  if (sum.device == DeviceKind::cuda && !stream.is_dry())
    return device_work::ordered_sum(stream, sum);
  stream.submit([sum] { add_up(sum); });
}

template void ordered_sum(Stream&, const OrderedSum<float>&);
template void ordered_sum(Stream&, const OrderedSum<double>&);
template void ordered_sum(Stream&, const OrderedSum<int64_t>&);

}  // namespace moemamba
