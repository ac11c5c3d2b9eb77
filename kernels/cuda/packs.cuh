#pragma once
#include <algorithm>

#include "kernels/cuda/common.cuh"

namespace moemamba {  // rows of tensors, read and written in packs of neighbours

template <class Real>
struct Lines {
  Real* data;
  int64_t stride;
  __device__ Real* row(int64_t r) const { return data + r * stride; }
};
template <class Real>
Lines<Real> lines(const Tensor& tensor) { return {pointer<Real>(tensor), tensor.stride}; }

// True where every row begins on a 16-byte border (or the tensor is not there). A row may end
// within a pack.
inline bool rows_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
         (tensor.rows() <= 1 || tensor.stride * size_of(tensor.dtype) % 16 == 0);
}

// A pack all of whose elements exist. Kernels take these apart from the others by for_pack(), for
// loads that no branch divides are all under way before the first is needed.
struct Whole {};

// Calls body(Whole()) or, for the last pack of a row, body(count).
template <int kCount, class Body>
__device__ __forceinline__ void for_pack(int64_t count, Body body) {
  if (kCount == 1 || count >= kCount) body(Whole());
  else body(int(count));
}

// kCount neighbours in f32. Of a pack that is not whole `count` exist (or none): the others are
// read as 0 and not written. REQUIRES: kCount is 1, or the pack lies on its border.
template <int kCount, class Real>
__device__ __forceinline__ void load(const Real* from, Whole, float (&to)[kCount]) {
  constexpr int kPart = std::min(kCount, 16 / int(sizeof(Real)));
#pragma unroll
  for (int part = 0; part < kCount; part += kPart) {
    const auto pack = *reinterpret_cast<const Pack<Real, kPart>*>(from + part);
#pragma unroll
    for (int i = 0; i < kPart; ++i) to[part + i] = to_float(pack.at[i]);
  }
}
template <int kCount, class Real>
__device__ __forceinline__ void load(const Real* from, int64_t count, float (&to)[kCount]) {
  if (count >= kCount) return load<kCount>(from, Whole(), to);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = i < count ? to_float(from[i]) : 0.f;
}

template <int kCount, class Real>
__device__ __forceinline__ void store(Real* to, Whole, const float (&from)[kCount]) {
  constexpr int kPart = std::min(kCount, 16 / int(sizeof(Real)));
#pragma unroll
  for (int part = 0; part < kCount; part += kPart) {
    Pack<Real, kPart> pack;
#pragma unroll
    for (int i = 0; i < kPart; ++i) pack.at[i] = from_float<Real>(from[part + i]);
    *reinterpret_cast<Pack<Real, kPart>*>(to + part) = pack;
  }
}
template <int kCount, class Real>
__device__ __forceinline__ void store(Real* to, int64_t count, const float (&from)[kCount]) {
  if (count >= kCount) return store<kCount>(to, Whole(), from);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < count) to[i] = from_float<Real>(from[i]);
}

// Row and place in the row of the index-th of rows of `columns`; in 32 bits where they suffice,
// since a 64-bit division is about a hundred instructions.
struct Place {
  int64_t row, column;
};
__device__ __forceinline__ Place place_of(int64_t index, int64_t columns) {
  if ((uint64_t(index) | uint64_t(columns)) >> 32 == 0) {
    const uint32_t row = uint32_t(index) / uint32_t(columns);
    return {row, uint32_t(index) - row * uint32_t(columns)};
  }
  return {index / columns, index % columns};
}

}  // namespace moemamba
