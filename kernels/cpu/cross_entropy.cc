#include "kernels/cross_entropy.h"

#include <cmath>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/simd/rows.h"

namespace moemamba {

namespace {

// Tokens of a tile: about 8 MiB of logits, so that dweight is read and written once in 512 tokens
// at V = 4096. Depends on V alone, so the workspace does too.
int64_t tile_tokens(int64_t V) {
  return std::clamp<int64_t>((int64_t{1} << 21) / std::max<int64_t>(V, 1) / 128 * 128, 256, 1024);
}

// One tile of tokens and its logits, [tokens, V] with rows `stride` apart.
struct Tile {
  int64_t begin, tokens;
  float* logits;
  int64_t stride;
};

// The loss of each token; with gradients the logits become scale (softmax - onehot), or zeros for
// a token that is not counted.
void softmax_tile(Stream& stream, const HeadCrossEntropy& op, const Tile& tile) {
  constexpr int64_t kTokens = 32;  // of one call below
  const Observed observed(stream, "cross_entropy");
  const RowKernels& rows = row_kernels(simd_level());
  const int64_t V = op.weight.rows();
  const auto* targets = op.targets.as<int32_t>() + tile.begin;
  auto* loss = op.loss.as<float>() + tile.begin;
  stream.parallel_for((tile.tokens + kTokens - 1) / kTokens, [&](int64_t block) {
    const int64_t end = std::min(tile.tokens, (block + 1) * kTokens);
    for (int64_t t = block * kTokens; t < end; ++t) {
      float* logits = tile.logits + t * tile.stride;
      if (targets[t] < 0) {
        loss[t] = 0;
        if (op.dx) std::fill_n(logits, V, 0.f);
        continue;
      }
      float greatest = 0, sum = 0;
      rows.exp_sum(logits, V, &greatest, &sum);
      loss[t] = float(std::log(double(sum)) + double(greatest) - double(logits[targets[t]]));
      if (!op.dx) continue;
      rows.scaled_exp(logits, logits, greatest, op.scale / sum, V);
      logits[targets[t]] -= op.scale;
    }
  });
}

void run_tile(Stream& stream, const HeadCrossEntropy& op, const Tile& tile, bool add_to_dweight) {
  const int64_t V = op.weight.rows(), D = op.weight.cols();
  const auto* x = op.x.row<float>(tile.begin);
  const auto* weight = op.weight.as<float>();
  multiply_tiles(stream, {.a = x,
                          .a_stride = op.x.stride,
                          .b = weight,
                          .b_stride = op.weight.stride,
                          .c = tile.logits,
                          .c_stride = tile.stride,
                          .M = tile.tokens,
                          .N = V,
                          .K = D,
                          .b_transposed = true});
  softmax_tile(stream, op, tile);
  if (!op.dx) return;
  multiply_tiles(stream, {.a = tile.logits,
                          .a_stride = tile.stride,
                          .b = weight,
                          .b_stride = op.weight.stride,
                          .c = op.dx.row<float>(tile.begin),
                          .c_stride = op.dx.stride,
                          .M = tile.tokens,
                          .N = D,
                          .K = V});
  multiply_tiles(stream, {.a = tile.logits,
                          .a_stride = tile.stride,
                          .b = x,
                          .b_stride = op.x.stride,
                          .c = op.dweight.as<float>(),
                          .c_stride = op.dweight.stride,
                          .M = V,
                          .N = D,
                          .K = tile.tokens,
                          .a_transposed = true,
                          .accumulate = add_to_dweight});
}

}  // namespace

void HeadCrossEntropy::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  const auto [V, weight_cols] = dims<2>("weight[V, D]", weight);
  expect_real("x[T, D]", x);
  expect("weight[V, D]", weight, {V, D}, x.dtype);
  expect("targets[T]", targets, {T}, DType::i32);
  expect("loss[T]", loss, {T});
  moemamba::check(V >= 1 && D >= 1, "weight[V, D] must not be empty, found ",
                  to_string(weight.shape));
  moemamba::check(bool(dx) == bool(dweight), "give both dx and dweight or neither");
  if (!dx) return;
  expect("dx[T, D]", dx, {T, D}, x.dtype);
  expect("dweight[V, D]", dweight, {V, D});
}

void run_cpu(Stream& stream, const HeadCrossEntropy& op) {
  const int64_t T = op.x.rows(), V = op.weight.rows();
  check(op.x.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.x.dtype));
  const auto* targets = op.targets.as<int32_t>();
  for (int64_t t = 0; t < T; ++t)
    check(targets[t] >= -1 && targets[t] < V, "targets[", t, "] must be -1 .. ", V - 1, ", found ",
          targets[t]);
  const int64_t tokens = tile_tokens(V), stride = (V + 15) / 16 * 16;
  auto* logits =
      reinterpret_cast<float*>(stream.workspace(size_t(tokens * stride) * sizeof(float)));
  for (int64_t begin = 0; begin < T; begin += tokens)
    run_tile(stream, op, {begin, std::min(tokens, T - begin), logits, stride},
             op.accumulate || begin > 0);
  if (T == 0 && op.dweight && !op.accumulate) fill_zero(stream, op.dweight);
}

}  // namespace moemamba
