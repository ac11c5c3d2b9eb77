#include "parallel/gradient_buckets.h"

#include <algorithm>

#include "parallel/ordered_sum.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

int64_t slice_of(const GradientBuckets::Bucket& bucket) {
  return bucket.gradient.elements() / bucket.group->size();
}

}  // namespace

GradientBuckets::GradientBuckets(std::vector<Bucket> buckets, Stream& communication)
    : buckets_(std::move(buckets)), gathered_(buckets_.size()), communication_(communication) {
  for (const Bucket& bucket : buckets_) {
    const int64_t P = bucket.gradient.elements(), N = bucket.group->size();
    check(P % N == 0, "bucket ", bucket.name, ": ", P, " elements do not divide by the ", N,
          " ranks of group ", bucket.group->name(), "; pad the bucket");
    if (P > 0) {
      expect("gradient[P]", bucket.gradient, {P});
      expect("value[P]", bucket.value, {P});
    }
    Places places;
    for (int64_t r = 0; r < N; ++r) {
      // The own slice is added where it lies.
      places.bytes.push_back(r == bucket.group->rank() ? 0 : P / N * int64_t(sizeof(float)));
      places.offsets.push_back(r * (P / N) * int64_t(sizeof(float)));
    }
    places_.push_back(std::move(places));
  }
  const DeviceKind device = communication.is_dry() ? DeviceKind::cpu : communication.device();
  receive_ = Buffer(device, buffer_bytes(buckets_));
}

int64_t GradientBuckets::buffer_bytes(const std::vector<Bucket>& buckets) {
  int64_t largest = 0;
  for (const Bucket& bucket : buckets)
    if (bucket.group->size() > 1) largest = std::max(largest, bucket.gradient.elements());
  return largest * int64_t(sizeof(float));
}

Tensor GradientBuckets::owned_gradient(int64_t i) const {
  const int64_t slice = slice_of(bucket(i)), begin = bucket(i).group->rank() * slice;
  return bucket(i).gradient.column_range(begin, begin + slice).reshaped({slice});
}

Tensor GradientBuckets::owned_value(int64_t i) const {
  const int64_t slice = slice_of(bucket(i)), begin = bucket(i).group->rank() * slice;
  return bucket(i).value.column_range(begin, begin + slice).reshaped({slice});
}

void GradientBuckets::ready(int64_t i, Stream& compute) {
  const Bucket& bucket = buckets_[size_t(i)];
  if (bucket.group->size() == 1) return;  // the sum is there
  communication_.wait(compute.record());
  start_clock();
  const Places& places = places_[size_t(i)];
  bucket.group->all_to_all(communication_, {.send = bucket.gradient.data,
                                            .send_offsets = places.offsets.data(),
                                            .send_bytes = places.bytes.data(),
                                            .recv = receive_.data(),
                                            .recv_offsets = places.offsets.data(),
                                            .recv_bytes = places.bytes.data()});
  const int64_t slice = slice_of(bucket);
  const OrderedSum<float> sum{.parts = reinterpret_cast<const float*>(receive_.data()),
                              .stride = slice,
                              .ranks = bucket.group->size(),
                              .rank = bucket.group->rank(),
                              .own = owned_gradient(i).as<float>(),
                              .count = slice,
                              .device = bucket.gradient.device};
  ordered_sum(communication_, sum);
  stop_clock();
  last_ = communication_.record();
}

// Whoever watches this rank hears how long it has waited: of an immediate stream, whose thread
// waits here. A CUDA stream waits by itself.
void GradientBuckets::wait(Event event, Stream& compute) {
  Activity* activity = buckets_.empty() ? nullptr : buckets_[0].group->activity();
  if (!activity) return compute.wait(event);
  const auto start = Clock::now();
  compute.wait(event);
  activity->add_waited(Clock::now() - start);
}

void GradientBuckets::finish(Stream& compute) {
  wait(last_, compute);
}

void GradientBuckets::gather_weights(Stream& compute) {
  communication_.wait(compute.record());
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Bucket& bucket = buckets_[i];
    if (bucket.group->size() == 1) continue;
    start_clock();
    const Tensor own = owned_value(int64_t(i));
    bucket.group->all_gather(communication_, own.data, bucket.value.data, own.bytes());
    stop_clock();
    gathered_[i] = communication_.record();
  }
}

void GradientBuckets::wait_weights(int64_t i, Stream& compute) {
  wait(gathered_[size_t(i)], compute);
}

void GradientBuckets::start_clock() {
  if (communication_.device() == DeviceKind::cuda) return;  // its tasks run ahead of its work
  communication_.submit([this] { started_ = Clock::now(); });
}

void GradientBuckets::stop_clock() {
  if (communication_.device() == DeviceKind::cuda) return;
  communication_.submit([this] {
    nanoseconds_ += std::chrono::nanoseconds(Clock::now() - started_).count();
  });
}

double GradientBuckets::take_seconds() { return double(nanoseconds_.exchange(0)) * 1e-9; }

}  // namespace moemamba
