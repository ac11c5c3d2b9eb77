#include "runtime/prepare.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>

#include "core/random.h"
#include "runtime/baselines.h"
#include "runtime/documents.h"
#include "tests/support/faulty_files.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

std::string big_endian(uint32_t value) {
  return {char(value >> 24), char(value >> 16), char(value >> 8), char(value)};
}

// One record of an R data base, as saveRDS-style serialisation 3 writes a character vector.
std::string r_record(const std::vector<std::string>& lines) {
  std::string raw = "X\n" + big_endian(3) + big_endian(0x40200) + big_endian(0x30500) +
                    big_endian(5) + "UTF-8" + big_endian(16) + big_endian(uint32_t(lines.size()));
  for (const std::string& line : lines) {
    if (line == "NA")
      raw += big_endian(9) + big_endian(uint32_t(-1));
    else
      raw += big_endian(0x40009) + big_endian(uint32_t(line.size())) + line;
  }
  uLongf size = compressBound(raw.size());
  std::string packed(size, '\0');
  compress(reinterpret_cast<Bytef*>(packed.data()), &size,
           reinterpret_cast<const Bytef*>(raw.data()), raw.size());
  return big_endian(uint32_t(raw.size())) + packed.substr(0, size);
}

std::vector<std::pair<std::string, std::string>> documents_in(const std::string& path) {
  std::vector<std::pair<std::string, std::string>> found;
  visit_documents(path, [&](const std::string& name, std::string_view text) {
    found.emplace_back(name, text);
  });
  return found;
}

using Documents = std::vector<std::pair<std::string, std::string>>;

TEST(Documents, ReadsTextFiles) {
  TemporaryFolder folder;
  EXPECT_EQ(documents_in(folder.put("Emma.txt", "I\r\n\tII")), (Documents{{"Emma", "I\r\n\tII"}}));
  EXPECT_EQ(documents_in(folder.put("empty.txt", "")), Documents{});
}

TEST(Documents, ReadsJsonLines) {
  TemporaryFolder folder;
  const auto path = folder.put("a.jsonl",
                               "{\"text\": \"one\\n\\u00e9\", \"title\": \"First\"}\r\n\n"
                               "{\"text\": \"\"}\n{\"id\": 7, \"text\": \"three\"}\n"
                               "{\"text\": \"no end of line\"}");
  EXPECT_EQ(
      documents_in(path),
      (Documents{{"First", "one\n\xC3\xA9"}, {"7", "three"}, {"a.jsonl:5", "no end of line"}}));
  for (const char* bad : {"{\"txt\": 1}", "{\"text\": 1}", "[]", "{\"text\": \"cut"}) {
    const auto file = folder.put("bad.jsonl", std::string("{\"text\":\"x\"}\n") + bad);
    EXPECT_NE(message_of([&] { documents_in(file); }).find("bad.jsonl:2: expected"),
              std::string::npos);
  }
}

TEST(Documents, ReadsAnRDataBaseAndRefusesItCutAnywhere) {
  TemporaryFolder folder;
  const std::string first = r_record({"", "EMMA", "by \xC3\x89", "NA"});
  const std::string whole = first + r_record({"Persuasion", "", "1"});
  EXPECT_EQ(documents_in(folder.put("R.rdb", whole)),
            (Documents{{"EMMA", "\nEMMA\nby \xC3\x89\n\n"}, {"Persuasion", "Persuasion\n\n1\n"}}));
  for (size_t size = 1; size < whole.size(); ++size) {
    if (size == first.size()) continue;
    EXPECT_THROW(documents_in(folder.put("R.rdb", whole.substr(0, size))), Error) << size;
  }
  std::string bomb = whole;
  bomb[0] = char(0xFF);  // a record of 4 GB
  EXPECT_NE(message_of([&] { documents_in(folder.put("R.rdb", bomb)); }).find("cannot come from"),
            std::string::npos);
}

TEST(Documents, ListsFoldersInOrder) {
  TemporaryFolder folder;
  folder.put("b.txt", "b");
  folder.put("a.jsonl", "{}");
  folder.put("readme.md", "no");
  EXPECT_EQ(list_inputs({folder.path()}),
            (std::vector<std::string>{folder / "a.jsonl", folder / "b.txt"}));
  EXPECT_THROW(list_inputs({folder / "readme.md"}), Error);
  EXPECT_THROW(list_inputs({folder / "none"}), Error);
}

std::string novel(uint64_t seed, int words) {
  const char* syllables[] = {"an", "ne", "el", "li", "ot", "went", "worth", "mus", "gro", "ve"};
  const Random random(seed, "novel");
  std::string text;
  for (int i = 0; i < words; ++i) {
    for (uint64_t s = 0; s < 3; ++s) text += syllables[random.integer(uint64_t(i) * 4 + s, 10)];
    text += i % 9 == 8 ? ".\n" : " ";
  }
  return text;
}

std::string decoded(const std::string& folder, const std::string& split) {
  const Tokenizer tokenizer = Tokenizer::load(tokenizer_path(folder));
  const TokenFile file(split);
  std::vector<int32_t> ids(size_t(file.size()));
  file.read(0, file.size(), ids.data());
  return tokenizer.decode(ids);
}

class Prepare : public testing::Test {
 protected:
  Prepare() {
    std::filesystem::create_directories(folder_ / "in");
    folder_.put("in/Emma.txt", emma_);
    folder_.put("in/Mansfield Park.txt", park_);
    folder_.put("in/Persuasion.txt", persuasion_);
    request_.inputs = {folder_ / "in"};
    request_.output = folder_ / "out";
    request_.vocabulary = 400;
  }
  std::string text(const char* split) { return decoded(folder_ / "out", folder_ / "out/" + split); }

  TemporaryFolder folder_;
  PosixFileSystem files_;
  PrepareRequest request_;
  const std::string emma_ = novel(1, 3000), park_ = novel(2, 2000), persuasion_ = novel(3, 1000);
};

TEST_F(Prepare, HoldsOutADocumentByName) {
  request_.hold_out = {"mansfieldpark"};
  for (const TokenizerKind kind : {TokenizerKind::bytes, TokenizerKind::bpe}) {
    for (const TokenFormat format : {TokenFormat::megatron, TokenFormat::llmc}) {
      request_.tokenizer = kind;
      request_.format = format;
      request_.overwrite = true;
      const PrepareSummary summary = prepare(files_, request_);
      EXPECT_EQ(text("train"), emma_ + persuasion_);
      EXPECT_EQ(text("validation"), park_);
      EXPECT_EQ(read_file(validation_text_path(folder_ / "out")), park_);
      const PrepareSummary read = read_summary(folder_ / "out");
      EXPECT_EQ(read.train.documents, 2);
      EXPECT_EQ(read.train.bytes, int64_t(emma_.size() + persuasion_.size()));
      EXPECT_EQ(read.train.tokens, TokenFile(train_path(folder_ / "out")).size());
      EXPECT_EQ(read.validation.bytes, int64_t(park_.size()));
      EXPECT_EQ(read.vocabulary, kind == TokenizerKind::bytes ? 257 : 400);
      EXPECT_EQ(read.end_of_document, summary.end_of_document);
      EXPECT_EQ(read.tokenizer_digest, sha256_of_file(tokenizer_path(folder_ / "out")));
      EXPECT_FALSE(file_exists(folder_ / "out.tmp") || file_exists(folder_ / "out.old"));
    }
  }
}

TEST_F(Prepare, HoldsOutByNumberOrFile) {
  request_.tokenizer = TokenizerKind::bytes;
  request_.hold_out = {"3"};
  prepare(files_, request_);
  EXPECT_EQ(text("validation"), persuasion_);
  request_.overwrite = true;
  request_.hold_out.clear();
  request_.validation_inputs = {folder_.put("other.txt", "other words")};
  prepare(files_, request_);
  EXPECT_EQ(text("train"), emma_ + park_ + persuasion_);
  EXPECT_EQ(text("validation"), "other words");
}

TEST_F(Prepare, HoldsOutAFraction) {
  request_.tokenizer = TokenizerKind::bytes;
  request_.held_out_fraction = 0.34;  // of three documents: one
  const auto whole = prepare(files_, request_);
  EXPECT_EQ(whole.validation.documents, 1);
  request_.overwrite = true;
  request_.held_out_fraction = 0.1;  // too few documents: the end of each, in whole lines
  const auto ends = prepare(files_, request_);
  EXPECT_EQ(ends.validation.documents, 3);
  const double all = double(emma_.size() + park_.size() + persuasion_.size());
  EXPECT_NEAR(double(ends.validation.bytes) / all, 0.1, 0.02);
  EXPECT_EQ(ends.train.bytes + ends.validation.bytes, int64_t(all));
  EXPECT_EQ(text("train").back(), '\n');
}

TEST_F(Prepare, TakesAnExistingTokenizer) {
  const Tokenizer tokenizer = Tokenizer::train_bpe(std::vector<std::string>{emma_}, 350);
  tokenizer.save(files_, folder_ / "mine.model");
  request_.tokenizer_file = folder_ / "mine.model";
  const auto summary = prepare(files_, request_);
  EXPECT_EQ(summary.vocabulary, 350);
  EXPECT_EQ(summary.tokenizer_digest, tokenizer.digest());
  EXPECT_EQ(summary.validation.documents, 0);
  EXPECT_FALSE(file_exists(validation_text_path(folder_ / "out")));
}

TEST_F(Prepare, RefusesBadRequests) {
  request_.tokenizer = TokenizerKind::bytes;
  request_.hold_out = {"Ulysses"};
  EXPECT_NE(message_of([&] { prepare(files_, request_); }).find("Mansfield Park"),
            std::string::npos);
  request_.hold_out = {"1", "2", "3"};
  EXPECT_NE(message_of([&] { prepare(files_, request_); }).find("nothing is left"),
            std::string::npos);
  EXPECT_FALSE(file_exists(folder_ / "out"));
  request_.hold_out.clear();
  prepare(files_, request_);
  EXPECT_NE(message_of([&] { prepare(files_, request_); }).find("already holds"),
            std::string::npos);
  request_.output = folder_ / "in";
  request_.overwrite = true;
  EXPECT_NE(message_of([&] { prepare(files_, request_); }).find("did not write"),
            std::string::npos);
  folder_.put("out/summary.json", "{\"version\": 1, \"train\": {}}");
  EXPECT_THROW(read_summary(folder_ / "out"), Error);
}

TEST_F(Prepare, WritesAllOrNothingWhateverFails) {
  request_.tokenizer = TokenizerKind::bytes;
  request_.hold_out = {"1"};
  FaultyFiles counting;
  prepare(counting, request_);
  const PrepareSummary expected = read_summary(folder_ / "out");
  for (int64_t working = 0; working < counting.operations; ++working) {
    remove_tree(files_, folder_ / "out");
    remove_tree(files_, folder_ / "out.tmp");
    FaultyFiles disk(working);
    EXPECT_THROW(prepare(disk, request_), Error) << working;
    if (!file_exists(folder_ / "out")) continue;
    EXPECT_EQ(read_summary(folder_ / "out").train.tokens, expected.train.tokens);
    EXPECT_EQ(text("validation"), emma_);
  }
}

TEST_F(Prepare, BaselinesMeasureBitsPerByte) {
  request_.tokenizer = TokenizerKind::bytes;
  request_.hold_out = {"1"};
  const auto summary = prepare(files_, request_);
  const double bigram = bigram_bits_per_byte(TokenFile(train_path(folder_ / "out")),
                                             TokenFile(validation_path(folder_ / "out")), 257,
                                             summary.validation.bytes);
  EXPECT_GT(bigram, 0.8);
  EXPECT_LT(bigram, 2.2);  // the alphabet alone would give about 3.8
  const double gzip = gzip_bits_per_byte(emma_);
  EXPECT_GT(gzip, 1.0);
  EXPECT_LT(gzip, 3.0);
}

TEST(Baselines, BigramIsADistributionOverTheVocabulary) {
  TemporaryFolder folder;
  PosixFileSystem files;
  TokenWriter train(files, folder / "train", TokenFormat::megatron, 3);
  train.add_document(std::vector<int32_t>{0, 1, 0, 1, 0, 2, 2});
  train.commit();
  double sum = 0;  // of the joint probability of all pairs
  for (int32_t a = 0; a < 3; ++a) {
    for (int32_t b = 0; b < 3; ++b) {
      TokenWriter pair(files, folder / "pair", TokenFormat::megatron, 3);
      pair.add_document(std::vector<int32_t>{a, b});
      pair.commit();
      sum += std::exp2(
          -bigram_bits_per_byte(TokenFile(folder / "train"), TokenFile(folder / "pair"), 3, 1));
    }
  }
  EXPECT_NEAR(sum, 1, 1e-12);
}

TEST(Baselines, GzipCompressesAsTheProgramDoes) {
  // `printf 'aaaa...' | gzip -9 | wc -c` for 1000 letters gives 29 bytes: header 10, trailer 8.
  EXPECT_NEAR(gzip_bits_per_byte(std::string(1000, 'a')), 8 * 29.0 / 1000, 8 * 3.0 / 1000);
}

}  // namespace
}  // namespace moemamba
