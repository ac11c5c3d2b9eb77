#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "core/arena.h"
#include "core/random.h"
#include "tests/support/cases.h"

namespace moemamba {
namespace {

template <class Fn>
std::string message_of(Fn fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Check, SaysWhatWasFoundAndWhere) {
  const int line = __builtin_LINE() + 1;
  const std::string text = message_of([] { check(1 > 2, "experts: at least ", 2, ", found ", 1); });
  EXPECT_EQ(text, concat("experts: at least 2, found 1  [core_test.cc:", line, "]"));
  EXPECT_NO_THROW(check(true, "never shown"));
}

TEST(Check, APeerLostNamesGroupAndRank) {
  const PeerLost known("expert", 3, "no answer for 30 s"), unknown("data", -1, "cut off");
  EXPECT_STREQ(known.what(), "group expert: rank 3: no answer for 30 s");
  EXPECT_STREQ(unknown.what(), "group data: cut off");
  EXPECT_EQ(known.rank(), 3);
}

TEST(Bf16, RoundsToNearestEven) {
  const auto rounded = [](uint32_t bits) { return bf16(std::bit_cast<float>(bits)).bits; };
  EXPECT_EQ(rounded(0x3f800000), 0x3f80);  // 1
  EXPECT_EQ(rounded(0x3f808000), 0x3f80);  // half way, below is even
  EXPECT_EQ(rounded(0x3f818000), 0x3f82);  // half way, above is even
  EXPECT_EQ(rounded(0x3f807fff), 0x3f80);
  EXPECT_EQ(rounded(0x3f808001), 0x3f81);
  EXPECT_EQ(rounded(0xbf818000), 0xbf82);
  EXPECT_EQ(rounded(0x7f7fffff), 0x7f80);  // the largest float is infinity
  EXPECT_EQ(rounded(0x7f800000), 0x7f80);
  EXPECT_TRUE(std::isnan(float(bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_EQ(float(bf16(-2.5f)), -2.5f);
}

TEST(DType, NamesItselfAndItsSize) {
  for (DType dtype : {DType::f32, DType::bf16, DType::f64, DType::i32, DType::i64, DType::u8})
    EXPECT_GT(size_of(dtype), 0) << name_of(dtype);
  EXPECT_STREQ(name_of(dtype_of<bf16>()), "bf16");
  EXPECT_EQ(visit_float(DType::bf16, []<class Real>() { return sizeof(Real); }), 2u);
  EXPECT_THROW(visit_float(DType::i32, []<class Real>() {}), Error);
}

TEST(Tensor, FlattensAllExtentsButTheLastIntoRows) {
  const Shape shape{2, 3, 4};
  EXPECT_EQ(shape.rows(), 6);
  EXPECT_EQ(shape.last(), 4);
  EXPECT_EQ(shape.elements(), 24);
  EXPECT_EQ(to_string(shape), "[2, 3, 4]");
  EXPECT_EQ(Shape{5}.rows(), 1);
  EXPECT_FALSE(shape == (Shape{2, 3}));
  EXPECT_THROW((Shape{1, -1}), Error);
  EXPECT_THROW((Shape{1, 1, 1, 1, 1}), Error);
}

TEST(Tensor, CutsRowsAndColumns) {
  std::vector<float> memory(24);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = float(i);
  const Tensor tensor = view(memory.data(), {4, 6});
  const Tensor rows = tensor.row_range(1, 3), columns = tensor.column_range(2, 5);
  EXPECT_EQ(rows.as<float>(), memory.data() + 6);
  EXPECT_EQ(rows.shape, (Shape{2, 6}));
  EXPECT_EQ(columns.row<float>(3)[0], 20);
  EXPECT_EQ(columns.stride, 6);
  EXPECT_FALSE(columns.dense());
  EXPECT_TRUE(tensor.dense());
  EXPECT_TRUE(tensor.row_range(4, 4).dense());
  EXPECT_THROW(tensor.row_range(3, 5), Error);
  EXPECT_THROW(tensor.column_range(2, 7), Error);
}

TEST(Tensor, IsViewedInAnotherShape) {
  std::vector<float> memory(24);
  const Tensor tensor = view(memory.data(), {4, 6});
  EXPECT_EQ(tensor.reshaped({2, 2, 6}).stride, 6);
  EXPECT_EQ(tensor.reshaped({3, 8}).stride, 8);
  const Tensor part = tensor.column_range(0, 4);
  EXPECT_EQ(part.reshaped({2, 2, 4}).stride, 6);
  EXPECT_THROW(part.reshaped({2, 8}), Error);
  EXPECT_THROW(tensor.reshaped({5, 5}), Error);
}

TEST(Tensor, NamesWhatIsWrong) {
  std::vector<float> memory(6);
  const Tensor tensor = view(memory.data(), {2, 3});
  EXPECT_NE(message_of([&] {
              expect("y[T, D]", tensor, {3, 2});
            }).find("y[T, D]: expected [3, 2], found [2, 3]"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              expect("y", {}, {3, 2});
            }).find("found no tensor"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              expect("y", tensor, {2, 3}, DType::bf16);
            }).find("expected bf16, found f32"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              dims<3>("x[B, L, D]", tensor);
            }).find("x[B, L, D] must have 3 dims, found [2, 3]"),
            std::string::npos);
  EXPECT_THROW(tensor.as<int32_t>(), Error);
}

TEST(Buffer, IsZeroedAlignedAndMoves) {
  Buffer first(DeviceKind::cpu, 100);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first.data()) % 64, 0u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(int(first.data()[i]), 0);
  std::byte* data = first.data();
  Buffer second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(first.data(), nullptr);
  EXPECT_EQ(Buffer(DeviceKind::cpu, 0).bytes(), 0);
}

TEST(Arena, PadsRowsAndAlignsTensors) {
  Arena arena("test", DeviceKind::cpu, 4096);
  const Tensor a = arena.take({3, 5}), b = arena.take({7}), c = arena.take({2, 3}, DType::bf16);
  EXPECT_EQ(a.stride, 8);
  EXPECT_EQ(b.stride, 7);
  EXPECT_EQ(c.stride, 8);
  for (const Tensor& tensor : {a, b, c})
    EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data) % 64, 0u);
  EXPECT_EQ(static_cast<char*>(b.data) - static_cast<char*>(a.data), 128);
}

TEST(Arena, SaysWhoAskedForTooMuch) {
  Arena arena("activations", DeviceKind::cpu, 128);
  arena.take({16});
  const std::string text = message_of([&] { arena.take({4, 8}, DType::f32, "scan.y"); });
  EXPECT_NE(text.find("activations arena is full: scan.y [4, 8] f32 needs 128 bytes, 64 of 128"),
            std::string::npos)
      << text;
  EXPECT_NO_THROW(arena.take({16}));
}

TEST(Arena, GivesBackWhatAFrameTook) {
  Arena arena("test", DeviceKind::cpu, 4096);
  const Tensor kept = arena.take({16});
  const int64_t used = arena.used();
  {
    Frame frame(arena);
    arena.take({64});
  }
  EXPECT_EQ(arena.used(), used);
  EXPECT_EQ(arena.peak(), used + 256);
  EXPECT_GT(static_cast<char*>(arena.take({1}).data), static_cast<char*>(kept.data));
  arena.reset_peak();
  EXPECT_EQ(arena.peak(), arena.used());
}

bool is_nan(const Tensor& tensor) {
  bool all = true;
  for (double value : to_doubles(tensor)) all = all && value != value;
  return all;
}

TEST(Arena, GuardedHandsOutNaNBetweenRedZonesAndCountsAsBefore) {
  Stream stream = Stream::immediate();
  Arena arena("test", DeviceKind::cpu, 512), plain("test", DeviceKind::cpu, 512);
  arena.guard(stream, 3);
  for (int round = 0; round < 2; ++round) {
    const Tensor kept = arena.take({3, 5});
    arena.take({0, 5});
    plain.take({3, 5});
    EXPECT_TRUE(is_nan(kept));
    std::fill_n(kept.as<float>(), 3 * kept.stride, 0.f);
    {
      Frame frame(arena);
      const Tensor gone = arena.take({2, 7}, DType::bf16);
      EXPECT_TRUE(is_nan(gone));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(gone.data) % 64, 0u);
      EXPECT_GE(static_cast<char*>(gone.data) - static_cast<char*>(kept.data),
                128 + 2 * Arena::kRedZone);
    }
    EXPECT_EQ(arena.take({1}, DType::i32).as<int32_t>()[0], 0x7fffffff);
    plain.take({1});
    EXPECT_EQ(arena.used(), plain.used());
    EXPECT_EQ(arena.peak(), 192);
    EXPECT_EQ(arena.capacity(), 512);
    arena.give_back(0);
    plain.give_back(0);
  }
  EXPECT_EQ(arena.broken_guard(), "");
  EXPECT_THROW(arena.take({1000}), Error);
}

TEST(Arena, GuardedNamesWhomSomebodyWroteBeside) {
  Stream stream = Stream::immediate();
  for (const auto& [at, where] : {std::pair{16, "1 bytes past its end"},
                                  {-1, "1 bytes before its begin"},
                                  {16 + 63, "253 bytes past its end"}}) {
    Arena arena("test", DeviceKind::cpu, 1024);
    arena.guard(stream, 4);
    arena.take({16}, DType::f32, "first");
    {
      Frame frame(arena);
      auto* bytes = static_cast<char*>(arena.take({16}, DType::f32, "scan y").data);
      bytes[at < 0 ? at : at * 4] = 1;
    }
    const std::string text = arena.broken_guard();
    EXPECT_NE(text.find(concat("scan y (64 bytes): written ", where)), std::string::npos) << text;
  }
}

TEST(Arena, GuardsAreForSoManyTensors) {
  Stream stream = Stream::immediate();
  Arena arena("test", DeviceKind::cpu, 1024);
  arena.guard(stream, 2);
  arena.take({1});
  arena.take({1});
  EXPECT_THROW(arena.take({1}), Error);
  EXPECT_THROW(arena.guard(stream, 3), Error);
}

TEST(Arena, RemembersWhoHeldItsMemoryAtThePeak) {
  Arena arena = Arena::measure("plan");
  const auto peak = [&] {
    std::vector<std::string> names;
    int64_t bytes = 0;
    for (const Arena::Taken& taken : arena.at_peak()) {
      names.emplace_back(taken.who);
      bytes += taken.bytes;
    }
    EXPECT_EQ(bytes, arena.peak());
    return names;
  };
  using Names = std::vector<std::string>;
  arena.take({16}, DType::f32, "a");
  {
    Frame frame(arena);
    arena.take({16}, DType::f32, "b");
    arena.take({0}, DType::f32, "nothing");
    {
      Frame inner(arena);
      arena.take({64}, DType::f32, "c");
    }
    EXPECT_EQ(peak(), (Names{"a", "b", "c"}));
    arena.take({16}, DType::f32, "d");
  }
  EXPECT_EQ(peak(), (Names{"a", "b", "c"}));
  {
    Frame frame(arena);
    arena.take({128}, DType::f32, "e");
    EXPECT_EQ(peak(), (Names{"a", "e"}));
  }
  arena.give_back(0);
  arena.take({512}, DType::f32, "f");
  EXPECT_EQ(peak(), Names{"f"});
}

TEST(Arena, CountsTheSameWithoutMemory) {
  Arena real("real", DeviceKind::cpu, 1 << 16), counts = Arena::measure("plan");
  for (Arena* arena : {&real, &counts}) {
    arena->take({5, 33});
    Frame frame(*arena);
    arena->take({70, 3}, DType::bf16);
  }
  EXPECT_EQ(real.used(), counts.used());
  EXPECT_EQ(real.peak(), counts.peak());
  EXPECT_TRUE(counts.measures());
  EXPECT_FALSE(real.measures());
  EXPECT_TRUE(bool(counts.take({1 << 20, 1 << 10})));
}

TEST(Stream, ImmediateRunsAWorkBeforeSubmitReturns) {
  Stream stream = Stream::immediate(2);
  int value = 0;
  stream.submit([&value] { value = 1; });
  EXPECT_EQ(value, 1);
  EXPECT_EQ(stream.threads(), 2);
  EXPECT_THROW(stream.submit([] { check(false, "broken"); }), Error);
  EXPECT_THROW(Stream::immediate(0), Error);
}

TEST(Stream, WorkerRunsInOrderAndBesideItsCaller) {
  Stream stream = Stream::worker();
  std::atomic<bool> open = false;
  std::vector<int> order;
  stream.submit([&open] {
    while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  for (int i = 0; i < 100; ++i) stream.submit([&order, i] { order.push_back(i); });
  EXPECT_TRUE(order.empty());  // submit() came back although the first task still waits
  open = true;
  stream.synchronize();
  ASSERT_EQ(order.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[size_t(i)], i);
}

TEST(Stream, WorkerTakesMoreTasksThanItsRingHolds) {
  Stream stream = Stream::worker();
  int count = 0;
  for (int i = 0; i < 5000; ++i) stream.submit([&count] { ++count; });
  stream.synchronize();
  EXPECT_EQ(count, 5000);
}

TEST(Stream, WaitsForAnotherStreamsEvent) {
  Stream first = Stream::worker(), second = Stream::worker(), host = Stream::immediate();
  std::atomic<bool> open = false;
  std::atomic<int> value = 0;
  first.submit([&open, &value] {
    while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    value = 1;
  });
  const Event event = first.record();
  first.submit([&open] {
    while (open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  int seen = -1;
  second.wait(event);
  second.submit([&value, &seen] { seen = value; });
  open = true;
  second.synchronize();  // although what `first` was given after the event still runs
  EXPECT_EQ(seen, 1);
  host.wait(event);
  host.wait(Event());
  host.wait(host.record());
  open = false;
  first.synchronize();
}

TEST(Stream, AThrowingTaskPoisonsItsWorker) {
  Stream stream = Stream::worker(), other = Stream::worker();
  bool ran = false;
  stream.submit([] { check(false, "lost a peer"); });
  EXPECT_NE(message_of([&] { stream.synchronize(); }).find("lost a peer"), std::string::npos);
  EXPECT_THROW(stream.submit([&ran] { ran = true; }), Error);
  other.wait(Event{&stream, 1});
  EXPECT_THROW(other.synchronize(), Error);
  EXPECT_FALSE(ran);
}

TEST(Stream, DryRunsNothing) {
  Stream stream = Stream::dry();
  bool ran = false;
  stream.submit([&ran] { ran = true; });
  Stream worker = Stream::worker();
  stream.wait(worker.record());
  stream.synchronize();
  EXPECT_FALSE(ran);
  EXPECT_TRUE(stream.is_dry());
}

TEST(Stream, ParallelForCallsEveryIndexOnce) {
  for (int threads : {1, 2, 3, 7}) {
    Stream stream = Stream::immediate(threads);
    for (int64_t count : {0, 1, 2, 100}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      stream.parallel_for(count, [&](int64_t i) { ++calls[size_t(i)]; });
      for (const auto& number : calls) EXPECT_EQ(number, 1);
    }
  }
}

TEST(Stream, ParallelForHandsOnAnExceptionAndGoesOn) {
  Stream stream = Stream::immediate(3);
  for (int round = 0; round < 20; ++round)
    EXPECT_NE(message_of([&] {
                stream.parallel_for(50, [](int64_t i) { check(i != 17, "row ", i, " is broken"); });
              }).find("row 17 is broken"),
              std::string::npos);
  std::atomic<int64_t> sum = 0;
  stream.parallel_for(10, [&](int64_t i) { sum += i; });
  EXPECT_EQ(sum, 45);
}

TEST(Stream, WorkspaceIsAlignedAndStaysWhereItIs) {
  Stream stream = Stream::immediate();
  std::byte* data = stream.workspace(1000);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
  EXPECT_EQ(stream.workspace(10), data);
  EXPECT_EQ(stream.workspace(1000), data);
}

TEST(Copy, TakesRowsOfAnyStrideAndLeavesThePadding) {
  Stream stream = Stream::immediate();
  std::vector<float> from(12), to(15, -1);
  for (size_t i = 0; i < from.size(); ++i) from[i] = float(i);
  const Tensor source = view(from.data(), {3, 4}).column_range(1, 4);
  const Tensor target = view(to.data(), {3, 5}).column_range(0, 3);
  copy(stream, source, target);
  EXPECT_EQ(to, (std::vector<float>{1, 2, 3, -1, -1, 5, 6, 7, -1, -1, 9, 10, 11, -1, -1}));
  fill_zero(stream, target);
  EXPECT_EQ(to[4], -1);
  EXPECT_EQ(to[5], 0);
  EXPECT_THROW(copy(stream, source, view(to.data(), {3, 5})), Error);
}

// Philox4x32-10 as Salmon et al. define it, for any key and counter.
using Words = std::array<uint32_t, 4>;
Words philox(Words x, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t(0xD2511F53u) * x[0], b = uint64_t(0xCD9E8D57u) * x[2];
    x = {uint32_t(b >> 32) ^ x[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k1, uint32_t(a)};
  }
  return x;
}

TEST(Random, MatchesThePublishedVectorsOfPhilox) {
  const uint32_t f = 0xffffffffu;
  EXPECT_EQ(philox({0, 0, 0, 0}, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({f, f, f, f}, f, f), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  // These eight bytes have the FNV-1a hash 0, so that the counter is zero but for the index.
  const std::string_view zero("\xd5\x6b\xb9\x53\x42\x87\x08\x36", 8);
  EXPECT_EQ(Random(0, zero).bits(0), philox({0, 0, 0, 0}, 0, 0));
  const uint64_t seed = 0x299f31d0a4093822u, index = 0x85a308d3243f6a88u;
  EXPECT_EQ(Random(seed, zero).bits(index),
            philox({0x243f6a88, 0x85a308d3, 0, 0}, 0xa4093822, 0x299f31d0));
}

TEST(Random, DependsOnSeedPurposeAndIndexAlone) {
  const Random random(1, "weights");
  EXPECT_EQ(random.bits(5), Random(1, "weights").bits(5));
  EXPECT_NE(random.bits(5), random.bits(6));
  EXPECT_NE(random.bits(5), Random(2, "weights").bits(5));
  EXPECT_NE(random.bits(5), Random(1, "data").bits(5));
}

TEST(Random, HasTheMomentsOfItsDistributions) {
  const Random random(3, "moments");
  constexpr int kCount = 200000;
  double mean = 0, normal = 0, squares = 0, fourth = 0;
  std::array<int, 7> faces{};
  for (uint64_t i = 0; i < kCount; ++i) {
    const double u = random.uniform(i), n = random.normal(i);
    ASSERT_GT(u, 0);
    ASSERT_LT(u, 1);
    mean += u / kCount;
    normal += n / kCount;
    squares += n * n / kCount;
    fourth += n * n * n * n / kCount;
    ++faces[random.integer(i, 7)];
  }
  EXPECT_NEAR(mean, 0.5, 0.003);
  EXPECT_NEAR(normal, 0, 0.01);
  EXPECT_NEAR(squares, 1, 0.02);
  EXPECT_NEAR(fourth, 3, 0.15);
  for (int count : faces) EXPECT_NEAR(count, kCount / 7.0, 700);
}

}  // namespace
}  // namespace moemamba
