#include "kernels/routing.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/rows.h"

namespace moemamba {

namespace {

// The K greatest of E logits, greatest first, ties to the lower id; 0, 1, .. K - 1 if one is NaN.
// Returns whether one is.
bool choose(const float* logits, int64_t E, int32_t* chosen, int64_t K) {
  bool nan = false;
  for (int64_t e = 0; e < E; ++e) {
    nan |= std::isnan(logits[e]);
    int64_t at = std::min(e, K);  // so many are chosen by now
    for (; at > 0 && logits[e] > logits[chosen[at - 1]]; --at)
      if (at < K) chosen[at] = chosen[at - 1];
    if (at < K) chosen[at] = int32_t(e);
  }
  for (int64_t k = 0; nan && k < K; ++k) chosen[k] = int32_t(k);
  return nan;
}

// Probabilities, choices and weights, token by token. lse[t] = logsumexp(logits_t).
void decide(Stream& stream, const Route& op, double* lse) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  const RowKernels& rows = row_kernels(simd_level());
  auto* flag = op.flag.as<int32_t>();
  *flag = 0;
  for_row_blocks(stream, T, rows_per_block(8 * E), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* logits = op.logits.row<float>(t);
      float *p = op.probabilities.row<float>(t), *weight = op.weight.row<float>(t);
      auto* chosen = op.expert.row<int32_t>(t);
      float greatest = 0, sum = 0;
      rows.exp_sum(logits, E, &greatest, &sum);
      rows.scaled_exp(p, logits, greatest, 1 / sum, E);
      lse[t] = double(greatest) + std::log(double(sum));
      if (choose(logits, E, chosen, K))
        std::atomic_ref<int32_t>(*flag).store(1, std::memory_order_relaxed);
      float total = op.renormalise ? 0.f : 1.f;
      for (int64_t k = 0; op.renormalise && k < K; ++k) total += p[chosen[k]];
      for (int64_t k = 0; k < K; ++k) weight[k] = p[chosen[k]] / total;
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
      int64_t(std::floor(double(op.capacity_factor) * double(tokens) * double(K) / double(E)));
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
  const auto* counts = op.counts.row<int32_t>(g);
  double balance = 0, z = 0;
  for (int64_t t = g * tokens; t < (g + 1) * tokens; ++t) {
    const float* p = op.probabilities.row<float>(t);
    for (int64_t e = 0; e < E; ++e) balance += double(p[e]) * counts[e];
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
  moemamba::check(T * K <= INT32_MAX, "T K must be below 2^31, found ", T * K);
  expect("logits[T, E]", logits, {T, E});
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

void RouteBackward::check() const {
  const auto [T, E] = dims<2>("logits[T, E]", logits);
  const auto [expert_rows, K] = dims<2>("expert[T, K]", expert);
  moemamba::check(groups >= 1 && T % groups == 0, "groups must divide the ", T, " tokens, found ",
                  groups);
  expect("logits[T, E]", logits, {T, E});
  expect("probabilities[T, E]", probabilities, {T, E});
  expect("expert[T, K]", expert, {T, K}, DType::i32);
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect("counts[G, E]", counts, {groups, E}, DType::i32);
  expect("dweight[T, K]", dweight, {T, K});
  expect("dlogits[T, E]", dlogits, {T, E});
}

namespace {

// Through the softmax: dlogits_e = p_e (dp_e - sum_j p_j dp_j) + dz_e, where dp_e holds what
// reaches p_e from the balance loss (b_e below) and, of chosen experts, from their weights.
void route_backward(const RouteBackward& op, int64_t t) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  const double tokens = double(T / op.groups);
  const auto* counts = op.counts.row<int32_t>(t / (T / op.groups));
  const auto *chosen = op.expert.row<int32_t>(t), *position = op.position.row<int32_t>(t);
  const float *p = op.probabilities.row<float>(t), *dweight = op.dweight.row<float>(t);
  float* dlogits = op.dlogits.row<float>(t);

  const double b = double(op.balance_scale) * double(E) / (tokens * tokens * double(K));
  double total = op.renormalise ? 0 : 1, along = 0;  // along = sum_k dweight_k weight_k
  for (int64_t k = 0; op.renormalise && k < K; ++k) {
    total += p[chosen[k]];
    if (position[k] >= 0) along += double(dweight[k]) * p[chosen[k]];
  }
  along /= total;
  const auto from_weight = [&](int64_t k) {  // what reaches p of choice k
    return ((position[k] >= 0 ? double(dweight[k]) : 0.0) - along) / total;
  };
  double mean = 0;  // sum_j p_j dp_j
  for (int64_t e = 0; e < E; ++e) mean += p[e] * b * counts[e];
  for (int64_t k = 0; k < K; ++k) mean += p[chosen[k]] * from_weight(k);
  // The first choice has the greatest probability, whose logarithm is the most exact one.
  const double lse = double(op.logits.row<float>(t)[chosen[0]]) - std::log(double(p[chosen[0]]));
  const double z = op.z_scale == 0 ? 0 : 2 * double(op.z_scale) * lse / tokens;
  for (int64_t e = 0; e < E; ++e) dlogits[e] = float(p[e] * (b * counts[e] - mean + z));
  for (int64_t k = 0; k < K; ++k) {
    const int32_t e = chosen[k];
    dlogits[e] = float(p[e] * (b * counts[e] + from_weight(k) - mean + z));
  }
}

}  // namespace

void run_cpu(Stream& stream, const RouteBackward& op) {
  for_row_blocks(stream, op.logits.rows(), rows_per_block(8 * op.logits.cols()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) route_backward(op, t);
                 });
}

void Permute::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  const auto [R, rows_cols] = dims<2>("rows[R, D]", rows);
  moemamba::check(top_k >= 1, "top_k must be at least 1, found ", top_k);
  moemamba::check(offsets.shape.dims == 1 && offsets.cols() >= 1,
                  "offsets[E + 1] must have one dim, found ", to_string(offsets.shape));
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
  expect("drows[R, D]", drows, {R, D}, drows.dtype);
  expect("dx[T, D]", dx, {T, D}, drows.dtype);
}

void run_cpu(Stream& stream, const PermuteBackward& op) {
  check(op.dx.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.dx.dtype));
  for_row_blocks(stream, op.dx.rows(), rows_per_block(op.dx.cols()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t)
                     gather_rows(op.drows, op.position, op.dx, t, op.accumulate,
                                 [](int64_t) { return 1.f; });
                 });
}

void Unpermute::check() const {
  const auto [R, D] = dims<2>("rows[R, D]", rows);
  const auto [T, K] = dims<2>("position[T, K]", position);
  expect("rows[R, D]", rows, {R, D}, rows.dtype);
  expect("position[T, K]", position, {T, K}, DType::i32);
  expect("weight[T, K]", weight, {T, K});
  expect("y[T, D]", y, {T, D}, rows.dtype);
}

void run_cpu(Stream& stream, const Unpermute& op) {
  check(op.y.dtype == DType::f32, op.name, " on the CPU takes f32, found ", name_of(op.y.dtype));
  for_row_blocks(stream, op.y.rows(), rows_per_block(op.y.cols()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t)
                     gather_rows(op.rows, op.position, op.y, t, false,
                                 [&](int64_t k) { return op.weight.row<float>(t)[k]; });
                 });
}

void UnpermuteBackward::check() const {
  const auto [R, D] = dims<2>("rows[R, D]", rows);
  const auto [T, K] = dims<2>("position[T, K]", position);
  expect("dy[T, D]", dy, {T, D}, rows.dtype);
  expect("rows[R, D]", rows, {R, D}, rows.dtype);
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

}  // namespace moemamba
