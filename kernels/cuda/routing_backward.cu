#include "kernels/cuda/routing.cuh"
#include "kernels/routing.h"

namespace moemamba {

namespace {

using namespace routing;

struct Args {
  Matrix<const float> logits, probabilities, dweight;
  Matrix<const int32_t> expert, position, counts;
  Matrix<float> dlogits;
  int64_t T, tokens;  // all, of a group
  int E, K;
  bool renormalise;
  double scale, b, z_scale;  // b = balance_scale E / (tokens^2 K)
};

// What the weights of one token have in common; as in kernels/cpu/routing_backward.cc, in f64.
struct Token {
  const float *logits, *p, *dweight;
  const int32_t *chosen, *position, *counts;
  float* dlogits;
  double scale, total, along;  // along = sum_k dweight_k weight_k

  __device__ Token(const Args& a, int64_t t)
      : logits(a.logits.row(t)),
        p(a.probabilities.row(t)),
        dweight(a.dweight.row(t)),
        chosen(a.expert.row(t)),
        position(a.position.row(t)),
        counts(a.counts.row(t / a.tokens)),
        dlogits(a.dlogits.row(t)),
        scale(a.scale),
        total(a.renormalise ? 0 : 1),
        along(0) {
    for (int k = 0; a.renormalise && k < a.K; ++k) {
      const double score = p[chosen[k]];
      total += score;
      if (position[k] >= 0) along += scale * double(dweight[k]) * score;
    }
    along /= total;
  }
  // What reaches p of choice k through the weights.
  __device__ double from_weight(int k) const {
    return ((position[k] >= 0 ? scale * double(dweight[k]) : 0.0) - along) / total;
  }
};

__device__ float greatest_logit(const Args& a, const Token& token) {
  float greatest = -INFINITY;
  for (int e = lane(); e < a.E; e += 32) greatest = fmaxf(greatest, token.logits[e]);
  return warp_max(greatest);
}

// Through the softmax: dlogits_e = p_e (dp_e - sum_j p_j dp_j) + dz_e.
__device__ void through_softmax(const Args& a, const Token& token) {
  double mean = 0;  // sum_j p_j dp_j
  float most = 0;   // the greatest p
  for (int e = lane(); e < a.E; e += 32) {
    mean += token.p[e] * a.b * token.counts[e];
    most = fmaxf(most, token.p[e]);
  }
  mean = warp_sum(mean);
  for (int k = 0; k < a.K; ++k) mean += token.p[token.chosen[k]] * token.from_weight(k);
  double z = 0;
  if (a.z_scale != 0) {  // the greatest probability's logarithm is the most exact one
    const double lse = double(greatest_logit(a, token)) - log(double(warp_max(most)));
    z = 2 * a.z_scale * lse / double(a.tokens);
  }
  for (int e = lane(); e < a.E; e += 32)
    token.dlogits[e] = float(token.p[e] * (a.b * token.counts[e] - mean + z));
  __syncwarp();
  for (int k = lane(); k < a.K; k += 32) {
    const int e = token.chosen[k];
    token.dlogits[e] =
        float(token.p[e] * (a.b * token.counts[e] + token.from_weight(k) - mean + z));
  }
}

// Through each expert's sigmoid: dlogits_e = p_e (1 - p_e) dp_e + dz_e, where 1 - p is
// 1 / (1 + exp(logit)).
__device__ void through_sigmoid(const Args& a, const Token& token) {
  double sum = 0, mean = 0;  // sum_f p_f, sum_f q_f counts_f
  for (int e = lane(); e < a.E; e += 32) {
    sum += token.p[e];
    mean += double(token.p[e]) * token.counts[e];
  }
  sum = warp_sum(sum);
  mean = warp_sum(mean) / sum;
  double lse = 0, z = 0;
  if (a.z_scale != 0) {
    const float greatest = greatest_logit(a, token);
    float exps = 0;
    for (int e = lane(); e < a.E; e += 32) exps += expf(token.logits[e] - greatest);
    lse = double(greatest) + log(double(warp_sum(exps)));
    z = 2 * a.z_scale * lse / double(a.tokens);
  }
  const auto gradient = [&](int e, double from_weight) {
    const double logit = token.logits[e];
    const double slope = token.p[e] / (1 + exp(logit));
    const double from_z = z == 0 ? 0 : z * exp(logit - lse);
    return float(slope * (a.b * (token.counts[e] - mean) / sum + from_weight) + from_z);
  };
  const bool quiet = a.b == 0 && z == 0;  // then only the chosen experts hear of it
  for (int e = lane(); e < a.E; e += 32) token.dlogits[e] = quiet ? 0.f : gradient(e, 0);
  __syncwarp();
  for (int k = lane(); k < a.K; k += 32) {
    const int e = token.chosen[k];
    token.dlogits[e] = gradient(e, token.from_weight(k));
  }
}

// One warp per token; the chosen experts' entries are written over by the lanes of their k. Reads
// 8 T E bytes, writes 4 T E; arithmetic in f64 (of a sigmoid two exp() per element, which bind).
template <bool kSigmoid>
__global__ __launch_bounds__(kThreads) void backward(const Args a) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + warp();
  if (t >= a.T) return;
  const Token token(a, t);
  if constexpr (kSigmoid)
    through_sigmoid(a, token);
  else
    through_softmax(a, token);
}

}  // namespace

void run_cuda(Stream& stream, const RouteBackward& op) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  if (T == 0) return;
  const double tokens = double(T / op.groups);
  const Args a{.logits = matrix<const float>(op.logits),
               .probabilities = matrix<const float>(op.probabilities),
               .dweight = matrix<const float>(op.dweight),
               .expert = matrix<const int32_t>(op.expert),
               .position = matrix<const int32_t>(op.position),
               .counts = matrix<const int32_t>(op.counts),
               .dlogits = matrix<float>(op.dlogits),
               .T = T,
               .tokens = T / op.groups,
               .E = int(E),
               .K = int(K),
               .renormalise = op.renormalise,
               .scale = op.scale,
               .b = double(op.balance_scale) * double(E) / (tokens * tokens * double(K)),
               .z_scale = op.z_scale};
  const auto blocks = grid_of(ceil_divide(T, kWarps));
  if (op.kind == RouterKind::sigmoid)
    backward<true><<<blocks, kThreads, 0, native(stream)>>>(a);
  else
    backward<false><<<blocks, kThreads, 0, native(stream)>>>(a);
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
