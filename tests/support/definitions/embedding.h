#pragma once
#include <vector>

namespace moemamba::definition {  // letters: T tokens, V vocabulary, D width

// ids [T] hold whole numbers; table [V, D].
inline std::vector<double> embedding_forward(const std::vector<double>& ids,
                                             const std::vector<double>& table, size_t D) {
  std::vector<double> y;
  for (double id : ids)
    for (size_t d = 0; d < D; ++d) y.push_back(table[size_t(id) * D + d]);
  return y;
}

// dtable [V, D] of the sum of dy * y.
inline std::vector<double> embedding_backward(const std::vector<double>& ids,
                                              const std::vector<double>& dy, size_t V, size_t D) {
  std::vector<double> dtable(V * D);
  for (size_t t = 0; t < ids.size(); ++t)
    for (size_t d = 0; d < D; ++d) dtable[size_t(ids[t]) * D + d] += dy[t * D + d];
  return dtable;
}

}  // namespace moemamba::definition
