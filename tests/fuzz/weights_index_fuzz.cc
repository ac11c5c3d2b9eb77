// model.safetensors.index.json of a folder of weights: whatever it says, files of this folder alone
// are opened, and no link.
#include "runtime/weights_files.h"

#include "runtime/checkpoint_parts.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

// A file with one tensor of that name.
std::string file_of(const char* tensor) {
  std::vector<StoredTensor> tensors{{.name = tensor, .dtype = DType::u8, .shape = {1}}};
  return safetensors_header(tensors, {}, "memory") + "v";
}

// weights/ with two files, one that is hidden, a link out of it, a link within it, a folder, and
// beside it what no index may reach.
class Weights {
 public:
  Weights() {
    std::filesystem::create_directories(folder_ / "weights/folder");
    for (const char* name : {"weights/a", "weights/b.safetensors", "weights/folder/c"})
      folder_.put(name, file_of("within"));
    for (const char* name : {"outside", "weights/.hidden", "weights/a\\b"})
      folder_.put(name, file_of("outside"));
    std::filesystem::create_symlink(folder_ / "outside", folder_ / "weights/out");
    std::filesystem::create_symlink("a", folder_ / "weights/in");
  }
  // Whether the index was taken.
  bool open(std::string_view index) const {
    folder_.put(std::string("weights/") + kIndexName, index);
    try {
      const AllocationLimit limit(index.size());
      for (const SafetensorsReader& reader : open_index(folder_ / "weights")) {
        require(reader.path() == folder_ / "weights/a" ||
                    reader.path() == folder_ / "weights/b.safetensors",
                "only files of the folder are opened");
        require(reader.find("within") && !reader.find("outside"), "they are what they are called");
      }
      return true;
    } catch (const Error&) {
      return false;
    }
  }

 private:
  FuzzFolder folder_;
};

bool open_known(const Weights& weights) {
  const auto index = [](const std::string& name) {
    return R"({"metadata": {"total_size": 1}, "weight_map": {"t": ")" + name + "\"}}";
  };
  require(weights.open(index("a")) && weights.open(index("b.safetensors")), "its own are opened");
  for (const char* name : {"out", "in", "folder", ".hidden", "folder/c", "../outside", "./a", "",
                           ".", "..", "a\\u0000", "\\u002e.\\/outside", "weights/a", "/etc/passwd"})
    require(!weights.open(index(name)), "no other is opened");
  std::string many = R"({"weight_map": {"t": "a")";
  for (int i = 0; i < 20000; ++i) many += concat(",\"\":\"", i % 2 ? "a" : "\\u0061", "\"");
  require(weights.open(many + "}}"), "a long index is taken");
  weights.open(index(std::string(1 << 20, 'x')));
  weights.open("{\"a\":" + std::string(1 << 20, '['));
  return true;
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  static const Weights weights;
  static const bool known = open_known(weights);
  require(known, "known names were tried");
  weights.open({reinterpret_cast<const char*>(data), size});
  return 0;
}
