#include "kernels/routing.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/definitions/routing.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

using definition::RouteShape;

// One expert, top-1, top-2, all experts, 42 of them, groups, capacities that drop, nothing kept.
const RouteShape kShapes[] = {
    {.T = 1, .E = 1, .K = 1},
    {.T = 7, .E = 5, .K = 1},
    {.T = 64, .E = 8, .K = 2, .renormalise = true},
    {.T = 60, .E = 42, .K = 1, .G = 4, .capacity_factor = 1},
    {.T = 60, .E = 42, .K = 3, .G = 3, .capacity_factor = 1.25, .renormalise = true},
    {.T = 1030, .E = 17, .K = 2, .G = 2, .capacity_factor = 0.5},
    {.T = 12, .E = 4, .K = 4, .G = 6, .renormalise = true},
    {.T = 12, .E = 8, .K = 1, .capacity_factor = 0.25},
};

std::vector<int64_t> integers_of(const Tensor& tensor) {
  std::vector<int64_t> list;
  for (double value : to_doubles(tensor)) list.push_back(int64_t(value));
  return list;
}


Route make(Case& c, const RouteShape& s, const Tensor& logits) {
  return {.logits = logits,
          .probabilities = c.empty({s.T, s.E}),
          .expert = c.empty({s.T, s.K}, DType::i32),
          .weight = c.empty({s.T, s.K}),
          .position = c.empty({s.T, s.K}, DType::i32),
          .source = c.empty({s.T * s.K}, DType::i32),
          .offsets = c.empty({s.E + 1}, DType::i32),
          .counts = c.empty({s.G, s.E}, DType::i32),
          .balance = c.empty({s.G}),
          .z = c.empty({s.G}),
          .flag = c.empty({1}, DType::i32),
          .groups = s.G,
          .capacity_factor = float(s.capacity_factor),
          .renormalise = s.renormalise};
}

Route routed(Case& c, const RouteShape& s, const Tensor& logits) {
  Stream stream = Stream::immediate();
  const Route op = make(c, s, logits);
  run(stream, op);
  return op;
}

TEST(Route, MatchesItsDefinition) {
  for (const RouteShape& s : kShapes) {
    Case c(1);
    const Route op = make(c, s, c.normal({s.T, s.E}, 2));
    expect_backends_agree(op);
    const auto expected = definition::route(s, to_doubles(op.logits));
    expect_close("probabilities", op.probabilities, expected.probabilities);
    expect_close("weight", op.weight, expected.weight);
    expect_close("balance", op.balance, expected.balance);
    expect_close("z", op.z, expected.z);
    EXPECT_EQ(integers_of(op.expert), expected.expert);
    EXPECT_EQ(integers_of(op.position), expected.position);
    EXPECT_EQ(integers_of(op.source), expected.source);
    EXPECT_EQ(integers_of(op.offsets), expected.offsets);
    EXPECT_EQ(integers_of(op.counts), expected.counts);
    EXPECT_EQ(integers_of(op.flag)[0], 0);
  }
}

TEST(Route, ThreadsDoNotChangeBits) {
  for (const RouteShape& s : kShapes) {
    Case c(2);
    expect_threads_agree(make(c, s, c.normal({s.T, s.E})));
  }
}

TEST(Route, TiesGoToTheLowerExpert) {
  Case c(3);
  const RouteShape s{.T = 3, .E = 5, .K = 2};
  const Route op = routed(c, s, c.values({3, 5}, {1, 1, 1, 1, 1,  //
                                                  0, 2, 1, 2, 1,  //
                                                  0, 0, 3, 1, 1}));
  EXPECT_EQ(integers_of(op.expert), (std::vector<int64_t>{0, 1, 1, 3, 2, 3}));
}

TEST(Route, CapacityKeepsTheFirstTokensOfEachGroup) {
  Case c(4);
  const RouteShape s{.T = 8, .E = 2, .K = 1, .G = 2, .capacity_factor = 1};  // 2 per expert
  const Tensor logits = c.values({8, 2}, {1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0});
  const Route op = routed(c, s, logits);
  EXPECT_EQ(integers_of(op.counts), (std::vector<int64_t>{3, 1, 4, 0}));
  EXPECT_EQ(integers_of(op.position), (std::vector<int64_t>{0, 1, -1, 4, 2, 3, -1, -1}));
  EXPECT_EQ(integers_of(op.source), (std::vector<int64_t>{0, 1, 4, 5, 3, -1, -1, -1}));
  EXPECT_EQ(integers_of(op.offsets), (std::vector<int64_t>{0, 4, 5}));
  EXPECT_EQ(to_doubles(op.weight)[2], 0);
  EXPECT_EQ(to_doubles(op.weight)[7], 0);
}

TEST(Route, NaNSetsTheFlagAndNeverAnIndex) {
  for (int64_t T : {4, 3000}) {
    Case c(5);
    const RouteShape s{.T = T, .E = 20, .K = 2};
    const Tensor logits = c.normal({T, 20});
    logits.row<float>(T - 2)[19] = std::nanf("");
    expect_threads_agree(make(c, s, logits));
    const Route op = routed(c, s, logits);
    EXPECT_EQ(integers_of(op.flag)[0], 1);
    EXPECT_EQ(op.expert.row<int32_t>(T - 2)[0], 0);
    EXPECT_EQ(op.expert.row<int32_t>(T - 2)[1], 1);
    EXPECT_TRUE(std::isnan(op.weight.row<float>(T - 2)[0]));
    EXPECT_EQ(integers_of(op.offsets).back(), 2 * T);
  }
}

TEST(Route, NoTokensGiveZeros) {
  Case c(6);
  const RouteShape s{.T = 0, .E = 3, .K = 2, .G = 2, .capacity_factor = 1};
  const Route op = routed(c, s, c.empty({0, 3}));
  EXPECT_EQ(integers_of(op.offsets), std::vector<int64_t>(4));
  EXPECT_EQ(integers_of(op.counts), std::vector<int64_t>(6));
  EXPECT_EQ(to_doubles(op.balance), std::vector<double>(2));
  EXPECT_EQ(to_doubles(op.z), std::vector<double>(2));
  EXPECT_EQ(integers_of(op.flag)[0], 0);
}

TEST(Route, RefusesGroupsThatDoNotDivideTheTokens) {
  Case c(7);
  Stream stream = Stream::immediate();
  Route op = make(c, {.T = 6, .E = 3, .K = 1, .G = 4}, c.normal({6, 3}));
  EXPECT_THROW(run(stream, op), Error);
}

RouteBackward make_backward(Case& c, const RouteShape& s, const Route& forward) {
  return {.logits = forward.logits,
          .probabilities = forward.probabilities,
          .expert = forward.expert,
          .position = forward.position,
          .counts = forward.counts,
          .dweight = c.normal({s.T, s.K}),
          .dlogits = c.empty({s.T, s.E}),
          .groups = s.G,
          .renormalise = s.renormalise,
          .balance_scale = 0.7f,
          .z_scale = 0.05f};
}

TEST(RouteBackward, MatchesItsDefinition) {
  for (const RouteShape& s : kShapes) {
    Case c(8);
    const Route forward = routed(c, s, c.normal({s.T, s.E}, 2));
    const RouteBackward op = make_backward(c, s, forward);
    expect_threads_agree(op);
    const std::vector<double> logits = to_doubles(op.logits);
    expect_close("dlogits", op.dlogits,
                 definition::route_backward(s, logits, definition::route(s, logits),
                                            to_doubles(op.dweight), op.balance_scale, op.z_scale));
  }
}

TEST(RouteBackward, DefinitionsGradientIsItsSlope) {
  for (const RouteShape& s : kShapes) {
    if (s.T > 100) continue;
    Case c(9);
    const std::vector<double> logits = to_doubles(c.normal({s.T, s.E}));
    const std::vector<double> dweight = to_doubles(c.normal({s.T, s.K}));
    const auto result = definition::route(s, logits);
    const auto loss = [&](const std::vector<double>& at) {
      const auto r = definition::route(s, at);
      EXPECT_EQ(r.expert, result.expert) << "too near a tie; take another seed";
      return weighted_sum(r.weight, dweight) +
             weighted_sum(r.balance, std::vector<double>(size_t(s.G), 0.7)) +
             weighted_sum(r.z, std::vector<double>(size_t(s.G), 0.05));
    };
    expect_gradient("logits", definition::route_backward(s, logits, result, dweight, 0.7, 0.05),
                    loss, logits);
  }
}

// The four row movers behind one route.
struct Moved {
  Moved(Case& c, const RouteShape& s, const Route& route, int64_t D)
      : kept(route.offsets.as<int32_t>()[s.E]),
        permute{.x = c.normal({s.T, D}),
                .source = route.source,
                .offsets = route.offsets,
                .rows = c.empty({s.T * s.K, D}),
                .top_k = s.K},
        unpermute{.rows = permute.rows,
                  .position = route.position,
                  .weight = route.weight,
                  .y = c.empty({s.T, D})},
        unpermute_backward{.dy = c.normal({s.T, D}),
                           .rows = permute.rows,
                           .position = route.position,
                           .weight = route.weight,
                           .drows = c.empty({s.T * s.K, D}),
                           .dweight = c.empty({s.T, s.K})},
        permute_backward{.drows = unpermute_backward.drows,
                         .position = route.position,
                         .dx = c.empty({s.T, D})} {}
  int64_t kept;
  Permute permute;
  Unpermute unpermute;
  UnpermuteBackward unpermute_backward;
  PermuteBackward permute_backward;
};

TEST(Permute, AndItsFriendsMatchTheirDefinitions) {
  for (const RouteShape& s : kShapes)
    for (int64_t D : {1, 7, 48}) {
      Case c(10);
      const Route route = routed(c, s, c.normal({s.T, s.E}));
      const Moved m(c, s, route, D);
      const auto position = integers_of(route.position);
      const auto rows = definition::permute(to_doubles(m.permute.x), integers_of(route.source),
                                            m.kept, D, s.K);
      expect_threads_agree(m.permute);
      EXPECT_EQ(to_doubles(m.permute.rows.row_range(0, m.kept)), rows);
      for (double value : to_doubles(m.permute.rows.row_range(m.kept, s.T * s.K)))
        EXPECT_TRUE(std::isnan(value));
      expect_threads_agree(m.unpermute);
      const auto weight = to_doubles(route.weight);
      expect_close("y", m.unpermute.y, definition::unpermute(rows, position, weight, D, s.K));
      expect_threads_agree(m.unpermute_backward);
      const auto gradient = definition::unpermute_backward(
          to_doubles(m.unpermute_backward.dy), rows, position, weight, D, s.K);
      expect_close("drows", m.unpermute_backward.drows.row_range(0, m.kept), gradient.drows);
      expect_close("dweight", m.unpermute_backward.dweight, gradient.dweight);
      expect_threads_agree(m.permute_backward);
      expect_close("dx", m.permute_backward.dx,
                   definition::unpermute(gradient.drows, position,
                                         std::vector<double>(position.size(), 1), D, s.K));
    }
}

TEST(Permute, DefinitionsGradientsAreTheirSlopes) {
  Case c(11);
  const RouteShape s{.T = 6, .E = 3, .K = 2, .capacity_factor = 0.8};
  const auto r = definition::route(s, to_doubles(c.normal({6, 3})));
  const int64_t D = 2, kept = r.offsets.back();
  const auto x = to_doubles(c.normal({6, D})), rows = to_doubles(c.normal({kept, D}));
  const auto drows = to_doubles(c.normal({kept, D})), dy = to_doubles(c.normal({6, D}));
  ASSERT_LT(kept, 12);
  expect_gradient(
      "x", definition::unpermute(drows, r.position, std::vector<double>(12, 1), D, 2),
      [&](const auto& at) {
        return weighted_sum(definition::permute(at, r.source, kept, D, 2), drows);
      },
      x);
  const auto gradient = definition::unpermute_backward(dy, rows, r.position, r.weight, D, 2);
  expect_gradient(
      "rows", gradient.drows,
      [&](const auto& at) {
        return weighted_sum(definition::unpermute(at, r.position, r.weight, D, 2), dy);
      },
      rows);
  expect_gradient(
      "weight", gradient.dweight,
      [&](const auto& at) {
        return weighted_sum(definition::unpermute(rows, r.position, at, D, 2), dy);
      },
      r.weight);
}

TEST(Permute, UnpermuteUndoesItWhenNothingIsDropped) {
  Stream stream = Stream::immediate();
  Case c(12);
  const RouteShape s{.T = 50, .E = 6, .K = 1};
  const Route route = routed(c, s, c.normal({s.T, s.E}));
  Moved m(c, s, route, 9);
  m.unpermute.weight = c.uniform({s.T, 1}, 1, 1);
  run(stream, m.permute);
  run(stream, m.unpermute);
  EXPECT_EQ(to_doubles(m.unpermute.y), to_doubles(m.permute.x));
}

TEST(UnpermuteBackward, WorksInPlace) {
  Stream stream = Stream::immediate();
  Case c(13);
  const RouteShape s{.T = 30, .E = 4, .K = 2, .capacity_factor = 1};
  const Route route = routed(c, s, c.normal({s.T, s.E}));
  Moved m(c, s, route, 21);
  run(stream, m.permute);
  run(stream, m.unpermute_backward);
  UnpermuteBackward in_place = m.unpermute_backward;
  in_place.rows = in_place.drows = c.copy_of(m.permute.rows);
  in_place.dweight = c.empty({s.T, s.K});
  run(stream, in_place);
  EXPECT_EQ(to_doubles(in_place.drows.row_range(0, m.kept)),
            to_doubles(m.unpermute_backward.drows.row_range(0, m.kept)));
  EXPECT_EQ(to_doubles(in_place.dweight), to_doubles(m.unpermute_backward.dweight));
}

TEST(PermuteBackward, AddsWhereAsked) {
  Stream stream = Stream::immediate();
  Case c(14);
  const RouteShape s{.T = 10, .E = 4, .K = 2, .capacity_factor = 0.5};
  const Route route = routed(c, s, c.normal({s.T, s.E}));
  const Tensor drows = c.normal({20, 3}), dx = c.empty({10, 3}), sum = c.normal({10, 3});
  const std::vector<double> before = to_doubles(sum);
  run(stream, PermuteBackward{.drows = drows, .position = route.position, .dx = dx});
  run(stream, PermuteBackward{
                  .drows = drows, .position = route.position, .dx = sum, .accumulate = true});
  std::vector<double> expected = to_doubles(dx);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
  expect_close("dx", sum, expected);
}

TEST(Permute, RefusesAnOffsetPastItsRows) {
  Stream stream = Stream::immediate();
  Case c(15);
  const Permute op{.x = c.normal({4, 2}),
                   .source = c.values({4}, {0, 1, 2, 3}, DType::i32),
                   .offsets = c.values({2}, {0, 5}, DType::i32),
                   .rows = c.empty({4, 2})};
  EXPECT_THROW(run(stream, op), Error);
}

}  // namespace
}  // namespace moemamba
