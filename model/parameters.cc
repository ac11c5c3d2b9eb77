#include "model/parameters.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/host_mirror.h"
#include "core/random.h"
#include "kernels/pointwise.h"

namespace moemamba {

namespace {

// Tensors start on 64-byte borders of their bucket.
constexpr int64_t kElementAlignment = 16;
int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

std::string expert_name(const std::string& pattern, int64_t expert) {
  const size_t at = pattern.find("{}");
  return pattern.substr(0, at) + std::to_string(expert) + pattern.substr(at + 2);
}

// The quantile of the standard normal: Halley steps on erfc from a rough start; exact to 1e-14.
double normal_quantile(double p) {
  const bool upper = p > 0.5;
  const double q = upper ? 1 - p : p;
  const double t = std::sqrt(-2 * std::log(q));
  double x = -(t - (2.30753 + 0.27061 * t) / (1 + 0.99229 * t + 0.04481 * t * t));
  for (int i = 0; i < 3; ++i) {
    const double error = 0.5 * std::erfc(-x * M_SQRT1_2) - q;
    const double step = error * std::sqrt(2 * M_PI) * std::exp(x * x / 2);
    x -= step / (1 + x * step / 2);
  }
  return upper ? -x : x;
}

}  // namespace

void initialise(const Tensor& value, const Initial& initial, uint64_t seed,
                const std::string& name, int64_t first_row) {
  const Random random(seed, name);
  const double low = initial.kind == Initial::Kind::truncated_normal
                         ? 0.5 * std::erfc(initial.b / initial.a * M_SQRT1_2)
                         : 0;
  uint64_t index = uint64_t(first_row * value.cols());
  for (int64_t r = 0; r < value.rows(); ++r) {
    float* row = value.row<float>(r);
    for (int64_t i = 0; i < value.cols(); ++i, ++index) {
      switch (initial.kind) {
        case Initial::Kind::constant:
          row[i] = float(initial.a);
          break;
        case Initial::Kind::uniform:
          row[i] = float((2 * random.uniform(index) - 1) * initial.a);
          break;
        case Initial::Kind::truncated_normal:
          row[i] = float(initial.a * normal_quantile(low + (1 - 2 * low) * random.uniform(index)));
          break;
        case Initial::Kind::log_arange:
          row[i] = float(std::log(double(i + 1)));
          break;
        case Initial::Kind::inverse_softplus_dt: {
          const double log_low = std::log(0.001), log_high = std::log(0.1);
          const double dt =
              std::max(1e-4, std::exp(log_low + random.uniform(index) * (log_high - log_low)));
          row[i] = float(dt + std::log(-std::expm1(-dt)));
          break;
        }
      }
    }
  }
}

void ParameterStore::begin_block(const std::string& name) {
  blocks_.push_back({name, {-1, -1}});
}

const Parameter* ParameterStore::add(const std::string& name, Shape shape, Initial initial,
                                     Axis axis) {
  Block& block = blocks_.back();
  int& bucket = block.bucket[int(axis)];
  if (bucket < 0) {
    bucket = int(buckets_.size());
    Bucket made;
    made.name = block.name + (axis == Axis::data ? "" : " (experts)");
    made.axis = axis;
    buckets_.push_back(std::move(made));
  }
  Bucket& home = buckets_[size_t(bucket)];
  parameters_.push_back(
      {block.name + "." + name, shape, initial, axis, bucket, home.elements, {}, {}, {}});
  home.elements = round_up(home.elements + shape.elements(), kElementAlignment);
  return &parameters_.back();
}

const Parameter* ParameterStore::add_state(const std::string& name, Shape shape) {
  states_.push_back({.name = blocks_.back().name + "." + name,
                     .shape = shape,
                     .initial = {},
                     .axis = Axis::data,
                     .bucket = -1,
                     .offset = 0,
                     .value = {},
                     .compute = {},
                     .gradient = {}});
  return &states_.back();
}

void ParameterStore::allocate(Memory memory) {
  const bool training = memory != Memory::values;
  const auto take = [&](int64_t bytes) {
    return memory == Memory::planned_training ? Buffer::planned(bytes)
                                              : Buffer(groups_.device, bytes);
  };
  for (Bucket& bucket : buckets_) {
    const int64_t ranks = group(bucket.axis).size();
    bucket.padded = round_up(std::max<int64_t>(bucket.elements, 1), ranks * kElementAlignment);
    bucket.value = take(bucket.padded * 4);
    if (compute_ != DType::f32) bucket.compute = take(bucket.padded * size_of(compute_));
    if (!training) continue;
    bucket.gradient = take(bucket.padded * 4);
    bucket.m = take(bucket.padded / ranks * 4);
    bucket.v = take(bucket.padded / ranks * 4);
  }
  for (Parameter& p : parameters_) {
    const Bucket& bucket = buckets_[size_t(p.bucket)];
    p.value = view(bucket.value, p.offset * 4, p.shape, DType::f32);
    p.compute = compute_ == DType::f32
                    ? p.value
                    : view(bucket.compute, p.offset * size_of(compute_), p.shape, compute_);
    if (training) p.gradient = view(bucket.gradient, p.offset * 4, p.shape, DType::f32);
  }
  for (Parameter& state : states_) {
    state_values_.push_back(take(state.shape.elements() * 4));
    state.value = state.compute = view(state_values_.back(), 0, state.shape, DType::f32);
  }
}

ParameterStore::Bytes ParameterStore::bytes() const {
  Bytes sum;
  for (const Bucket& b : buckets_) {
    sum.values += b.value.bytes() + b.compute.bytes();
    sum.gradients += b.gradient.bytes();
    sum.moments += b.m.bytes() + b.v.bytes();
  }
  for (const Buffer& b : state_values_) sum.values += b.bytes();
  return sum;
}

void ParameterStore::values_changed() {
  for (Bucket& bucket : buckets_) bucket.stale = true;
}

void ParameterStore::refresh_compute(Stream& stream, int bucket) {
  Bucket& b = buckets_[size_t(bucket)];
  if (compute_ == DType::f32 || !std::exchange(b.stale, false)) return;
  run(stream, Cast{.from = view(b.value, 0, {b.padded}, DType::f32),
                   .to = view(b.compute, 0, {b.padded}, compute_)});
}

int ParameterStore::bucket_of_block(int block, Axis axis) const {
  return blocks_[size_t(block)].bucket[int(axis)];
}

std::vector<GradientBuckets::Bucket> ParameterStore::buckets() const {
  std::vector<GradientBuckets::Bucket> list;
  for (const Bucket& b : buckets_)
    list.push_back({.gradient = view(b.gradient, 0, {b.padded}, DType::f32),
                    .value = view(b.value, 0, {b.padded}, DType::f32),
                    .group = &group(b.axis),
                    .name = b.name});
  return list;
}

Tensor ParameterStore::moments(int bucket, int which) const {
  const Bucket& b = buckets_[size_t(bucket)];
  const Buffer& buffer = which == 0 ? b.m : b.v;
  return view(buffer, 0, {buffer.bytes() / 4}, DType::f32);
}

// Numbers are a function of their place, so threads may share the work: 2.4 billion of them would
// keep one busy for minutes.
void ParameterStore::initialise(uint64_t seed, int threads) {
  Stream stream = Stream::immediate(threads);
  HostMirror mirror(groups_.device);
  for (const Parameter& p : parameters_) {
    const Tensor host = mirror.blank(p.value);
    const int64_t tensors = p.axis == Axis::data ? 1 : p.shape[0];
    const int64_t rows = p.shape.rows() / tensors;
    const int64_t block = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, p.shape.last()));
    const int64_t blocks = (rows + block - 1) / block;
    stream.parallel_for(tensors * blocks, [&](int64_t i) {
      const int64_t e = i / blocks, first = i % blocks * block;
      const int64_t end = std::min(rows, first + block);
      moemamba::initialise(host.row_range(e * rows + first, e * rows + end), p.initial, seed,
                           p.axis == Axis::data ? p.name : expert_name(p, e), first);
    });
    mirror.write_back(host, p.value);
  }
  values_changed();
}

std::string ParameterStore::expert_name(const Parameter& p, int64_t local) const {
  const int coordinate = groups_.layout.expert_coordinate(groups_.rank);
  return moemamba::expert_name(p.name, groups_.layout.first_expert(coordinate) + local);
}

std::vector<OwnedSlice> ParameterStore::owned_slices() const {
  std::vector<OwnedSlice> list;
  for (const Parameter& p : parameters_) {
    const Bucket& bucket = buckets_[size_t(p.bucket)];
    const Communicator& members = group(bucket.axis);
    const int64_t size = bucket.padded / members.size(), first = size * members.rank();
    const int64_t begin = std::max(p.offset, first);
    const int64_t end = std::min(p.offset + p.shape.elements(), first + size);
    if (begin < end) list.push_back({&p, begin - p.offset, end - p.offset, begin - first});
  }
  return list;
}

std::vector<NamedTensor> ParameterStore::named_tensors() const {
  std::vector<NamedTensor> list;
  for (const Parameter& p : parameters_) {
    if (p.axis == Axis::data) {
      list.push_back({p.name, p.value});
      continue;
    }
    const int64_t rows = p.shape.rows() / p.shape[0];
    for (int64_t e = 0; e < p.shape[0]; ++e)
      list.push_back({expert_name(p, e), p.value.row_range(e * rows, (e + 1) * rows)});
  }
  for (const Parameter& state : states_) list.push_back({state.name, state.value});
  return list;
}

}  // namespace moemamba
