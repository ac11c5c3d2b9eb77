#include "kernels/sha256.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/file.h"
#include "core/random.h"
#include "kernels/cpu/simd/sha256.h"
#include "runtime/checkpoint_digests.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

std::string random_bytes(const Random& random, size_t bytes, uint64_t& draw) {
  std::string text(bytes, '\0');
  for (char& c : text) c = char(random.integer(draw++, 256));
  return text;
}

// Files cut into runs anywhere: within blocks, on their borders, with runs of nothing.
TEST(Sha256, OfFilesAtOnceIsThatOfEachAlone) {
  const Random random(1, "sha256");
  uint64_t draw = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<std::string> texts(random.integer(draw++, 6));
    std::vector<std::vector<MemoryRun>> files;
    for (std::string& text : texts) {
      const uint64_t sizes[] = {0, 1, 63, 64, 65, 128, 1000, 64 * 40};
      text = random_bytes(random, sizes[random.integer(draw++, 8)], draw);
      std::vector<MemoryRun>& runs = files.emplace_back();
      for (size_t at = 0; at < text.size();) {
        const size_t step = random.integer(draw++, 2) ? 64 * random.integer(draw++, 9)
                                                      : random.integer(draw++, 200);
        const size_t bytes = std::min(step, text.size() - at);
        runs.push_back({text.data() + at, bytes});
        at += bytes;
      }
    }
    const std::vector<std::string> digests = sha256_of_runs(files);
    ASSERT_EQ(digests.size(), texts.size());
    for (size_t i = 0; i < texts.size(); ++i)
      ASSERT_EQ(digests[i], sha256(texts[i])) << texts[i].size() << " bytes, file " << i;
  }
}

void expect_right(int chains, Sha256Kernels::Blocks blocks, const Random& random) {
  constexpr size_t kBlocks = 1001;
  const std::string before = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
  uint64_t draw = 0;
  std::vector<std::string> texts;
  std::vector<Sha256> digests(kSha256Chains);
  uint32_t* words[kSha256Chains];
  const uint8_t* data[kSha256Chains];
  for (int c = 0; c < chains; ++c) {
    texts.push_back(random_bytes(random, 64 * kBlocks, draw));
    digests[size_t(c)].add(before);
    words[c] = digests[size_t(c)].words();
  }
  for (int c = 0; c < chains; ++c)
    data[c] = reinterpret_cast<const uint8_t*>(texts[size_t(c)].data());
  blocks(words, data, kBlocks);
  for (int c = 0; c < chains; ++c) {
    Sha256& digest = digests[size_t(c)];
    digest.count_blocks(kBlocks);
    digest.add("end");
    EXPECT_EQ(digest.hex(), sha256(before + texts[size_t(c)] + "end")) << chains << " chains";
  }
}

// Of every level that this processor can run, not of the one that it takes alone.
TEST(Sha256, OfManyBlocksInTwoAndThreeChains) {
  EXPECT_THROW(sha256_blocks(4, nullptr, nullptr, 1), Error);
  if (!can_chain_sha256()) {
    EXPECT_THROW(sha256_blocks(2, nullptr, nullptr, 1), Error);
    GTEST_SKIP() << "no SHA-256 instructions";
  }
  const Random random(2, "sha256");
  for (SimdLevel level : {SimdLevel::avx2, SimdLevel::avx512}) {
    if (level > simd_level()) continue;
    SCOPED_TRACE(name_of(level));
    expect_right(2, sha256_kernels(level).two, random);
    expect_right(3, sha256_kernels(level).three, random);
  }
}

// One that was wrong would write checkpoints that only this program calls whole.
TEST(Sha256, InChainsIsNotBelievedWhereOpensslSaysOtherwise) {
  if (!can_chain_sha256()) GTEST_SKIP() << "no SHA-256 instructions";
  EXPECT_TRUE(agrees_with_openssl([](auto... of) { sha256_blocks(of...); }));
  for (int wrong_chains : {2, 3})
    for (int wrong = 0; wrong < wrong_chains; ++wrong) {
      const auto blocks = [&](int chains, uint32_t* const* states, const uint8_t* const* data,
                              size_t count) {
        sha256_blocks(chains, states, data, count);
        if (chains == wrong_chains) states[wrong][7] ^= 1;
      };
      EXPECT_FALSE(agrees_with_openssl(blocks)) << wrong << " of " << wrong_chains;
    }
}

// Chunks of 512 KiB, up to three files at once, the larger ones first; threads from 8 MiB on.
TEST(Sha256, OfStoredFilesIsThatOfTheirBytes) {
  const TemporaryFolder folder;
  PosixFileSystem disk;
  const Random random(3, "sha256");
  uint64_t draw = 0;
  const std::string some = random_bytes(random, 1 << 20, draw);
  constexpr int64_t kChunk = 1 << 19;
  const std::vector<std::vector<int64_t>> cases = {
      {},
      {0},
      {5, 0, 64, kChunk},
      {kChunk + 1, kChunk - 1, 3 * kChunk, 2 * kChunk + 64, 7},
      {6 * kChunk + 3, 6 * kChunk, 6 * kChunk - 64, 2 * kChunk, 1, 0, 9 * kChunk}};
  for (const std::vector<int64_t>& sizes : cases) {
    std::vector<StoredFile> files;
    std::vector<std::string> texts;
    for (const int64_t size : sizes) {
      std::string& text = texts.emplace_back();
      while (int64_t(text.size()) < size) text += some.substr(draw++ % 1000);
      text.resize(size_t(size));
      files.push_back({folder / concat("file-", files.size()), size});
      write_file(disk, files.back().path, text);
    }
    for (int threads : {1, 2, 3}) {
      const std::vector<std::string> digests = sha256_of_files(files, threads);
      ASSERT_EQ(digests.size(), texts.size());
      for (size_t i = 0; i < texts.size(); ++i)
        ASSERT_EQ(digests[i], sha256(texts[i])) << texts[i].size() << " bytes, file " << i;
    }
    if (files.empty()) continue;
    ++files.back().bytes;
    EXPECT_EQ(sha256_of_files(files, 2).back(), "");
    files.back().path += "-missing";
    EXPECT_THROW(sha256_of_files(files, 2), Error);
  }
}

// By the cores that a rank has, not by how many ranks the job has elsewhere.
TEST(Sha256, TakesAsManyThreadsAsARankHasCoresFor) {
  const bool chains = can_chain_sha256();
  EXPECT_EQ(digest_threads(1, 1), 1);
  EXPECT_EQ(digest_threads(1, 2), 2);
  EXPECT_EQ(digest_threads(2, 2), 1);
  EXPECT_EQ(digest_threads(4, 2), 1);
  EXPECT_EQ(digest_threads(1, 3), chains ? 2 : 3);
  EXPECT_EQ(digest_threads(1, 4), 3);
  EXPECT_EQ(digest_threads(8, 128), 3);
}

TEST(Sha256, CountsBlocksOnly) {
  Sha256 digest;
  digest.add("abc");
  EXPECT_THROW(digest.count_blocks(1), Error);
}

}  // namespace
}  // namespace moemamba
