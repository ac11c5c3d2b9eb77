// Every operator once, small, for compute-sanitizer (scripts/gpu_check.sh) and for what it cannot
// see: each tensor lies in memory of its own that ends with its last element; all that nobody has
// written is NaN. And a training whose arena is guarded. Without a GPU the same runs on the CPU in
// f32, for the address sanitizer, and nothing is compared.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>

#include "core/gpu.h"
#include "kernels/adamw.h"
#include "kernels/attention.h"
#include "kernels/bias.h"
#include "kernels/conv.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"
#include "kernels/rope.h"
#include "kernels/routing.h"
#include "kernels/scan.h"
#include "tests/support/bucket_scene.h"
#include "tests/support/exchange_scene.h"
#include "tests/support/harness.h"
#include "tests/support/in_world.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

// Exactly so many bytes on a device, not zeroed.
class Memory {
 public:
  Memory(DeviceKind device, int64_t bytes)
      : device_(device),
        data_(device == DeviceKind::cuda
                  ? gpu::allocate(std::max<int64_t>(bytes, 1))
                  : ::operator new(size_t(std::max<int64_t>(bytes, 1)), kAlignment)) {}
  ~Memory() {
    if (device_ == DeviceKind::cuda) gpu::release(data_);
    else ::operator delete(data_, kAlignment);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  DeviceKind device_;
  void* data_;
};

void poison(Stream& stream, void* data, int64_t bytes) {
  std::vector<uint32_t> pattern(size_t(bytes / 4 + 1), Arena::kPoison);
  copy(stream, view(pattern.data(), {bytes}, DType::u8),
       view(data, {bytes}, DType::u8, stream.device()));
  stream.synchronize();
}

// How an operator's copy looks on the device.
struct Look {
  bool aligned;   // rows on 16 bytes, as an arena lays them out; or on odd ones, as in the case
  bool poisoned;  // NaN where nothing is written; or untouched, for initcheck
};

// A case's empty() tensors hold what no operator may read: NaN, or a number that is no index.
bool unwritten(const Tensor& host) {
  if (host.elements() == 0) return true;
  const double first = to_doubles(host.row_range(0, 1))[0];
  return std::isnan(first) ||
         (host.dtype == DType::i32 && first == double(std::numeric_limits<int32_t>::max()));
}

// An operator whose tensors lie apart on the stream's device. Tensors that begin at the same
// address stay one.
template <class Op>
class Apart {
 public:
  Apart(Stream& stream, const Op& op, const Look& look) : op_(op), look_(look) {
    const auto put = [&](auto field) {
      place(stream, op.*field, op_.*field, is_private<Op>(field));
    };
    std::apply([&](auto... field) { (put(field), ...); }, Op::reads());
    std::apply([&](auto... field) { (put(field), ...); }, Op::writes());
    stream.synchronize();
  }
  const Op& op() const { return op_; }

 private:
  void place(Stream& stream, const Tensor& from, Tensor& to, bool own) {
    if (!from) return;
    to.device = stream.device();
    const int64_t size = size_of(from.dtype);
    if constexpr (requires { Op::privates(); })
      if (own) {
        const int64_t elements = op_.private_elements(stream.device());
        to = view(nullptr, {elements}, from.dtype, stream.device());
        to.data = memory(stream, to.bytes());
        return;
      }
    for (const auto& [original, replica] : placed_)
      if (original.data == from.data) {
        to.data = replica.data;
        to.stride = replica.stride;
        return;
      }
    const int64_t pack = 16 / size;
    if (look_.aligned && from.rows() > 1) to.stride = (from.cols() + pack - 1) / pack * pack;
    const int64_t rows = from.rows();
    const int64_t elements = rows == 0 ? 0 : (rows - 1) * to.stride + from.cols();
    to.data = memory(stream, elements * size);
    if (!unwritten(from)) copy(stream, from, to);
    placed_.emplace_back(from, to);
  }
  void* memory(Stream& stream, int64_t bytes) {
    memory_.emplace_back(stream.device(), bytes);
    if (look_.poisoned) poison(stream, memory_.back().data(), bytes);
    return memory_.back().data();
  }
  Op op_;
  Look look_;
  std::deque<Memory> memory_;
  std::vector<std::pair<Tensor, Tensor>> placed_;
};

enum class Purpose { compare, only_run };

constexpr auto kNothing = [](Stream&, const auto&) {};

// Compares `op` with the CPU's: on rows of both kinds, with a workspace that grows to what is asked
// for and not a byte further; then once more with NaN in the workspace, for the same bits.
// only_run: in memory that was never written.
template <class Op, class Prepare = decltype(kNothing)>
void try_out(Purpose purpose, const Op& op, Prepare prepare = kNothing, double bound = 0) {
  const bool on_gpu = !gpu::devices().empty();
  if (!on_gpu && has_bf16(op)) return;
  SCOPED_TRACE(concat(Op::name, has_bf16(op) ? " bf16" : " f32"));
  Stream stream = on_gpu ? Stream::cuda() : Stream::immediate(), cpu = Stream::immediate();
  if (purpose == Purpose::only_run) {
    if (!on_gpu) return;
    const Apart<Op> copy(stream, op, {.aligned = true, .poisoned = false});
    prepare(stream, copy.op());
    run(stream, copy.op());
    stream.synchronize();
    return;
  }
  const Replica<Op> reference(cpu, op);
  prepare(cpu, reference.op());
  run(cpu, reference.op());
  if (bound == 0) bound = tolerance(has_bf16(op) ? DType::bf16 : DType::f32);
  const Apart<Op> packed(stream, op, {true, true}), odd(stream, op, {false, true}),
      again(stream, op, {true, true});
  const auto agree = [&](const char* name, int where, const Tensor& found, const Tensor& expected) {
    expect_agree(name, where, found, expected, bound);
  };
  for (const Apart<Op>* copy : {&packed, &odd}) {
    prepare(stream, copy->op());
    run(stream, copy->op());
    stream.synchronize();
    compare_written(cpu, reference.op(), stream, copy->op(), agree);
  }
  prepare(stream, again.op());
  constexpr int64_t kBytes = 1 << 16;
  poison(stream, stream.workspace(kBytes), kBytes);
  run(stream, again.op());
  stream.synchronize();
  compare_written(stream, packed.op(), stream, again.op(), expect_same_bits);
  if (on_gpu) count_comparison();
}

// Where forward's results are backward's input, the CPU's f32 ones are; rounded where asked.
template <class Op>
void run_on_cpu(const Op& op) {
  Stream stream = Stream::immediate();
  run(stream, op);
}

void try_norms(Purpose purpose, DType dtype) {
  for (NormKind kind : {NormKind::layer, NormKind::rms})
    for (int64_t D : {33, 64, 520}) {
      Case c(1);
      const bool layer = kind == NormKind::layer;
      const Shape rows{37, D};
      NormForward f{.x = c.uniform(rows, -1, 3), .residual = c.normal(rows),
                    .weight = c.normal({D}), .bias = layer ? c.normal({D}) : Tensor(),
                    .sum = c.empty(rows), .y = c.empty(rows),
                    .mean = layer ? c.empty({37}) : Tensor(), .rstd = c.empty({37}), .kind = kind};
      run_on_cpu(f);
      try_out(purpose, NormBackward{.dy = c.normal(rows, 1, dtype), .x = c.copy_as(f.sum, dtype),
                                    .weight = f.weight, .mean = f.mean, .rstd = f.rstd,
                                    .dsum = c.normal(rows, 1, dtype), .dx = c.empty(rows, dtype),
                                    .dweight = c.normal({D}),
                                    .dbias = layer ? c.normal({D}) : Tensor(), .kind = kind,
                                    .accumulate = true});
      f.x = c.copy_as(f.x, dtype), f.residual = c.copy_as(f.residual, dtype);
      f.sum = c.empty(rows, dtype), f.y = c.empty(rows, dtype);
      f.mean = layer ? c.empty({37}) : Tensor(), f.rstd = c.empty({37});
      try_out(purpose, f);
    }
}

void try_pointwise(Purpose purpose, DType dtype) {
  for (int64_t F : {21, 48}) {
    Case c(2);
    const Shape rows{19, F};
    const Tensor x = c.normal(rows, 1, dtype), up = c.normal(rows, 1, dtype);
    const Tensor dy = c.normal(rows, 1, dtype), count = c.values({1}, {13}, DType::i32);
    const auto out = [&] { return c.zeros(rows, dtype); };  // rows that do not count stay
    for (Activation kind : {Activation::relu, Activation::gelu, Activation::silu}) {
      try_out(purpose, ActivationForward{.x = x, .rows = count, .y = out(), .kind = kind});
      try_out(purpose,
              ActivationBackward{.x = x, .dy = dy, .rows = count, .dx = out(), .kind = kind});
    }
    try_out(purpose, SwiGluForward{.gate = x, .up = up, .rows = count, .y = out()});
    try_out(purpose, SwiGluBackward{.gate = x, .up = up, .dy = dy, .rows = count, .dgate = out(),
                                    .dup = out()});
    try_out(purpose, Add{.a = x, .b = up, .out = c.empty(rows, dtype)});
    try_out(purpose, AddBias{.x = x, .bias = c.normal({F}), .y = c.empty(rows, dtype)});
    try_out(purpose, BiasBackward{.dy = dy, .dbias = c.normal({F}), .accumulate = true});
  }
  Case c(3);
  for (int64_t half : {7, 8})
    try_out(purpose, Rope{.x = c.normal({20, 6 * half}, 1, dtype), .starts = c.bytes({20}, 0.2),
                          .y = c.empty({20, 6 * half}, dtype), .sequences = 4,
                          .head_width = 2 * half, .first_position = 3});
  try_out(purpose, Cast{.from = c.normal({1003}), .to = c.empty({1003}, dtype)});
  try_out(purpose, Sum{.x = c.normal({1003}), .sum = c.values({1}, {2}, DType::f64),
                       .accumulate = true});
  try_out(purpose, SumOfSquares{.x = c.normal({5003}), .sum = c.empty({1}, DType::f64)});
  try_out(purpose, AdamW{.gradient = c.normal({1003}), .verdict = c.values({2}, {0.5, 1}),
                         .value = c.normal({1003}), .m = c.normal({1003}),
                         .v = c.uniform({1003}, 0, 1), .step = 3});
}

void try_tables(Purpose purpose, DType dtype) {
  for (int64_t D : {13, 40}) {
    Case c(4);
    const Shape rows{57, D};
    const Tensor ids = c.integers({57}, 0, 10);
    try_out(purpose, EmbeddingForward{.ids = ids, .table = c.normal({11, D}, 1, dtype),
                                      .y = c.empty(rows, dtype)});
    try_out(purpose, EmbeddingBackward{.ids = ids, .dy = c.normal(rows, 1, dtype),
                                       .dtable = c.normal({11, D}), .accumulate = true});
    try_out(purpose, AddPositions{.x = c.normal(rows, 1, dtype),
                                  .table = c.normal({25, D}, 1, dtype),
                                  .y = c.empty(rows, dtype), .sequences = 3, .first_position = 6});
    try_out(purpose, PositionsBackward{.dy = c.normal(rows, 1, dtype), .dtable = c.empty({25, D}),
                                       .sequences = 3});
    HeadCrossEntropy head{.x = c.normal(rows, 1, dtype), .weight = c.normal({83, D}, 0.3, dtype),
                          .targets = c.integers({57}, -1, 82), .loss = c.empty({57})};
    try_out(purpose, head);
    head.dx = c.empty(rows, dtype), head.dweight = c.normal({83, D});
    head.scale = 0.25f, head.accumulate = true;
    try_out(purpose, head);
  }
}

void try_products(Purpose purpose, DType dtype) {
  Case c(5);
  constexpr std::array<int64_t, 3> kSizes[] = {{17, 9, 23}, {48, 64, 32}};
  for (auto [M, N, K] : kSizes) {
    const auto product = [&, M = M, N = N, K = K](bool a_transposed, bool b_transposed, DType out) {
      return Matmul{.a = c.normal(a_transposed ? Shape{K, M} : Shape{M, K}, 1, dtype),
                    .b = c.normal(b_transposed ? Shape{N, K} : Shape{K, N}, 1, dtype),
                    .out = c.normal({M, N}, 1, out), .a_transposed = a_transposed,
                    .b_transposed = b_transposed, .accumulate = out == DType::f32};
    };
    try_out(purpose, product(false, true, dtype));
    try_out(purpose, product(false, false, dtype));
    try_out(purpose, product(true, false, DType::f32));
    // Groups of no rows first, last and between; rows past the end, which stay.
    const Tensor offsets = c.values({8}, {0, 0, 3, 3, 20, 41, 41, 41}, DType::i32);
    const Tensor a = c.normal({45, K}, 1, dtype);
    for (bool transposed : {false, true})
      try_out(purpose, GroupedMatmul{.a = a,
                                     .b = c.normal(transposed ? Shape{7, N, K} : Shape{7, K, N}, 1,
                                                   dtype),
                                     .offsets = offsets, .out = c.zeros({45, N}, dtype),
                                     .b_transposed = transposed});
    for (bool accumulate : {false, true})
      try_out(purpose, GroupedOuter{.a = a, .b = c.normal({45, N}, 1, dtype), .offsets = offsets,
                                    .out = accumulate ? c.normal({7, K, N}) : c.empty({7, K, N}),
                                    .accumulate = accumulate});
  }
}

void try_attention(Purpose purpose, DType dtype) {
  constexpr std::array<int64_t, 5> kSizes[] = {{2, 37, 2, 1, 12}, {1, 70, 2, 2, 64}};
  for (auto [B, L, H, Hkv, dh] : kSizes) {
    Case c(6);
    const Shape rows{B * L, H * dh};
    AttentionForward f{.qkv = c.normal({B * L, (H + 2 * Hkv) * dh}),
                       .starts = c.bytes({B * L}, 0.05), .y = c.empty(rows),
                       .lse = c.empty({B * L, H}), .sequences = B, .heads = H, .kv_heads = Hkv};
    run_on_cpu(f);
    const Tensor qkv = c.copy_as(f.qkv, dtype);
    try_out(purpose, AttentionBackward{.qkv = qkv, .starts = f.starts, .y = c.copy_as(f.y, dtype),
                                       .lse = f.lse, .dy = c.normal(rows, 1, dtype),
                                       .dqkv = c.empty(qkv.shape, dtype), .sequences = B,
                                       .heads = H, .kv_heads = Hkv});
    f.qkv = qkv, f.y = c.empty(rows, dtype), f.lse = c.empty({B * L, H});
    try_out(purpose, f);
    f.lse = {};
    f.cache = c.normal({B, L + 5, 2 * Hkv * dh}, 1, dtype);
    f.first = c.integers({B}, 0, 4);
    f.filled = 4;
    try_out(purpose, f);
  }
}

// Leaves in `op.states` what its backward reads.
constexpr auto kRunScan = [](Stream& stream, const ScanBackward& op) {
  const Memory y(stream.device(), op.u.rows() * op.u.stride * size_of(op.u.dtype));
  Tensor there = op.u;
  there.data = y.data();
  run(stream, ScanForward{.u = op.u, .dt = op.dt, .dt_bias = op.dt_bias, .a_log = op.a_log,
                          .b = op.b, .c = op.c, .skip = op.skip, .z = op.z, .initial = op.initial,
                          .starts = op.starts, .y = there, .states = op.states,
                          .sequences = op.sequences});
  stream.synchronize();
};

void try_scans(Purpose purpose, DType dtype) {
  constexpr std::array<int64_t, 4> kSizes[] = {{2, 33, 17, 16}, {1, 130, 72, 5}, {2, 15, 8, 33}};
  for (auto [B, L, D, N] : kSizes) {
    Case c(7);
    const int64_t T = B * L;
    const auto real = [&](Shape shape) { return c.normal(shape, 1, dtype); };
    const auto result = [&](Shape shape) { return c.empty(shape, dtype); };
    const Tensor states = c.empty({scan_state_elements(B, L, D, N)});
    const ScanForward f{.u = real({T, D}), .dt = real({T, D}), .dt_bias = c.uniform({D}, -6, -2),
                        .a_log = c.uniform({D, N}, 0, 2.8), .b = real({T, N}), .c = real({T, N}),
                        .skip = c.normal({D}), .z = real({T, D}), .initial = c.normal({B, D, N}),
                        .starts = c.bytes({T}, 0.1), .y = result({T, D}), .states = states,
                        .final = c.empty({B, D, N}), .sequences = B};
    try_out(purpose, f);
    try_out(purpose,
            ScanBackward{.u = f.u, .dt = f.dt, .dt_bias = f.dt_bias, .a_log = f.a_log, .b = f.b,
                         .c = f.c, .skip = f.skip, .z = f.z, .initial = f.initial,
                         .starts = f.starts, .states = states, .dy = real({T, D}),
                         .dfinal = c.normal({B, D, N}), .du = result({T, D}),
                         .ddt = result({T, D}), .db = result({T, N}), .dc = result({T, N}),
                         .dz = result({T, D}), .da_log = c.normal({D, N}),
                         .ddt_bias = c.normal({D}), .dskip = c.normal({D}),
                         .dinitial = c.empty({B, D, N}), .sequences = B, .accumulate = true},
            kRunScan);
  }
}

void try_convolutions(Purpose purpose, DType dtype) {
  constexpr std::array<int64_t, 4> kSizes[] = {{2, 35, 17, 4}, {1, 67, 40, 4}, {3, 2, 24, 8}};
  for (auto [B, L, D, W] : kSizes) {
    Case c(8);
    const int64_t T = B * L;
    const Shape rows{T, D}, border{B, W - 1, D};
    const ConvForward f{.x = c.normal(rows, 1, dtype), .weight = c.normal({D, W}),
                        .bias = c.normal({D}), .initial = c.normal(border, 1, dtype),
                        .starts = c.bytes({T}, 0.15), .y = c.empty(rows, dtype),
                        .final = c.empty(border, dtype), .sequences = B};
    try_out(purpose, f);
    try_out(purpose, ConvBackward{.x = f.x, .weight = f.weight, .bias = f.bias,
                                  .initial = f.initial, .starts = f.starts,
                                  .dy = c.normal(rows, 1, dtype),
                                  .dfinal = c.normal(border, 1, dtype), .dx = c.empty(rows, dtype),
                                  .dweight = c.normal({D, W}), .dbias = c.normal({D}),
                                  .dinitial = c.empty(border, dtype), .sequences = B,
                                  .accumulate = true});
  }
}

// A capacity that drops rows, experts that nobody chooses.
void try_routing(Purpose purpose, DType dtype) {
  Case c(9);
  constexpr int64_t T = 42, E = 13, K = 2, G = 3;
  std::vector<double> liking(E, 0);
  liking[4] = liking[12] = -20;
  for (RouterKind kind : {RouterKind::softmax, RouterKind::sigmoid}) {
    const auto choices = [&](Shape shape) { return c.empty(shape, DType::i32); };
    const Route route{.logits = c.normal({T, E}, 2), .bias = c.values({E}, liking),
                      .probabilities = c.empty({T, E}), .expert = choices({T, K}),
                      .weight = c.empty({T, K}), .position = choices({T, K}),
                      .source = choices({T * K}), .offsets = choices({E + 1}),
                      .counts = choices({G, E}), .balance = c.empty({G}), .z = c.empty({G}),
                      .flag = choices({1}), .groups = G, .capacity_factor = 1,
                      .renormalise = true, .kind = kind};
    if (dtype == DType::f32) try_out(purpose, route);
    run_on_cpu(route);
    if (dtype == DType::f32) {
      try_out(purpose, RouteBackward{.logits = route.logits, .probabilities = route.probabilities,
                                     .expert = route.expert, .position = route.position,
                                     .counts = route.counts, .dweight = c.normal({T, K}),
                                     .dlogits = c.empty({T, E}), .groups = G, .renormalise = true,
                                     .kind = kind, .balance_scale = 0.7f, .z_scale = 0.05f});
      try_out(purpose, CollectRouting{.counts = route.counts, .offsets = route.offsets,
                                      .balance = route.balance, .z = route.z, .flag = route.flag,
                                      .choices = c.uniform({E}, 5, 5, DType::f64),
                                      .sums = c.values({4}, {1, 2, 3, 4}, DType::f64)});
    }
    for (int64_t D : {9, 32}) {
      const Shape rows{T * K, D}, tokens{T, D};
      const Tensor sorted = c.normal(rows, 1, dtype);
      try_out(purpose, Permute{.x = c.normal(tokens, 1, dtype), .source = route.source,
                               .offsets = route.offsets, .rows = c.zeros(rows, dtype),
                               .top_k = K});
      try_out(purpose, PermuteBackward{.drows = sorted, .position = route.position,
                                       .dx = c.normal(tokens, 1, dtype), .accumulate = true});
      try_out(purpose, Unpermute{.rows = sorted, .position = route.position,
                                 .weight = route.weight, .y = c.empty(tokens, dtype)});
      try_out(purpose, UnpermuteBackward{.dy = c.normal(tokens, 1, dtype), .rows = sorted,
                                         .position = route.position, .weight = route.weight,
                                         .drows = c.zeros(rows, dtype),
                                         .dweight = c.empty({T, K})});
    }
  }
}

void try_all(Purpose purpose) {
  if (gpu::devices().empty()) std::printf("no GPU: nothing is compared\n");
  for (DType dtype : {DType::f32, DType::bf16})
    for (auto family : {try_norms, try_pointwise, try_tables, try_products, try_attention,
                        try_scans, try_convolutions, try_routing})
      family(purpose, dtype);
}

TEST(CudaSanitizer, OperatorsKeepToTheirTensorsAndReadNothingUnwritten) {
  try_all(Purpose::compare);
}

// For initcheck: nothing was zeroed or poisoned, so that it knows what is unwritten.
TEST(CudaInitcheck, OperatorsReadNothingUnwritten) { try_all(Purpose::only_run); }

// The room `parallel` on the device; its ranks are threads that share the GPU.
TEST(CudaSanitizer, RowsTravelAndGradientsAreSummed) {
  const bool on_gpu = !gpu::devices().empty();
  const auto make = [&] { return on_gpu ? Stream::cuda() : Stream::immediate(); };
  const auto rows = [](int rank, int expert) { return expert == 2 ? 0 : (3 * rank + expert) % 5; };
  in_world(RankLayout(2, 2, 7), [&](ProcessGroups& groups) {
    Stream stream = make();
    there_and_back({2, 7, 9, 5, rows}, groups, stream);
    there_and_back({2, 7, 100, 32, rows}, groups, stream);
  });
  in_world(RankLayout(3, 1, 0), [&](ProcessGroups& groups) {
    Stream compute = make();
    Stream communication = on_gpu ? Stream::cuda() : Stream::worker();
    reduce_and_gather(*groups.data, compute, communication);
  });
  if (on_gpu) count_comparison();
}

struct GuardedTraining {
  TrainingResult result;
  std::string broken;
};

GuardedTraining train_guarded(const TrainingCase& c) {
  constexpr int64_t kTensors = 4096;  // at a time, at most
  GuardedTraining training;
  const TrainingHooks hooks{
      .wire = {},
      .start = [&](Trainer& trainer) {
        trainer.session().arena.guard(trainer.session().compute, kTensors);
      },
      .end = [&](Trainer& trainer) { training.broken = trainer.session().arena.broken_guard(); }};
  training.result = train(c, 1, 1, hooks);
  return training;
}

// Everything a step takes from the arena is NaN between red zones, and the step is the same.
TEST(CudaSanitizer, TrainingStaysWithinItsTensorsAndReadsNothingUnwritten) {
  const bool on_gpu = !gpu::devices().empty();
  for (const char* model :
       {"pattern: 'mamba, moe' capacity_factor: 1",
        "pattern: 'attention, feed_forward' pattern: 'mamba, moe' positions: ROPE heads: 4 "
        "mamba_norms: true norm: RMS_NORM final_norm: true expert_activation: SWIGLU "
        "feed_forward_activation: GELU reset_at_documents: true shared_hidden: 16"})
    for (const char* dtype : {"", " compute_dtype: BF16"}) {
      if (!on_gpu && dtype[0]) continue;
      const std::string text = concat(model, dtype);
      SCOPED_TRACE(text);
      const TrainingCase c{.experts = 7, .top_k = 2, .batch = 3, .micro_batch = 2, .length = 11,
                           .steps = 2, .device = on_gpu ? DeviceKind::cuda : DeviceKind::cpu,
                           .model = text.c_str()};
      const GuardedTraining guarded = train_guarded(c);
      const TrainingResult plain = train(c, 1, 1);
      EXPECT_EQ(guarded.broken, "");
      for (size_t k = 0; k < plain.records.size(); ++k) {
        EXPECT_TRUE(std::isfinite(guarded.result.records[k].loss)) << "step " << k;
        EXPECT_EQ(guarded.result.records[k].loss, plain.records[k].loss) << "step " << k;
        EXPECT_EQ(guarded.result.records[k].grad_norm, plain.records[k].grad_norm) << "step " << k;
      }
      if (on_gpu) count_comparison();
    }
}

}  // namespace
}  // namespace moemamba
