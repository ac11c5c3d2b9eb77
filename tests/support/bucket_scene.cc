#include "tests/support/bucket_scene.h"

#include "core/random.h"

namespace moemamba {

namespace {

float gradient_of(int rank, int64_t bucket, int64_t i) {
  return float(Random(uint64_t(rank), "gradient").normal(uint64_t(bucket * 100000 + i)));
}

Tensor on_host(std::vector<float>& values) {
  return view(values.data(), {int64_t(values.size())});
}

std::vector<float> fetch(Stream& stream, const Tensor& tensor) {
  std::vector<float> values(size_t(tensor.elements()));
  copy(stream, tensor, on_host(values));
  stream.synchronize();
  return values;
}

// One rank's buckets, filled with its gradients.
struct Owner {
  Owner(Communicator& group, const std::vector<int64_t>& sizes, Stream& compute) {
    for (size_t b = 0; b < sizes.size(); ++b) {
      const int64_t P = sizes[b];
      std::vector<float> gradient(static_cast<size_t>(P));
      for (int64_t i = 0; i < P; ++i)
        gradient[size_t(i)] = gradient_of(group.rank(), int64_t(b), i);
      for (int i = 0; i < 2; ++i) memory.emplace_back(compute.device(), P * int64_t(sizeof(float)));
      const Tensor there = view(memory[2 * b], 0, {P}, DType::f32);
      copy(compute, on_host(gradient), there);
      compute.synchronize();
      buckets.push_back({there, view(memory[2 * b + 1], 0, {P}, DType::f32), &group,
                         "bucket " + std::to_string(b)});
    }
  }
  std::vector<Buffer> memory;
  std::vector<GradientBuckets::Bucket> buckets;
};

}  // namespace

void reduce_and_gather(Communicator& group, Stream& compute, Stream& communication) {
  const int N = group.size();
  const std::vector<int64_t> sizes = {N * 1, N * 4096, 0, N * 5003};
  Owner owner(group, sizes, compute);
  GradientBuckets buckets(owner.buckets, communication);
  for (int64_t b = buckets.size() - 1; b >= 0; --b) buckets.ready(b, compute);
  buckets.finish(compute);
  for (int64_t b = 0; b < buckets.size(); ++b) {
    const int64_t slice = sizes[size_t(b)] / N;
    std::vector<float> own = fetch(compute, buckets.owned_gradient(b));
    check(int64_t(own.size()) == slice, "a rank owns ", own.size(), " of ", slice, " elements");
    for (int64_t i = 0; i < slice; ++i) {
      const int64_t at = group.rank() * slice + i;
      float expected = gradient_of(0, b, at);
      for (int r = 1; r < N; ++r) expected += gradient_of(r, b, at);
      check(own[size_t(i)] == expected, "bucket ", b, ", element ", at, ": found ", own[size_t(i)],
            ", expected ", expected);
      own[size_t(i)] = float(at);
    }
    copy(compute, on_host(own), buckets.owned_value(b));
    compute.synchronize();
  }
  buckets.gather_weights(compute);
  for (int64_t b = 0; b < buckets.size(); ++b) {
    buckets.wait_weights(b, compute);
    const std::vector<float> values = fetch(compute, buckets.bucket(b).value);
    for (size_t i = 0; i < values.size(); ++i)
      check(values[i] == float(i), "bucket ", b, ": value ", i, " was gathered as ", values[i]);
  }
  communication.synchronize();
  const bool measured = N > 1 && communication.device() == DeviceKind::cpu;
  check((buckets.take_seconds() > 0) == measured && buckets.take_seconds() == 0, "the clock");
}

}  // namespace moemamba
