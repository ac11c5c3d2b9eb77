#pragma once
#include "kernels/cpu/simd/level.h"
#include "tests/support/harness.h"

namespace moemamba {

// Runs op on its own tensors with AVX2 and on copies of them with AVX-512, by its
// run_cpu(Stream&, const Op&, SimdLevel); fails unless all that they write is the same bits.
template <class Op>
void expect_levels_agree(Stream& stream, const Op& op) {
  const Replica<Op> other(stream, op);
  run_cpu(stream, op, SimdLevel::avx2);
  run_cpu(stream, other.op(), SimdLevel::avx512);
  int where = 0;
  const auto compare = [&](auto field) {
    if (op.*field) expect_same_bits(Op::name, where, other.op().*field, op.*field);
    ++where;
  };
  std::apply([&](auto... field) { (compare(field), ...); }, Op::writes());
}

}  // namespace moemamba
