#include "kernels/routing.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/rows.h"

namespace moemamba {

namespace {

// The K experts of the greatest value(e), greatest first, ties to the lower id; 0, 1, .. K - 1 if a
// value is NaN. Returns whether one is.
template <class Value>
bool choose(int64_t E, int32_t* chosen, int64_t K, const Value& value) {
  bool nan = false;
  for (int64_t e = 0; e < E; ++e) {
    nan |= std::isnan(value(e));
    int64_t at = std::min(e, K);  // so many are chosen by now
    for (; at > 0 && value(e) > value(chosen[at - 1]); --at)
      if (at < K) chosen[at] = chosen[at - 1];
    if (at < K) chosen[at] = int32_t(e);
  }
  for (int64_t k = 0; nan && k < K; ++k) chosen[k] = int32_t(k);
  return nan;
}

// Writes the scores p of one token; returns logsumexp of its logits.
double score(RouterKind kind, const float* logits, float* p, int64_t E) {
  const RowKernels& rows = row_kernels(simd_level());
  float greatest = 0, sum = 0;
  rows.exp_sum(logits, E, &greatest, &sum);
  if (kind == RouterKind::softmax) {
    rows.scaled_exp(p, logits, greatest, 1 / sum, E);
  } else {  // exp(x) / (1 + exp(x)): exact at both ends, for exp() neither overflows nor reaches 0
    rows.scaled_exp(p, logits, 0, 1, E);
    for (int64_t e = 0; e < E; ++e) p[e] /= 1 + p[e];
  }
  return double(greatest) + std::log(double(sum));
}

// Scores, choices and weights, token by token. lse[t] = logsumexp(logits_t).
void decide(Stream& stream, const Route& op, double* lse) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  auto* flag = op.flag.as<int32_t>();
  *flag = 0;
  for_row_blocks(stream, T, rows_per_block(8 * E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = op.logits.row<float>(t);
      float *p = op.probabilities.row<float>(t), *weight = op.weight.row<float>(t);
      auto* chosen = op.expert.row<int32_t>(t);
      lse[t] = score(op.kind, logits, p, E);
      const bool nan =
          op.bias ? choose(E, chosen, K,
                           [&, bias = op.bias.as<float>()](int64_t e) { return p[e] + bias[e]; })
                  : choose(E, chosen, K, [&](int64_t e) { return logits[e]; });
      if (nan) std::atomic_ref<int32_t>(*flag).store(1, std::memory_order_relaxed);
      float total = op.renormalise ? 0.f : 1.f;
      for (int64_t k = 0; op.renormalise && k < K; ++k) total += p[chosen[k]];
      for (int64_t k = 0; k < K; ++k) weight[k] = p[chosen[k]] / total * op.scale;
    }
  });
}

// Counts per group, and which choices fit: position is 0 or -1 for now, the weight of a dropped
// choice 0. Leaves the kept rows of expert e in offsets[e + 1].
void admit(const Route& op) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  const int64_t tokens = T / op.groups;
  const bool dropless = op.capacity_factor == 0;
  const int64_t capacity =
      // A factor like 1.15 lies a little below its decimal: that must not cost a row.
      int64_t(std::floor(op.capacity_factor * double(tokens) * double(K) / double(E) + 1e-9));
  auto* offsets = op.offsets.as<int32_t>();
  std::fill_n(offsets, E + 1, 0);
  for (int64_t g = 0; g < op.groups; ++g) {
    auto* counts = op.counts.row<int32_t>(g);
    std::fill_n(counts, E, 0);
    for (int64_t t = g * tokens; t < (g + 1) * tokens; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int32_t e = op.expert.row<int32_t>(t)[k];
        const bool kept = dropless || counts[e] < capacity;
        ++counts[e];
        offsets[e + 1] += kept;
        op.position.row<int32_t>(t)[k] = kept ? 0 : -1;
        if (!kept) op.weight.row<float>(t)[k] = 0;
      }
    }
  }
}

// A stable counting sort of the kept choices by expert. While it runs, offsets[e] is the next free
// row of expert e; the shift back at the end makes it the first one again.
void sort_rows(const Route& op) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  auto* offsets = op.offsets.as<int32_t>();
  auto* source = op.source.as<int32_t>();
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  std::fill(source + offsets[E], source + T * K, -1);
  for (int64_t t = 0; t < T; ++t) {
    auto* position = op.position.row<int32_t>(t);
    for (int64_t k = 0; k < K; ++k) {
      if (position[k] < 0) continue;
      position[k] = offsets[op.expert.row<int32_t>(t)[k]]++;
      source[position[k]] = int32_t(t * K + k);
    }
  }
  for (int64_t e = E - 1; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

// Sums in double, in token order.
void losses_of_group(const Route& op, const double* lse, int64_t g) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  const int64_t tokens = T / op.groups;
  const bool shared = op.kind == RouterKind::sigmoid;  // q = p / sum p; else q = p
  const auto* counts = op.counts.row<int32_t>(g);
  double balance = 0, z = 0;
  for (int64_t t = g * tokens; t < (g + 1) * tokens; ++t) {
    const float* p = op.probabilities.row<float>(t);
    double sum = 0;
    for (int64_t e = 0; shared && e < E; ++e) sum += p[e];
    const double to_share = shared ? 1 / sum : 1;
    for (int64_t e = 0; e < E; ++e) balance += double(p[e]) * to_share * counts[e];
    z += lse[t] * lse[t];
  }
  const double n = double(std::max<int64_t>(1, tokens));
  op.balance.as<float>()[g] = float(balance * double(E) / (n * n * double(K)));
  op.z.as<float>()[g] = float(z / n);
}

}  // namespace

void Route::check() const {
  const auto [T, E] = dims<2>("logits[T, E]", logits);
  const auto [expert_rows, K] = dims<2>("expert[T, K]", expert);
  moemamba::check(K >= 1 && K <= E, "expert[T, K]: K must be 1 .. ", E, ", found ", K);
  moemamba::check(groups >= 1 && T % groups == 0, "groups must divide the ", T, " tokens, found ",
                  groups);
  moemamba::check(capacity_factor >= 0, "capacity_factor must be at least 0 (0 = dropless), found ",
                  capacity_factor);
  moemamba::check(scale > 0, "scale must be above 0, found ", scale);
  moemamba::check(T * K <= INT32_MAX, "T K must be below 2^31, found ", T * K);
  expect("logits[T, E]", logits, {T, E});
  if (bias) expect("bias[E]", bias, {E});
  expect("probabilities[T, E]", probabilities, {T, E});
  expect("expert[T, K]", expert, {T, K}, DType::i32);
  expect("weight[T, K]", weight, {T, K});
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect("source[T K]", source, {T * K}, DType::i32);
  expect("offsets[E + 1]", offsets, {E + 1}, DType::i32);
  expect("counts[G, E]", counts, {groups, E}, DType::i32);
  expect("balance[G]", balance, {groups});
  expect("z[G]", z, {groups});
  expect("flag[1]", flag, {1}, DType::i32);
}

void run_cpu(Stream& stream, const Route& op) {
  auto* lse =
      reinterpret_cast<double*>(stream.workspace(size_t(op.logits.rows()) * sizeof(double)));
  decide(stream, op, lse);
  admit(op);
  sort_rows(op);
  stream.parallel_for(op.groups, [&](int64_t g) { losses_of_group(op, lse, g); });
}

void Permute::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  const auto [R, rows_cols] = dims<2>("rows[R, D]", rows);
  moemamba::check(top_k >= 1, "top_k must be at least 1, found ", top_k);
  moemamba::check(offsets.shape.dims == 1 && offsets.cols() >= 1,
                  "offsets[E + 1] must have one dim, found ", to_string(offsets.shape));
  expect_real("x[T, D]", x);
  expect("source[R]", source, {R}, DType::i32);
  expect("offsets[E + 1]", offsets, offsets.shape, DType::i32);
  expect("rows[R, D]", rows, {R, D}, x.dtype);
}

void run_cpu(Stream& stream, const Permute& op) {
  const int64_t T = op.x.rows(), D = op.x.cols();
  check(op.x.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.x.dtype));
  const auto* source = op.source.as<int32_t>();
  const int64_t R = op.offsets.as<int32_t>()[op.offsets.cols() - 1];
  check(R >= 0 && R <= op.rows.rows(), op.name, ": offsets end at ", R, " but there are ",
        op.rows.rows(), " rows");
  for_row_blocks(stream, R, rows_per_block(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t t = source[r] / op.top_k;
      check(source[r] >= 0 && t < T, op.name, ": source[", r, "] must be 0 .. ", T * op.top_k - 1,
            ", found ", source[r]);
      std::memcpy(op.rows.row<float>(r), op.x.row<float>(t), size_t(D) * sizeof(float));
    }
  });
}

namespace {

// y[t] = sum over k in order of w(k) rows[position[t, k]] (+ y[t]).
template <class Weight>
void gather_rows(const Tensor& rows, const Tensor& position, const Tensor& y, int64_t t,
                 bool accumulate, const Weight& weight) {
  const RowKernels& kernels = row_kernels(simd_level());
  const int64_t D = y.cols(), K = position.cols();
  float* sum = y.row<float>(t);
  bool first = !accumulate;
  for (int64_t k = 0; k < K; ++k) {
    const int32_t r = position.row<int32_t>(t)[k];
    if (r < 0) continue;
    check(r < rows.rows(), "position[", t, ", ", k, "] must be below ", rows.rows(), ", found ", r);
    (first ? kernels.scale : kernels.axpy)(sum, weight(k), rows.row<float>(r), D);
    first = false;
  }
  if (first) std::fill_n(sum, D, 0.f);
}

}  // namespace

void PermuteBackward::check() const {
  const auto [R, D] = dims<2>("drows[R, D]", drows);
  const auto [T, K] = dims<2>("position[T, K]", position);
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect_real("drows[R, D]", drows);
  expect("dx[T, D]", dx, {T, D}, drows.dtype);
}

void run_cpu(Stream& stream, const PermuteBackward& op) {
  check(op.dx.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.dx.dtype));
  for_row_blocks(
      stream, op.dx.rows(), rows_per_block(op.dx.cols()), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          gather_rows(op.drows, op.position, op.dx, t, op.accumulate, [](int64_t) { return 1.f; });
      });
}

void Unpermute::check() const {
  const auto [R, D] = dims<2>("rows[R, D]", rows);
  const auto [T, K] = dims<2>("position[T, K]", position);
  expect_real("rows[R, D]", rows);
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect("weight[T, K]", weight, {T, K});
  expect("y[T, D]", y, {T, D}, rows.dtype);
}

void run_cpu(Stream& stream, const Unpermute& op) {
  check(op.y.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.y.dtype));
  for_row_blocks(stream, op.y.rows(), rows_per_block(op.y.cols()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      gather_rows(op.rows, op.position, op.y, t, false,
                  [&](int64_t k) { return op.weight.row<float>(t)[k]; });
  });
}

void UnpermuteBackward::check() const {
  const auto [R, D] = dims<2>("rows[R, D]", rows);
  const auto [T, K] = dims<2>("position[T, K]", position);
  expect("dy[T, D]", dy, {T, D}, rows.dtype);
  expect_real("rows[R, D]", rows);
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect("weight[T, K]", weight, {T, K});
  expect("drows[R, D]", drows, {R, D}, rows.dtype);
  expect("dweight[T, K]", dweight, {T, K});
}

void run_cpu(Stream& stream, const UnpermuteBackward& op) {
  check(op.dy.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.dy.dtype));
  const RowKernels& kernels = row_kernels(simd_level());
  const int64_t D = op.dy.cols(), K = op.position.cols();
  for_row_blocks(stream, op.dy.rows(), rows_per_block(D), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int32_t r = op.position.row<int32_t>(t)[k];
        check(r < op.rows.rows(), "position[", t, ", ", k, "] must be below ", op.rows.rows(),
              ", found ", r);
        op.dweight.row<float>(t)[k] =
            r < 0 ? 0.f
                  : kernels.dot_and_scale(op.dy.row<float>(t), op.rows.row<float>(r),
                                          op.drows.row<float>(r), op.weight.row<float>(t)[k], D);
      }
    }
  });
}

void CollectRouting::check() const {
  const auto [G, E] = dims<2>("counts[G, E]", counts);
  expect("counts[G, E]", counts, {G, E}, DType::i32);
  expect("offsets[E + 1]", offsets, {E + 1}, DType::i32);
  expect("balance[G]", balance, {G});
  expect("z[G]", z, {G});
  expect("flag[1]", flag, {1}, DType::i32);
  expect("choices[E]", choices, {E}, DType::f64);
  expect("sums[4]", sums, {4}, DType::f64);
}

void run_cpu(Stream&, const CollectRouting& op) {
  const int64_t G = op.counts.rows(), E = op.counts.cols();
  double* sums = op.sums.as<double>();
  double chosen = 0;
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t e = 0; e < E; ++e) {
      const double count = op.counts.row<int32_t>(g)[e];
      op.choices.as<double>()[e] += count;
      chosen += count;
    }
    sums[0] += op.balance.as<float>()[g];
    sums[1] += op.z.as<float>()[g];
  }
  sums[2] += chosen - op.offsets.as<int32_t>()[E];
  sums[3] += op.flag.as<int32_t>()[0];
}

}  // namespace moemamba
