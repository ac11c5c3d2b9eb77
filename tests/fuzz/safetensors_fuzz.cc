// A safetensors file of anybody's. What its reader takes for JSON, nlohmann-json must, too.
#include "runtime/safetensors.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

void read_all(const SafetensorsReader& reader) {
  for (const StoredTensor& tensor : reader.tensors()) {
    require(reader.find(tensor.name) == &tensor, "every tensor is found by its name");
    require(tensor.end - tensor.begin == tensor.shape.elements() * size_of(tensor.dtype),
            "offsets span the shape");
    const size_t bytes = size_t(tensor.end - tensor.begin);
    sha256({reinterpret_cast<const char*>(reader.data(tensor)), bytes});  // all of it is there
  }
}

void expect_json(const SafetensorsReader& reader, std::string_view file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof length);
  const auto json = nlohmann::json::parse(file.substr(8, length), nullptr, false);
  require(json.is_object(), "a header that was taken is JSON");
  for (const StoredTensor& tensor : reader.tensors())
    require(json.contains(tensor.name) && json[tensor.name]["data_offsets"][0] == tensor.begin,
            "names mean the same to both");
  for (const auto& [key, text] : reader.metadata())
    require(json["__metadata__"][key] == text, "texts mean the same to both");
}

bool read(const FuzzFolder& folder, std::string_view bytes) {
  folder.put("file", bytes);
  try {
    std::optional<AllocationLimit> limit(bytes.size());
    const SafetensorsReader reader(folder / "file");
    read_all(reader);
    limit.reset();
    expect_json(reader, bytes);
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::string file_of(const std::string& header) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header;
}

// Headers that ask for as much as they can: the inputs of libFuzzer are short, and of those the
// bound's constant part is the larger one.
bool read_greedy(const FuzzFolder& folder) {
  constexpr const char* kEmpty = R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  for (const int more : {0, 11, 12, 13, 14, 60}) {
    std::string header = "{";
    for (int i = 0; i < 4000; ++i) {
      std::string name(size_t(more), '{');
      for (int rest = i; rest > 0; rest /= 26) name += char('a' + rest % 26);
      header += concat(i ? "," : "", '"', name, R"(":)", kEmpty);
    }
    require(read(folder, file_of(header + "}")), "a good header is taken");
    read(folder, file_of(header + ",\"a\":1}"));
  }
  const std::string text(1 << 20, 'x');
  read(folder, file_of(R"({"__metadata__":{"a":")" + text + "\"}}"));
  read(folder, file_of(R"({"__metadata__":{")" + text + R"(":""}})"));
  read(folder, file_of("{\"" + text + "\":" + kEmpty + "}"));
  read(folder, file_of("{\"a\":" + std::string(1 << 20, '[')));
  return true;
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  static const FuzzFolder folder;
  static const bool greedy = read_greedy(folder);
  require(greedy, "greedy headers were read");
  read(folder, {reinterpret_cast<const char*>(data), size});
  return 0;
}
