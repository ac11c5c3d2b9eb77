#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/tensor.h"

namespace moemamba {

// One tensor of a safetensors file: dense, row-major, little-endian.
struct StoredTensor {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  int64_t begin = 0;  // bytes after the header; the writer fills them in
  int64_t end = 0;
};

using SafetensorsMetadata = std::map<std::string, std::string>;

// The bytes before the values: length and JSON, padded so that values start on such a border.
// Fills begin and end of the tensors, in their order. path: for errors.
std::string safetensors_header(std::vector<StoredTensor>& tensors,
                               const SafetensorsMetadata& metadata, const std::string& path,
                               int64_t alignment = 64);

// Writes a file tensor by tensor: all names first, then the values in that order. The file
// appears with commit().
class SafetensorsWriter {
 public:
  SafetensorsWriter(FileSystem& files, const std::string& path, std::vector<StoredTensor> tensors,
                    const SafetensorsMetadata& metadata = {});
  // The values of the next tensor of the list: its shape and dtype, any row stride.
  void write(const Tensor& values);
  void commit();

 private:
  AtomicFile file_;
  std::vector<StoredTensor> tensors_;
  size_t next_ = 0;
};

// A file of anybody's, mapped. The constructor believes nothing: it throws an Error unless the
// header (at most 100 MB) is JSON without duplicate names, every shape and dtype gives the bytes
// that its offsets span, and the offsets cover the file without holes or overlaps. What it takes in
// memory is at most twice the header, 16 KiB aside. A name has at most 1000 bytes.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path, Links links = Links::followed);
  const std::string& path() const { return file_.path(); }
  const std::vector<StoredTensor>& tensors() const { return tensors_; }  // in file order
  const StoredTensor* find(const std::string& name) const;               // null = not there
  const SafetensorsMetadata& metadata() const { return metadata_; }
  const std::byte* data(const StoredTensor& tensor) const;
  // Copies into `to`, which has the same shape, converting between f32 and bf16 where they differ.
  void read(const StoredTensor& tensor, const Tensor& to) const;

 private:
  void read_header(std::string_view text);
  void index_names();
  MappedFile file_;
  std::vector<StoredTensor> tensors_;
  std::vector<uint32_t> by_name_;  // indices into tensors_, in order of the names
  SafetensorsMetadata metadata_;
  int64_t start_ = 0;
};

}  // namespace moemamba
