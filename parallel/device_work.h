#pragma once
#include <span>

#include "parallel/ordered_sum.h"

// What the room enqueues on a CUDA stream. parallel/cuda has it; a build without CUDA has
// device_work_no_cuda.cc, which is never reached, for there is no CUDA stream.
namespace moemamba::device_work {

template <class Number>
void ordered_sum(Stream& stream, const OrderedSum<Number>& sum);

// Rows first .. first + rows of one tensor beside those of another.
struct Segment {
  int32_t from, to, rows;
};
// to[segment.to + i] = from[segment.from + i] for all segments, whose rows do not overlap. The
// table travels with the launch: it may change as soon as the call returns.
void copy_segments(Stream& stream, std::span<const Segment> segments, const Tensor& from,
                   const Tensor& to);

// to[r] = from[r] for r < *count, which lies on the device.
void copy_first_rows(Stream& stream, const Tensor& from, const int32_t* count, const Tensor& to);

// to[i] = values[i]; the values may change as soon as the call returns.
void write_integers(Stream& stream, std::span<const int32_t> values, int32_t* to);

}  // namespace moemamba::device_work
