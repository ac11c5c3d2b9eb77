// The program's command line as a user meets it: settings, usage, help.
#include <sstream>

#include "core/file.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

class CommandLine : public ProgramTest {};

TEST_F(CommandLine, ReportsAllWrongSettingsAtOnceWithExitCode2) {
  put("run.textproto",
      "model { experts: 2 top_k: 3 }\n"
      "parallel {\n  exprt: 2\n}\n");
  for (const char* ranks : {"", "--ranks 4 "}) {
    const Result result = shell(std::string("$moemamba train ") + ranks +
                                "--config run.textproto --train.lr=-1 --overwrite=maybe");
    EXPECT_EQ(result.code, 2);
    EXPECT_EQ(result.out, "");
    for (const std::string& part :
         {std::string(
              "run.textproto:3:3: parallel.exprt: no such setting; did you mean \"expert\"?"),
          std::string("run.textproto:1:20: model.top_k: must be at most the 2 experts"),
          std::string("--train.lr=-1: out of range: must be 0 to 10, found -1"),
          std::string("--overwrite=maybe: expected true or false, found \"maybe\""),
          std::string("data.train: no token files to train on")})
      EXPECT_EQ(count(result.err, part), 1) << part << "\nin\n" << result.err;
  }
}

TEST_F(CommandLine, RefusesLayoutsThatDoNotFit) {
  const std::string train = "$moemamba train --data.train=x ";
  Result result = shell(train + "--ranks 8 --parallel.expert=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err,
                  "--parallel.expert=3: must divide the 8 ranks that were started; "
                  "try 1, 2, 4 or 8"),
            1)
      << result.err;
  result = shell(train + "--ranks 4 --parallel.expert=4 --model.experts=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "--parallel.expert=4: 4 ranks cannot share 3 experts"), 1);
  result = shell(train + "--train.routing_group=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "16 sequences (train.global_batch_size) are not a multiple of the 3"),
            1)
      << result.err;
}

TEST_F(CommandLine, RefusesWrongUsageWithExitCode2) {
  for (const char* words :
       {"", "trian", "train --ranks 0", "train --ranks x", "train --config", "evaluate",
        "generate --run x --tokens 0", "prepare", "train extra",
        "prepare --output x --tokenizer morse y", "evaluate --run no/such/run"}) {
    const Result result = shell(std::string("$moemamba ") + words);
    EXPECT_EQ(result.code, 2) << words;
    EXPECT_FALSE(result.err.empty()) << words;
  }
}

TEST_F(CommandLine, HelpNamesEverySetting) {
  const Result result = shell("$moemamba train --help");
  EXPECT_EQ(result.code, 0);
  EXPECT_NE(result.out.find("--ranks"), std::string::npos);
  EXPECT_NE(result.out.find("--model.experts=8  (whole number, 1 to 4096)"), std::string::npos);
  EXPECT_NE(result.out.find("--data.train=(none)"), std::string::npos);
  for (const char* command : {"", "prepare", "evaluate", "generate", "plan", "settings"})
    EXPECT_EQ(shell(std::string("$moemamba ") + command + " --help").code, 0) << command;
}

TEST_F(CommandLine, VersionSaysWhatTheBuildIsMadeOf) {
  const Result result = shell("$moemamba --version");
  EXPECT_EQ(result.code, 0);
  for (const char* part : {"moemamba 0.", "sources: ", "compiler: ", "BLAS: OpenBLAS", "SIMD: avx"})
    EXPECT_NE(result.out.find(part), std::string::npos) << result.out;
}

// After an incremental build too.
TEST_F(CommandLine, VersionHasADigestOfTheSourcesAsTheyAre) {
  std::istringstream names(read_file(MOEMAMBA_BINARY_DIR "/generated/launcher/sources.txt"));
  std::string lines;
  int sources = 0;
  for (std::string name; std::getline(names, name); ++sources)
    lines += sha256_of_file(MOEMAMBA_SOURCE_DIR "/" + name) + "  " + name + "\n";
  EXPECT_GT(sources, 100);
  const Result result = shell("$moemamba --version");
  EXPECT_EQ(count(result.out, "  sources: " + sha256(lines).substr(0, 16) + "\n"), 1) << result.out;
}

// Out of date? Write it again: ./moemamba settings > docs/settings.md
TEST_F(CommandLine, TheReferencePageIsUpToDate) {
  const Result result = shell("$moemamba settings");
  EXPECT_EQ(result.code, 0);
  EXPECT_TRUE(result.out == read_file(std::string(MOEMAMBA_SOURCE_DIR) + "/docs/settings.md"))
      << "docs/settings.md differs from the schema: ./moemamba settings > docs/settings.md";
}

TEST_F(CommandLine, ShowsWhatSettingsResolveTo) {
  const Result result = shell("$moemamba settings --model.experts 32 --run=a");
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(count(result.out, "run: \"a\"\n"), 1);
  EXPECT_EQ(count(result.out, "  experts: 32\n"), 1);
  EXPECT_EQ(count(result.out, "  width: 192\n"), 1);
  EXPECT_EQ(
      shell("$moemamba settings --config " MOEMAMBA_SOURCE_DIR "/configs/moe_mamba_25m.textproto")
          .code,
      0);
}

}  // namespace
}  // namespace moemamba
