#include "runtime/session.h"

#include <algorithm>
#include <cmath>

#include "model/gpu_limits.h"

namespace moemamba {

namespace {

// of_cpu: makes the kind of stream that a CPU has for the purpose.
Stream stream_on(DeviceKind device, Session::Memory memory, FunctionRef<Stream()> of_cpu) {
  if (memory == Session::Memory::planned_training) return Stream::dry(device);
  return device == DeviceKind::cuda ? Stream::cuda() : of_cpu();
}

// Before any memory is taken, and before a plan says that it fits.
ProcessGroups& checked(ProcessGroups& groups, const ModelSizes& sizes) {
  if (groups.device == DeviceKind::cuda) check_gpu_limits(sizes);
  return groups;
}

}  // namespace

int64_t exchange_capacity(const ModelSizes& sizes, int64_t tokens, double factor, int group) {
  const int64_t share = std::max<int64_t>(1, tokens * std::max<int64_t>(1, sizes.K));
  const double rows = std::ceil(factor * double(share));
  return int64_t(std::clamp(rows, 1.0, double(share) * group));
}

BatchShare share_of_batch(int64_t global_batch, int64_t routing_group, int64_t micro_batch,
                          int rank, int ranks) {
  check(global_batch % routing_group == 0, "train.global_batch_size: ", global_batch,
        " is not a multiple of train.routing_group ", routing_group);
  check(micro_batch % routing_group == 0, "train.micro_batch_size: ", micro_batch,
        " is not a multiple of train.routing_group ", routing_group);
  const int64_t groups = global_batch / routing_group;
  const int64_t first = groups * rank / ranks, last = groups * (rank + 1) / ranks;
  const int64_t most = (groups + ranks - 1) / ranks * routing_group;
  BatchShare share;
  share.first = first * routing_group;
  share.count = (last - first) * routing_group;
  share.micro_batch = micro_batch > 0 ? std::min(micro_batch, most) : most;
  share.micro_batches = (most + share.micro_batch - 1) / share.micro_batch;
  return share;
}

std::string idle_ranks_warning(int64_t global_batch, int64_t routing_group, int ranks) {
  const int64_t groups = global_batch / routing_group;
  if (groups >= ranks) return "";
  return concat(ranks - groups, " of ", ranks, ranks - groups == 1 ? " ranks has" : " ranks have",
                " no sequences: train.global_batch_size ", global_batch, " is ", groups,
                " x train.routing_group ", routing_group, ", and a group stays on one rank; set ",
                "train.global_batch_size to ", routing_group * ranks, " or lower ",
                "train.routing_group");
}

Session::Session(ProcessGroups& groups, const ModelSizes& sizes, int threads, int64_t sequences,
                 int64_t length, double exchange_rows, Memory memory)
    : groups(checked(groups, sizes)),
      compute(stream_on(groups.device, memory, [&] { return Stream::immediate(threads); })),
      communication(stream_on(groups.device, memory, [] { return Stream::worker(); })),
      host(Stream::immediate()),
      store(groups, sizes.compute),
      model(sizes, store, groups.layout, groups.rank),
      saved(model.make_saved()),
      sequences(sequences),
      length(length),
      exchange(*groups.expert, groups.layout,
               exchange_capacity(sizes, sequences * length, exchange_rows, groups.expert->size()),
               std::max<int64_t>(1, sequences * length * std::max<int64_t>(1, sizes.K)),
               groups.device),
      arena(Arena::measure("activation", groups.device)) {
  if (groups.device == DeviceKind::cuda && memory != Memory::planned_training)
    for (Stream* stream : {&compute, &communication}) stream->watch([&groups] { groups.poll(); });
  store.allocate(memory);
  activation_bytes = measure(memory != Memory::values);
  if (memory != Memory::planned_training)
    arena = Arena("activation", groups.device, activation_bytes);
}

Step Session::begin(int64_t sequences, int64_t routing_group) {
  arena.give_back(0);
  return Step{.stream = compute,
              .arena = arena,
              .exchange = &exchange,
              .sequences = sequences,
              .routing_groups = std::max<int64_t>(1, sequences / routing_group),
              .activity = groups.activity};
}

Tensor Session::upload(Step& step, const Tensor& host) {
  if (groups.device == DeviceKind::cpu) return host;
  const Tensor there = step.arena.take(host.shape, host.dtype, "tokens");
  copy(step.stream, host, there);
  return there;
}

int64_t Session::measure(bool training) {
  Stream dry = Stream::dry(groups.device);
  // Every sequence a routing group of its own: the most that the router's tables can take.
  Step step{.stream = dry,
            .arena = arena,
            .exchange = &exchange,
            .sequences = sequences,
            .routing_groups = std::max<int64_t>(1, sequences)};
  const int64_t T = sequences * length;
  const Tensor ids = arena.take({T}, DType::i32);
  step.starts = arena.take({T}, DType::u8);
  // A trainer has buffers for these, and so has the host; upload() takes them, and the targets.
  if (training || groups.device == DeviceKind::cpu)
    arena.give_back(0);
  else
    arena.take({T}, DType::i32);
  const Tensor loss = arena.take({T});
  model.forward(step, ids, saved, nullptr);
  model.loss(step, ids, loss, 1, training, saved);
  if (training) model.backward(step, ids, saved, nullptr);
  return arena.peak();
}

}  // namespace moemamba
