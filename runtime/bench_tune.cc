#include "runtime/bench_tune.h"

#include <ostream>

#include "kernels/matmul_tuning.h"

namespace moemamba {

void bench_tune(ProcessGroups& groups, const TrainerOptions& options, std::ostream& out) {
  check(groups.device == DeviceKind::cuda,
        "bench tune: algorithms are tuned on the GPU that will run them, and this is the CPU");
  std::vector<TuningCase> products;
  {
    Trainer trainer(groups, options);  // its memory is free again for the tuner
    trainer.step(0);
    trainer.session().compute.synchronize();
    products = products_met(trainer.session().compute);
  }
  if (groups.rank != 0) return;
  out << "// " << products.size() << " products of a step\n";
  out.flush();
  Stream stream = Stream::cuda();
  tune_matmul(stream, products, out);
}

}  // namespace moemamba
