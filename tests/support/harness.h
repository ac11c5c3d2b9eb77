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

// An operator whose tensors are copies on another device. Tensors that begin at the same address
// stay one (an operator in place is copied in place); others must not overlap.
template <class Op>
class Replica {
 public:
  Replica(Stream& stream, const Op& op) : op_(op) {
    const auto copy_field = [&](auto field) { copy_tensor(stream, op.*field, op_.*field); };
    std::apply([&](auto... field) { (copy_field(field), ...); }, Op::reads());
    std::apply([&](auto... field) { (copy_field(field), ...); }, Op::writes());
    stream.synchronize();
  }
  const Op& op() const { return op_; }

 private:
  void copy_tensor(Stream& stream, const Tensor& from, Tensor& to) {
    if (!from) return;
    for (const auto& [original, replica] : copied_)
      if (original.data == from.data) {
        to.data = replica.data;
        return;
      }
    const int64_t elements = from.rows() * from.stride;
    buffers_.emplace_back(stream.device(), elements * size_of(from.dtype) + 1);
    to.data = buffers_.back().data();
    to.device = stream.device();
    copy(stream, from, to);
    copied_.emplace_back(from, to);
  }
  Op op_;
  std::deque<Buffer> buffers_;
  std::vector<std::pair<Tensor, Tensor>> copied_;
};

// The other backend's stream; nothing in a build or on a machine without it.
std::optional<Stream> other_backend();
// Adds to what the program's last line reports: "backend comparisons: N".
void count_comparison();
// A copy in the host's memory, owned by `keeper`.
Tensor to_host(Stream& stream, const Tensor& tensor, Case& keeper);

// Fail unless found holds what expected holds: within tolerance(dtype), integers exactly; or, the
// second, bit by bit. `where` is the place among the operator's writes().
void expect_agree(const char* op, int where, const Tensor& found, const Tensor& expected);
void expect_same_bits(const char* op, int where, const Tensor& found, const Tensor& expected);

// Runs op on both streams, on its own tensors and on copies of them, and hands every written pair
// to `compare`.
template <class Op, class Compare>
void compare_runs(const Op& op, Stream& first, Stream& second, Compare compare) {
  Case keeper(1);
  Replica<Op> replica(second, op);
  run(first, op);
  run(second, replica.op());
  first.synchronize();
  second.synchronize();
  int where = 0;
  const auto compare_field = [&](auto field) {
    if (op.*field)
      compare(Op::name, where, to_host(second, replica.op().*field, keeper), op.*field);
    ++where;
  };
  std::apply([&](auto... field) { (compare_field(field), ...); }, Op::writes());
}

// The proof that both backends mean the same. Runs `op` on the CPU, on its own tensors; where
// there is another backend, also there on copies, and compares all that was written.
template <class Op>
void expect_backends_agree(const Op& op) {
  Stream cpu = Stream::immediate();
  std::optional<Stream> other = other_backend();
  if (!other) return run(cpu, op);
  compare_runs(op, cpu, *other, expect_agree);
  count_comparison();
}

// The results of `op` are the same bits for one thread and for three.
template <class Op>
void expect_threads_agree(const Op& op) {
  Stream one = Stream::immediate(1), three = Stream::immediate(3);
  compare_runs(op, one, three, expect_same_bits);
}

}  // namespace moemamba
