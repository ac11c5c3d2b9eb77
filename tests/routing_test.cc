#include "kernels/routing.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/definitions/routing.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

using definition::RouteShape;

// No tokens, one expert, top-1, top-2, all experts, 42 of them, groups, capacities that drop,
// nothing kept.
const RouteShape kShapes[] = {
    {.T = 0, .E = 3, .K = 2, .G = 2},
    {.T = 1, .E = 1, .K = 1},
    {.T = 7, .E = 5, .K = 1},
    {.T = 64, .E = 8, .K = 2, .renormalise = true},
    {.T = 60, .E = 42, .K = 1, .G = 4, .capacity_factor = 1},
    {.T = 60, .E = 42, .K = 3, .G = 3, .capacity_factor = 1.25, .renormalise = true},
    {.T = 1030, .E = 17, .K = 2, .G = 2, .capacity_factor = 0.5},
    {.T = 12, .E = 4, .K = 4, .G = 6, .renormalise = true},
    {.T = 18, .E = 6, .K = 3, .G = 3, .capacity_factor = 0.75},
    {.T = 12, .E = 8, .K = 1, .capacity_factor = 0.25},
    // 23 and 7 rows, which no binary fraction gives exactly
    {.T = 100, .E = 5, .K = 1, .capacity_factor = 1.15},
    {.T = 80, .E = 8, .K = 1, .capacity_factor = 0.7},
};

// Every shape for both kinds of router, renormalised or not, with a bias and a scale or without.
std::vector<RouteShape> all_routers() {
  std::vector<RouteShape> list;
  Case c(16);
  for (RouteShape s : kShapes)
    for (int options = 0; options < 16; ++options) {
      s.sigmoid = options & 1;
      s.renormalise = options & 2;
      s.scale = options & 4 ? 2.5 : 1;
      s.bias = options & 8 ? to_doubles(c.normal({s.E}, 0.3)) : std::vector<double>();
      list.push_back(s);
    }
  return list;
}

std::vector<int64_t> integers_of(const Tensor& tensor) {
  std::vector<int64_t> list;
  for (double value : to_doubles(tensor)) list.push_back(int64_t(value));
  return list;
}

RouterKind kind_of(const RouteShape& s) {
  return s.sigmoid ? RouterKind::sigmoid : RouterKind::softmax;
}

Route make(Case& c, const RouteShape& s, const Tensor& logits) {
  return {.logits = logits,
          .bias = s.bias.empty() ? Tensor() : c.values({s.E}, s.bias),
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
          .capacity_factor = s.capacity_factor,
          .renormalise = s.renormalise,
          .kind = kind_of(s),
          .scale = float(s.scale)};
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
          .kind = kind_of(s),
          .scale = float(s.scale),
          .balance_scale = 0.7f,
          .z_scale = 0.05f};
}

Route routed(Case& c, const RouteShape& s, const Tensor& logits) {
  Stream stream = Stream::immediate();
  const Route op = make(c, s, logits);
  run(stream, op);
  return op;
}

TEST(Route, MatchesItsDefinition) {
  for (const RouteShape& s : all_routers()) {
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

// Several parts of a group, all of the experts, many of them, long passes; choices are made on the
// logits, which are the same bits on both sides.
TEST(Route, BackendsAgreeOnManyTokens) {
  const RouteShape shapes[] = {
      {.T = 65536, .E = 42, .K = 1, .G = 64, .capacity_factor = 1.25},
      {.T = 20000, .E = 32, .K = 2, .renormalise = true},
      {.T = 2268, .E = 300, .K = 2, .G = 2, .capacity_factor = 0.9},
      {.T = 3000, .E = 1024, .K = 8, .G = 3, .capacity_factor = 1.1, .renormalise = true},
      {.T = 372, .E = 33, .K = 33, .renormalise = true},
      {.T = 65, .E = 64, .K = 40},
  };
  for (RouteShape s : shapes)
    for (bool sigmoid : {false, true}) {
      s.sigmoid = sigmoid;
      Case c(22);
      const Route op = make(c, s, c.normal({s.T, s.E}, 2));
      expect_backends_agree(op);
      expect_backends_agree(make_backward(c, s, op));
    }
}

// All tokens want the same two experts, which tie.
TEST(Route, BackendsAgreeOnTiesAndOneExpert) {
  Case c(23);
  const RouteShape s{.T = 500, .E = 50, .K = 3, .G = 2, .capacity_factor = 2};
  const Tensor logits = c.zeros({s.T, s.E});
  for (int64_t t = 0; t < s.T; ++t) logits.row<float>(t)[37] = logits.row<float>(t)[41] = 2;
  expect_backends_agree(make(c, s, logits));
}

TEST(Route, ThreadsDoNotChangeBits) {
  for (const RouteShape& s : all_routers()) {
    Case c(2);
    expect_threads_agree(make(c, s, c.normal({s.T, s.E})));
  }
}

TEST(Route, TiesGoToTheLowerExpert) {
  Case c(3);
  const RouteShape s{.T = 3, .E = 5, .K = 2};
  const Route op = routed(c, s,
                          c.values({3, 5}, {1, 1, 1, 1, 1,  //
                                            0, 2, 1, 2, 1,  //
                                            0, 0, 3, 1, 1}));
  EXPECT_EQ(integers_of(op.expert), (std::vector<int64_t>{0, 1, 1, 3, 2, 3}));
}

TEST(Route, BiasChoosesButDoesNotWeigh) {
  for (bool sigmoid : {false, true}) {
    Case c(17);
    RouteShape s{.T = 2, .E = 4, .K = 3, .sigmoid = sigmoid, .bias = {0, 0.25, 0.25, -2}};
    const Tensor logits = c.values({2, 4}, {0, 0, 0, 0,  // ties, of the biased ones as well
                                            -9, -9, -9, 9});
    const Route op = routed(c, s, logits);
    EXPECT_EQ(integers_of(op.expert), (std::vector<int64_t>{1, 2, 0, 1, 2, 0}))
        << "sigmoid: " << sigmoid;
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t k = 0; k < s.K; ++k)
        EXPECT_EQ(op.weight.row<float>(t)[k],
                  op.probabilities.row<float>(t)[op.expert.row<int32_t>(t)[k]]);
  }
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
  for (int64_t T : {4, 3000})
    for (int options = 0; options < 4; ++options) {
      Case c(5);
      RouteShape s{.T = T, .E = 20, .K = 2, .sigmoid = (options & 1) != 0};
      if (options & 2) s.bias = to_doubles(c.normal({20}));
      const Tensor logits = c.normal({T, 20});
      logits.row<float>(T - 2)[19] = std::nanf("");
      expect_threads_agree(make(c, s, logits));
      const Route op = routed(c, s, logits);
      EXPECT_EQ(integers_of(op.flag)[0], 1);
      EXPECT_EQ(op.expert.row<int32_t>(T - 2)[0], 0);
      EXPECT_EQ(op.expert.row<int32_t>(T - 2)[1], 1);
      EXPECT_TRUE(std::isnan(op.probabilities.row<float>(T - 2)[19]));
      EXPECT_EQ(std::isnan(op.weight.row<float>(T - 2)[0]), !s.sigmoid);
      EXPECT_EQ(integers_of(op.offsets).back(), 2 * T);
    }
}

TEST(Route, NaNInTheBiasSetsTheFlagToo) {
  Case c(18);
  const RouteShape s{.T = 2, .E = 3, .K = 2, .sigmoid = true, .bias = {0, 0, NAN}};
  const Route op = routed(c, s, c.normal({2, 3}));
  EXPECT_EQ(integers_of(op.flag)[0], 1);
  EXPECT_EQ(integers_of(op.expert), (std::vector<int64_t>{0, 1, 0, 1}));
}

TEST(Route, NoTokensGiveZeros) {
  for (bool sigmoid : {false, true}) {
    Case c(6);
    const RouteShape s{.T = 0,
                       .E = 3,
                       .K = 2,
                       .G = 2,
                       .capacity_factor = 1,
                       .sigmoid = sigmoid,
                       .bias = {1, 2, 3}};
    const Route op = routed(c, s, c.empty({0, 3}));
    EXPECT_EQ(integers_of(op.offsets), std::vector<int64_t>(4));
    EXPECT_EQ(integers_of(op.counts), std::vector<int64_t>(6));
    EXPECT_EQ(to_doubles(op.balance), std::vector<double>(2));
    EXPECT_EQ(to_doubles(op.z), std::vector<double>(2));
    EXPECT_EQ(integers_of(op.flag)[0], 0);
  }
}

TEST(Route, RefusesGroupsThatDoNotDivideTheTokens) {
  Case c(7);
  Stream stream = Stream::immediate();
  Route op = make(c, {.T = 6, .E = 3, .K = 1, .G = 4}, c.normal({6, 3}));
  EXPECT_THROW(run(stream, op), Error);
}

TEST(Route, RefusesABiasOfAnotherLengthAndAScaleOfZero) {
  Case c(19);
  Stream stream = Stream::immediate();
  const Route op = make(c, {.T = 6, .E = 3, .K = 1}, c.normal({6, 3}));
  Route wrong = op;
  wrong.bias = c.normal({4});
  EXPECT_THROW(run(stream, wrong), Error);
  wrong = op;
  wrong.scale = 0;
  EXPECT_THROW(run(stream, wrong), Error);
}

void expect_defined(const RouteShape& s, const RouteBackward& op) {
  const std::vector<double> logits = to_doubles(op.logits);
  expect_close("dlogits", op.dlogits,
               definition::route_backward(s, logits, definition::route(s, logits),
                                          to_doubles(op.dweight), op.balance_scale, op.z_scale));
}

TEST(RouteBackward, MatchesItsDefinition) {
  for (const RouteShape& s : all_routers()) {
    Case c(8);
    const Route forward = routed(c, s, c.normal({s.T, s.E}, 2));
    const RouteBackward op = make_backward(c, s, forward);
    expect_threads_agree(op);
    expect_backends_agree(op);
    expect_defined(s, op);
  }
}

TEST(RouteBackward, MatchesItWithoutLosses) {
  Stream stream = Stream::immediate();
  for (const RouteShape& s : all_routers()) {
    if (s.K == 1 && s.renormalise) continue;  // weights are constant: nothing but rounding is left
    if (s.E == s.K && !s.sigmoid) continue;   // the same
    Case c(20);
    RouteBackward op = make_backward(c, s, routed(c, s, c.normal({s.T, s.E}, 2)));
    op.balance_scale = op.z_scale = 0;
    run(stream, op);
    expect_defined(s, op);
  }
}

// Scores near 1 and 0, whose slopes 1 - p and whose logarithms have lost their digits in f32.
TEST(RouteBackward, KeepsItsPrecisionFarFromZero) {
  Stream stream = Stream::immediate();
  for (bool sigmoid : {false, true})
    for (float loss_scale : {0.f, 0.5f}) {
      Case c(21);
      const RouteShape s{
          .T = 2, .E = 4, .K = 2, .sigmoid = sigmoid, .bias = {0, 2, 0, 1}};  // takes 1, then 3
      const Tensor logits = c.values({2, 4}, {30, 14, 17, 15, -21, -20, -16, -18});
      RouteBackward op = make_backward(c, s, routed(c, s, logits));
      op.balance_scale = op.z_scale = loss_scale;
      run(stream, op);
      expect_defined(s, op);
    }
}

// Facts are added to what is there, in f64.
TEST(CollectRouting, AddsWhatTheRouterDecided) {
  Case c(24);
  const RouteShape s{.T = 60, .E = 300, .K = 2, .G = 3, .capacity_factor = 0.5};
  const Route route = routed(c, s, c.normal({s.T, s.E}, 2));
  route.flag.as<int32_t>()[0] = 1;
  const CollectRouting op{.counts = route.counts,
                          .offsets = route.offsets,
                          .balance = route.balance,
                          .z = route.z,
                          .flag = route.flag,
                          .choices = c.uniform({s.E}, 5, 5, DType::f64),
                          .sums = c.values({4}, {1, 2, 3, 4}, DType::f64)};
  expect_backends_agree(op);
  const double *choices = op.choices.as<double>(), *sums = op.sums.as<double>();
  double balance = 1, z = 2, chosen = 0;
  for (int64_t g = 0; g < s.G; ++g) {
    balance += route.balance.as<float>()[g];
    z += route.z.as<float>()[g];
  }
  for (int64_t e = 0; e < s.E; ++e) chosen += choices[e] - 5;
  EXPECT_EQ(chosen, double(s.T * s.K));
  EXPECT_EQ(sums[0], balance);
  EXPECT_EQ(sums[1], z);
  EXPECT_EQ(sums[2], 3 + chosen - double(integers_of(route.offsets).back()));
  EXPECT_EQ(sums[3], 5);
}

TEST(RouteBackward, DefinitionsGradientIsItsSlope) {
  for (const RouteShape& s : all_routers()) {
    if (s.T * s.E > 200) continue;  // more tokens come too near a tie
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

}  // namespace
}  // namespace moemamba
