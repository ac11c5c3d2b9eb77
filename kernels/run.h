#pragma once
#include <tuple>

#include "core/device.h"

namespace moemamba {

// Enqueues an operator: checks its contract, then hands it to the stream's backend. The only
// dispatch between devices in the house. An operator is a struct of tensors and options with
//   static constexpr auto name;  reads();  writes();  void check() const;
// and a run_cpu(Stream&, const Op&) found beside it. On a dry stream only the contract is checked.
// Tensors are read when the operator runs; on the CPU's compute stream that is at once.
template <class Op>
void run(Stream& stream, const Op& op) {
  op.check();
  if (stream.is_dry()) return;
  const Observed observed(stream, op.name);
  run_cpu(stream, op);
}

}  // namespace moemamba
