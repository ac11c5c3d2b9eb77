#include "kernels/routing.h"

#include <gtest/gtest.h>

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

Tensor integers(Case& c, Shape shape, const std::vector<int64_t>& values) {
  return c.values(shape, {values.begin(), values.end()}, DType::i32);
}

// A route as its definition takes it, of random logits.
struct Routed {
  Routed(Case& c, const RouteShape& s)
      : defined(definition::route(s, to_doubles(c.normal({s.T, s.E})))),
        kept(defined.offsets.back()),
        weight(c.values({s.T, s.K}, defined.weight)),
        position(integers(c, {s.T, s.K}, defined.position)),
        source(integers(c, {s.T * s.K}, defined.source)),
        offsets(integers(c, {s.E + 1}, defined.offsets)) {}
  definition::RouteResult defined;
  int64_t kept;
  Tensor weight, position, source, offsets;
};

// The four row movers behind one route.
struct Moved {
  Moved(Case& c, const RouteShape& s, const Routed& route, int64_t D)
      : kept(route.kept),
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
      const Routed route(c, s);
      const Moved m(c, s, route, D);
      const auto position = route.defined.position;
      const auto rows =
          definition::permute(to_doubles(m.permute.x), route.defined.source, m.kept, D, s.K);
      expect_threads_agree(m.permute);
      EXPECT_EQ(to_doubles(m.permute.rows.row_range(0, m.kept)), rows);
      for (double value : to_doubles(m.permute.rows.row_range(m.kept, s.T * s.K)))
        EXPECT_TRUE(std::isnan(value));
      expect_threads_agree(m.unpermute);
      const auto weight = to_doubles(route.weight);
      expect_close("y", m.unpermute.y, definition::unpermute(rows, position, weight, D, s.K));
      expect_threads_agree(m.unpermute_backward);
      const auto gradient = definition::unpermute_backward(to_doubles(m.unpermute_backward.dy),
                                                           rows, position, weight, D, s.K);
      expect_close("drows", m.unpermute_backward.drows.row_range(0, m.kept), gradient.drows);
      expect_close("dweight", m.unpermute_backward.dweight, gradient.dweight);
      expect_threads_agree(m.permute_backward);
      expect_close("dx", m.permute_backward.dx,
                   definition::unpermute(gradient.drows, position,
                                         std::vector<double>(position.size(), 1), D, s.K));
    }
}

// Widths: one, a prime, 48, one past a pack, two of real models. Rows past the end are zeros on
// both sides and stay so.
TEST(Permute, AndItsFriendsBackendsAgree) {
  std::vector<RouteShape> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.push_back({.T = 1134, .E = 42, .K = 2, .G = 2, .capacity_factor = 0.8});
  shapes.push_back({.T = 372, .E = 42, .K = 8, .renormalise = true});
  for (const RouteShape& s : shapes)
    for (int64_t D : {1, 7, 48, 257, 341, 512})
      for (DType dtype : {DType::f32, DType::bf16}) {
        if (s.T * D > 400000) continue;
        Case c(25);
        const Routed route(c, s);
        const Shape tokens{s.T, D}, rows{s.T * s.K, D};
        expect_backends_agree(Permute{.x = c.normal(tokens, 1, dtype),
                                      .source = route.source,
                                      .offsets = route.offsets,
                                      .rows = c.zeros(rows, dtype),
                                      .top_k = s.K});
        expect_backends_agree(Unpermute{.rows = c.normal(rows, 1, dtype),
                                        .position = route.position,
                                        .weight = route.weight,
                                        .y = c.zeros(tokens, dtype)});
        UnpermuteBackward backward{.dy = c.normal(tokens, 1, dtype),
                                   .rows = c.normal(rows, 1, dtype),
                                   .position = route.position,
                                   .weight = route.weight,
                                   .drows = c.zeros(rows, dtype),
                                   .dweight = c.zeros({s.T, s.K})};
        expect_backends_agree(backward);
        backward.drows = backward.rows;
        expect_backends_agree(backward);
        for (bool accumulate : {false, true})
          expect_backends_agree(PermuteBackward{.drows = c.normal(rows, 1, dtype),
                                                .position = route.position,
                                                .dx = c.normal(tokens, 1, dtype),
                                                .accumulate = accumulate});
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
  const Routed route(c, s);
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
  const Routed route(c, s);
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
  const Routed route(c, s);
  const Tensor drows = c.normal({20, 3}), dx = c.empty({10, 3}), sum = c.normal({10, 3});
  const std::vector<double> before = to_doubles(sum);
  run(stream, PermuteBackward{.drows = drows, .position = route.position, .dx = dx});
  run(stream,
      PermuteBackward{.drows = drows, .position = route.position, .dx = sum, .accumulate = true});
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
