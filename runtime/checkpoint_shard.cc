#include "runtime/checkpoint_shard.h"

#include <algorithm>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr size_t kChunk = 1 << 20;  // bytes that are hashed, then written

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

// A new file whose digest is that of the memory it was written from.
class DigestedFile {
 public:
  DigestedFile(FileSystem& files, const std::string& folder, const std::string& name)
      : name_(name), file_(files.open(join_path(folder, name), OpenMode::create_new)) {}

  void write(const void* data, size_t bytes) {
    const auto* from = static_cast<const char*>(data);
    bytes_ += int64_t(bytes);
    for (; bytes > 0; from += std::min(bytes, kChunk), bytes -= std::min(bytes, kChunk)) {
      digest_.add(from, std::min(bytes, kChunk));
      file_->write(from, std::min(bytes, kChunk));
    }
  }
  void finish(ShardReport& report) {
    file_->sync();
    file_->close();
    CheckpointManifest::File* file = report.add_files();
    file->set_name(name_);
    file->set_bytes(bytes_);
    file->set_sha256(bytes_of_hex(digest_.hex()));
  }

 private:
  std::string name_;
  std::unique_ptr<OutputFile> file_;
  Sha256 digest_;
  int64_t bytes_ = 0;
};

void report_piece(const StatePiece& piece, int file, int64_t offset, ShardReport& report) {
  CheckpointManifest::Tensor* tensor = report.add_tensors();
  tensor->set_name(piece.tensor);
  for (int d = 0; d < piece.shape.dims; ++d) tensor->add_shape(piece.shape[d]);
  CheckpointManifest::Piece* stored = piece.kind == StateKind::value     ? tensor->add_value()
                                      : piece.kind == StateKind::exp_avg ? tensor->add_exp_avg()
                                                                         : tensor->add_exp_avg_sq();
  stored->set_begin(piece.begin);
  stored->set_end(piece.end);
  stored->set_file(file);
  stored->set_offset(offset);
}

// Writes header and pieces; write_piece(file, piece) writes the elements of one.
template <class WritePiece>
void write_pieces(FileSystem& files, const std::string& folder, const std::string& name,
                  const std::vector<StatePiece>& pieces, const SafetensorsMetadata& metadata,
                  ShardReport& report, WritePiece&& write_piece) {
  std::vector<StoredTensor> tensors;
  for (const StatePiece& piece : pieces) tensors.push_back(stored_tensor(piece));
  const std::string header = safetensors_header(tensors, metadata, join_path(folder, name));
  DigestedFile file(files, folder, name);
  file.write(header.data(), header.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    report_piece(pieces[i], report.files_size(), int64_t(header.size()) + tensors[i].begin, report);
    write_piece(file, pieces[i]);
  }
  file.finish(report);
}

}  // namespace

StoredTensor stored_tensor(const StatePiece& piece) {
  if (piece.kind == StateKind::value && piece.begin == 0 && piece.end == piece.shape.elements())
    return {.name = piece.tensor, .dtype = DType::f32, .shape = piece.shape};
  return {.name = concat(kStateNames[int(piece.kind)], "/", piece.tensor, "[", piece.begin, ":",
                         piece.end, "]"),
          .dtype = DType::f32,
          .shape = {piece.end - piece.begin}};
}

void write_shard(FileSystem& files, const std::string& folder, const std::string& name,
                 const std::vector<StatePiece>& pieces, const SafetensorsMetadata& metadata,
                 ShardReport& report) {
  write_pieces(files, folder, name, pieces, metadata, report,
               [](DigestedFile& file, const StatePiece& piece) {
                 file.write(piece.data, size_t(piece.end - piece.begin) * sizeof(float));
               });
}

void write_shard(FileSystem& files, const std::string& folder, const std::string& name,
                 const std::vector<StatePiece>& pieces, const SafetensorsMetadata& metadata,
                 const PieceReader& read, ShardReport& report) {
  std::vector<float> buffer;
  write_pieces(files, folder, name, pieces, metadata, report,
               [&](DigestedFile& file, const StatePiece& piece) {
                 for_parts(piece, buffer, [&](const StatePiece& part) {
                   read(part);
                   file.write(part.data, size_t(part.end - part.begin) * sizeof(float));
                 });
               });
}

void write_small_file(FileSystem& files, const std::string& folder, const std::string& name,
                      std::string_view content, ShardReport& report) {
  DigestedFile file(files, folder, name);
  file.write(content.data(), content.size());
  file.finish(report);
}

}  // namespace moemamba
