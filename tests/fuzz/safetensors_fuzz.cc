// A safetensors file of anybody's.
#include "runtime/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

void read_all(const std::string& path) {
  const SafetensorsReader reader(path);
  for (const StoredTensor& tensor : reader.tensors()) {
    require(reader.find(tensor.name) == &tensor, "every tensor is found by its name");
    require(tensor.end - tensor.begin == tensor.shape.elements() * size_of(tensor.dtype),
            "offsets span the shape");
    const size_t bytes = size_t(tensor.end - tensor.begin);
    sha256({reinterpret_cast<const char*>(reader.data(tensor)), bytes});  // all of it is there
  }
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  static const FuzzFolder folder;
  folder.put("file", {reinterpret_cast<const char*>(data), size});
  try {
    const AllocationLimit limit(size, 6);
    read_all(folder / "file");
  } catch (const Error&) {
  }
  return 0;
}
