#include "runtime/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"

namespace moemamba {
namespace {

using Json = nlohmann::json;

constexpr int64_t kLargestHeader = 100'000'000;  // as the reference implementation
constexpr int64_t kAlignment = 64;
constexpr int kDeepest = 4;  // objects within objects: one entry has depth 3

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

// Parses `text`, refusing what JSON allows but a header must not hold: the same name twice, or
// nesting so deep that the parser's own recursion could be attacked.
Json parse_header(std::string_view text, const std::string& path) {
  std::vector<std::set<std::string>> names;
  std::string problem;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > kDeepest && problem.empty()) problem = "nested too deeply";
    if (event == Json::parse_event_t::object_start) {
      names.emplace_back();
    } else if (event == Json::parse_event_t::object_end) {
      names.pop_back();
    } else if (event == Json::parse_event_t::key && problem.empty()) {
      if (!names.back().insert(value.get_ref<const std::string&>()).second)
        problem = concat("the name ", value.dump(-1, ' ', true, Json::error_handler_t::replace),
                         " appears twice");
    }
    return problem.empty();
  };
  Json header = Json::parse(text.begin(), text.end(), watch, false);
  check(problem.empty(), path, ": damaged header: ", problem);
  check(header.is_object(), path, ": damaged header: expected a JSON object");
  return header;
}

int64_t integer(const Json& value, const std::string& where) {
  check(value.is_number_unsigned() && value.get<uint64_t>() < (uint64_t{1} << 62), where,
        ": expected an integer from 0 to 2^62 - 1");
  return value.get<int64_t>();
}

DType parse_dtype(const Json& value, const std::string& where) {
  check(value.is_string(), where, ": expected a dtype");
  const auto& name = value.get_ref<const std::string&>();
  for (const auto& entry : kDTypeNames)
    if (name == entry.name) return entry.dtype;
  throw Error(
      concat(where, ": dtype ", name, " is not known; expected F32, BF16, F64, I32, I64, ", "U8"));
}

StoredTensor parse_tensor(const std::string& name, const Json& entry, const std::string& where) {
  check(entry.is_object() && entry.size() == 3 && entry.contains("dtype") &&
            entry.contains("shape") && entry.contains("data_offsets"),
        where, ": expected dtype, shape and data_offsets, nothing else");
  StoredTensor tensor{.name = name, .dtype = parse_dtype(entry["dtype"], where)};
  const Json& shape = entry["shape"];
  check(shape.is_array() && shape.size() <= 4, where, ": expected a shape of at most 4 dims");
  int64_t bytes = size_of(tensor.dtype);
  for (const Json& extent : shape) {
    const int64_t size = integer(extent, where);
    tensor.shape.extents[tensor.shape.dims++] = size;
    check(!__builtin_mul_overflow(bytes, size, &bytes), where, ": the shape is too large");
  }
  const Json& offsets = entry["data_offsets"];
  check(offsets.is_array() && offsets.size() == 2, where, ": expected two data_offsets");
  tensor.begin = integer(offsets[0], where);
  tensor.end = integer(offsets[1], where);
  check(tensor.begin <= tensor.end && tensor.end - tensor.begin == bytes, where, ": ",
        stored_name(tensor.dtype), to_string(tensor.shape), " has ", bytes,
        " bytes, its offsets say ", tensor.begin, " to ", tensor.end);
  return tensor;
}

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
  const Json header = parse_header(text, path);
  for (const auto& [name, entry] : header.items()) {
    if (name != "__metadata__") {
      tensors_.push_back(parse_tensor(name, entry, concat(path, ": ", name)));
      continue;
    }
    check(entry.is_object(), path, ": __metadata__: expected an object");
    for (const auto& [key, value] : entry.items()) {
      check(value.is_string(), path, ": __metadata__: expected text for ", key);
      metadata_[key] = value.get<std::string>();
    }
  }
  check_cover(tensors_, int64_t(bytes.size()) - start_, path);
  for (size_t i = 0; i < tensors_.size(); ++i) by_name_[tensors_[i].name] = i;
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
