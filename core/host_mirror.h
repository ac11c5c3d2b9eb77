#pragma once
#include "core/arena.h"

namespace moemamba {

// Tensors for the host to read and write, wherever they lie: on the CPU themselves, of a GPU a copy
// in memory that lasts until the next call. The caller has waited for the work that writes them.
class HostMirror {
 public:
  explicit HostMirror(DeviceKind device);
  Tensor read(const Tensor& tensor);
  // Room of the tensor's size, whose content does not matter; then brings it back.
  Tensor blank(const Tensor& tensor);
  void write_back(const Tensor& host, const Tensor& tensor);

 private:
  Stream stream_;
  Buffer buffer_;
};

}  // namespace moemamba
