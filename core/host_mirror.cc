#include "core/host_mirror.h"

namespace moemamba {

HostMirror::HostMirror(DeviceKind device)
    : stream_(device == DeviceKind::cuda ? Stream::cuda() : Stream::immediate()) {}

Tensor HostMirror::blank(const Tensor& tensor) {
  if (tensor.device == DeviceKind::cpu) return tensor;
  if (tensor.bytes() > buffer_.bytes())
    buffer_ = Buffer::staging(tensor.device, tensor.bytes());
  return view(buffer_.data(), tensor.shape, tensor.dtype);
}

Tensor HostMirror::read(const Tensor& tensor) {
  const Tensor host = blank(tensor);
  if (host.data == tensor.data) return host;
  copy(stream_, tensor, host);
  stream_.synchronize();
  return host;
}

void HostMirror::write_back(const Tensor& host, const Tensor& tensor) {
  if (host.data == tensor.data) return;
  copy(stream_, host, tensor);
  stream_.synchronize();
}

}  // namespace moemamba
