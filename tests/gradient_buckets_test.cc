#include "parallel/gradient_buckets.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "core/gpu.h"
#include "core/random.h"
#include "tests/support/bucket_scene.h"
#include "tests/support/harness.h"
#include "tests/support/in_world.h"
#include "tests/support/wires.h"

namespace moemamba {
namespace {

using std::chrono::milliseconds;

float gradient_of(int rank, int64_t bucket, int64_t i) {
  return float(Random(uint64_t(rank), "gradient").normal(uint64_t(bucket * 100000 + i)));
}

// The buckets of one rank over `group`, filled with that rank's gradients.
struct Owner {
  std::vector<std::vector<float>> gradients, values;

  Owner(Communicator& group, const std::vector<int64_t>& sizes) {
    for (size_t b = 0; b < sizes.size(); ++b) {
      gradients.emplace_back(size_t(sizes[b]));
      values.emplace_back(size_t(sizes[b]), -1.0f);
      for (int64_t i = 0; i < sizes[b]; ++i)
        gradients[b][size_t(i)] = gradient_of(group.rank(), int64_t(b), i);
    }
  }
  std::vector<GradientBuckets::Bucket> buckets(Communicator& group) {
    std::vector<GradientBuckets::Bucket> list;
    for (size_t b = 0; b < gradients.size(); ++b) {
      const auto P = int64_t(gradients[b].size());
      list.push_back({view(gradients[b].data(), {P}), view(values[b].data(), {P}), &group,
                      "bucket " + std::to_string(b)});
    }
    return list;
  }
};

TEST(GradientBuckets, SumInRankOrderAndGatherWhatTheOwnersWrote) {
  for (int ranks : {1, 2, 3, 5, 8}) {
    in_world(RankLayout(ranks, 1, 0), [](ProcessGroups& groups) {
      Stream compute = Stream::immediate(), communication = Stream::worker();
      reduce_and_gather(*groups.data, compute, communication);
      Stream at_once = Stream::immediate();
      reduce_and_gather(*groups.data, compute, at_once);
    });
  }
}

// The ranks are threads that share one GPU. NCCL's turn is communicator_nccl_mpi_test.
TEST(GradientBuckets, DoSoOnAGpu) {
  if (gpu::devices().empty()) return;
  for (int ranks : {1, 2, 3}) {
    in_world(RankLayout(ranks, 1, 0), [](ProcessGroups& groups) {
      Stream compute = Stream::cuda(), communication = Stream::cuda();
      reduce_and_gather(*groups.data, compute, communication);
    });
    count_comparison();
  }
}

constexpr milliseconds kSlow(50);  // of a wire; nothing must be faster, so nothing can be flaky

// The wire carries bucket 1 only once block 0's backward pass has begun: a ready() that waited for
// the wire would never come to it. finish() waits for the slow wire of the last bucket.
TEST(GradientBuckets, ReduceWhileTheBackwardPassGoesOn) {
  in_world(RankLayout(2, 1, 0), [](ProcessGroups& groups) {
    Milestone backward_began;
    std::atomic<int> carried{0}, in_vain{0};
    WatchedWire wire(std::move(groups.data), [&](CallKind, int64_t n) {
      if (n == 0 && !backward_began.wait()) ++in_vain;
      if (n == 1) std::this_thread::sleep_for(kSlow);
      ++carried;
    });
    Stream communication = Stream::worker(), compute = Stream::immediate();
    Owner owner(wire, {1000, 1000});
    GradientBuckets buckets(owner.buckets(wire), communication);
    buckets.ready(1, compute);
    compute.submit([&] { backward_began.reach(); });  // of block 0
    buckets.ready(0, compute);
    buckets.finish(compute);
    EXPECT_EQ(in_vain, 0) << "ready() waited for the wire";
    EXPECT_EQ(carried, 2) << "finish() did not wait";
    EXPECT_GE(buckets.take_seconds(), std::chrono::duration<double>(kSlow).count());
  });
}

// The wire carries the weights of bucket 1 only once those of bucket 0 have been waited for.
TEST(GradientBuckets, WaitForOneBucketsWeightsOnly) {
  in_world(RankLayout(2, 1, 0), [](ProcessGroups& groups) {
    Milestone first_is_there;
    std::atomic<int> carried{0}, in_vain{0};
    WatchedWire wire(std::move(groups.data), [&](CallKind, int64_t n) {
      if (n == 1 && !first_is_there.wait()) ++in_vain;
      if (n == 2) std::this_thread::sleep_for(kSlow);
      ++carried;
    });
    Stream communication = Stream::worker(), compute = Stream::immediate();
    Owner owner(wire, {10, 10, 10});
    GradientBuckets buckets(owner.buckets(wire), communication);
    buckets.wait_weights(2, compute);  // before the first gather: no wait
    buckets.gather_weights(compute);
    buckets.wait_weights(0, compute);
    first_is_there.reach();
    buckets.wait_weights(2, compute);
    EXPECT_EQ(in_vain, 0) << "waited for other buckets too";
    EXPECT_EQ(carried, 3) << "did not wait for its own";
  });
}

TEST(GradientBuckets, RefuseABucketThatDoesNotDivide) {
  in_world(RankLayout(3, 1, 0), [](ProcessGroups& groups) {
    Stream communication = Stream::immediate();
    Owner owner(*groups.data, {10});
    EXPECT_THROW(GradientBuckets(owner.buckets(*groups.data), communication), Error);
  });
}

TEST(GradientBuckets, DoNothingOnDryStreams) {
  auto seats = make_thread_group(4, "data", milliseconds(50));
  Stream dry = Stream::dry();
  Owner owner(*seats[1], {8});
  GradientBuckets buckets(owner.buckets(*seats[1]), dry);
  buckets.ready(0, dry);
  buckets.finish(dry);
  buckets.gather_weights(dry);
  buckets.wait_weights(0, dry);
  EXPECT_EQ(owner.values[0][0], -1.0f);
}

}  // namespace
}  // namespace moemamba
