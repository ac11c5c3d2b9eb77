#include "runtime/checkpoint_shard.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <future>

#include "core/error.h"
#include "runtime/checkpoint_digests.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

constexpr size_t kChunk = 1 << 20;  // bytes that are hashed, then written

std::string bytes_of_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

void report_file(const std::string& name, int64_t bytes, const std::string& digest,
                 ShardReport& report) {
  CheckpointManifest::File* file = report.add_files();
  file->set_name(name);
  file->set_bytes(bytes);
  file->set_sha256(bytes_of_hex(digest));
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
  // The file, which is not synced yet.
  std::unique_ptr<OutputFile> finish(ShardReport& report) {
    report_file(name_, bytes_, digest_.hex(), report);
    return std::move(file_);
  }

 private:
  std::string name_;
  std::unique_ptr<OutputFile> file_;
  Sha256 digest_;
  int64_t bytes_ = 0;
};

// A few bytes where a disk may take them itself.
class Block {
 public:
  explicit Block(std::string_view bytes)
      : data_(static_cast<char*>(std::aligned_alloc(
            kDirectBlock, (bytes.size() + kDirectBlock - 1) / kDirectBlock * kDirectBlock))) {
    check(data_ != nullptr, "out of memory: could not allocate ", bytes.size(), " bytes");
    std::memcpy(data_.get(), bytes.data(), bytes.size());
  }
  const char* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
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

size_t bytes_of(const StatePiece& piece) {
  return size_t(piece.end - piece.begin) * sizeof(float);
}

int64_t up_to_border(int64_t bytes) {
  constexpr auto kBorder = int64_t(kDirectBlock);
  return (bytes + kBorder - 1) / kBorder * kBorder;
}

// A shard's bytes: its header, then its pieces. The shard must outlive it. Values of more than a
// few pages begin on a border of the file's blocks.
class ShardBytes {
 public:
  ShardBytes(const Shard& shard, const std::string& folder) : shard_(shard) {
    for (const StatePiece& piece : shard.pieces) {
      tensors_.push_back(stored_tensor(piece));
      values_ += bytes_of(piece);
    }
    header_ = safetensors_header(tensors_, shard.metadata, join_path(folder, shard.name),
                                 values_ >= kWorthBlocks ? kDirectBlock : 64);
  }
  const std::string& header() const { return header_; }
  int64_t bytes() const { return int64_t(header_.size() + values_); }
  // REQUIRES: the pieces lie one behind the other in memory.
  MemoryRun values() const {
    const char* begin = nullptr;
    size_t bytes = 0;
    for (const StatePiece& piece : shard_.pieces) {
      const auto* data = reinterpret_cast<const char*>(piece.data);
      if (!begin) begin = data;
      check(data == begin + bytes, shard_.name, ": ", piece.tensor, " does not follow in memory");
      bytes += bytes_of(piece);
    }
    return {begin, bytes};
  }
  // REQUIRES: the file is the next that `report` gets.
  void report_pieces(ShardReport& report) const {
    for (size_t i = 0; i < tensors_.size(); ++i)
      report_piece(shard_.pieces[i], report.files_size(),
                   int64_t(header_.size()) + tensors_[i].begin, report);
  }

 private:
  static constexpr size_t kWorthBlocks = 1 << 16;  // bytes
  const Shard& shard_;
  size_t values_ = 0;
  std::vector<StoredTensor> tensors_;
  std::string header_;
};

// A new file, not synced, past the page cache where that can be: a disk is given many blocks at
// once and reads them from where they lie.
std::unique_ptr<OutputFile> write_file_of(FileSystem& files, const std::string& path,
                                          const ShardBytes& content, size_t most) {
  auto file = files.open(path, OpenMode::create_direct);
  file->write(Block(content.header()).data(), content.header().size());
  const MemoryRun values = content.values();
  for (size_t at = 0; at < values.bytes; at += most)
    file->write(values.data + at, std::min(most, values.bytes - at));
  return file;
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

std::vector<Shard> shards_of(const std::vector<StatePiece>& pieces, int rank, int ranks,
                             const SafetensorsMetadata& metadata) {
  std::vector<Shard> shards;
  for (StateKind kind : {StateKind::value, StateKind::exp_avg, StateKind::exp_avg_sq}) {
    Shard shard{.name = shard_name(kShardNames[int(kind)], rank, ranks), .pieces = {}};
    for (const StatePiece& piece : pieces)
      if (piece.kind == kind) shard.pieces.push_back(piece);
    if (kind == StateKind::value) shard.metadata = metadata;
    if (!shard.pieces.empty()) shards.push_back(std::move(shard));
  }
  return shards;
}

// Kind by kind, and within one in order, as shards_of() does.
int64_t staging_bytes(const std::vector<StatePiece>& pieces) {
  int64_t of_kind[3] = {};
  for (const StatePiece& piece : pieces) of_kind[int(piece.kind)] += int64_t(bytes_of(piece));
  int64_t sum = 0;
  for (int64_t bytes : of_kind) sum += up_to_border(bytes);
  return sum == 0 ? 0 : sum + int64_t(kDirectBlock);  // to begin on a border itself
}

std::vector<StatePiece> staged_in(std::byte* memory, std::vector<StatePiece> pieces) {
  int64_t of_kind[3] = {};
  for (const StatePiece& piece : pieces) of_kind[int(piece.kind)] += int64_t(bytes_of(piece));
  std::byte* at[3];
  at[0] = memory + up_to_border(int64_t(uintptr_t(memory))) - int64_t(uintptr_t(memory));
  for (int kind = 1; kind < 3; ++kind) at[kind] = at[kind - 1] + up_to_border(of_kind[kind - 1]);
  for (StatePiece& piece : pieces) {
    std::byte*& next = at[int(piece.kind)];
    piece.data = reinterpret_cast<float*>(next);
    next += bytes_of(piece);
  }
  return pieces;
}

void write_shards(FileSystem& files, const std::string& folder, const std::vector<Shard>& shards,
                  const ShardWriting& how, ShardReport& report) {
  std::vector<ShardBytes> contents;
  for (const Shard& shard : shards) contents.emplace_back(shard, folder);
  // Shard i is hashed by thread i % threads.
  const auto threads = size_t(std::max(1, how.digest_threads));
  std::vector<std::future<std::vector<std::string>>> digests;
  for (size_t thread = 0; thread < threads; ++thread)
    digests.push_back(std::async(std::launch::async, [&, thread] {
      std::vector<std::vector<MemoryRun>> own;
      for (size_t i = thread; i < shards.size(); i += threads) {
        const std::string& header = contents[i].header();
        own.push_back({{header.data(), header.size()}, contents[i].values()});
      }
      return sha256_of_runs(own);
    }));
  std::future<uint64_t> state = std::async(std::launch::async, [&] {
    uint64_t sum = 0;
    for (const Shard& shard : shards) sum += state_hash_of(shard.pieces);
    return sum;
  });
  std::vector<std::unique_ptr<OutputFile>> written;
  for (size_t i = 0; i < shards.size(); ++i)
    written.push_back(write_file_of(files, join_path(folder, shards[i].name), contents[i],
                                    how.block_bytes));
  sync_and_close(std::move(written));
  std::vector<std::vector<std::string>> taken;
  for (auto& digest : digests) taken.push_back(digest.get());
  for (size_t i = 0; i < shards.size(); ++i) {
    contents[i].report_pieces(report);
    report_file(shards[i].name, contents[i].bytes(), taken[i % threads][i / threads], report);
  }
  report.set_state_hash(state.get());
}

void write_shard(FileSystem& files, const std::string& folder, const Shard& shard,
                 const PieceReader& read, ShardReport& report) {
  const ShardBytes content(shard, folder);
  DigestedFile file(files, folder, shard.name);
  file.write(content.header().data(), content.header().size());
  std::vector<float> buffer;
  for (const StatePiece& piece : shard.pieces)
    for_parts(piece, buffer, [&](const StatePiece& part) {
      read(part);
      file.write(part.data, bytes_of(part));
    });
  content.report_pieces(report);
  std::vector<std::unique_ptr<OutputFile>> written;
  written.push_back(file.finish(report));
  sync_and_close(std::move(written));
}

std::unique_ptr<OutputFile> write_small_file(FileSystem& files, const std::string& folder,
                                             const std::string& name, std::string_view content,
                                             ShardReport& report) {
  DigestedFile file(files, folder, name);
  file.write(content.data(), content.size());
  return file.finish(report);
}

void sync_and_close(std::vector<std::unique_ptr<OutputFile>> files) {
  for (const auto& file : files) file->sync();
  for (const auto& file : files) file->close();
}

}  // namespace moemamba
