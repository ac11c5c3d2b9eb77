#include "runtime/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "runtime/json_reader.h"

namespace moemamba {
namespace {

using Json = nlohmann::json;

constexpr int64_t kLargestHeader = 100'000'000;  // as the reference implementation
constexpr size_t kLongestName = 1000;  // bytes, of a tensor or of a text of the metadata
constexpr size_t kMostTexts = 100;     // of the metadata; a map's entry is larger than its text

struct DTypeName {
  DType dtype;
  const char* name;
};
constexpr DTypeName kDTypeNames[] = {{DType::f32, "F32"}, {DType::bf16, "BF16"},
                                     {DType::f64, "F64"}, {DType::i32, "I32"},
                                     {DType::i64, "I64"}, {DType::u8, "U8"}};

const char* stored_name(DType dtype) {
  for (const auto& entry : kDTypeNames)
    if (entry.dtype == dtype) return entry.name;
  return "?";
}

// Takes a header apart. Nothing is kept: whoever asks for entries says what becomes of them.
class HeaderWalk {
 public:
  HeaderWalk(std::string_view text, const std::string& path) : path_(path), json_(text, path) {}

  void walk(FunctionRef<void(StoredTensor&&)> tensor,
            FunctionRef<void(std::string_view key, std::string_view text)> metadata) {
    bool seen_metadata = false;
    json_.object([&](std::string_view key) {
      check(key.size() <= kLongestName, path_, ": damaged header: a name of ", key.size(),
            " bytes; expected at most ", kLongestName);
      std::string name = unescaped(key);
      if (name == "__metadata__") {
        check(!std::exchange(seen_metadata, true), path_,
              ": damaged header: __metadata__ appears twice");
        json_.call(path_ + ": __metadata__");
        json_.object([&](std::string_view text) { metadata(text, json_.string()); });
      } else {
        json_.call(path_ + ": " + name);
        tensor(read_tensor(std::move(name)));
      }
      json_.call(path_);
    });
    json_.end();
  }

 private:
  StoredTensor read_tensor(std::string name) {
    StoredTensor tensor{.name = std::move(name)};
    bool seen[3] = {};
    json_.object([&](std::string_view key) {
      const int field = key == "dtype" ? 0 : key == "shape" ? 1 : key == "data_offsets" ? 2 : -1;
      check(field >= 0 && !std::exchange(seen[field], true), path_, ": ", tensor.name,
            ": expected dtype, shape and data_offsets, once each, nothing else");
      if (field == 0) tensor.dtype = read_dtype(tensor);
      if (field == 1) read_shape(tensor);
      if (field == 2) read_offsets(tensor);
    });
    check(seen[0] && seen[1] && seen[2], path_, ": ", tensor.name,
          ": expected dtype, shape and data_offsets");
    check_bytes(tensor);
    return tensor;
  }
  DType read_dtype(const StoredTensor& tensor) {
    const std::string_view name = json_.string();
    for (const auto& entry : kDTypeNames)
      if (name == entry.name) return entry.dtype;
    throw Error(concat(path_, ": ", tensor.name, ": dtype ", name.substr(0, 60),
                       " is not known; expected F32, BF16, F64, I32, I64, U8"));
  }
  void read_shape(StoredTensor& tensor) {
    json_.list([&] {
      check(tensor.shape.dims < 4, path_, ": ", tensor.name, ": expected at most 4 dims");
      tensor.shape.extents[size_t(tensor.shape.dims++)] = json_.integer();
    });
  }
  void read_offsets(StoredTensor& tensor) {
    int count = 0;
    json_.list([&] {
      const int64_t offset = json_.integer();
      if (++count <= 2) (count == 1 ? tensor.begin : tensor.end) = offset;
    });
    check(count == 2, path_, ": ", tensor.name, ": expected two data_offsets, found ", count);
  }
  void check_bytes(const StoredTensor& tensor) const {
    int64_t bytes = size_of(tensor.dtype);
    for (int d = 0; d < tensor.shape.dims; ++d)
      check(!__builtin_mul_overflow(bytes, tensor.shape[d], &bytes), path_, ": ", tensor.name,
            ": the shape is too large");
    check(tensor.begin <= tensor.end && tensor.end - tensor.begin == bytes, path_, ": ",
          tensor.name, ": ", stored_name(tensor.dtype), to_string(tensor.shape), " has ", bytes,
          " bytes, its offsets say ", tensor.begin, " to ", tensor.end);
  }

  const std::string& path_;
  JsonReader json_;
};

// Sorts by place and checks that nothing overlaps and nothing is left out.
void check_cover(std::vector<StoredTensor>& tensors, int64_t bytes, const std::string& path) {
  const auto before = [](const StoredTensor& a, const StoredTensor& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  };
  if (!std::is_sorted(tensors.begin(), tensors.end(), before))  // sorted in place
    std::sort(tensors.begin(), tensors.end(), before);
  int64_t end = 0;
  for (const StoredTensor& tensor : tensors) {
    check(tensor.begin == end, path, ": ", tensor.name, " begins at byte ", tensor.begin,
          " of the values, expected ", end, " (", tensor.begin < end ? "overlap" : "hole", ")");
    end = tensor.end;
  }
  check(end == bytes, path, ": the tensors end at byte ", end, " of the values, the file has ",
        bytes, end > bytes ? " (cut off)" : " (left over)");
}

template <class From, class To>
void convert(const std::byte* from, const Tensor& to) {
  for (int64_t r = 0; r < to.rows(); ++r) {
    To* row = to.row<To>(r);
    for (int64_t c = 0; c < to.cols(); ++c, from += sizeof(From)) {
      From value;
      std::memcpy(&value, from, sizeof(From));
      row[c] = To(float(value));
    }
  }
}

}  // namespace

std::string safetensors_header(std::vector<StoredTensor>& tensors,
                               const SafetensorsMetadata& metadata, const std::string& path,
                               int64_t alignment) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t end = 0;
  for (StoredTensor& tensor : tensors) {
    check(!tensor.name.empty() && tensor.name != "__metadata__" && !header.contains(tensor.name),
          path, ": the name ", tensor.name, " is taken");
    tensor.begin = end;
    tensor.end = end += tensor.shape.elements() * size_of(tensor.dtype);
    Json& entry = header[tensor.name];
    entry["dtype"] = stored_name(tensor.dtype);
    entry["shape"] = Json::array();
    for (int d = 0; d < tensor.shape.dims; ++d) entry["shape"].push_back(tensor.shape[d]);
    entry["data_offsets"] = {tensor.begin, tensor.end};
  }
  std::string text = header.dump();
  text.append(size_t((alignment - (8 + int64_t(text.size())) % alignment) % alignment), ' ');
  check(int64_t(text.size()) <= kLargestHeader, path, ": too many tensors for one file (header of ",
        text.size(), " bytes)");
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;
}

SafetensorsWriter::SafetensorsWriter(FileSystem& files, const std::string& path,
                                     std::vector<StoredTensor> tensors,
                                     const SafetensorsMetadata& metadata)
    : file_(files, path), tensors_(std::move(tensors)) {
  file_.write(safetensors_header(tensors_, metadata, path));
}

void SafetensorsWriter::write(const Tensor& values) {
  check(next_ < tensors_.size(), "all ", tensors_.size(), " tensors are written already");
  const StoredTensor& tensor = tensors_[next_++];
  expect(tensor.name.c_str(), values, tensor.shape, tensor.dtype);
  const int64_t row_bytes = values.cols() * size_of(values.dtype);
  if (tensor.begin == tensor.end) return;
  if (values.dense()) return file_.write(values.data, size_t(values.bytes()));
  const auto* from = static_cast<const std::byte*>(values.data);
  for (int64_t r = 0; r < values.rows(); ++r)
    file_.write(from + r * values.stride * size_of(values.dtype), size_t(row_bytes));
}

void SafetensorsWriter::commit() {
  check(next_ == tensors_.size(), "expected ", tensors_.size(), " tensors, written are ", next_);
  file_.commit();
}

SafetensorsReader::SafetensorsReader(const std::string& path, Links links)
    : file_(path, links) {
  const auto bytes = file_.bytes();
  check(bytes.size() >= 8, path, ": expected a safetensors file, found ", bytes.size(), " bytes");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  check(length <= uint64_t(kLargestHeader), path, ": expected a header of at most ", kLargestHeader,
        " bytes, found ", length, ": damaged, or no safetensors file");
  check(length <= bytes.size() - 8, path, ": its header should have ", length, " bytes, the file ",
        "has ", bytes.size(), ": cut off");
  start_ = 8 + int64_t(length);
  const std::string_view text = file_.text().substr(8, length);
  check(!text.empty() && text[0] == '{', path, ": damaged header: expected it to begin with {");
  read_header(text);
  check_cover(tensors_, int64_t(bytes.size()) - start_, path);
  index_names();
}

// Walks twice, first to count: so no memory is taken before the whole header is known to hold, and
// then just enough. An entry has 50 bytes at least; in memory it takes 100 and its name.
void SafetensorsReader::read_header(std::string_view text) {
  size_t tensors = 0, texts = 0;
  HeaderWalk(text, path()).walk([&](StoredTensor&&) { ++tensors; },
                                [&](std::string_view key, std::string_view) {
                                  check(key.size() <= kLongestName && ++texts <= kMostTexts, path(),
                                        ": __metadata__: expected at most ", kMostTexts,
                                        " texts with names of at most ", kLongestName, " bytes");
                                });
  tensors_.reserve(tensors);
  HeaderWalk(text, path())
      .walk([&](StoredTensor&& tensor) { tensors_.push_back(std::move(tensor)); },
            [&](std::string_view key, std::string_view value) {
              check(metadata_.emplace(unescaped(key), unescaped(value)).second, path(),
                    ": __metadata__: ", key, " appears twice");
            });
}

void SafetensorsReader::index_names() {
  by_name_.resize(tensors_.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(),
            [&](uint32_t a, uint32_t b) { return tensors_[a].name < tensors_[b].name; });
  for (size_t i = 1; i < by_name_.size(); ++i)
    check(tensors_[by_name_[i - 1]].name != tensors_[by_name_[i]].name, path(),
          ": damaged header: the name ", tensors_[by_name_[i]].name, " appears twice");
}

const StoredTensor* SafetensorsReader::find(const std::string& name) const {
  const auto found =
      std::lower_bound(by_name_.begin(), by_name_.end(), name,
                       [&](uint32_t at, const auto& text) { return tensors_[at].name < text; });
  return found == by_name_.end() || tensors_[*found].name != name ? nullptr : &tensors_[*found];
}

const std::byte* SafetensorsReader::data(const StoredTensor& tensor) const {
  return file_.bytes().data() + start_ + tensor.begin;
}

void SafetensorsReader::read(const StoredTensor& tensor, const Tensor& to) const {
  check(tensor.shape == to.shape, path(), ": ", tensor.name, ": expected shape ",
        to_string(to.shape), ", found ", to_string(tensor.shape));
  const std::byte* from = data(tensor);
  if (tensor.dtype == DType::f32 && to.dtype == DType::bf16) return convert<float, bf16>(from, to);
  if (tensor.dtype == DType::bf16 && to.dtype == DType::f32) return convert<bf16, float>(from, to);
  check(tensor.dtype == to.dtype, path(), ": ", tensor.name, ": expected ", name_of(to.dtype),
        ", found ", name_of(tensor.dtype));
  const int64_t row_bytes = to.cols() * size_of(to.dtype);
  if (row_bytes == 0) return;
  auto* into = static_cast<std::byte*>(to.data);
  for (int64_t r = 0; r < to.rows(); ++r)
    std::memcpy(into + r * to.stride * size_of(to.dtype), from + r * row_bytes, size_t(row_bytes));
}

}  // namespace moemamba
