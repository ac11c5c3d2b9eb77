#pragma once
#include <cstdint>
#include <vector>

namespace moemamba::definition {  // letters: M, N, K of a product; E groups, R rows sorted by group

// op(a)[M, K] op(b)[K, N], row by row.
inline std::vector<double> matmul(const std::vector<double>& a, const std::vector<double>& b,
                                  int64_t M, int64_t N, int64_t K, bool a_transposed = false,
                                  bool b_transposed = false) {
  std::vector<double> out(size_t(M * N));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < N; ++n)
        out[m * N + n] += (a_transposed ? a[k * M + m] : a[m * K + k]) *
                          (b_transposed ? b[n * K + k] : b[k * N + n]);
  return out;
}

// Row r of group e, offsets[e] <= r < offsets[e + 1]: row r of a[R, K] times op(b[e])[K, N].
inline std::vector<double> grouped_matmul(const std::vector<double>& a,
                                          const std::vector<double>& b,
                                          const std::vector<int64_t>& offsets, int64_t N, int64_t K,
                                          bool b_transposed) {
  std::vector<double> out(size_t(offsets.back() * N));
  for (size_t e = 0; e + 1 < offsets.size(); ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k)
          out[r * N + n] += a[r * K + k] * b[e * K * N + (b_transposed ? n * K + k : k * N + n)];
  return out;
}

// out[e][M, N] = the sum over the rows r of group e of a[r]' b[r].
inline std::vector<double> grouped_outer(const std::vector<double>& a, const std::vector<double>& b,
                                         const std::vector<int64_t>& offsets, int64_t M,
                                         int64_t N) {
  std::vector<double> out((offsets.size() - 1) * size_t(M * N));
  for (size_t e = 0; e + 1 < offsets.size(); ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n)
          out[(e * M + m) * N + n] += a[r * M + m] * b[r * N + n];
  return out;
}

}  // namespace moemamba::definition
