#include "runtime/checkpoint_shard.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <future>

#include "core/error.h"
#include "kernels/sha256.h"
#include "runtime/checkpoint_digests.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

constexpr size_t kChunk = 1 << 20;  // bytes that are hashed, then written
constexpr size_t kHugePage = 2 << 20;

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
  void finish(ShardReport& report) {
    file_->sync();
    file_->close();
    report_file(name_, bytes_, digest_.hex(), report);
  }

 private:
  std::string name_;
  std::unique_ptr<OutputFile> file_;
  Sha256 digest_;
  int64_t bytes_ = 0;
};

// Memory from which a disk may take whole blocks itself. Large ones are of huge pages where the
// system has such: it looks up every page of every write, and the disk gets fewer and longer
// requests.
class Block {
 public:
  explicit Block(size_t bytes)
      : bytes_(bytes), whole_(bytes + (bytes < kHugePage ? 0 : kHugePage)) {
    void* mapped =
        ::mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(mapped != MAP_FAILED, "out of memory: could not allocate ", whole_, " bytes");
    mapped_ = data_ = static_cast<char*>(mapped);
    if (bytes < kHugePage) return;
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(mapped) % kHugePage) % kHugePage;
    ::madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { ::munmap(mapped_, whole_); }
  size_t bytes() const { return bytes_; }
  char* data() const { return data_; }

 private:
  size_t bytes_, whole_;
  char *mapped_ = nullptr, *data_ = nullptr;
};

// The bytes of a file, from its first to its last.
class ByteStream {
 public:
  explicit ByteStream(std::vector<MemoryRun> runs) : runs_(std::move(runs)) {}
  // The next bytes, at most `most`; how many there were.
  size_t take(char* to, size_t most) {
    size_t taken = 0;
    while (taken < most && next_ < runs_.size()) {
      MemoryRun& run = runs_[next_];
      const size_t part = std::min(run.bytes, most - taken);
      std::memcpy(to + taken, run.data, part);
      run.data += part, run.bytes -= part, taken += part;
      if (run.bytes == 0) ++next_;
    }
    return taken;
  }

 private:
  std::vector<MemoryRun> runs_;
  size_t next_ = 0;
};

// Writes a new file in blocks, past the page cache where that can be. Pieces begin on no border of
// the file's blocks, so that they are copied; one block is filled while the other is written.
void write_blocks(FileSystem& files, const std::string& path, ByteStream& bytes,
                  Block (&blocks)[2]) {
  const auto file = files.open(path, OpenMode::create_direct);
  size_t filled = bytes.take(blocks[0].data(), blocks[0].bytes());
  for (int at = 0; filled > 0; at = 1 - at) {
    Block& other = blocks[1 - at];
    std::future<size_t> next =
        std::async(std::launch::async, [&] { return bytes.take(other.data(), other.bytes()); });
    file->write(blocks[at].data(), filled);
    filled = next.get();
  }
  file->sync();
  file->close();
}

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

// A shard's bytes: its header, then its pieces. The shard must outlive it.
class ShardBytes {
 public:
  ShardBytes(const Shard& shard, const std::string& folder) : shard_(shard) {
    for (const StatePiece& piece : shard.pieces) tensors_.push_back(stored_tensor(piece));
    header_ = safetensors_header(tensors_, shard.metadata, join_path(folder, shard.name));
  }
  const std::string& header() const { return header_; }
  int64_t bytes() const {
    return int64_t(header_.size()) + (tensors_.empty() ? 0 : tensors_.back().end);
  }
  std::vector<MemoryRun> runs() const {
    std::vector<MemoryRun> runs = {{header_.data(), header_.size()}};
    for (const StatePiece& piece : shard_.pieces)
      if (const size_t bytes = bytes_of(piece); bytes > 0)
        runs.push_back({reinterpret_cast<const char*>(piece.data), bytes});
    return runs;
  }
  // REQUIRES: the file is the next that `report` gets.
  void report_pieces(ShardReport& report) const {
    for (size_t i = 0; i < tensors_.size(); ++i)
      report_piece(shard_.pieces[i], report.files_size(),
                   int64_t(header_.size()) + tensors_[i].begin, report);
  }

 private:
  const Shard& shard_;
  std::vector<StoredTensor> tensors_;
  std::string header_;
};

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

void write_shards(FileSystem& files, const std::string& folder, const std::vector<Shard>& shards,
                  const ShardWriting& how, ShardReport& report) {
  std::vector<ShardBytes> contents;
  for (const Shard& shard : shards) contents.emplace_back(shard, folder);
  // Shard i is hashed by thread i % threads.
  const size_t threads =
      can_chain_sha256() ? size_t(std::max(1, how.digest_threads)) : shards.size();
  std::vector<std::future<std::vector<std::string>>> digests;
  for (size_t thread = 0; thread < threads; ++thread)
    digests.push_back(std::async(std::launch::async, [&, thread] {
      std::vector<std::vector<MemoryRun>> own;
      for (size_t i = thread; i < shards.size(); i += threads) own.push_back(contents[i].runs());
      return sha256_of_runs(own);
    }));
  std::future<uint64_t> state = std::async(std::launch::async, [&] {
    uint64_t sum = 0;
    for (const Shard& shard : shards) sum += state_hash_of(shard.pieces);
    return sum;
  });
  Block blocks[2] = {Block(how.block_bytes), Block(how.block_bytes)};
  for (size_t i = 0; i < shards.size(); ++i) {
    ByteStream bytes(contents[i].runs());
    write_blocks(files, join_path(folder, shards[i].name), bytes, blocks);
  }
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
  file.finish(report);
}

void write_small_file(FileSystem& files, const std::string& folder, const std::string& name,
                      std::string_view content, ShardReport& report) {
  DigestedFile file(files, folder, name);
  file.write(content.data(), content.size());
  file.finish(report);
}

}  // namespace moemamba
