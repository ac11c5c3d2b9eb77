#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: T rows (or tokens), F columns, P elements of a flat buffer
                      // [T, F] tensors: f32 or bf16, all of one operator alike

enum class Activation : uint8_t { relu, gelu, silu };  // gelu: the exact one, with erf

// y = act(x). Only the first `rows` rows where `rows` is given; the others are not touched.
struct ActivationForward {
  static constexpr auto name = "activation_forward";
  Tensor x;     // [T, F] read
  Tensor rows;  // [1] i32 read, optional: how many rows count
  Tensor y;     // [T, F] written; may be x
  Activation kind = Activation::relu;
  static constexpr auto reads() {
    return std::tuple(&ActivationForward::x, &ActivationForward::rows);
  }
  static constexpr auto writes() { return std::tuple(&ActivationForward::y); }
  void check() const;
};

// dx = dy * act'(x).
struct ActivationBackward {
  static constexpr auto name = "activation_backward";
  Tensor x;     // [T, F] read, as in forward
  Tensor dy;    // [T, F] read
  Tensor rows;  // [1] i32 read, optional
  Tensor dx;    // [T, F] written; may be dy
  Activation kind = Activation::relu;
  static constexpr auto reads() {
    return std::tuple(&ActivationBackward::x, &ActivationBackward::dy, &ActivationBackward::rows);
  }
  static constexpr auto writes() { return std::tuple(&ActivationBackward::dx); }
  void check() const;
};

// y = silu(gate) * up (SwiGLU's product; also Mamba's gate with up = y, gate = z).
struct SwiGluForward {
  static constexpr auto name = "swiglu_forward";
  Tensor gate;  // [T, F] read
  Tensor up;    // [T, F] read
  Tensor rows;  // [1] i32 read, optional
  Tensor y;     // [T, F] written
  static constexpr auto reads() {
    return std::tuple(&SwiGluForward::gate, &SwiGluForward::up, &SwiGluForward::rows);
  }
  static constexpr auto writes() { return std::tuple(&SwiGluForward::y); }
  void check() const;
};

struct SwiGluBackward {
  static constexpr auto name = "swiglu_backward";
  Tensor gate;   // [T, F] read
  Tensor up;     // [T, F] read
  Tensor dy;     // [T, F] read
  Tensor rows;   // [1] i32 read, optional
  Tensor dgate;  // [T, F] written
  Tensor dup;    // [T, F] written
  static constexpr auto reads() {
    return std::tuple(&SwiGluBackward::gate, &SwiGluBackward::up, &SwiGluBackward::dy,
                      &SwiGluBackward::rows);
  }
  static constexpr auto writes() {
    return std::tuple(&SwiGluBackward::dgate, &SwiGluBackward::dup);
  }
  void check() const;
};

// out = a + b.
struct Add {
  static constexpr auto name = "add";
  Tensor a;    // [T, F] read
  Tensor b;    // [T, F] read
  Tensor out;  // [T, F] written; may be a or b
  static constexpr auto reads() { return std::tuple(&Add::a, &Add::b); }
  static constexpr auto writes() { return std::tuple(&Add::out); }
  void check() const;
};

// to = from, rounded to the nearest, halves to even: the copy of f32 weights that products take.
struct Cast {
  static constexpr auto name = "cast";
  Tensor from;  // [P] read, f32
  Tensor to;    // [P] written, bf16 (or f32: a copy)
  static constexpr auto reads() { return std::tuple(&Cast::from); }
  static constexpr auto writes() { return std::tuple(&Cast::to); }
  void check() const;
};

// sum = sum of x[t] in f64 (+ sum). On the CPU strictly in the order of t, on a GPU over fixed
// blocks in order.
struct Sum {
  static constexpr auto name = "sum";
  Tensor x;    // [T] read, f32
  Tensor sum;  // [1] f64 written (or added to)
  bool accumulate = false;
  static constexpr auto reads() { return std::tuple(&Sum::x); }
  static constexpr auto writes() { return std::tuple(&Sum::sum); }
  void check() const;
};

void run_cpu(Stream&, const ActivationForward&);
void run_cpu(Stream&, const ActivationBackward&);
void run_cpu(Stream&, const SwiGluForward&);
void run_cpu(Stream&, const SwiGluBackward&);
void run_cpu(Stream&, const Add&);
void run_cpu(Stream&, const Cast&);
void run_cpu(Stream&, const Sum&);
void run_cuda(Stream&, const ActivationForward&);
void run_cuda(Stream&, const ActivationBackward&);
void run_cuda(Stream&, const SwiGluForward&);
void run_cuda(Stream&, const SwiGluBackward&);
void run_cuda(Stream&, const Add&);
void run_cuda(Stream&, const Cast&);
void run_cuda(Stream&, const Sum&);

}  // namespace moemamba
