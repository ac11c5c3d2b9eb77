#include <gtest/gtest.h>

#include "kernels/cpu/scan.h"
#include "tests/support/definitions/scan.h"
#include "tests/support/harness.h"
#include "tests/support/levels.h"

namespace moemamba {
namespace {

struct Sizes {
  int64_t B, L, D, N;
};
// Lengths around a chunk, widths around a block, several groups of blocks, all kinds of N.
constexpr Sizes kSizes[] = {{1, 1, 1, 1},     {2, 7, 16, 8},    {1, 31, 17, 16}, {3, 32, 16, 3},
                            {2, 33, 341, 16}, {1, 372, 17, 16}, {2, 45, 5, 64}};
// For backends that cut otherwise: time in parts or not, blocks of channels, all paddings of N,
// many sequences.
constexpr Sizes kMoreSizes[] = {{2, 1134, 7, 16},  {1, 117, 130, 16}, {101, 113, 3, 16},
                                {2, 127, 129, 5},  {1, 29, 33, 17},   {2, 372, 33, 32},
                                {1, 372, 17, 33},  {3, 14, 64, 16},   {1, 15, 65, 16},
                                {1, 65536, 3, 16}, {2, 1, 341, 16},   {5, 28, 257, 8},
                                {384, 15, 67, 16}, {200, 31, 130, 12}};

struct Options {
  bool gate = true;
  bool states = true;  // initial, final
  double starts = 0;   // probability
};
constexpr Options kOptions[] = {{false, false, 0}, {true, true, 0}, {true, true, 0.1}};

// A layer's usual sizes: A in -1 .. -16, delta around 0.001 .. 0.1 and, here and there, far more.
struct ScanCase {
  Case c;
  ScanForward forward;
  ScanBackward backward;

  ScanCase(uint64_t seed, const Sizes& s, const Options& o, DType dtype = DType::f32) : c(seed) {
    const auto [B, L, D, N] = s;
    const int64_t T = B * L;
    // b and c are parts of a projection's output
    const Tensor wide = c.normal({T, 2 * N + 3}, 1, dtype);
    const Tensor halves = c.normal({T, 2 * D}, 1, dtype);
    forward = {.u = c.normal({T, D}, 1, dtype),
               .dt = c.normal({T, D}, 1.5, dtype),
               .dt_bias = c.uniform({D}, -6.9, -2.3),
               .a_log = c.uniform({D, N}, 0, 2.8),
               .b = wide.column_range(1, N + 1),
               .c = wide.column_range(N + 2, 2 * N + 2),
               .skip = c.normal({D}),
               .z = o.gate ? halves.column_range(D, 2 * D) : Tensor(),
               .initial = o.states ? c.normal({B, D, N}) : Tensor(),
               .starts = o.starts > 0 ? c.bytes({T}, o.starts) : Tensor(),
               .y = c.empty({T, D}, dtype),
               .states = c.empty({scan_state_elements(B, L, D, N)}),
               .final = o.states ? c.empty({B, D, N}) : Tensor(),
               .sequences = B};
    const Tensor dwide = c.empty({T, 2 * N}, dtype), dhalves = c.empty({T, 2 * D}, dtype);
    const ScanForward& f = forward;
    backward = {.u = f.u,
                .dt = f.dt,
                .dt_bias = f.dt_bias,
                .a_log = f.a_log,
                .b = f.b,
                .c = f.c,
                .skip = f.skip,
                .z = f.z,
                .initial = f.initial,
                .starts = f.starts,
                .states = f.states,
                .dy = c.normal({T, D}, 1, dtype),
                .dfinal = o.states ? c.normal({B, D, N}) : Tensor(),
                .du = c.empty({T, D}, dtype),
                .ddt = c.empty({T, D}, dtype),
                .db = dwide.column_range(0, N),
                .dc = dwide.column_range(N, 2 * N),
                .dz = o.gate ? dhalves.column_range(D, 2 * D) : Tensor(),
                .da_log = c.empty({D, N}),
                .ddt_bias = c.empty({D}),
                .dskip = c.empty({D}),
                .dinitial = o.states ? c.empty({B, D, N}) : Tensor(),
                .sequences = B};
  }
};

definition::ScanGradient defined_gradient(const ScanBackward& op) {
  return definition::scan_backward(definition::ScanInput(op), to_doubles(op.dy),
                                   op.dfinal ? to_doubles(op.dfinal) : std::vector<double>());
}

void expect_gradient_close(const ScanBackward& op, const definition::ScanGradient& expected) {
  expect_close("du", op.du, expected.du);
  expect_close("ddt", op.ddt, expected.ddt);
  expect_close("db", op.db, expected.db);
  expect_close("dc", op.dc, expected.dc);
  if (op.z) expect_close("dz", op.dz, expected.dz);
  expect_close("da_log", op.da_log, expected.da_log);
  expect_close("ddt_bias", op.ddt_bias, expected.ddt_bias);
  expect_close("dskip", op.dskip, expected.dskip);
  if (op.dinitial) expect_close("dinitial", op.dinitial, expected.dinitial);
}

void expect_matches_definition(const ScanCase& test) {
  Stream stream = Stream::immediate();
  run(stream, test.forward);
  run(stream, test.backward);
  const auto expected = definition::scan_forward(definition::ScanInput(test.forward));
  expect_close("y", test.forward.y, expected.y);
  if (test.forward.final) expect_close("final", test.forward.final, expected.final);
  expect_gradient_close(test.backward, defined_gradient(test.backward));
}

TEST(Scan, MatchesItsDefinition) {
  for (const Sizes& s : kSizes)
    for (const Options& o : kOptions) {
      SCOPED_TRACE(concat("B", s.B, " L", s.L, " D", s.D, " N", s.N, " starts ", o.starts));
      expect_matches_definition(ScanCase(1, s, o));
    }
}

TEST(Scan, MatchesItsDefinitionWhereStepsAreTinyOrHuge) {
  for (double shift : {-40.0, -12.0, 8.0, 30.0}) {
    SCOPED_TRACE(concat("dt_bias + ", shift));
    ScanCase test(2, {2, 40, 19, 5}, {});
    std::vector<double> bias = to_doubles(test.forward.dt_bias);
    for (double& value : bias) value += shift;
    from_doubles(bias, test.forward.dt_bias);
    expect_matches_definition(test);
  }
}

TEST(Scan, DefinitionsBackwardIsItsGradient) {
  const ScanCase test(3, {2, 5, 3, 2}, {true, true, 0.2});
  const definition::ScanInput in(test.forward);
  const std::vector<double> dy = to_doubles(test.backward.dy);
  const std::vector<double> dfinal = to_doubles(test.backward.dfinal);
  const definition::ScanGradient g = definition::scan_backward(in, dy, dfinal);
  const auto check_field = [&](const char* what, std::vector<double> definition::ScanInput::*field,
                               const std::vector<double>& gradient) {
    const auto sum = [&](const std::vector<double>& at) {
      definition::ScanInput moved = in;
      moved.*field = at;
      const definition::ScanResult result = definition::scan_forward(moved);
      return weighted_sum(result.y, dy) + weighted_sum(result.final, dfinal);
    };
    expect_gradient(what, gradient, sum, in.*field);
  };
  using In = definition::ScanInput;
  check_field("du", &In::u, g.du);
  check_field("ddt", &In::dt, g.ddt);
  check_field("ddt_bias", &In::dt_bias, g.ddt_bias);
  check_field("da_log", &In::a_log, g.da_log);
  check_field("db", &In::b, g.db);
  check_field("dc", &In::c, g.dc);
  check_field("dskip", &In::skip, g.dskip);
  check_field("dz", &In::z, g.dz);
  check_field("dinitial", &In::initial, g.dinitial);
}

// The tokens begin .. end - 1 of the one sequence of `f`, with states of their own.
ScanForward part_of(const ScanForward& f, int64_t begin, int64_t end, Case& c) {
  const int64_t D = f.u.cols(), N = f.a_log.cols();
  ScanForward part = f;
  for (auto field :
       {&ScanForward::u, &ScanForward::dt, &ScanForward::b, &ScanForward::c, &ScanForward::z})
    part.*field = (f.*field).row_range(begin, end);
  part.initial = c.zeros({1, D, N});
  part.y = c.empty({end - begin, D});
  part.final = c.empty({1, D, N});
  part.states = c.empty({scan_state_elements(1, end - begin, D, N)});
  return part;
}

std::vector<double> joined(std::vector<double> first, const std::vector<double>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

TEST(Scan, HalvesWithACarriedStateEqualTheWhole) {
  Stream stream = Stream::immediate();
  ScanCase test(4, {1, 75, 33, 16}, {});
  ScanForward first = part_of(test.forward, 0, 41, test.c);
  first.initial = test.forward.initial;
  ScanForward second = part_of(test.forward, 41, 75, test.c);
  second.initial = first.final;
  run(stream, test.forward);
  run(stream, first);
  run(stream, second);
  EXPECT_EQ(to_doubles(test.forward.y), joined(to_doubles(first.y), to_doubles(second.y)));
  EXPECT_EQ(to_doubles(test.forward.final), to_doubles(second.final));
}

TEST(Scan, AStartEqualsASequenceOfItsOwn) {
  Stream stream = Stream::immediate();
  ScanCase test(5, {1, 75, 33, 16}, {});
  std::vector<double> starts(75);
  starts[41] = 1;
  test.forward.starts = test.c.values({75}, starts, DType::u8);
  ScanForward first = part_of(test.forward, 0, 41, test.c);
  ScanForward second = part_of(test.forward, 41, 75, test.c);
  first.starts = second.starts = {};
  first.initial = test.forward.initial;
  run(stream, test.forward);
  run(stream, first);
  run(stream, second);
  EXPECT_EQ(to_doubles(test.forward.y), joined(to_doubles(first.y), to_doubles(second.y)));
  EXPECT_EQ(to_doubles(test.forward.final), to_doubles(second.final));
}

TEST(Scan, AddsToParameterGradientsWhenAsked) {
  Stream stream = Stream::immediate();
  ScanCase test(6, {2, 9, 18, 4}, {});
  definition::ScanGradient expected = defined_gradient(test.backward);
  for (auto [field, sum] : {std::pair(&ScanBackward::da_log, &expected.da_log),
                            std::pair(&ScanBackward::ddt_bias, &expected.ddt_bias),
                            std::pair(&ScanBackward::dskip, &expected.dskip)}) {
    test.backward.*field = test.c.normal((test.backward.*field).shape);
    const std::vector<double> before = to_doubles(test.backward.*field);
    for (size_t i = 0; i < before.size(); ++i) (*sum)[i] += before[i];
  }
  test.backward.accumulate = true;
  run(stream, test.forward);
  run(stream, test.backward);
  expect_gradient_close(test.backward, expected);
}

TEST(Scan, SameBitsForAnyThreads) {
  for (const Sizes& s : kSizes) {
    const ScanCase test(7, s, kOptions[2]);
    expect_threads_agree(test.forward);
    expect_threads_agree(test.backward);
  }
}

// Leaves in `op.states` what its backward reads.
void run_forward_of(Stream& stream, const ScanBackward& op) {
  const Buffer memory(stream.device(), op.u.elements() * size_of(op.u.dtype) + 1);
  run(stream, ScanForward{.u = op.u,
                          .dt = op.dt,
                          .dt_bias = op.dt_bias,
                          .a_log = op.a_log,
                          .b = op.b,
                          .c = op.c,
                          .skip = op.skip,
                          .z = op.z,
                          .initial = op.initial,
                          .starts = op.starts,
                          .y = view(memory, 0, op.u.shape, op.u.dtype),
                          .states = op.states,
                          .final = {},
                          .sequences = op.sequences});
  stream.synchronize();
}

void expect_backends_agree_on(const ScanCase& test) {
  expect_backends_agree(test.forward);
  expect_backends_agree(test.backward, 0, run_forward_of);
}

TEST(Scan, BackendsAgree) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (const Sizes& s : kSizes)
      for (const Options& o : kOptions) {
        SCOPED_TRACE(concat(name_of(dtype), " B", s.B, " L", s.L, " D", s.D, " N", s.N, " starts ",
                            o.starts));
        expect_backends_agree_on(ScanCase(7, s, o, dtype));
      }
    for (const Sizes& s : kMoreSizes)
      for (double starts : {0.0, 0.01}) {
        SCOPED_TRACE(concat(name_of(dtype), " B", s.B, " L", s.L, " D", s.D, " N", s.N, " starts ",
                            starts));
        expect_backends_agree_on(ScanCase(11, s, {true, true, starts}, dtype));
      }
  }
}

TEST(Scan, BackendsAgreeWhereGradientsAreAdded) {
  ScanCase test(12, {2, 130, 18, 4}, {});
  for (auto field : {&ScanBackward::da_log, &ScanBackward::ddt_bias, &ScanBackward::dskip})
    test.backward.*field = test.c.normal((test.backward.*field).shape);
  test.backward.accumulate = true;
  expect_backends_agree_on(test);
}

TEST(Scan, BackendsAgreeWithoutKeptStates) {
  ScanCase test(13, {2, 130, 18, 16}, {});
  test.forward.states = {};
  expect_backends_agree(test.forward);
}

TEST(Scan, SameBitsOnBothInstructionSets) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has no AVX-512";
  Stream stream = Stream::immediate();
  for (const Sizes& s : kSizes)
    for (const Options& o : kOptions) {
      const ScanCase test(8, s, o);
      expect_levels_agree(stream, test.forward);
      expect_levels_agree(stream, test.backward);
    }
}

TEST(Scan, NoSequencesAreNoWork) {
  Stream stream = Stream::immediate();
  const ScanCase test(9, {0, 0, 17, 4}, {false, false, 0});
  run(stream, test.forward);
  run(stream, test.backward);
  EXPECT_EQ(to_doubles(test.backward.dskip), std::vector<double>(17));
}

TEST(Scan, NamesTheTensorOfAWrongShape) {
  Stream stream = Stream::immediate();
  ScanCase test(10, {1, 3, 4, 2}, {});
  test.forward.c = test.c.normal({3, 5});
  try {
    run(stream, test.forward);
    FAIL() << "a wrong shape was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("c[T, N]: expected [3, 2], found [3, 5]"),
              std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace moemamba
