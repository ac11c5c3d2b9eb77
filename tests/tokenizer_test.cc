#include "runtime/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "core/random.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// Enough different words for a vocabulary of some hundred pieces.
std::vector<std::string> training_texts() {
  const char* syllables[] = {"an", "ne", "el", "li", "ot", "went", "worth", "mus", "gro", "ve"};
  const Random random(7, "words");
  std::string text;
  for (uint64_t i = 0; i < 6000; ++i) {
    for (uint64_t s = 0; s < 3; ++s) text += syllables[random.integer(i * 4 + s, 10)];
    text += random.integer(i * 4 + 3, 12) == 0 ? ".\n\n" : " ";
  }
  return {text, "A second, short text.\n"};
}

std::vector<std::string> nasty_texts() {
  std::string every_byte, random_bytes;
  for (int byte = 0; byte < 256; ++byte) every_byte += char(byte);
  const Random random(3, "bytes");
  for (uint64_t i = 0; i < 5000; ++i) random_bytes += char(random.integer(i, 256));
  return {"",
          " ",
          "\n",
          "\n\n\n",
          "  two  spaces  ",
          "\ttabs\tand\r\nDOS lines\r",
          "no end of line",
          "emoji \xF0\x9F\xA6\x89, combining e\xCC\x81, ligature \xEF\xAC\x81, \xC2\xA0 space",
          "\xE2\x96\x81 the space mark itself \xE2\x96\x81\xE2\x96\x81",
          "\xEF\xBF\xBD replacement, byte order mark \xEF\xBB\xBF",
          "pieces as text: <0x41> <unk> <s> </s> \\n",
          std::string("zero \0 byte \0\0", 14),
          "cut-off UTF-8 \xE2\x82",
          "surrogate \xED\xA0\x80, overlong \xC0\xAF \xE0\x80\xAF, too high \xF5\x80\x80\x80",
          std::string(10000, 'a'),
          std::string(5000, ' '),
          every_byte,
          random_bytes};
}

TEST(Tokenizer, GivesBackEveryText) {
  for (const Tokenizer& tokenizer :
       {Tokenizer::bytes(), Tokenizer::train_bpe(training_texts(), 400)}) {
    for (const std::string& text : nasty_texts()) {
      const auto ids = tokenizer.encode(text);
      EXPECT_EQ(tokenizer.decode(ids), text) << tokenizer.description();
      EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.end_of_document()), 0);
      for (const int32_t id : ids) ASSERT_TRUE(id >= 0 && id < tokenizer.vocabulary());
    }
  }
}

TEST(Tokenizer, BytesAreIds) {
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_EQ(tokenizer.encode("a\xFF"), (std::vector<int32_t>{97, 255}));
  EXPECT_EQ(tokenizer.vocabulary(), 257);
  EXPECT_EQ(tokenizer.end_of_document(), 256);
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{72, 256, 105}), "Hi");
}

TEST(Tokenizer, TrainsThePromisedVocabularyAndTheSameEveryTime) {
  const auto texts = training_texts();
  const Tokenizer one = Tokenizer::train_bpe(texts, 400), two = Tokenizer::train_bpe(texts, 400);
  EXPECT_EQ(one.vocabulary(), 400);
  EXPECT_EQ(one.digest(), two.digest());
  EXPECT_LT(one.encode(texts[0]).size(), texts[0].size() / 3);  // it did learn words
}

TEST(Tokenizer, EncodesLinesAsIfTheyWereAlone) {
  const Tokenizer tokenizer = Tokenizer::train_bpe(training_texts(), 400);
  auto parts = tokenizer.encode("anneelliot went\n");
  tokenizer.encode("  musgrove", parts);
  EXPECT_EQ(parts, tokenizer.encode("anneelliot went\n  musgrove"));
}

TEST(Tokenizer, SurvivesItsFile) {
  TemporaryFolder folder;
  PosixFileSystem files;
  for (const Tokenizer& tokenizer :
       {Tokenizer::bytes(), Tokenizer::train_bpe(training_texts(), 350)}) {
    tokenizer.save(files, folder / "tokenizer.model");
    const Tokenizer again = Tokenizer::load(folder / "tokenizer.model");
    EXPECT_EQ(again.digest(), tokenizer.digest());
    EXPECT_EQ(again.digest(), sha256_of_file(folder / "tokenizer.model"));
    EXPECT_EQ(again.vocabulary(), tokenizer.vocabulary());
    EXPECT_EQ(again.encode("anne went\n"), tokenizer.encode("anne went\n"));
  }
}

TEST(Tokenizer, ReadsTheFirstBytesFile) {  // the format, as version 1 wrote it
  TemporaryFolder folder;
  const auto path = folder.put("old", "moemamba tokenizer 1\nkind: bytes\n");
  EXPECT_EQ(Tokenizer::load(path).kind(), TokenizerKind::bytes);
}

TEST(Tokenizer, RefusesWhatItCannotUse) {
  TemporaryFolder folder;
  EXPECT_NE(message_of([&] { Tokenizer::load(folder.put("empty", "")); }).find("empty"),
            std::string::npos);
  EXPECT_NE(message_of([&] { Tokenizer::load(folder.put("junk", "junk")); }).find("junk"),
            std::string::npos);
  EXPECT_NE(message_of([&] { Tokenizer::train_bpe({}, 400); }).find("found none"),
            std::string::npos);
  const std::vector<std::string> tiny = {"too little text"};
  EXPECT_NE(message_of([&] { Tokenizer::train_bpe(tiny, 4000); }).find("4000"), std::string::npos);
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_NE(message_of([&] { tokenizer.decode(std::vector<int32_t>{257}); }).find("257"),
            std::string::npos);
}

}  // namespace
}  // namespace moemamba
