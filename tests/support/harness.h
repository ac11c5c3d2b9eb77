#pragma once
#include <cstring>
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "kernels/run.h"
#include "tests/support/cases.h"

namespace moemamba {

// Central differences in double, of fourth order: the gradient of f at x, to about 1e-9 of f's
// size where f is smooth within 2e-4 of x.
std::vector<double> numeric_gradient(std::function<double(const std::vector<double>&)> f,
                                     std::vector<double> x);

// The sum of values[i] * weights[i]: makes one number of an output, whose gradient is `weights`.
double weighted_sum(const std::vector<double>& values, const std::vector<double>& weights);

// Fails unless `analytic` (of a definition, in double) is numeric_gradient(f, x) within 1e-7.
void expect_gradient(const char* what, const std::vector<double>& analytic,
                     std::function<double(const std::vector<double>&)> f,
                     const std::vector<double>& x);

// Whether the layout of this tensor belongs to the backend: Op::privates() names it.
template <class Op>
bool is_private([[maybe_unused]] Tensor Op::*field) {
  if constexpr (requires { Op::privates(); })
    return std::apply([&](auto... own) { return ((own == field) || ...); }, Op::privates());
  return false;
}

// An operator whose tensors are copies on another device. Tensors that begin at the same address
// stay one (an operator in place is copied in place); others must not overlap. bf16 tensors become
// f32 ones with the same values where the stream is the CPU's, which computes in f32. What belongs
// to a backend is not copied to another: there it has the size that is wanted there, and zeros.
template <class Op>
class Replica {
 public:
  Replica(Stream& stream, const Op& op) : op_(op) {
    const auto copy_field = [&](auto field) {
      if (is_private<Op>(field) && (op.*field).device != stream.device())
        make_private(stream, op.*field, op_.*field);
      else
        copy_tensor(stream, op.*field, op_.*field);
    };
    std::apply([&](auto... field) { (copy_field(field), ...); }, Op::reads());
    std::apply([&](auto... field) { (copy_field(field), ...); }, Op::writes());
    stream.synchronize();
  }
  const Op& op() const { return op_; }

 private:
  void make_private(Stream& stream, const Tensor& from, Tensor& to) {
    if (!from) return;
    if constexpr (requires { Op::privates(); }) {
      const int64_t elements = op_.private_elements(stream.device());
      buffers_.emplace_back(stream.device(), elements * size_of(from.dtype) + 1);
      to = view(buffers_.back(), 0, {elements}, from.dtype);
    }
  }
  void copy_tensor(Stream& stream, const Tensor& from, Tensor& to) {
    if (!from) return;
    const bool widens = from.dtype == DType::bf16 && stream.device() == DeviceKind::cpu;
    if (widens) to.dtype = DType::f32;
    to.device = stream.device();
    for (const auto& [original, replica] : copied_)
      if (original.data == from.data) {
        to.data = replica.data;
        return;
      }
    const int64_t elements = from.rows() * from.stride;
    buffers_.emplace_back(stream.device(), elements * size_of(to.dtype) + 1);
    to.data = buffers_.back().data();
    if (widens)
      from_doubles(to_doubles(from), to);
    else
      copy(stream, from, to);
    copied_.emplace_back(from, to);
  }
  Op op_;
  std::deque<Buffer> buffers_;
  std::vector<std::pair<Tensor, Tensor>> copied_;
};

// Whether any tensor of `op` is bf16.
template <class Op>
bool has_bf16(const Op& op) {
  bool found = false;
  const auto look = [&](auto field) { found |= (op.*field).dtype == DType::bf16; };
  std::apply([&](auto... field) { (look(field), ...); }, Op::reads());
  std::apply([&](auto... field) { (look(field), ...); }, Op::writes());
  return found;
}

// The other backend's stream; nothing in a build or on a machine without it.
std::optional<Stream> other_backend();
// Adds to what the program's last line reports: "backend comparisons: N".
void count_comparison();
// A copy in the host's memory, owned by `keeper`.
Tensor to_host(Stream& stream, const Tensor& tensor, Case& keeper);

// Fail unless found holds what expected holds: within `bound` of the norm, integers exactly; or,
// the second, bit by bit. `where` is the place among the operator's writes().
void expect_agree(const char* op, int where, const Tensor& found, const Tensor& expected,
                  double bound);
void expect_same_bits(const char* op, int where, const Tensor& found, const Tensor& expected);

// Hands every pair of tensors that `first` and `second`, copies of one operator, have written to
// `compare`, both as copies in the host's memory; but not what belongs to different backends.
template <class Op, class Compare>
void compare_written(Stream& stream, const Op& first, Stream& other, const Op& second,
                     Compare compare) {
  Case keeper(1);
  int where = 0;
  const auto compare_field = [&](auto field) {
    const bool apart = (first.*field).device != (second.*field).device;
    if (first.*field && !(apart && is_private<Op>(field)))
      compare(Op::name, where, to_host(other, second.*field, keeper),
              to_host(stream, first.*field, keeper));
    ++where;
  };
  std::apply([&](auto... field) { (compare_field(field), ...); }, Op::writes());
}

// Runs op on both streams, on its own tensors and on copies of them, and hands every written pair
// to `compare`.
template <class Op, class Compare>
void compare_runs(const Op& op, Stream& first, Stream& second, Compare compare) {
  Replica<Op> replica(second, op);
  run(first, op);
  run(second, replica.op());
  first.synchronize();
  second.synchronize();
  compare_written(first, op, second, replica.op(), compare);
}

// The proof that both backends mean the same. Runs `op` on the CPU, on its own tensors (on f32
// copies where some are bf16); where there is another backend, also there on copies, and compares
// all that was written: within the tolerance of f32, or of bf16 if any tensor is that. There it
// runs twice, and the second run must give the same bits.
// bound: instead of the table's tolerance, where an operator's page says so.
// prepare(stream, copy) runs before each: makes what a backend leaves for itself (privates()).
template <class Op, class Prepare = void (*)(Stream&, const Op&)>
void expect_backends_agree(
    const Op& op, double bound = 0, Prepare prepare = [](Stream&, const Op&) {}) {
  Stream cpu = Stream::immediate();
  std::optional<Stream> other = other_backend();
  if (bound == 0) bound = tolerance(has_bf16(op) ? DType::bf16 : DType::f32);
  std::optional<Replica<Op>> first, second, widened;
  if (other) first.emplace(*other, op), second.emplace(*other, op);
  if (has_bf16(op)) widened.emplace(cpu, op);
  const Op& reference = widened ? widened->op() : op;
  prepare(cpu, reference);
  run(cpu, reference);
  if (!other) return;
  for (const Op* copy : {&first->op(), &second->op()}) {
    prepare(*other, *copy);
    run(*other, *copy);
  }
  other->synchronize();
  compare_written(cpu, reference, *other, first->op(),
                  [&](const char* name, int where, const Tensor& found, const Tensor& expected) {
                    expect_agree(name, where, found, expected, bound);
                  });
  compare_written(*other, first->op(), *other, second->op(), expect_same_bits);
  count_comparison();
}

// The results of `op` are the same bits for one thread and for three.
template <class Op>
void expect_threads_agree(const Op& op) {
  Stream one = Stream::immediate(1), three = Stream::immediate(3);
  compare_runs(op, one, three, expect_same_bits);
}

}  // namespace moemamba
