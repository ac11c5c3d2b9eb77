#pragma once
#include <deque>
#include <string>
#include <vector>

#include "parallel/gradient_buckets.h"
#include "parallel/groups.h"

namespace moemamba {

// The distribution of a tensor's first values (reference: docs/operators.md, "initial values").
struct Initial {
  enum class Kind : uint8_t {
    constant,
    uniform,
    truncated_normal,
    log_arange,
    inverse_softplus_dt
  };
  Kind kind = Kind::constant;
  // constant: a. uniform: +-a. truncated_normal: deviation a, cut at +-b. log_arange: ln(1 .. last
  // extent) in every row. inverse_softplus_dt: softplus^-1(exp(U(ln 0.001, ln 0.1))).
  double a = 0, b = 0;
};

enum class Axis : uint8_t { data, expert_data };  // the ranks that its gradient is summed over

// One named tensor, or one per expert of this rank (then the first extent counts them and the name
// holds "{}" for the expert's global number).
struct Parameter {
  std::string name;
  Shape shape;
  Initial initial;
  Axis axis = Axis::data;
  int bucket = 0;
  int64_t offset = 0;  // within its bucket, in elements
  Tensor value;        // f32 view of the flat buffer
  Tensor compute;      // what products and look-ups read: `value`, or its copy in bf16
  Tensor gradient;     // f32 view; valid for the whole micro-batch loop
};

// A global tensor of which this rank holds all elements (or all elements of its own experts).
struct NamedTensor {
  std::string name;
  Tensor value;
};

// Elements [begin, end) of a parameter that this rank owns; they begin at element `at` of the
// moments of its bucket.
struct OwnedSlice {
  const Parameter* parameter;
  int64_t begin, end, at;
};

// Owns values, gradients and moments in flat buffers cut into named slices, in buckets in block
// order: one bucket for each (block, axis). Every rank owns 1/N of every padded bucket (ZeRO-1).
class ParameterStore {
 public:
  // compute: bf16 keeps a copy of all values in it, for products. Memory is of groups.device.
  explicit ParameterStore(const ProcessGroups& groups, DType compute = DType::f32)
      : groups_(groups), compute_(compute) {}

  // Parameters are added in forward order, bucket by bucket, then allocated once.
  void begin_block(const std::string& name);
  const Parameter* add(const std::string& name, Shape shape, Initial initial,
                       Axis axis = Axis::data);
  // A tensor that steps change but no gradient does: kept beside the buckets, alike on all ranks,
  // zero at first, stored with the weights.
  const Parameter* add_state(const std::string& name, Shape shape);
  enum class Memory : uint8_t {
    training,          // values, gradients, moments
    values,            // those alone
    planned_training,  // addresses without memory, for dry streams; sizes as of training
  };
  void allocate(Memory memory = Memory::training);

  // Where there is a copy of the values in bf16: all of it is old from here on.
  void values_changed();
  // Makes the bucket's copy anew if it is old; behind the stream's earlier work.
  void refresh_compute(Stream& stream, int bucket);

  int bucket_of_block(int block, Axis axis) const;  // -1: the block has no such parameters
  int blocks() const { return int(blocks_.size()); }
  std::vector<GradientBuckets::Bucket> buckets() const;
  Tensor moments(int bucket, int which) const;  // [P / N] of this rank; which: 0 = m, 1 = v
  const std::deque<Parameter>& parameters() const { return parameters_; }  // those with gradients
  const std::deque<Parameter>& states() const { return states_; }
  struct Bytes {
    int64_t values = 0, gradients = 0, moments = 0;
  };
  Bytes bytes() const;  // of this rank, padding included

  // Fills this rank's values: a pure function of (seed, global name, index).
  void initialise(uint64_t seed, int threads = 1);
  // Tensors under global names; experts one by one. `all`: what this rank holds.
  std::vector<NamedTensor> named_tensors() const;
  // Over all ranks every element of every parameter once. In order of the parameters.
  std::vector<OwnedSlice> owned_slices() const;
  // Of this rank's `local` expert of a parameter that holds one tensor per expert.
  std::string expert_name(const Parameter& parameter, int64_t local) const;
  const ProcessGroups& groups() const { return groups_; }

 private:
  struct Bucket {
    std::string name;
    Axis axis;
    int64_t elements = 0, padded = 0;
    Buffer value, compute, gradient, m, v;
    bool stale = true;  // `compute` is older than `value`
  };
  struct Block {
    std::string name;
    int bucket[2] = {-1, -1};
  };
  Communicator& group(Axis axis) const {
    return axis == Axis::data ? *groups_.data : *groups_.expert_data;
  }
  const ProcessGroups& groups_;
  const DType compute_;
  std::deque<Parameter> parameters_, states_;
  std::vector<Buffer> state_values_;
  std::vector<Bucket> buckets_;
  std::vector<Block> blocks_;
};

// Fills `value` with the first values of the tensor called `name`, from its row `first_row` on.
void initialise(const Tensor& value, const Initial& initial, uint64_t seed,
                const std::string& name, int64_t first_row = 0);

}  // namespace moemamba
