// The calls of a group that a device has still to do: each has its deadline, however many they are.
#include "parallel/pending_calls.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kDeadline(1000);

// A device that has begun the first `begun` calls and done the first `done` of them.
struct Device {
  int64_t begun = 0, done = 0, enqueued = 0, ended = 0;
  milliseconds now{0};
  std::vector<int64_t> held = std::vector<int64_t>(PendingCalls::kMost, -1);  // call by place
  PendingCalls calls{{.begun = [this](int place) { return held[size_t(place)] < begun; },
                      .done = [this](int place) { return held[size_t(place)] < done; },
                      .ended = [this](int place) { EXPECT_EQ(held[size_t(place)], ended++); },
                      .now = [this] { return PendingCalls::Clock::time_point(now); }},
                     kDeadline};

  void enqueue() {
    held[size_t(calls.next())] = enqueued++;
    calls.add();
  }
};

TEST(PendingCalls, AreLateByTheTimeSinceTheDeviceBeganThem) {
  Device device;
  EXPECT_FALSE(device.calls.look());
  device.enqueue();
  device.now += 10 * kDeadline;  // the device is at something else
  EXPECT_FALSE(device.calls.look());
  device.begun = 1;
  EXPECT_FALSE(device.calls.look());
  device.now += kDeadline;
  EXPECT_FALSE(device.calls.look());
  device.now += milliseconds(1);
  EXPECT_TRUE(device.calls.look());
  device.done = 1;  // after all
  EXPECT_FALSE(device.calls.look());
  EXPECT_EQ(device.ended, 1);
}

// The first 64 end well, and then a peer stops.
TEST(PendingCalls, BeyondTheLastPlaceHaveADeadlineToo) {
  for (const int64_t hanging : {63, 64, 65, 127, 128, 1000}) {
    Device device;
    bool late = false;
    for (int64_t call = 0; call < hanging + PendingCalls::kMost && !late; ++call) {
      for (int looks = 0; device.calls.full() && !late; ++looks) {
        ASSERT_LT(looks, 2000) << hanging << ": waits for ever";
        device.begun = std::min(device.done + 1, device.enqueued);
        device.done = std::min(device.begun, hanging);
        device.now += milliseconds(1);
        late = device.calls.look();
      }
      if (!late) device.enqueue();
    }
    device.begun = hanging + 1;
    device.done = hanging;
    for (int looks = 0; !late && looks < 1100; ++looks) {
      device.now += milliseconds(1);
      late = device.calls.look();
    }
    EXPECT_TRUE(late) << hanging;
    EXPECT_EQ(device.ended, hanging);  // each was told of
  }
}

TEST(PendingCalls, HaveNoPlaceWithoutALook) {
  Device device;
  for (int i = 0; i < PendingCalls::kMost; ++i) {
    EXPECT_FALSE(device.calls.full());
    device.enqueue();
  }
  EXPECT_TRUE(device.calls.full());
  EXPECT_THROW(device.calls.add(), Error);
  device.begun = device.done = 1;
  EXPECT_TRUE(device.calls.full());  // nobody has looked
  EXPECT_FALSE(device.calls.look());
  EXPECT_FALSE(device.calls.full());
  device.enqueue();
  EXPECT_TRUE(device.calls.full());
}

// A place that was late once is as good as new.
TEST(PendingCalls, BeginAnewInAPlaceThatWasUsed) {
  Device device;
  for (int64_t call = 0; call < 3 * PendingCalls::kMost; ++call) {
    device.enqueue();
    device.now += 2 * kDeadline;
    EXPECT_FALSE(device.calls.look()) << call;
    device.begun = call + 1;
    EXPECT_FALSE(device.calls.look()) << call;
    device.done = call + 1;
    device.now += kDeadline / 2;
    EXPECT_FALSE(device.calls.look()) << call;
  }
}

}  // namespace
}  // namespace moemamba
