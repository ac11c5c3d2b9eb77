#pragma once
#include <bit>
#include <cstdint>

#include "core/error.h"

namespace moemamba {

// bfloat16: the upper half of an f32, rounded to nearest even. A NaN stays a NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    const auto u = std::bit_cast<uint32_t>(value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

enum class DType : uint8_t { f32, bf16, f64, i32, i64, u8 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::f64:
    case DType::i64: return 8;
    case DType::bf16: return 2;
    case DType::u8: return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {"f32", "bf16", "f64", "i32", "i64", "u8"};
  return names[int(dtype)];
}

template <class T>
constexpr DType dtype_of();
template <> constexpr DType dtype_of<float>() { return DType::f32; }
template <> constexpr DType dtype_of<bf16>() { return DType::bf16; }
template <> constexpr DType dtype_of<double>() { return DType::f64; }
template <> constexpr DType dtype_of<int32_t>() { return DType::i32; }
template <> constexpr DType dtype_of<int64_t>() { return DType::i64; }
template <> constexpr DType dtype_of<uint8_t>() { return DType::u8; }

// Calls fn.operator()<Real>() for the floating type that a kernel computes on.
template <class Fn>
decltype(auto) visit_float(DType dtype, Fn&& fn) {
  check(dtype == DType::f32 || dtype == DType::bf16, "expected f32 or bf16, found ",
        name_of(dtype));
  return dtype == DType::bf16 ? fn.template operator()<bf16>() : fn.template operator()<float>();
}

}  // namespace moemamba
