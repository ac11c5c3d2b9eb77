#pragma once
#include <tuple>

#include "core/device.h"

namespace moemamba {

namespace detail {
// Every tensor lies where the stream works; the CPU computes in f32.
template <class Op>
void check_places(const Stream& stream, const Op& op) {
  const DeviceKind device = stream.device();
  int at = 0;
  const auto look = [&](auto field) {
    const Tensor& tensor = op.*field;
    ++at;
    if (!tensor) return;
    check(tensor.device == device, Op::name, ": tensor ", at, " of reads and writes is on the ",
          device == DeviceKind::cpu ? "GPU" : "CPU", ", where this stream cannot work");
    check(device != DeviceKind::cpu || tensor.dtype != DType::bf16, Op::name,
          ": the CPU computes in f32, found a bf16 tensor; use --model.compute_dtype=F32");
  };
  std::apply([&](auto... field) { (look(field), ...); }, Op::reads());
  std::apply([&](auto... field) { (look(field), ...); }, Op::writes());
}
}  // namespace detail

// Enqueues an operator: checks its contract, then hands it to the stream's backend. The only
// dispatch between devices in the house. An operator is a struct of tensors and options with
//   static constexpr auto name;  reads();  writes();  void check() const;
// and, found beside it, a run_cpu(Stream&, const Op&) and a run_cuda() that a build with CUDA has.
// On a dry stream only the contract is checked. Tensors are read when the operator runs; on the
// CPU's compute stream that is at once.
template <class Op>
void run(Stream& stream, const Op& op) {
  op.check();
  if (stream.is_dry()) return;
  detail::check_places(stream, op);
  const Observed observed(stream, op.name);
#ifdef MOEMAMBA_CUDA
  if (stream.device() == DeviceKind::cuda) return run_cuda(stream, op);
#endif
  run_cpu(stream, op);
}

}  // namespace moemamba
