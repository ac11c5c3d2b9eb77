#include "runtime/checkpoint_digests.h"

#include <algorithm>
#include <memory>

#include "core/file.h"
#include "kernels/sha256.h"

namespace moemamba {

namespace {

constexpr size_t kBlock = 64;  // bytes

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

}  // namespace

std::vector<std::string> sha256_of_runs(const std::vector<std::vector<MemoryRun>>& files) {
  std::vector<std::string> results(files.size());
  const size_t most = can_chain_sha256() ? kSha256Chains : 1;
  std::vector<std::unique_ptr<Chain>> chains;
  for (size_t next = 0; next < files.size() || !chains.empty();) {
    for (; next < files.size() && chains.size() < most; ++next)
      chains.push_back(std::make_unique<Chain>(files[next], results[next]));
    std::erase_if(chains, [](const auto& chain) { return chain->ready() == 0; });
    if (!chains.empty()) go_on(chains);
  }
  return results;
}

}  // namespace moemamba
