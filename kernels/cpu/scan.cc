#include "kernels/cpu/scan.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/cpu/operands.h"
#include "kernels/cpu/simd/scan.h"

namespace moemamba {

static_assert(kScanSteps == kScanChunk);

namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Sizes {
  int64_t B, L, D, N;
};

// What forward and backward read; both have the same fields.
template <class Op>
Sizes check_inputs(const Op& op) {
  const auto [T, D] = dims<2>("u[T, D]", op.u);
  const auto [rows, N] = dims<2>("a_log[D, N]", op.a_log);
  const int64_t B = op.sequences;
  check(B >= 1 ? T % B == 0 : B == 0 && T == 0, "sequences must divide the T = ", T,
        " tokens, found ", B);
  check(N >= 1 && N <= kScanStates, "a_log[D, N]: N must be 1 .. ", kScanStates, ", found ", N);
  const DType dtype = op.u.dtype;
  expect_real("u[T, D]", op.u);
  expect("dt[T, D]", op.dt, {T, D}, dtype);
  expect("dt_bias[D]", op.dt_bias, {D});
  expect("a_log[D, N]", op.a_log, {D, N});
  expect("b[T, N]", op.b, {T, N}, dtype);
  expect("c[T, N]", op.c, {T, N}, dtype);
  expect("skip[D]", op.skip, {D});
  if (op.z) expect("z[T, D]", op.z, {T, D}, dtype);
  if (op.initial) expect("initial[B, D, N]", op.initial, {B, D, N});
  if (op.starts) expect("starts[T]", op.starts, {T}, DType::u8);
  return {B, B ? T / B : 0, D, N};
}

template <class Op>
ScanInputs inputs_of(const Op& op, int64_t blocks_of_group) {
  const int64_t D = op.u.cols(), blocks = ceil_div(D, kScanLanes);
  return {.L = op.sequences ? op.u.rows() / op.sequences : 0,
          .D = D,
          .N = op.a_log.cols(),
          .blocks = blocks,
          .groups = ceil_div(blocks, blocks_of_group),
          .u = source(op.u),
          .dt = source(op.dt),
          .b = source(op.b),
          .c = source(op.c),
          .z = source(op.z),
          .dt_bias = floats(op.dt_bias),
          .skip = floats(op.skip),
          .rates = nullptr,
          .initial = source(op.initial),
          .starts = static_cast<const uint8_t*>(op.starts.data)};
}

// Cuts one block of memory into parts that begin on 64-byte borders.
class Cutter {
 public:
  explicit Cutter(std::byte* memory = nullptr) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    std::byte* part = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += size_t(ceil_div(count * int64_t(sizeof(T)), 64) * 64);
    return reinterpret_cast<T*>(part);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  size_t bytes_ = 0;
};

int64_t rate_floats(const ScanInputs& in) {
  return in.blocks * (in.N + 1) * kScanLanes;
}

void compute_rates(Stream& stream, const ScanKernels& kernels, const ScanInputs& in,
                   const Tensor& a_log, float* rates) {
  stream.parallel_for(in.blocks, [&](int64_t block) {
    kernels.rates(source(a_log), in.D, in.N, block, rates + block * (in.N + 1) * kScanLanes);
  });
}

// Calls body(task, worker) for all tasks, each worker one at a time, so that it has its scratch to
// itself. Which worker takes which task does not matter.
template <class Body>
void share_tasks(Stream& stream, int64_t tasks, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  stream.parallel_for(workers, [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, worker);
  });
}

struct BackwardMemory {
  float *rates, *sums, *db, *dc;  // db and dc: [groups, T, N], where there are several groups
  ScanBackwardScratch* scratch;

  BackwardMemory(Cutter& cutter, const ScanInputs& in, int64_t B, int64_t workers) {
    const int64_t partial = in.groups > 1 ? in.groups * B * in.L * in.N : 0;
    rates = cutter.take<float>(rate_floats(in));
    sums = cutter.take<float>(B * in.blocks * (in.N + 2) * kScanLanes);
    db = cutter.take<float>(partial);
    dc = cutter.take<float>(partial);
    scratch = cutter.take<ScanBackwardScratch>(workers);
  }
};

// db and dc from the groups' parts, in the groups' order.
void sum_groups(Stream& stream, const ScanBackward& op, const ScanBackwardCall& call) {
  const int64_t T = op.u.rows(), N = call.in.N;
  constexpr int64_t kTokens = 256;
  const auto sum = [&](const Target& parts, const Tensor& out, int64_t token) {
    float* row = out.row<float>(token);
    for (int64_t n = 0; n < N; ++n) row[n] = parts.data[token * N + n];
    for (int64_t group = 1; group < call.in.groups; ++group) {
      const float* part = parts.data + group * call.group_step + token * N;
      for (int64_t n = 0; n < N; ++n) row[n] += part[n];
    }
  };
  stream.parallel_for(ceil_div(T, kTokens), [&](int64_t i) {
    for (int64_t token = i * kTokens; token < std::min(T, (i + 1) * kTokens); ++token) {
      sum(call.db, op.db, token);
      sum(call.dc, op.dc, token);
    }
  });
}

// da_log, dskip and ddt_bias of one block, from the sequences' sums, in the sequences' order.
void sum_sequences(const ScanBackward& op, const ScanBackwardCall& call, int64_t block) {
  const ScanInputs& in = call.in;
  const int64_t rows = in.N + 2, first = block * kScanLanes;
  const int64_t lanes = std::min<int64_t>(kScanLanes, in.D - first);
  const auto write = [&](float& to, float value) { to = op.accumulate ? to + value : value; };
  for (int64_t row = 0; row < rows; ++row) {
    float sum[kScanLanes] = {};
    for (int64_t sequence = 0; sequence < op.sequences; ++sequence) {
      const float* part = call.sums + ((sequence * in.blocks + block) * rows + row) * kScanLanes;
      for (int lane = 0; lane < kScanLanes; ++lane) sum[lane] += part[lane];
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t d = first + lane;
      if (row == in.N)
        write(floats(op.dskip)[d], sum[lane]);
      else if (row > in.N)
        write(floats(op.ddt_bias)[d], sum[lane]);
      else
        write(op.da_log.row<float>(d)[row], -std::exp(op.a_log.row<float>(d)[row]) * sum[lane]);
    }
  }
}

}  // namespace

const ScanKernels& scan_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::scan_kernels : avx2::scan_kernels;
}

int64_t scan_state_elements(int64_t B, int64_t L, int64_t D, int64_t N, DeviceKind device) {
  if (device == DeviceKind::cpu)
    return B * ceil_div(L, kScanChunk) * ceil_div(D, kScanLanes) * kScanLanes * N;
  int64_t padded = 8;
  while (padded < N) padded *= 2;
  return B * ceil_div(L, kScanTile) * ceil_div(D, 1024 / padded) * 1024;
}

int64_t ScanForward::private_elements(DeviceKind device) const {
  const int64_t L = sequences ? u.rows() / sequences : 0;
  return scan_state_elements(sequences, L, u.cols(), a_log.cols(), device);
}

int64_t ScanBackward::private_elements(DeviceKind device) const {
  const int64_t L = sequences ? u.rows() / sequences : 0;
  return scan_state_elements(sequences, L, u.cols(), a_log.cols(), device);
}

void ScanForward::check() const {
  const Sizes s = check_inputs(*this);
  expect("y[T, D]", y, {s.B * s.L, s.D}, u.dtype);
  if (initial) expect("initial[B, D, N]", initial, {s.B, s.D, s.N});
  if (states)
    expect("states[scan_state_elements()]", states, {private_elements(states.device)});
  if (final) expect("final[B, D, N]", final, {s.B, s.D, s.N});
}

void ScanBackward::check() const {
  const Sizes s = check_inputs(*this);
  const int64_t T = s.B * s.L;
  expect("states[scan_state_elements()]", states, {private_elements(states.device)});
  expect("dy[T, D]", dy, {T, s.D}, u.dtype);
  if (initial) expect("initial[B, D, N]", initial, {s.B, s.D, s.N});
  if (dfinal) expect("dfinal[B, D, N]", dfinal, {s.B, s.D, s.N});
  expect("du[T, D]", du, {T, s.D}, u.dtype);
  expect("ddt[T, D]", ddt, {T, s.D}, u.dtype);
  expect("db[T, N]", db, {T, s.N}, u.dtype);
  expect("dc[T, N]", dc, {T, s.N}, u.dtype);
  if (z) expect("dz[T, D], needed with z", dz, {T, s.D}, u.dtype);
  expect("da_log[D, N]", da_log, {s.D, s.N});
  expect("ddt_bias[D]", ddt_bias, {s.D});
  expect("dskip[D]", dskip, {s.D});
  if (dinitial) expect("dinitial[B, D, N]", dinitial, {s.B, s.D, s.N});
}

void run_cpu(Stream& stream, const ScanForward& op, SimdLevel level) {
  const ScanKernels& kernels = scan_kernels(level);
  // A row's memory is passed through best in large groups; no result depends on them.
  const int64_t tasks_wanted = 4 * stream.threads(), blocks = ceil_div(op.u.cols(), kScanLanes);
  const int64_t share = blocks * op.sequences / tasks_wanted;
  ScanForwardCall call{.in = inputs_of(op, std::clamp<int64_t>(share, 4, kScanForwardBlocks)),
                       .y = target(op.y),
                       .states = floats(op.states),
                       .final = target(op.final)};
  const int64_t tasks = op.sequences * call.in.groups;
  const int64_t workers = std::min<int64_t>(stream.threads(), tasks);
  Cutter count;
  count.take<float>(rate_floats(call.in));
  count.take<ScanForwardScratch>(workers);
  Cutter cutter(stream.workspace(count.bytes()));
  float* rates = cutter.take<float>(rate_floats(call.in));
  auto* scratch = cutter.take<ScanForwardScratch>(workers);
  compute_rates(stream, kernels, call.in, op.a_log, rates);
  call.in.rates = rates;
  share_tasks(stream, tasks, workers, [&](int64_t task, int64_t worker) {
    kernels.forward(call, task / call.in.groups, task % call.in.groups, scratch[worker]);
  });
}

void run_cpu(Stream& stream, const ScanBackward& op, SimdLevel level) {
  const ScanKernels& kernels = scan_kernels(level);
  ScanBackwardCall call{.in = inputs_of(op, kScanBlocks),
                        .dy = source(op.dy),
                        .states = floats(op.states),
                        .dfinal = source(op.dfinal),
                        .du = target(op.du),
                        .ddt = target(op.ddt),
                        .dz = target(op.dz),
                        .db = target(op.db),
                        .dc = target(op.dc),
                        .group_step = 0,
                        .sums = nullptr,
                        .dinitial = target(op.dinitial)};
  const int64_t B = op.sequences, groups = call.in.groups, tasks = B * groups;
  const int64_t workers = std::min<int64_t>(stream.threads(), tasks);
  Cutter count;
  BackwardMemory(count, call.in, B, workers);
  Cutter cutter(stream.workspace(count.bytes()));
  const BackwardMemory memory(cutter, call.in, B, workers);
  if (groups > 1) {
    call.db = {memory.db, call.in.N};
    call.dc = {memory.dc, call.in.N};
    call.group_step = op.u.rows() * call.in.N;
  }
  call.sums = memory.sums;
  compute_rates(stream, kernels, call.in, op.a_log, memory.rates);
  call.in.rates = memory.rates;
  share_tasks(stream, tasks, workers, [&](int64_t task, int64_t worker) {
    kernels.backward(call, task / groups, task % groups, memory.scratch[worker]);
  });
  if (groups > 1) sum_groups(stream, op, call);
  stream.parallel_for(call.in.blocks, [&](int64_t block) { sum_sequences(op, call, block); });
}

void run_cpu(Stream& stream, const ScanForward& op) {
  run_cpu(stream, op, simd_level());
}
void run_cpu(Stream& stream, const ScanBackward& op) {
  run_cpu(stream, op, simd_level());
}

}  // namespace moemamba
