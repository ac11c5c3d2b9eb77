#include "runtime/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace moemamba {
namespace {

using Json = nlohmann::json;

constexpr int64_t kLargestHeader = 100'000'000;  // as the reference implementation
constexpr int64_t kAlignment = 64;

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

DType parse_dtype(const std::string& name, const std::string& where) {
  for (const auto& entry : kDTypeNames)
    if (name == entry.name) return entry.dtype;
  throw Error(
      concat(where, ": dtype ", name, " is not known; expected F32, BF16, F64, I32, I64, U8"));
}

// Takes a header apart while it is read (an interface of nlohmann-json): what does not belong there
// is an Error at once, so that no header can make the reader hold much more than itself.
class HeaderReader {
 public:
  HeaderReader(const std::string& path, std::vector<StoredTensor>& tensors,
               SafetensorsMetadata& metadata)
      : path_(path), tensors_(tensors), metadata_(metadata) {}

  bool start_object(size_t) {
    if (place_ == Place::outside) return go(Place::root);
    if (place_ != Place::root) refuse("an object");
    if (name_ == "__metadata__") return go(Place::metadata);
    tensor_ = {.name = name_};
    seen_dtype_ = seen_shape_ = seen_offsets_ = false;
    return go(Place::tensor);
  }
  bool key(std::string& name) {
    if (place_ == Place::root) {
      check(name != "__metadata__" || !seen_metadata_, path_,
            ": damaged header: __metadata__ appears twice");
      seen_metadata_ = seen_metadata_ || name == "__metadata__";
      name_ = std::move(name);
      return true;
    }
    key_ = std::move(name);
    if (place_ == Place::metadata) return true;
    bool& seen = key_ == "dtype"          ? seen_dtype_
                 : key_ == "shape"        ? seen_shape_
                 : key_ == "data_offsets" ? seen_offsets_
                                          : always_;
    check(!seen, where(), ": expected dtype, shape and data_offsets, once each, nothing else");
    seen = true;
    return true;
  }
  bool start_array(size_t) {
    if (place_ != Place::tensor || key_ == "dtype") refuse("a list");
    offsets_ = 0;
    return go(key_ == "shape" ? Place::shape : Place::offsets);
  }
  bool number_unsigned(uint64_t value) {
    check(value < (uint64_t{1} << 62), where(), ": expected an integer from 0 to 2^62 - 1");
    if (place_ == Place::shape) {
      check(tensor_.shape.dims < 4, where(), ": expected a shape of at most 4 dims");
      tensor_.shape.extents[tensor_.shape.dims++] = int64_t(value);
    } else if (place_ == Place::offsets) {
      check(offsets_ < 2, where(), ": expected two data_offsets");
      (offsets_++ == 0 ? tensor_.begin : tensor_.end) = int64_t(value);
    } else {
      refuse("a number");
    }
    return true;
  }
  bool string(std::string& text) {
    if (place_ == Place::tensor && key_ == "dtype") {
      tensor_.dtype = parse_dtype(text, where());
      return true;
    }
    if (place_ != Place::metadata) refuse("a text");
    check(metadata_.emplace(key_, std::move(text)).second, path_, ": __metadata__: ", key_,
          " appears twice");
    return true;
  }
  bool end_array() {
    check(place_ == Place::shape || offsets_ == 2, where(), ": expected two data_offsets");
    return go(Place::tensor);
  }
  bool end_object() {
    if (place_ == Place::tensor) add_tensor();
    return go(place_ == Place::root ? Place::outside : Place::root);
  }
  bool null() { return refuse("null"); }
  bool boolean(bool) { return refuse("true or false"); }
  bool number_integer(int64_t) { return refuse("a number below 0"); }
  bool number_float(double, const std::string&) { return refuse("a fraction"); }
  bool binary(Json::binary_t&) { return refuse("bytes"); }
  template <class Problem>
  bool parse_error(size_t at, const std::string&, const Problem&) {
    throw Error(concat(path_, ": damaged header: no JSON at its byte ", at));
  }

 private:
  enum class Place { outside, root, metadata, tensor, shape, offsets };

  bool go(Place place) {
    place_ = place;
    return true;
  }
  std::string where() const { return path_ + ": " + name_; }
  [[noreturn]] bool refuse(const char* found) const {
    const char* expected = place_ == Place::outside    ? "a JSON object"
                           : place_ == Place::root     ? "an object"
                           : place_ == Place::metadata ? "text"
                           : place_ != Place::tensor   ? "an integer from 0 to 2^62 - 1"
                           : key_ == "dtype"           ? "a dtype"
                                                       : "a list of integers";
    throw Error(concat(where(), ": damaged header: expected ", expected, ", found ", found));
  }
  void add_tensor() {
    check(seen_dtype_ && seen_shape_ && seen_offsets_, where(),
          ": expected dtype, shape and data_offsets, nothing else");
    int64_t bytes = size_of(tensor_.dtype);
    for (int d = 0; d < tensor_.shape.dims; ++d)
      check(!__builtin_mul_overflow(bytes, tensor_.shape[d], &bytes), where(),
            ": the shape is too large");
    check(tensor_.begin <= tensor_.end && tensor_.end - tensor_.begin == bytes, where(), ": ",
          stored_name(tensor_.dtype), to_string(tensor_.shape), " has ", bytes,
          " bytes, its offsets say ", tensor_.begin, " to ", tensor_.end);
    tensors_.push_back(std::move(tensor_));
  }

  const std::string& path_;
  std::vector<StoredTensor>& tensors_;
  SafetensorsMetadata& metadata_;
  Place place_ = Place::outside;
  std::string name_, key_;  // of the root's member, and within it
  StoredTensor tensor_;
  int offsets_ = 0;
  bool seen_metadata_ = false, seen_dtype_ = false, seen_shape_ = false, seen_offsets_ = false;
  bool always_ = true;
};

// Sorts by place and checks that nothing overlaps and nothing is left out.
void check_cover(std::vector<StoredTensor>& tensors, int64_t bytes, const std::string& path) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
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
                               const SafetensorsMetadata& metadata, const std::string& path) {
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
  text.append(size_t((kAlignment - (8 + int64_t(text.size())) % kAlignment) % kAlignment), ' ');
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

SafetensorsReader::SafetensorsReader(const std::string& path) : file_(path) {
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
  HeaderReader header(path, tensors_, metadata_);
  Json::sax_parse(text.begin(), text.end(), &header);
  check_cover(tensors_, int64_t(bytes.size()) - start_, path);
  for (size_t i = 0; i < tensors_.size(); ++i)
    check(by_name_.emplace(tensors_[i].name, i).second, path, ": damaged header: the name ",
          tensors_[i].name, " appears twice");
}

const StoredTensor* SafetensorsReader::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
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
