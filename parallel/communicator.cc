#include "parallel/communicator.h"

#include "parallel/ordered_sum.h"

namespace moemamba {

namespace {

template <class Number>
void sum_gathered(Communicator& group, Stream& stream, const Tensor& values, void* gathered) {
  const OrderedSum<Number> sum{.parts = static_cast<const Number*>(gathered),
                               .stride = values.elements(),
                               .ranks = group.size(),
                               .rank = group.rank(),
                               .own = values.as<Number>(),
                               .count = values.elements(),
                               .device = values.device};
  ordered_sum(stream, sum);
}

}  // namespace

void Communicator::tell(Activity* activity, bool waits) {
  activity_ = activity;
  waits_ = waits;
  if (activity) group_of_activity_ = activity->add_group(name());
}

void all_reduce_sum(Communicator& group, Stream& stream, const Tensor& values, Tensor workspace) {
  check(values.dense(), "all_reduce_sum: rows of ", to_string(values.shape), " are padded");
  check(workspace.bytes() >= group.size() * values.bytes(), "all_reduce_sum: expected ",
        group.size() * values.bytes(), " bytes of workspace, found ", workspace.bytes());
  group.all_gather(stream, values.data, workspace.data, values.bytes());
  if (group.size() == 1) return;
  switch (values.dtype) {
    case DType::f32: return sum_gathered<float>(group, stream, values, workspace.data);
    case DType::f64: return sum_gathered<double>(group, stream, values, workspace.data);
    case DType::i64: return sum_gathered<int64_t>(group, stream, values, workspace.data);
    default:
      check(false, "all_reduce_sum: expected f32, f64 or i64, found ", name_of(values.dtype));
  }
}

void barrier(Communicator& group, Stream& stream) { group.all_gather(stream, nullptr, nullptr, 0); }

}  // namespace moemamba
