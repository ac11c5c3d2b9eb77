#pragma once
#include "kernels/run.h"

namespace moemamba {
// letters: T tokens, E experts, K experts per token, D width, G routing groups, R = T K rows
// All that a router computes is f32; rows and tokens that are moved are f32 or bf16, alike within
// one operator, and sums over them are f32.

// What turns a token's logits into scores p.
enum class RouterKind : uint8_t {
  softmax,  // p = softmax(logits)
  sigmoid,  // p_e = 1 / (1 + exp(-logit_e)), each expert for itself
};

// The router's decision. The K experts of the greatest logits are chosen, or with `bias` those of
// the greatest p + bias; ties go to the lower expert id. The bias moves choices alone (balancing
// without a loss, DeepSeek-V3): weights are scale p, or scale p / sum of p over the K chosen where
// renormalised. T / G tokens in token order share a capacity of floor(capacity_factor T/G K / E)
// rows per expert (0 = dropless), kept in token order (all k of a token before the next token);
// later ones are dropped. A NaN among the values that decide sets `flag`, never an index (expert k
// is then taken for choice k).
//
// balance[g] = E sum_e mean_t(q_te) count_e / (T/G K), counts before dropping (Switch Transformer),
// q = p of a softmax, p_te / sum_f p_tf of sigmoids; z[g] = mean_t logsumexp(logits_t)^2.
// Unweighted: the model multiplies by its coefficients.
struct Route {
  static constexpr auto name = "route";
  Tensor logits;         // [T, E] read, f32
  Tensor bias;           // [E] read, f32; none: choices are made on the logits
  Tensor probabilities;  // [T, E] written: the scores p
  Tensor expert;         // [T, K] i32 written
  Tensor weight;         // [T, K] written: 0 for a dropped row
  Tensor position;       // [T, K] i32 written: row in the order sorted by expert (then token, then
                         // k); -1 = dropped
  Tensor source;         // [T K] i32 written: of each sorted row, t K + k; rows past the end: -1
  Tensor offsets;        // [E + 1] i32 written: where each expert's kept rows begin in that order
  Tensor counts;         // [G, E] i32 written: choices per group and expert before dropping
  Tensor balance;        // [G] written
  Tensor z;              // [G] written
  Tensor flag;           // [1] i32 written: 1 = a logit was NaN
  int64_t groups = 1;    // G, divides T (T = 0: no group has a token, nothing but zeros is written)
  double capacity_factor = 0;
  bool renormalise = false;
  RouterKind kind = RouterKind::softmax;
  float scale = 1;  // of all weights, above 0
  static constexpr auto reads() { return std::tuple(&Route::logits, &Route::bias); }
  static constexpr auto writes() {
    return std::tuple(&Route::probabilities, &Route::expert, &Route::weight, &Route::position,
                      &Route::source, &Route::offsets, &Route::counts, &Route::balance, &Route::z,
                      &Route::flag);
  }
  void check() const;
};

// dlogits from the gradient of the weights (ignored where position is -1) and from
// loss += balance_scale * sum_g balance[g] + z_scale * sum_g z[g]. Choices and counts are
// constants, so the bias has no gradient.
struct RouteBackward {
  static constexpr auto name = "route_backward";
  Tensor logits;         // [T, E] read
  Tensor probabilities;  // [T, E] read
  Tensor expert;         // [T, K] i32 read
  Tensor position;       // [T, K] i32 read
  Tensor counts;         // [G, E] i32 read
  Tensor dweight;        // [T, K] read
  Tensor dlogits;        // [T, E] written
  int64_t groups = 1;
  bool renormalise = false;
  RouterKind kind = RouterKind::softmax;  // this and scale as in forward
  float scale = 1;
  float balance_scale = 0, z_scale = 0;
  static constexpr auto reads() {
    return std::tuple(&RouteBackward::logits, &RouteBackward::probabilities, &RouteBackward::expert,
                      &RouteBackward::position, &RouteBackward::counts, &RouteBackward::dweight);
  }
  static constexpr auto writes() { return std::tuple(&RouteBackward::dlogits); }
  void check() const;
};

// Adds what a router decided to a step's facts: choices[e] += sum_g counts[g, e]; sums += (balance
// over the groups, z likewise, rows beyond capacity, the flag), in the groups' order.
struct CollectRouting {
  static constexpr auto name = "collect_routing";
  Tensor counts;   // [G, E] i32 read
  Tensor offsets;  // [E + 1] i32 read
  Tensor balance;  // [G] read
  Tensor z;        // [G] read
  Tensor flag;     // [1] i32 read
  Tensor choices;  // [E] f64 added to
  Tensor sums;     // [4] f64 added to
  static constexpr auto reads() {
    return std::tuple(&CollectRouting::counts, &CollectRouting::offsets, &CollectRouting::balance,
                      &CollectRouting::z, &CollectRouting::flag);
  }
  static constexpr auto writes() {
    return std::tuple(&CollectRouting::choices, &CollectRouting::sums);
  }
  void check() const;
};

// Permute: rows[r] = x[source[r] / K] for the first offsets[E] rows.
struct Permute {
  static constexpr auto name = "permute";
  Tensor x;        // [T, D] read, f32 or bf16
  Tensor source;   // [R] i32 read
  Tensor offsets;  // [E + 1] i32 read
  Tensor rows;     // [R, D] written
  int64_t top_k = 1;
  static constexpr auto reads() {
    return std::tuple(&Permute::x, &Permute::source, &Permute::offsets);
  }
  static constexpr auto writes() { return std::tuple(&Permute::rows); }
  void check() const;
};

// Its gradient: dx[t] = sum over k in order of drows[position[t, k]] (+ dx[t]).
struct PermuteBackward {
  static constexpr auto name = "permute_backward";
  Tensor drows;     // [R, D] read, f32 or bf16
  Tensor position;  // [T, K] i32 read
  Tensor dx;        // [T, D] written (or added to)
  bool accumulate = false;
  static constexpr auto reads() {
    return std::tuple(&PermuteBackward::drows, &PermuteBackward::position);
  }
  static constexpr auto writes() { return std::tuple(&PermuteBackward::dx); }
  void check() const;
};

// Weighted un-permute: y[t] = sum over k in order of weight[t, k] rows[position[t, k]]; 0 if all of
// a token's rows were dropped.
struct Unpermute {
  static constexpr auto name = "unpermute";
  Tensor rows;      // [R, D] read, f32 or bf16
  Tensor position;  // [T, K] i32 read
  Tensor weight;    // [T, K] read, f32
  Tensor y;         // [T, D] written
  static constexpr auto reads() {
    return std::tuple(&Unpermute::rows, &Unpermute::position, &Unpermute::weight);
  }
  static constexpr auto writes() { return std::tuple(&Unpermute::y); }
  void check() const;
};

// drows[position[t, k]] = weight[t, k] dy[t];  dweight[t, k] = <dy[t], rows[position[t, k]]>
// (0 where dropped).
struct UnpermuteBackward {
  static constexpr auto name = "unpermute_backward";
  Tensor dy;        // [T, D] read, f32 or bf16
  Tensor rows;      // [R, D] read, as in forward
  Tensor position;  // [T, K] i32 read
  Tensor weight;    // [T, K] read, f32
  Tensor drows;     // [R, D] written; may be rows
  Tensor dweight;   // [T, K] written, f32
  static constexpr auto reads() {
    return std::tuple(&UnpermuteBackward::dy, &UnpermuteBackward::rows,
                      &UnpermuteBackward::position, &UnpermuteBackward::weight);
  }
  static constexpr auto writes() {
    return std::tuple(&UnpermuteBackward::drows, &UnpermuteBackward::dweight);
  }
  void check() const;
};

void run_cpu(Stream&, const Route&);
void run_cpu(Stream&, const RouteBackward&);
void run_cpu(Stream&, const CollectRouting&);
void run_cpu(Stream&, const Permute&);
void run_cpu(Stream&, const PermuteBackward&);
void run_cpu(Stream&, const Unpermute&);
void run_cpu(Stream&, const UnpermuteBackward&);
void run_cuda(Stream&, const Route&);
void run_cuda(Stream&, const RouteBackward&);
void run_cuda(Stream&, const CollectRouting&);
void run_cuda(Stream&, const Permute&);
void run_cuda(Stream&, const PermuteBackward&);
void run_cuda(Stream&, const Unpermute&);
void run_cuda(Stream&, const UnpermuteBackward&);

}  // namespace moemamba
