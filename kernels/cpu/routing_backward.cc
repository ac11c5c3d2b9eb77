#include <algorithm>
#include <cmath>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/routing.h"

namespace moemamba {

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

// One token's rows, and what the scores p of both kinds have in common.
struct Token {
  Token(const RouteBackward& op, int64_t t)
      : E(op.logits.cols()),
        K(op.expert.cols()),
        tokens(double(op.logits.rows() / op.groups)),
        counts(op.counts.row<int32_t>(t / (op.logits.rows() / op.groups))),
        chosen(op.expert.row<int32_t>(t)),
        position(op.position.row<int32_t>(t)),
        logits(op.logits.row<float>(t)),
        p(op.probabilities.row<float>(t)),
        dweight(op.dweight.row<float>(t)),
        dlogits(op.dlogits.row<float>(t)),
        scale(op.scale),
        b(double(op.balance_scale) * double(E) / (tokens * tokens * double(K))),
        total(op.renormalise ? 0 : 1) {
    for (int64_t k = 0; op.renormalise && k < K; ++k) {
      total += p[chosen[k]];
      if (position[k] >= 0) along += scale * double(dweight[k]) * p[chosen[k]];
    }
    along /= total;
  }

  // What reaches p of choice k through the weights.
  double from_weight(int64_t k) const {
    return ((position[k] >= 0 ? scale * double(dweight[k]) : 0.0) - along) / total;
  }

  int64_t E, K;
  double tokens;  // of the group
  const int32_t *counts, *chosen, *position;
  const float *logits, *p, *dweight;
  float* dlogits;
  double scale, b, total, along = 0;  // along = sum_k dweight_k weight_k
};

// Through the softmax: dlogits_e = p_e (dp_e - sum_j p_j dp_j) + dz_e, where dp_e holds what
// reaches p_e from the balance loss (b counts_e) and, of chosen experts, from their weights.
void through_softmax(const RouteBackward& op, const Token& a) {
  const float* p = a.p;
  double mean = 0;  // sum_j p_j dp_j
  for (int64_t e = 0; e < a.E; ++e) mean += p[e] * a.b * a.counts[e];
  for (int64_t k = 0; k < a.K; ++k) mean += p[a.chosen[k]] * a.from_weight(k);
  double z = 0;
  if (op.z_scale != 0) {
    // The greatest probability's logarithm is the most exact one.
    const int64_t e = std::max_element(a.logits, a.logits + a.E) - a.logits;
    const double lse = double(a.logits[e]) - std::log(double(p[e]));
    z = 2 * double(op.z_scale) * lse / a.tokens;
  }
  for (int64_t e = 0; e < a.E; ++e) a.dlogits[e] = float(p[e] * (a.b * a.counts[e] - mean + z));
  for (int64_t k = 0; k < a.K; ++k) {
    const int32_t e = a.chosen[k];
    a.dlogits[e] = float(p[e] * (a.b * a.counts[e] + a.from_weight(k) - mean + z));
  }
}

// Through each expert's sigmoid: dlogits_e = p_e (1 - p_e) dp_e + dz_e. The balance loss sees
// q_e = p_e / sum_f p_f, which gives dp_e = b (counts_e - sum_f q_f counts_f) / sum_f p_f.
void through_sigmoid(const RouteBackward& op, const Token& a) {
  double sum = 0, mean = 0;  // sum_f p_f, sum_f q_f counts_f
  for (int64_t e = 0; e < a.E; ++e) {
    sum += a.p[e];
    mean += double(a.p[e]) * a.counts[e];
  }
  mean /= sum;
  double lse = 0, z = 0;
  if (op.z_scale != 0) {
    float greatest = 0, exps = 0;
    row_kernels(simd_level()).exp_sum(a.logits, a.E, &greatest, &exps);
    lse = double(greatest) + std::log(double(exps));
    z = 2 * double(op.z_scale) * lse / a.tokens;
  }
  const auto gradient = [&](int64_t e, double from_weight) {
    // 1 - p of a p near 1 would have lost its digits; 1 / (1 + exp(logit)) is the same and has not.
    const double slope = a.p[e] / (1 + std::exp(double(a.logits[e])));
    const double from_z = z == 0 ? 0 : z * std::exp(double(a.logits[e]) - lse);
    return float(slope * (a.b * (a.counts[e] - mean) / sum + from_weight) + from_z);
  };
  if (a.b == 0 && z == 0)
    std::fill_n(a.dlogits, a.E, 0.f);  // without losses only the chosen experts hear of it
  else
    for (int64_t e = 0; e < a.E; ++e) a.dlogits[e] = gradient(e, 0);
  for (int64_t k = 0; k < a.K; ++k)
    a.dlogits[a.chosen[k]] = gradient(a.chosen[k], a.from_weight(k));
}

}  // namespace

void run_cpu(Stream& stream, const RouteBackward& op) {
  const auto through = op.kind == RouterKind::softmax ? through_softmax : through_sigmoid;
  for_row_blocks(stream, op.logits.rows(), rows_per_block(8 * op.logits.cols()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) through(op, Token(op, t));
                 });
}

}  // namespace moemamba
