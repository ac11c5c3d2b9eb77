#include "runtime/checkpoint_digests.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <memory>
#include <semaphore>
#include <span>

#include "core/file.h"
#include "kernels/sha256.h"

namespace moemamba {

namespace {

constexpr size_t kBlock = 64;               // bytes
constexpr int64_t kChunk = 1 << 19;         // bytes of a file that are read, then hashed
constexpr int64_t kWorthAThread = 8 << 20;  // bytes of files

// One file on its way into its digest. Runs begin on no border of its blocks: what lies between
// whole blocks goes in byte by byte, the rest block by block from where it lies.
class Chain {
 public:
  Chain(const std::vector<MemoryRun>& runs, std::string& result)
      : next_(runs.data()), end_(runs.data() + runs.size()), result_(result) {}

  // Blocks one behind the other in memory; none: the file has ended, and its digest is there.
  size_t ready() {
    while (blocks_ == 0 && next_ != end_) begin(*next_++);
    if (blocks_ == 0) result_ = digest_.hex();
    return blocks_;
  }
  uint32_t* words() { return digest_.words(); }
  const uint8_t* data() const { return reinterpret_cast<const uint8_t*>(at_); }
  // So many of them have gone into words().
  void took(size_t blocks) {
    digest_.count_blocks(blocks);
    pass(blocks);
  }
  void take(size_t blocks) {
    digest_.add(at_, blocks * kBlock);
    pass(blocks);
  }

 private:
  void begin(const MemoryRun& run) {
    const size_t lead = std::min(run.bytes, (kBlock - partial_) % kBlock);
    digest_.add(run.data, lead);
    at_ = run.data + lead;
    blocks_ = (run.bytes - lead) / kBlock;
    tail_ = (run.bytes - lead) % kBlock;
    partial_ = (partial_ + run.bytes) % kBlock;
    if (blocks_ == 0) pass(0);
  }
  void pass(size_t blocks) {
    at_ += blocks * kBlock;
    blocks_ -= blocks;
    if (blocks_ == 0) digest_.add(at_, tail_);
  }

  const MemoryRun *next_, *end_;
  std::string& result_;
  Sha256 digest_;
  const char* at_ = nullptr;
  size_t blocks_ = 0, tail_ = 0;
  size_t partial_ = 0;  // bytes behind the last border of a block, of all runs that were begun
};

void go_on(const std::vector<std::unique_ptr<Chain>>& chains) {
  size_t blocks = SIZE_MAX;
  uint32_t* words[kSha256Chains];
  const uint8_t* data[kSha256Chains];
  for (size_t i = 0; i < chains.size(); ++i) {
    blocks = std::min(blocks, chains[i]->ready());
    words[i] = chains[i]->words();
    data[i] = chains[i]->data();
  }
  if (chains.size() == 1) return chains[0]->take(blocks);
  sha256_blocks(int(chains.size()), words, data, blocks);
  for (const auto& chain : chains) chain->took(blocks);
}

size_t most_at_once() {
  static const bool chains =
      can_chain_sha256() && agrees_with_openssl([](auto... of) { sha256_blocks(of...); });
  return chains ? kSha256Chains : 1;
}

// A file of a disk on its way into its digest, in two chunks: one is read, the other hashed.
class FileChain {
 public:
  explicit FileChain(const std::string& path) : file_(path) {
    for (std::string& chunk : chunks_) chunk.resize(size_t(std::min(kChunk, file_.bytes())));
  }
  int64_t size() const { return file_.bytes(); }
  // The next bytes; how many there were.
  size_t read(int chunk) {
    bytes_[chunk] = size_t(std::min(kChunk, file_.bytes() - at_));
    if (bytes_[chunk] > 0) file_.read_at(at_, chunks_[chunk].data(), bytes_[chunk]);
    at_ += int64_t(bytes_[chunk]);
    return bytes_[chunk];
  }
  size_t blocks(int chunk) const { return bytes_[chunk] / kBlock; }
  uint32_t* words() { return digest_.words(); }
  const uint8_t* data(int chunk) const {
    return reinterpret_cast<const uint8_t*>(chunks_[chunk].data());
  }
  // The rest of a chunk, of which so many blocks have gone into words().
  void finish(int chunk, size_t blocks) {
    if (blocks > 0) digest_.count_blocks(blocks);
    digest_.add(chunks_[chunk].data() + blocks * kBlock, bytes_[chunk] - blocks * kBlock);
  }
  std::string hex() { return digest_.hex(); }

 private:
  InputFile file_;
  int64_t at_ = 0;
  std::string chunks_[2];
  size_t bytes_[2] = {};
  Sha256 digest_;
};

// Chunks are whole blocks but for the last one of a file, behind which nothing more comes.
void hash(const std::vector<std::unique_ptr<FileChain>>& files, int chunk) {
  std::vector<FileChain*> going;
  size_t blocks = SIZE_MAX;
  for (const auto& file : files) {
    if (file->blocks(chunk) == 0) {
      file->finish(chunk, 0);
      continue;
    }
    going.push_back(file.get());
    blocks = std::min(blocks, file->blocks(chunk));
  }
  if (going.size() < 2) blocks = 0;  // OpenSSL's is as good
  uint32_t* words[kSha256Chains];
  const uint8_t* data[kSha256Chains];
  for (size_t i = 0; i < going.size(); ++i) {
    words[i] = going[i]->words();
    data[i] = going[i]->data(chunk);
  }
  if (blocks > 0) sha256_blocks(int(going.size()), words, data, blocks);
  for (FileChain* file : going) file->finish(chunk, blocks);
}

// Hashes chunks 0, 1, 0, .. as long as read() fills them. One thread of its own reads the next one
// meanwhile, whatever their number: a thread for each would meet a limit of threads now and then.
void read_ahead(FunctionRef<bool(int)> read, FunctionRef<void(int)> hash) {
  std::counting_semaphore<> empty(2), full(0);
  bool filled[2] = {};
  std::atomic<bool> given_up = false;
  std::future<void> reader = std::async(std::launch::async, [&] {
    for (int chunk = 0;; chunk = 1 - chunk) {
      empty.acquire();
      if (given_up) return;
      try {
        filled[chunk] = read(chunk);
      } catch (...) {
        filled[chunk] = false;
        full.release();
        throw;
      }
      full.release();
      if (!filled[chunk]) return;
    }
  });
  try {
    for (int chunk = 0; full.acquire(), filled[chunk]; chunk = 1 - chunk) {
      hash(chunk);
      empty.release();
    }
  } catch (...) {
    given_up = true;
    empty.release();
    throw;
  }
  reader.get();
}

struct Wanted {
  const StoredFile* file;
  std::string* digest;
};

// At most so many files as chains.
void digest_together(std::span<const Wanted> wanted, bool beside) {
  std::vector<std::unique_ptr<FileChain>> files;
  std::vector<std::string*> digests;
  for (const Wanted& one : wanted) {
    files.push_back(std::make_unique<FileChain>(one.file->path));
    digests.push_back(one.digest);
    if (files.back()->size() == one.file->bytes) continue;
    files.pop_back(), digests.pop_back();
  }
  const auto read = [&](int chunk) {
    size_t most = 0;
    for (const auto& file : files) most = std::max(most, file->read(chunk));
    return most > 0;
  };
  if (beside)
    read_ahead(read, [&](int chunk) { hash(files, chunk); });
  else
    while (read(0)) hash(files, 0);
  for (size_t i = 0; i < files.size(); ++i) *digests[i] = files[i]->hex();
}

}  // namespace

std::vector<std::string> sha256_of_runs(const std::vector<std::vector<MemoryRun>>& files) {
  std::vector<std::string> results(files.size());
  const size_t most = most_at_once();
  std::vector<std::unique_ptr<Chain>> chains;
  for (size_t next = 0; next < files.size() || !chains.empty();) {
    for (; next < files.size() && chains.size() < most; ++next)
      chains.push_back(std::make_unique<Chain>(files[next], results[next]));
    std::erase_if(chains, [](const auto& chain) { return chain->ready() == 0; });
    if (!chains.empty()) go_on(chains);
  }
  return results;
}

std::vector<std::string> sha256_of_files(const std::vector<StoredFile>& files, int threads) {
  std::vector<std::string> digests(files.size());
  std::vector<Wanted> wanted;
  int64_t bytes = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    wanted.push_back({&files[i], &digests[i]});
    bytes += files[i].bytes;
  }
  // Those that are taken at once should end together.
  std::ranges::stable_sort(wanted, std::greater(), [](const Wanted& w) { return w.file->bytes; });
  const bool beside = bytes >= kWorthAThread;
  const size_t shares = beside ? size_t(std::max(1, threads)) : 1;
  std::vector<std::future<void>> work;
  for (size_t share = 0; share < shares; ++share)
    work.push_back(
        std::async(beside ? std::launch::async : std::launch::deferred, [&, share] {
          std::vector<Wanted> own;
          for (size_t i = share; i < wanted.size(); i += shares) own.push_back(wanted[i]);
          for (size_t i = 0; i < own.size(); i += most_at_once())
            digest_together(std::span(own).subspan(i, std::min(most_at_once(), own.size() - i)),
                            beside);
        }));
  for (auto& share : work) share.get();
  return digests;
}

bool agrees_with_openssl(Sha256Blocks blocks) {
  constexpr size_t kBlocks = 2;
  for (int chains : {2, 3}) {
    std::string texts[kSha256Chains];
    Sha256 digests[kSha256Chains];
    uint32_t* words[kSha256Chains];
    const uint8_t* data[kSha256Chains];
    for (int c = 0; c < chains; ++c) {
      for (size_t i = 0; i < kBlocks * kBlock; ++i)
        texts[c].push_back(char(167 * i + 59 * size_t(c)));
      words[c] = digests[c].words();
      data[c] = reinterpret_cast<const uint8_t*>(texts[c].data());
    }
    blocks(chains, words, data, kBlocks);
    for (int c = 0; c < chains; ++c) {
      digests[c].count_blocks(kBlocks);
      if (digests[c].hex() != sha256(texts[c])) return false;
    }
  }
  return true;
}

int digest_threads(int ranks, int cores) {
  const int own = cores / ranks;
  return std::clamp(can_chain_sha256() ? own / 2 + 1 : own, 1, 3);
}

}  // namespace moemamba
