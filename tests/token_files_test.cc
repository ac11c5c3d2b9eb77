#include "runtime/token_files.h"

#include <gtest/gtest.h>

#include <numeric>

#include "core/error.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

std::string bytes_of(std::initializer_list<int> bytes) {
  std::string text;
  for (const int byte : bytes) text += char(byte);
  return text;
}

std::vector<int32_t> all_tokens(const TokenFile& file) {
  std::vector<int32_t> ids(size_t(file.size()));
  file.read(0, file.size(), ids.data());
  return ids;
}

// Two documents, {1, 2, 3} and {258}, as Megatron-LM's IndexedDatasetBuilder writes them in u16.
const std::string kOldIndex =
    std::string("MMIDIDX\0\0", 9) + bytes_of({1, 0, 0, 0, 0, 0, 0, 0, 8}) +
    bytes_of({2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0}) +
    bytes_of({3, 0, 0, 0, 1, 0, 0, 0}) +
    bytes_of({0, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0}) +
    bytes_of({0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0});
const std::string kOldTokens = bytes_of({1, 0, 2, 0, 3, 0, 2, 1});

// {5, 50256} as llm.c's data_common.py writes GPT-2 tokens.
std::string old_llmc() {
  std::string text = bytes_of({0x88, 0xD8, 0x34, 0x01, 1, 0, 0, 0, 2, 0, 0, 0});
  text.resize(1024);
  return text + bytes_of({5, 0, 0x50, 0xC4});
}

TEST(TokenFiles, ReadsAnOldMegatronPair) {
  TemporaryFolder folder;
  folder.put("a.idx", kOldIndex);
  folder.put("a.bin", kOldTokens);
  for (const char* name : {"a", "a.bin", "a.idx"}) {
    const TokenFile file(folder / name);
    EXPECT_EQ(file.format(), TokenFormat::megatron);
    EXPECT_EQ(all_tokens(file), (std::vector<int32_t>{1, 2, 3, 258}));
    ASSERT_EQ(file.documents(), 2);
    EXPECT_EQ(file.document_begin(1), 3);
    EXPECT_EQ(file.document_begin(2), 4);
  }
}

TEST(TokenFiles, ReadsAnOldLlmcFile) {
  TemporaryFolder folder;
  const TokenFile file(folder.put("a.bin", old_llmc()));
  EXPECT_EQ(file.format(), TokenFormat::llmc);
  EXPECT_EQ(all_tokens(file), (std::vector<int32_t>{5, 50256}));
  EXPECT_EQ(file.place(1), folder / "a.bin" + ", token 1 (byte 1026)");
  EXPECT_EQ(file.documents(), 0);
}

TEST(TokenFiles, ReadsNanoGptsRawFile) {
  TemporaryFolder folder;
  const TokenFile file(folder.put("train.bin", bytes_of({1, 0, 0xFF, 0xFF, 2, 1})));
  EXPECT_EQ(file.format(), TokenFormat::raw_u16);
  EXPECT_EQ(all_tokens(file), (std::vector<int32_t>{1, 65535, 258}));
  EXPECT_EQ(file.place(2), folder / "train.bin" + ", token 2 (byte 4)");
}

TEST(TokenFiles, GiveBackWhatWasWritten) {
  TemporaryFolder folder;
  PosixFileSystem files;
  for (const TokenFormat format : {TokenFormat::megatron, TokenFormat::llmc}) {
    for (const int64_t vocabulary : {257, 65499, 65500, 1 << 30}) {
      const int32_t top = int32_t(vocabulary) - 1;
      const std::vector<int32_t> long_one(70000, top), short_one = {0, top}, empty;
      TokenWriter writer(files, folder / "t", format, vocabulary);
      for (const auto* document : {&short_one, &empty, &long_one}) writer.add_document(*document);
      writer.commit();
      const TokenFile file(folder / "t");
      auto expected = short_one;
      expected.insert(expected.end(), long_one.begin(), long_one.end());
      EXPECT_EQ(all_tokens(file), expected);
      EXPECT_EQ(file.format(), format);
      EXPECT_EQ(file.documents(), format == TokenFormat::megatron ? 3 : 0);
      std::filesystem::remove(folder / "t.idx");
    }
  }
}

TEST(TokenFiles, ReadEveryIntegerWidth) {
  TemporaryFolder folder;
  struct Row {
    int code, bytes;
    int64_t expected;  // of all-ones bytes
  };
  for (const Row row :
       {Row{1, 1, 255}, {2, 1, -1}, {3, 2, -1}, {4, 4, -1}, {5, 8, -1}, {8, 2, 65535}}) {
    std::string index = kOldIndex;
    index[17] = char(row.code);
    index[50] = char(3 * row.bytes);  // offset of the second sequence
    folder.put("a.idx", index);
    folder.put("a.bin", std::string(size_t(4 * row.bytes), '\xFF'));
    EXPECT_EQ(all_tokens(TokenFile(folder / "a")), std::vector<int32_t>(4, int32_t(row.expected)));
  }
}

TEST(TokenFiles, RefuseTruncationAtEveryByte) {
  TemporaryFolder folder;
  folder.put("a.bin", kOldTokens);
  for (size_t size = 0; size < kOldIndex.size(); ++size) {
    folder.put("a.idx", kOldIndex.substr(0, size));
    EXPECT_THROW(TokenFile(folder / "a"), Error) << size;
  }
  folder.put("a.idx", kOldIndex);
  for (size_t size = 0; size < kOldTokens.size(); ++size) {
    folder.put("a.bin", kOldTokens.substr(0, size));
    EXPECT_THROW(TokenFile(folder / "a"), Error) << size;
  }
  const std::string llmc = old_llmc();
  for (size_t size = 0; size < llmc.size(); ++size) {
    folder.put("b.bin", llmc.substr(0, size));
    EXPECT_THROW(TokenFile(folder / "b", TokenFormat::llmc), Error) << size;
    if (size >= 8) {  // shorter: nothing tells it from raw tokens
      EXPECT_THROW(TokenFile(folder / "b"), Error) << size;
    }
  }
  for (const size_t size : {0, 1, 3}) {
    folder.put("c.bin", std::string(size, '\1'));
    EXPECT_THROW(TokenFile(folder / "c"), Error) << size;
  }
  EXPECT_THROW(TokenFile(folder / "missing"), Error);
  EXPECT_THROW(TokenFile(folder.put("d.bin", llmc + "xx")), Error);
}

// Whatever a byte of the index becomes: an Error, or a file that can be read to its end.
TEST(TokenFiles, SurviveEveryChangedByteOfAnIndex) {
  TemporaryFolder folder;
  folder.put("a.bin", kOldTokens);
  for (size_t at = 0; at < kOldIndex.size(); ++at) {
    for (const int value : {0, 1, 2, 0x7F, 0x80, 0xFF}) {
      std::string index = kOldIndex;
      index[at] = char(value);
      folder.put("a.idx", index);
      try {
        const TokenFile file(folder / "a");
        all_tokens(file);
        for (int64_t d = 0; d <= file.documents(); ++d) {
          EXPECT_GE(file.document_begin(d), 0);
          EXPECT_LE(file.document_begin(d), file.size());
        }
      } catch (const Error&) {
      }
    }
  }
}

// Users name these files, and link to data elsewhere; the files name no others.
TEST(TokenFiles, MayBeLinks) {
  TemporaryFolder folder;
  folder.put("real.idx", kOldIndex);
  folder.put("real.bin", kOldTokens);
  for (const char* end : {".idx", ".bin"})
    std::filesystem::create_symlink(std::string("real") + end, folder / (std::string("a") + end));
  EXPECT_EQ(all_tokens(TokenFile(folder / "a")), (std::vector<int32_t>{1, 2, 3, 258}));
}

TEST(TokenFiles, WriterRefusesIdsOutsideTheVocabulary) {
  TemporaryFolder folder;
  PosixFileSystem files;
  {
    TokenWriter writer(files, folder / "a", TokenFormat::megatron, 10);
    EXPECT_NE(message_of([&] { writer.add_document(std::vector<int32_t>{10}); }).find("id 10"),
              std::string::npos);
    EXPECT_THROW(writer.add_document(std::vector<int32_t>{-1}), Error);
    EXPECT_THROW(writer.commit(), Error);  // nothing in it
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace moemamba
