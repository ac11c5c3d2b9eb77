#include "kernels/conv.h"

#include <algorithm>

#include "kernels/cuda/row_sums.cuh"
#include "kernels/cuda/strided.cuh"

// A thread takes kCount neighbouring channels over a run of kRun tokens and slides over them: the
// last inputs stay in registers, and only the few before (and, backward, behind) a run are read
// twice. Neighbouring threads take neighbouring channels, then the next run. Widths are padded to
// kWidth = 4 or 8 taps with zero weights for the oldest.
namespace moemamba {

namespace conv {
namespace {

constexpr int kThreads = 128, kRun = 64;
constexpr int kAhead = 4;  // tokens whose loads are in flight together

// Both operators have these fields.
template <class Real>
struct Inputs {
  int64_t L, D, packs, runs, threads;  // packs of channels, runs of a sequence, threads of all
  int W;
  bool whole_weights;  // four taps of a channel are one aligned float4
  Strided<Real> x, initial;
  Strided<float> weight;
  const float* bias;
  const uint8_t* starts;

  template <class Op>
  Inputs(const Op& op, int count)
      : L(op.x.rows() / op.sequences), D(op.x.cols()), packs(D / count),
        runs(std::max<int64_t>(1, ceil_divide(L, kRun))), threads(op.sequences * runs * packs),
        W(int(op.weight.cols())), whole_weights(W == 4 && aligned(op.weight)), x(op.x),
        initial(op.initial), weight(op.weight), bias(pointer<float>(op.bias)),
        starts(pointer<const uint8_t>(op.starts)) {}
};

template <class Real>
struct ForwardCall {
  Inputs<Real> in;
  Strided<Real> y, final;
};

template <class Real>
struct BackwardCall {
  Inputs<Real> in;
  Strided<Real> dy, dfinal, dx, dinitial;
  float* sums;  // [B runs, W + 1, D]: dweight by tap, then dbias
};

template <class Real, int kCount>
__device__ __forceinline__ void load(float (&to)[kCount], const Real* from) {
  const auto pack = *reinterpret_cast<const Pack<Real, kCount>*>(from);
#pragma unroll
  for (int v = 0; v < kCount; ++v) to[v] = to_float(pack.at[v]);
}
template <class Real, int kCount>
__device__ __forceinline__ void store(Real* to, const float (&from)[kCount]) {
  Pack<Real, kCount> pack;
#pragma unroll
  for (int v = 0; v < kCount; ++v) pack.at[v] = from_float<Real>(from[v]);
  *reinterpret_cast<Pack<Real, kCount>*>(to) = pack;
}

// A thread's place: its channels d .. d + kCount - 1, and its run of tokens.
template <class Real>
struct Place {
  int64_t d, run, sequence, begin, end;
  __device__ Place(const Inputs<Real>& in, int64_t thread, int count) {
    d = thread % in.packs * count;
    run = thread / in.packs;
    sequence = run / in.runs;
    begin = run % in.runs * kRun;
    end = min(in.L, begin + kRun);
  }
};

// The taps of a thread's channels, taps[k] for the input k tokens back, and their last inputs.
template <class Real, int kCount, int kWidth>
struct Window {
  float taps[kWidth][kCount], bias[kCount];
  float past[kWidth - 1][kCount];  // past[k]: k + 1 tokens back; zero behind a document's start
  int seen = 1 << 20;              // tokens back that are of the same document; many: all

  __device__ void load_taps(const Inputs<Real>& in, int64_t d) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      bias[v] = in.bias[d + v];
      const float* const weight = in.weight.row(d + v);
      if (in.whole_weights) {
        const float4 all = *reinterpret_cast<const float4*>(weight);
        taps[0][v] = all.w, taps[1][v] = all.z, taps[2][v] = all.y, taps[3][v] = all.x;
#pragma unroll
        for (int k = 4; k < kWidth; ++k) taps[k][v] = 0;
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) taps[k][v] = k < in.W ? weight[in.W - 1 - k] : 0.0f;
      }
    }
  }
  // Before the token's input is used: a document's start sees nothing before it.
  __device__ __forceinline__ void enter(const Inputs<Real>& in, int64_t sequence, int64_t t) {
    ++seen;
    if (!in.starts || in.starts[sequence * in.L + t] == 0) return;
    seen = 0;
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k)
#pragma unroll
      for (int v = 0; v < kCount; ++v) past[k][v] = 0;
  }
  __device__ __forceinline__ void push(const float (&x)[kCount]) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int k = kWidth - 2; k > 0; --k) past[k][v] = past[k - 1][v];
      past[0][v] = x[v];
    }
  }
  // The inputs before a run: of the sequence, or of `initial`, or zero.
  __device__ void fill(const Inputs<Real>& in, const Place<Real>& place) {
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k)
#pragma unroll
      for (int v = 0; v < kCount; ++v) past[k][v] = 0;
#pragma unroll
    for (int back = kWidth - 1; back > 0; --back) {
      const int64_t t = place.begin - back, row = in.W - 1 + t;  // of initial
      float x[kCount] = {};
      if (t >= 0) {
        enter(in, place.sequence, t);
        load(x, in.x.row(place.sequence * in.L + t) + place.d);
      } else if (in.initial.at && row >= 0) {
        load(x, in.initial.row(place.sequence * (in.W - 1) + row) + place.d);
      }
      push(x);
    }
  }
  __device__ __forceinline__ float product(const float (&x)[kCount], int v) const {
    float p = fmaf(taps[0][v], x[v], bias[v]);
#pragma unroll
    for (int k = 1; k < kWidth; ++k) p = fmaf(taps[k][v], past[k - 1][v], p);
    return p;
  }
};

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// Reads x once and writes y: bound by HBM.
template <class Real, int kCount, int kWidth>
__global__ void __launch_bounds__(kThreads)
    forward(const __grid_constant__ ForwardCall<Real> call) {
  const Inputs<Real>& in = call.in;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= in.threads) return;
  const Place<Real> place(in, thread, kCount);
  Window<Real, kCount, kWidth> window;
  window.load_taps(in, place.d);
  window.fill(in, place);
  const int64_t token = place.sequence * in.L;
  for (int64_t first = place.begin; first < place.end; first += kAhead) {
    Pack<Real, kCount> ahead[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      ahead[j] = *reinterpret_cast<const Pack<Real, kCount>*>(
          in.x.row(token + min(first + j, place.end - 1)) + place.d);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t t = first + j;
      if (t >= place.end) break;
      float x[kCount], y[kCount];
      load(x, ahead[j].at);
      window.enter(in, place.sequence, t);
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const float p = window.product(x, v);
        y[v] = p * sigmoid(p);
      }
      store(call.y.row(token + t) + place.d, y);
      window.push(x);
    }
  }
  if (!call.final.at || place.end != in.L) return;
#pragma unroll
  for (int k = 0; k + 1 < kWidth; ++k)
    if (k < in.W - 1)
      store(call.final.row(place.sequence * (in.W - 1) + in.W - 2 - k) + place.d, window.past[k]);
}

// The gradients that a thread gathers: of the inputs of the last kWidth tokens, and of the taps.
template <int kCount, int kWidth>
struct Gathered {
  float dx[kWidth][kCount] = {};  // dx[k]: k tokens back
  float dtaps[kWidth][kCount] = {}, dbias[kCount] = {};

  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int k = kWidth - 1; k > 0; --k) dx[k][v] = dx[k - 1][v];
      dx[0][v] = 0;
    }
  }
  // One token. `own`: of this run, whose sums it belongs to.
  template <class Real>
  __device__ __forceinline__ void add(const Window<Real, kCount, kWidth>& window,
                                      const float (&x)[kCount], const float (&dy)[kCount],
                                      bool own) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const float p = window.product(x, v), s = sigmoid(p);
      const float dp = dy[v] * (s * (1.0f + p * (1.0f - s))), counted = own ? dp : 0.0f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        if (k <= window.seen) dx[k][v] = fmaf(window.taps[k][v], dp, dx[k][v]);
      dbias[v] += counted;
      dtaps[0][v] = fmaf(counted, x[v], dtaps[0][v]);
#pragma unroll
      for (int k = 1; k < kWidth; ++k)
        dtaps[k][v] = fmaf(counted, window.past[k - 1][v], dtaps[k][v]);
    }
  }
  // The gradient of the inputs that `final` holds, behind the last token.
  template <class Real>
  __device__ void add_final(const BackwardCall<Real>& call, const Place<Real>& place, int seen) {
    const int W = call.in.W;
    if (!call.dfinal.at) return;
#pragma unroll
    for (int k = 0; k + 1 < kWidth; ++k) {
      if (k >= W - 1 || k > seen) continue;
      float more[kCount];
      load(more, call.dfinal.row(place.sequence * (W - 1) + W - 2 - k) + place.d);
#pragma unroll
      for (int v = 0; v < kCount; ++v) dx[k][v] += more[v];
    }
  }
  // The oldest token's gradient is whole: it is t, of this run or before the sequence.
  template <class Real>
  __device__ __forceinline__ void emit(const BackwardCall<Real>& call, const Place<Real>& place,
                                       int64_t t) const {
    const Inputs<Real>& in = call.in;
    const int64_t row = in.W - 1 + t;  // of initial
    if (t >= place.begin)
      store(call.dx.row(place.sequence * in.L + t) + place.d, dx[kWidth - 1]);
    else if (t < 0 && row >= 0 && call.dinitial.at)
      store(call.dinitial.row(place.sequence * (in.W - 1) + row) + place.d, dx[kWidth - 1]);
  }
};

// Reads x and dy once, writes dx and, per run, the sums over its tokens: bound by HBM. A token's
// gradient is whole W - 1 tokens later, so a run goes on that far and computes their p again.
template <class Real, int kCount, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 4 ? 3 : 2)
    backward(const __grid_constant__ BackwardCall<Real> call) {
  const Inputs<Real>& in = call.in;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= in.threads) return;
  const Place<Real> place(in, thread, kCount);
  Window<Real, kCount, kWidth> window;
  window.load_taps(in, place.d);
  window.fill(in, place);
  Gathered<kCount, kWidth> gathered;
  if (in.L == 0) gathered.add_final(call, place, window.seen);
  const int64_t token = place.sequence * in.L, last = place.end + kWidth - 1;
  for (int64_t first = place.begin; first < last; first += kAhead) {
    Pack<Real, kCount> xs[kAhead], dys[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j >= in.L) break;
      xs[j] = *reinterpret_cast<const Pack<Real, kCount>*>(in.x.row(token + first + j) + place.d);
      dys[j] =
          *reinterpret_cast<const Pack<Real, kCount>*>(call.dy.row(token + first + j) + place.d);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t t = first + j;
      if (t >= last) break;
      gathered.shift();
      if (t < in.L) {
        float x[kCount], dy[kCount];
        load(x, xs[j].at);
        load(dy, dys[j].at);
        window.enter(in, place.sequence, t);
        gathered.add(window, x, dy, t < place.end);
        window.push(x);
        if (t == in.L - 1) gathered.add_final(call, place, window.seen);
      }
      gathered.emit(call, place, t - (kWidth - 1));
    }
  }
  float* const sums = call.sums + place.run * (in.W + 1) * in.D + place.d;
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (k < in.W) store(sums + (in.W - 1 - k) * in.D, gathered.dtaps[k]);
  store(sums + in.W * in.D, gathered.dbias);
}

// Where a column of the runs' sums goes.
struct ParameterGradients {
  int64_t D;
  int W;
  Strided<float> dweight;
  float* dbias;
  bool accumulate;
  __device__ void operator()(int64_t col, float sum) const {
    const int64_t w = col / D, d = col % D;
    float* const to = w < W ? dweight.row(d) + w : dbias + d;
    *to = accumulate ? *to + sum : sum;
  }
};

// fn.operator()<Real, kCount, kWidth>(), kCount as `packed` allows.
template <bool kBackward, class Fn>
void visit(DType dtype, bool packed, int64_t W, Fn&& fn) {
  visit_real(dtype, [&]<class Real>() {
    constexpr int kMany = kBackward ? 4 : 16 / int(sizeof(Real)), kFew = kBackward ? 2 : 4;
    if (W <= 4 && packed) fn.template operator()<Real, kMany, 4>();
    else if (W <= 4) fn.template operator()<Real, 1, 4>();
    else if (packed) fn.template operator()<Real, kFew, 8>();
    else fn.template operator()<Real, 1, 8>();
  });
}

bool packs(const Tensor& tensor) { return !tensor || aligned(tensor); }

}  // namespace
}  // namespace conv

void run_cuda(Stream& stream, const ConvForward& op) {
  if (op.sequences == 0 || op.x.cols() == 0) return;
  const bool packed = conv::packs(op.x) && conv::packs(op.y) && conv::packs(op.initial) &&
                      conv::packs(op.final);
  conv::visit<false>(op.x.dtype, packed, op.weight.cols(),
                     [&]<class Real, int kCount, int kWidth>() {
    const conv::ForwardCall<Real> call{.in = {op, kCount},
                                       .y = Strided<Real>(op.y),
                                       .final = Strided<Real>(op.final)};
    const unsigned grid = grid_of(ceil_divide(call.in.threads, conv::kThreads));
    conv::forward<Real, kCount, kWidth><<<grid, conv::kThreads, 0, native(stream)>>>(call);
  });
  cuda_check(cudaGetLastError(), op.name);
}

void run_cuda(Stream& stream, const ConvBackward& op) {
  const int64_t D = op.x.cols(), W = op.weight.cols(), B = op.sequences;
  const int64_t L = B ? op.x.rows() / B : 0;
  const int64_t runs = B * std::max<int64_t>(1, ceil_divide(L, conv::kRun)), cols = (W + 1) * D;
  if (D == 0) return;
  auto* const sums = reinterpret_cast<float*>(stream.workspace(size_t(runs * cols) * 4));
  const bool packed = conv::packs(op.x) && conv::packs(op.dy) && conv::packs(op.dx) &&
                      conv::packs(op.initial) && conv::packs(op.dfinal) &&
                      conv::packs(op.dinitial);
  if (B > 0)
    conv::visit<true>(op.x.dtype, packed, W, [&]<class Real, int kCount, int kWidth>() {
      const conv::BackwardCall<Real> call{.in = {op, kCount},
                                          .dy = Strided<Real>(op.dy),
                                          .dfinal = Strided<Real>(op.dfinal),
                                          .dx = Strided<Real>(op.dx),
                                          .dinitial = Strided<Real>(op.dinitial),
                                          .sums = sums};
      const unsigned grid = grid_of(ceil_divide(call.in.threads, conv::kThreads));
      conv::backward<Real, kCount, kWidth><<<grid, conv::kThreads, 0, native(stream)>>>(call);
    });
  launch_sum_rows(stream, sums, runs, cols,
                  conv::ParameterGradients{.D = D,
                                           .W = int(W),
                                           .dweight = Strided<float>(op.dweight),
                                           .dbias = pointer<float>(op.dbias),
                                           .accumulate = op.accumulate});
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
