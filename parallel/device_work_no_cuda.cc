#include "parallel/device_work.h"

namespace moemamba::device_work {

namespace {
[[noreturn]] void refuse() { throw Error("this build has no CUDA"); }
}  // namespace

template <class Number>
void ordered_sum(Stream&, const OrderedSum<Number>&) {
  refuse();
}
template void ordered_sum(Stream&, const OrderedSum<float>&);
template void ordered_sum(Stream&, const OrderedSum<double>&);
template void ordered_sum(Stream&, const OrderedSum<int64_t>&);

void copy_segments(Stream&, std::span<const Segment>, const Tensor&, const Tensor&) { refuse(); }
void copy_first_rows(Stream&, const Tensor&, const int32_t*, const Tensor&) { refuse(); }
void write_integers(Stream&, std::span<const int32_t>, int32_t*) { refuse(); }

}  // namespace moemamba::device_work
