#pragma once
#include "model/language_model.h"
#include "model/optimizer.h"

namespace moemamba {  // letters: B sequences, L length, C exchange rows

// One rank's model and where it runs: streams, parameters, the exchange of expert rows, and the
// arena of its activations, sized by a dry run of the very code that will use it.
struct Session {
  // sequences, length: of the largest micro-batch. planned_training: everything has its size and
  // nothing has memory.
  using Memory = ParameterStore::Memory;
  Session(ProcessGroups& groups, const ModelSizes& sizes, int threads, int64_t sequences,
          int64_t length, double exchange_rows, Memory memory);

  // An empty step of `sequences` sequences over the arena, whose memory is free again.
  Step begin(int64_t sequences, int64_t routing_group);
  // A host's tensor where the step's stream works, in memory of the arena: itself on the CPU.
  Tensor upload(Step& step, const Tensor& host);

  ProcessGroups& groups;
  Stream compute, communication;
  Stream host;  // runs at once: what `control` has to say, between tensors of the host
  ParameterStore store;
  LanguageModel model;
  LanguageModel::Saved saved;
  int64_t sequences, length;
  ExpertExchange exchange;
  int64_t activation_bytes;  // what the arena holds, or would
  Arena arena;  // planned: the one that measured

 private:
  int64_t measure(bool training);
};

// Rows that one chunk of the exchange holds: `factor` times the even share of a micro-batch, at
// most all rows of the group.
int64_t exchange_capacity(const ModelSizes& sizes, int64_t tokens, double factor, int group);

// The sequences of one rank of a step: whole routing groups, shares differ by at most one group;
// all ranks run equally many micro-batches, empty ones included (house.md, decision 3).
struct BatchShare {
  int64_t first, count;   // sequences of the global batch
  int64_t micro_batch;    // sequences of one micro-batch at most
  int64_t micro_batches;  // on every rank
};
BatchShare share_of_batch(int64_t global_batch, int64_t routing_group, int64_t micro_batch,
                          int rank, int ranks);

// What to say where a step has fewer routing groups than there are ranks, some of which then only
// serve their experts; empty where every rank has sequences.
std::string idle_ranks_warning(int64_t global_batch, int64_t routing_group, int ranks);

}  // namespace moemamba
