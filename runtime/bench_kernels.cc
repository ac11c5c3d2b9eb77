#include "runtime/bench_kernels.h"

#include <cmath>
#include <cstdio>

#include "kernels/adamw.h"
#include "kernels/conv.h"
#include "kernels/cross_entropy.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/routing.h"
#include "kernels/scan.h"
#include "runtime/bench_tools.h"

namespace moemamba {

namespace {

// Of all tensors that an operator names, each once.
template <class Op>
double bytes_of(const Op& op) {
  double sum = 0;
  const auto add = [&](auto field) {
    if (op.*field) sum += double((op.*field).bytes());
  };
  std::apply([&](auto... field) { (add(field), ...); }, Op::reads());
  std::apply([&](auto... field) { (add(field), ...); }, Op::writes());
  return sum;
}

// [E + 1] offsets of R rows, expert e's share of them in proportion to weights[e].
std::vector<int32_t> shared_out(int64_t R, const std::vector<double>& weights) {
  double all = 0, before = 0;
  for (double weight : weights) all += weight;
  std::vector<int32_t> offsets = {0};
  for (double weight : weights) {
    before += weight;
    offsets.push_back(int32_t(std::floor(double(R) * before / all + 1e-9)));
  }
  offsets.back() = int32_t(R);
  return offsets;
}

class KernelTable {
 public:
  KernelTable(Stream& stream, const ModelSizes& sizes, const KernelBenchOptions& options)
      : stream_(stream), s_(sizes), options_(options), T_(options.sequences * options.length) {}
  void ceilings();
  void mamba();
  void projection(const char* name, int64_t in, int64_t out);
  void experts();
  void expert_rows();
  void norms();
  void head();
  void optimizer();
  KernelBench take() { return std::move(result_); }

 private:
  template <class Op>
  double seconds(const Op& op) {
    return median(time_runs(stream_, options_.repeat, [&] { run(stream_, op); }));
  }
  template <class Op>
  void moves(const std::string& name, const std::string& shape, const Op& op, double bytes = 0) {
    result_.rows.push_back(
        {name, shape, seconds(op), bytes > 0 ? bytes : bytes_of(op), Limit::copy});
  }
  template <class Op>
  void multiplies(const std::string& name, const std::string& shape, double flops, const Op& op) {
    result_.rows.push_back({name, shape, seconds(op), flops, Limit::product});
  }
  void conv(const Tensor& x, const Tensor& dx);
  void expert_products(const char* name, int64_t in, int64_t out, const char* routing,
                       const std::vector<int32_t>& offsets);
  void activation();

  Stream& stream_;
  const ModelSizes& s_;
  KernelBenchOptions options_;
  int64_t T_;
  KernelBench result_;
};

void KernelTable::ceilings() {
  const bool on_gpu = stream_.device() == DeviceKind::cuda;
  const int64_t threads = stream_.threads(), mib = on_gpu ? 1024 : 256;
  {
    BenchTensors t(stream_);
    const int64_t part = (mib << 20) / 4 / threads;
    const Tensor from = t.dense({threads, part}), to = t.dense({threads, part});
    const auto times = time_runs(stream_, options_.repeat, [&] {
      if (on_gpu) return copy(stream_, from, to);
      stream_.parallel_for(threads, [&](int64_t i) {  // one copy alone is one core's work
        Stream own = Stream::immediate();
        copy(own, from.row_range(i, i + 1), to.row_range(i, i + 1));
      });
    });
    result_.copy_rate = 2 * double(from.bytes()) / median(times);
    result_.copied = concat(mib, " MiB, read and written");
  }
  const ProductCeiling product = measure_product(stream_, s_.compute, options_.repeat);
  result_.product_rate = product.rate;
  result_.multiplied = product.multiplied;
}

void KernelTable::conv(const Tensor& x, const Tensor& dx) {
  const std::string shape =
      sizes_text({options_.sequences, options_.length, s_.I}) + concat(", width ", s_.W);
  BenchTensors t(stream_);
  const Tensor weight = t.dense({s_.I, s_.W}), bias = t.dense({s_.I});
  moves("conv forward", shape,
        ConvForward{.x = x,
                    .weight = weight,
                    .bias = bias,
                    .initial = {},
                    .starts = {},
                    .y = t.rows({T_, s_.I}, s_.compute),
                    .final = {},
                    .sequences = options_.sequences});
  moves("conv backward", shape,
        ConvBackward{.x = x,
                     .weight = weight,
                     .bias = bias,
                     .initial = {},
                     .starts = {},
                     .dy = t.rows({T_, s_.I}, s_.compute),
                     .dfinal = {},
                     .dx = dx,
                     .dweight = t.dense({s_.I, s_.W}),
                     .dbias = t.dense({s_.I}),
                     .dinitial = {},
                     .sequences = options_.sequences});
}

// As SelectiveSsm calls them: x and z are halves of one tensor, b and c parts of another.
void KernelTable::mamba() {
  const int64_t I = s_.I, N = s_.N, R = s_.R, B = options_.sequences;
  BenchTensors t(stream_);
  const Tensor xz = t.rows({T_, 2 * I}, s_.compute), dxz = t.rows({T_, 2 * I}, s_.compute);
  conv(xz.column_range(0, I), dxz.column_range(0, I));
  const Tensor proj = t.rows({T_, R + 2 * N}, s_.compute), dproj = t.rows(proj.shape, s_.compute);
  const auto wide = [&] { return t.rows({T_, I}, s_.compute); };
  const ScanForward forward{
      .u = wide(),
      .dt = wide(),
      .dt_bias = t.dense({I}),
      .a_log = t.dense({I, N}),
      .b = proj.column_range(R, R + N),
      .c = proj.column_range(R + N, R + 2 * N),
      .skip = t.dense({I}),
      .z = xz.column_range(I, 2 * I),
      .initial = {},
      .starts = {},
      .y = wide(),
      .states = t.zeros({scan_state_elements(B, options_.length, I, N, stream_.device())}),
      .final = {},
      .sequences = B};
  const ScanBackward backward{.u = forward.u,
                              .dt = forward.dt,
                              .dt_bias = forward.dt_bias,
                              .a_log = forward.a_log,
                              .b = forward.b,
                              .c = forward.c,
                              .skip = forward.skip,
                              .z = forward.z,
                              .initial = {},
                              .starts = {},
                              .states = forward.states,
                              .dy = wide(),
                              .dfinal = {},
                              .du = wide(),
                              .ddt = wide(),
                              .db = dproj.column_range(R, R + N),
                              .dc = dproj.column_range(R + N, R + 2 * N),
                              .dz = dxz.column_range(I, 2 * I),
                              .da_log = t.dense({I, N}),
                              .ddt_bias = t.dense({I}),
                              .dskip = t.dense({I}),
                              .dinitial = {},
                              .sequences = B};
  const std::string shape = sizes_text({B, options_.length, I, N});
  moves("scan forward", shape, forward);
  moves("scan backward", shape, backward);
}

// y = x W', dx = dy W, dW = dy' x.
void KernelTable::projection(const char* name, int64_t in, int64_t out) {
  BenchTensors t(stream_);
  const Tensor x = t.rows({T_, in}, s_.compute), y = t.rows({T_, out}, s_.compute);
  const Tensor weight = t.dense({out, in}, s_.compute, 0.05);
  const double flops = 2.0 * double(T_) * double(in) * double(out);
  const std::string shape = sizes_text({T_, out, in});
  multiplies(concat(name, " y"), shape, flops,
             Matmul{.a = x, .b = weight, .out = y, .b_transposed = true});
  multiplies(concat(name, " dx"), sizes_text({T_, in, out}), flops,
             Matmul{.a = y, .b = weight, .out = x});
  multiplies(concat(name, " dW"), sizes_text({out, in, T_}), flops,
             Matmul{.a = y, .b = x, .out = t.dense({out, in}), .a_transposed = true});
}

void KernelTable::expert_products(const char* name, int64_t in, int64_t out, const char* routing,
                                  const std::vector<int32_t>& counted) {
  BenchTensors t(stream_);
  const int64_t R = T_ * s_.K;
  const Tensor x = t.rows({R, in}, s_.compute), y = t.rows({R, out}, s_.compute);
  const Tensor weight = t.dense({s_.E, out, in}, s_.compute, 0.05);
  const Tensor offsets = t.values(counted);
  const double flops = 2.0 * double(R) * double(in) * double(out);
  const auto named = [&](const char* what) { return concat(name, what, ", ", routing); };
  const std::string shape = concat(s_.E, " of ", sizes_text({R, out, in}));
  multiplies(
      named(" y"), shape, flops,
      GroupedMatmul{.a = x, .b = weight, .offsets = offsets, .out = y, .b_transposed = true});
  multiplies(named(" dx"), shape, flops,
             GroupedMatmul{.a = y, .b = weight, .offsets = offsets, .out = x});
  multiplies(named(" dW"), shape, flops,
             GroupedOuter{.a = y, .b = x, .offsets = offsets, .out = t.dense({s_.E, out, in})});
}

void KernelTable::experts() {
  const auto E = size_t(s_.E);
  std::vector<double> even(E, 1), zipf(E), one(E, 0);
  for (size_t e = 0; e < E; ++e) zipf[e] = 1 / double(e + 1);
  one[0] = 1;
  const std::pair<const char*, std::vector<double>> routings[] = {
      {"even", even}, {"Zipf", zipf}, {"one expert", one}};
  for (const auto& [routing, weights] : routings) {
    const std::vector<int32_t> offsets = shared_out(T_ * s_.K, weights);
    expert_products("expert up", s_.D, s_.F, routing, offsets);
    expert_products("expert down", s_.F, s_.D, routing, offsets);
  }
}

// Not in place, or gradients would shrink from run to run into numbers that a CPU is slow with.
void KernelTable::activation() {
  BenchTensors t(stream_);
  const int64_t R = T_ * s_.K;
  const std::string shape = sizes_text({R, s_.F});
  const auto take = [&] { return t.rows({R, s_.F}, s_.compute); };
  const Tensor x = take(), y = take(), dx = take();
  if (s_.expert.gated) {
    const Tensor gate = take();
    moves("SwiGLU forward", shape, SwiGluForward{.gate = gate, .up = x, .rows = {}, .y = y});
    moves("SwiGLU backward", shape,
          SwiGluBackward{.gate = gate, .up = x, .dy = y, .rows = {}, .dgate = take(), .dup = dx});
    return;
  }
  const Activation kind = s_.expert.activation;
  moves("activation forward", shape, ActivationForward{.x = x, .rows = {}, .y = y, .kind = kind});
  moves("activation backward", shape,
        ActivationBackward{.x = x, .dy = y, .rows = {}, .dx = dx, .kind = kind});
}

// Row i = t K + k goes to expert i mod E.
void KernelTable::expert_rows() {
  const int64_t K = s_.K, E = s_.E, R = T_ * K;
  std::vector<int32_t> offsets = {0}, source, place(static_cast<size_t>(R));
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t i = e; i < R; i += E) {
      place[size_t(i)] = int32_t(source.size());
      source.push_back(int32_t(i));
    }
    offsets.push_back(int32_t(source.size()));
  }
  BenchTensors t(stream_);
  const Tensor x = t.rows({T_, s_.D}, s_.compute), rows = t.rows({R, s_.D}, s_.compute);
  const Tensor position = t.values(place).reshaped({T_, K}), weight = t.dense({T_, K});
  const std::string shape = concat(sizes_text({R, s_.D}), " rows");
  moves("permute", shape,
        Permute{.x = x,
                .source = t.values(source),
                .offsets = t.values(offsets),
                .rows = rows,
                .top_k = K});
  moves("permute backward", shape, PermuteBackward{.drows = rows, .position = position, .dx = x});
  moves("unpermute", shape,
        Unpermute{.rows = rows, .position = position, .weight = weight, .y = x});
  moves("unpermute backward", shape,
        UnpermuteBackward{.dy = x,
                          .rows = rows,
                          .position = position,
                          .weight = weight,
                          .drows = rows,
                          .dweight = t.dense({T_, K})});
  activation();
}

// With what is added to the residual stream on the way.
void KernelTable::norms() {
  BenchTensors t(stream_);
  const bool layer = s_.norm == NormKind::layer;
  const auto row = [&] { return t.rows({T_, s_.D}, s_.compute); };
  const Tensor x = row(), y = row(), dsum = row(), weight = t.dense({s_.D});
  const Tensor mean = layer ? t.dense({T_}) : Tensor{}, rstd = t.dense({T_});
  const std::string shape = sizes_text({T_, s_.D});
  moves("norm forward", shape,
        NormForward{.x = row(),
                    .residual = x,
                    .weight = weight,
                    .bias = layer ? t.dense({s_.D}) : Tensor{},
                    .sum = x,
                    .y = y,
                    .mean = mean,
                    .rstd = rstd,
                    .kind = s_.norm,
                    .eps = s_.norm_eps});
  moves("norm backward", shape,
        NormBackward{.dy = y,
                     .x = x,
                     .weight = weight,
                     .mean = mean,
                     .rstd = rstd,
                     .dsum = dsum,
                     .dx = dsum,
                     .dweight = t.dense({s_.D}),
                     .dbias = layer ? t.dense({s_.D}) : Tensor{},
                     .kind = s_.norm});
}

void KernelTable::head() {
  BenchTensors t(stream_);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < T_; ++i) ids.push_back(int32_t(i * 7919 % s_.V));
  HeadCrossEntropy op{.x = t.rows({T_, s_.D}, s_.compute),
                      .weight = t.dense({s_.V, s_.D}, s_.compute, 0.05),
                      .targets = t.values(ids),
                      .loss = t.dense({T_}),
                      .dx = {},
                      .dweight = {},
                      .scale = 1 / float(T_)};
  const double flops = 2.0 * double(T_) * double(s_.V) * double(s_.D);
  const std::string shape = sizes_text({T_, s_.V, s_.D});
  multiplies("head and loss", shape, flops, op);
  op.dx = t.rows({T_, s_.D}, s_.compute);
  op.dweight = t.dense({s_.V, s_.D});
  multiplies("head, loss, gradients", shape, 3 * flops, op);
}

// Of a matrix of every expert, or of the head.
void KernelTable::optimizer() {
  BenchTensors t(stream_);
  const int64_t P = s_.E > 0 ? s_.E * s_.F * s_.D : s_.V * s_.D;
  const AdamW op{.gradient = t.dense({P}),
                 .verdict = t.values(std::vector<float>{1, 1}),
                 .value = t.dense({P}),
                 .m = t.zeros({P}),
                 .v = t.zeros({P})};
  moves("AdamW", sizes_text({P}), op, 7 * double(P) * 4);  // three are read and written
}

}  // namespace

KernelBench bench_kernels(Stream& stream, const ModelSizes& sizes,
                          const KernelBenchOptions& options) {
  KernelTable table(stream, sizes, options);
  table.ceilings();
  if (sizes.layers(LayerKind::mamba) + sizes.layers(LayerKind::inner_moe) > 0) {
    table.mamba();
    table.projection("in projection", sizes.D, 2 * sizes.I);
    table.projection("out projection", sizes.I, sizes.D);
  }
  if (sizes.layers(LayerKind::moe) > 0) {
    table.experts();
    table.expert_rows();
  }
  table.norms();
  table.head();
  table.optimizer();
  return table.take();
}

ProductCeiling measure_product(Stream& stream, DType dtype, int64_t repeat) {
  BenchTensors t(stream);
  const int64_t n = stream.device() == DeviceKind::cuda ? 8192 : 2048;
  const Matmul op{
      .a = t.dense({n, n}, dtype), .b = t.dense({n, n}, dtype), .out = t.dense({n, n}, dtype)};
  const double seconds = median(time_runs(stream, repeat, [&] { run(stream, op); }));
  return {2 * std::pow(double(n), 3) / seconds,
          concat(sizes_text({n, n, n}), ", ", name_of(dtype))};
}

std::string kernel_bench_text(const KernelBench& b) {
  const bool tera = b.product_rate >= 1e12;
  const char* unit = tera ? "TFLOP/s" : "GFLOP/s";
  const auto shown = [&](double rate, Limit limit) {
    return rate * (limit == Limit::product && tera ? 1e-12 : 1e-9);
  };
  char line[200];
  std::snprintf(line, sizeof line,
                "ceilings   copy    %8.1f GB/s    (%s)\n           product %8.1f %s (%s)\n",
                shown(b.copy_rate, Limit::copy), b.copied.c_str(),
                shown(b.product_rate, Limit::product), unit, b.multiplied.c_str());
  std::string text = line;
  std::snprintf(line, sizeof line, "%-28s %-28s %11s %16s  %s\n", "operator", "shape", "us", "rate",
                "of ceiling");
  text += line;
  bool above = false;
  for (const KernelBench::Row& row : b.rows) {
    const bool copies = row.limit == Limit::copy;
    const double rate = row.amount / row.seconds;
    std::snprintf(line, sizeof line, "%-28s %-28s %11.1f %8.1f %-7s %6.1f %% %s\n",
                  row.name.c_str(), row.shape.c_str(), row.seconds * 1e6, shown(rate, row.limit),
                  copies ? "GB/s" : unit, 100 * rate / b.rate_of(row.limit),
                  copies ? "copy" : "product");
    text += line;
    above |= copies && rate > b.copy_rate;
  }
  return text +
         (above ? "More than 100 %: tensors that the caches hold from run to run, or that are read "
                  "more than written.\n"
                : "");
}

}  // namespace moemamba
