#include "core/schema.h"

#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "core/random.h"
#include "core/schema_parts.h"
#include "launcher/run_config.pb.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

using namespace std::string_view_literals;
using Problems = std::vector<std::string>;

Problems problems_of(std::string_view text) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("run.textproto", text);
  return settings.problems();
}

Problems problems_of_option(const std::string& option) {
  RunConfig config;
  Settings settings(config);
  settings.read_option(option);
  return settings.problems();
}

RunConfig read(std::string_view text, const std::vector<std::string>& options = {}) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("run.textproto", text);
  for (const std::string& option : options) settings.read_option(option);
  settings.throw_problems();
  return config;
}

TEST(Schema, FillsEveryKindOfField) {
  const RunConfig config = read(R"(
    run: "runs/" 'x'  # two texts are one
    overwrite: true; model { width: 0x80, norm: RMS_NORM expand: 1.5f norm_eps: 1e-6 }
    train: < seed: 18446744073709551615 steps: 10 >
    data { train: "a" train: ["b", "\x63\144\n"] })");
  EXPECT_EQ(config.run(), "runs/x");
  EXPECT_TRUE(config.overwrite());
  EXPECT_EQ(config.model().width(), 128);
  EXPECT_EQ(config.model().norm(), ModelConfig::RMS_NORM);
  EXPECT_EQ(config.model().expand(), 1.5);
  EXPECT_EQ(config.model().norm_eps(), 1e-6f);
  EXPECT_EQ(config.train().seed(), 18446744073709551615u);
  ASSERT_EQ(config.data().train_size(), 3);
  EXPECT_EQ(config.data().train(2), "cd\n");
  EXPECT_EQ(config.model().blocks(), 4);  // a default
}

TEST(Schema, SuggestsTheNearestName) {
  EXPECT_EQ(problems_of("\nparallel {\n  exprt: 2\n}\n"),
            Problems{"run.textproto:3:3: parallel.exprt: no such setting; did you mean "
                     "\"expert\"?"});
  EXPECT_EQ(problems_of("experts: 2"),
            Problems{"run.textproto:1:1: experts: no such setting; did you mean "
                     "\"model.experts\"?"});
  EXPECT_EQ(problems_of_option("--model.exprts=3"),
            Problems{"--model.exprts=3: no such setting; did you mean \"--model.experts\"?"});
  EXPECT_EQ(problems_of_option("--experts=3"),
            Problems{"--experts=3: no such setting; did you mean \"--model.experts\"?"});
  EXPECT_EQ(problems_of_option("--parallel.zzzzzz=3"),
            Problems{"--parallel.zzzzzz=3: no such setting; there are expert, exchange_rows, "
                     "deadline_seconds"});
}

TEST(Schema, ReportsAllProblemsAtOnce) {
  const Problems problems = problems_of(R"(modle { width: 3 nested { a: [1, 2] } }
model {
  widht: 64
  blocks: "four"
  experts: -1
  norm: RMS
  top_k: 1.5
  final_norm: yes
}
train { lr: nan steps: 99999999999999999999 lr: 1 }
run: 3
)");
  EXPECT_EQ(
      problems,
      (Problems{
          "run.textproto:1:1: modle: no such setting; did you mean \"model\"?",
          "run.textproto:3:3: model.widht: no such setting; did you mean \"width\"?",
          "run.textproto:4:11: model.blocks: expected a whole number, found a text in quotes",
          "run.textproto:5:12: model.experts: out of range: must be 1 to 4096, found -1",
          "run.textproto:6:9: model.norm: expected LAYER_NORM or RMS_NORM, found \"RMS\"",
          "run.textproto:7:10: model.top_k: expected a whole number, found \"1.5\"",
          "run.textproto:8:15: model.final_norm: expected true or false, found \"yes\"",
          "run.textproto:10:13: train.lr: must be a finite number that a float can hold, found nan",
          "run.textproto:10:24: train.steps: out of range: must be 0 to 1e+12, found "
          "99999999999999999999",
          "run.textproto:10:45: train.lr: given twice, first at 10:9; keep one",
          "run.textproto:11:6: run: expected a text in quotes, found \"3\""}));
}

TEST(Schema, ThrowsAllProblemsInOneError) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("a", "x: 1 y: 2");
  settings.read_option("--z=3");
  try {
    settings.throw_problems();
    FAIL();
  } catch (const BadSettings& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("a:1:1: x:"), std::string::npos);
    EXPECT_NE(what.find("\na:1:6: y:"), std::string::npos);
    EXPECT_NE(what.find("\n--z=3:"), std::string::npos);
  }
}

TEST(Schema, GoesOnAfterBrokenSentences) {
  const Problems problems = problems_of(R"(run "x"
model: 3
model width: 4
data { train: "open
}
$ %
train { steps: }
parallel { expert: { x: 1 } exprt: 2 }
overwrite: [true]
] )");
  std::string all;
  for (const std::string& problem : problems) all += problem + "\n";
  for (const char* part :
       {"1:1: run: expected \"run: VALUE\", found a text in quotes",
        "2:1: model: expected \"model { ... }\", found \"3\"",
        "3:1: model: expected \"model { ... }\", found \"width\"",
        "4:15: data.train: expected a value, found text without closing quote",
        "6:1: expected the name of a setting, found unexpected character '$'",
        "7:16: train.steps: expected a value, found \"}\"",
        "8:12: parallel.expert: expected \"expert: VALUE\", found \"{\"",
        "8:29: parallel.exprt: no such setting", "9:12: overwrite: takes one value, found a list",
        "10:1: expected the name of a setting, found \"]\""})
    EXPECT_NE(all.find(part), std::string::npos) << part << "\nin\n" << all;
  EXPECT_EQ(problems.size(), 10u) << all;
}

TEST(Schema, NamesAMissingBraceAndAMissingFile) {
  EXPECT_EQ(problems_of("model {\n width: 3\n"),
            Problems{"run.textproto:3:1: expected '}', found the end of the file"});
  RunConfig config;
  Settings settings(config);
  settings.read_file("no/such/file.textproto");
  ASSERT_EQ(settings.problems().size(), 1u);
  EXPECT_NE(settings.problems()[0].find("no/such/file.textproto: cannot be read"),
            std::string::npos);
}

TEST(Schema, ChecksBoundsInclusivelyAndInTheFieldsOwnType) {
  EXPECT_TRUE(problems_of("model { norm_eps: 0.1 experts: 4096 }").empty());
  EXPECT_TRUE(problems_of("parallel { exchange_rows: 0.01 }").empty());
  EXPECT_EQ(problems_of("model { experts: 4097 }").size(), 1u);
  EXPECT_EQ(problems_of("parallel { expert: 0 }").size(), 1u);
}

TEST(Schema, RefusesNumbersThatAreNone) {
  for (const char* value : {"nan", "-nan", "inf", "-inf", "infinity", "1e39", "1e400", "1e-400",
                            "1..2", "--1", "+1", "1e", "0x1p3", "", "f", "1 2"})
    EXPECT_EQ(problems_of_option(std::string("--train.lr=") + value).size(), 1u) << value;
  for (const char* value : {"9223372036854775808", "-1", "18446744073709551616", "1e3", "0x", "x",
                            "1.0", ""})
    EXPECT_EQ(problems_of_option(std::string("--train.steps=") + value).size(), 1u) << value;
  EXPECT_EQ(problems_of_option("--train.seed=-1").size(), 1u);
  EXPECT_EQ(problems_of_option("--train.seed=18446744073709551616").size(), 1u);
  EXPECT_TRUE(problems_of_option("--train.seed=0xffffffffffffffff").empty());
}

TEST(Schema, OptionsWinAndNameTheirValuesInAnyCase) {
  const RunConfig config =
      read("model { experts: 4 norm: LAYER_NORM } overwrite: true",
           {"--model.experts=32", "--model.norm=rms_norm", "--overwrite=False",
            "--init-from=a=b", "--model.experts=16"});
  EXPECT_EQ(config.model().experts(), 16);
  EXPECT_EQ(config.model().norm(), ModelConfig::RMS_NORM);
  EXPECT_FALSE(config.overwrite());
  EXPECT_EQ(config.init_from(), "a=b");
}

TEST(Schema, RefusesBrokenOptions) {
  EXPECT_EQ(problems_of_option("--overwrite"),
            Problems{"--overwrite: needs a value: --overwrite=VALUE"});
  EXPECT_EQ(problems_of_option("--model=3"),
            Problems{"--model=3: is a group of settings, not a value; write --model.NAME=VALUE"});
  EXPECT_EQ(problems_of_option("--run.x=3"),
            Problems{"--run.x=3: \"run\" is one setting, not a group"});
  EXPECT_EQ(problems_of_option("--model.expert_activation=relo"),
            Problems{"--model.expert_activation=relo: expected RELU, GELU, SILU or SWIGLU, found "
                     "\"relo\"; did you mean RELU?"});
  for (const char* option : {"", "-", "--", "---x=1", "model.width=3", "--=3", "--.=3", "--..=",
                             "--model.=3", "--.model=3"})
    EXPECT_EQ(problems_of_option(option).size(), 1u) << option;
}

TEST(Schema, LaterSourcesReplaceLists) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("one",
                     R"(data { train: "a" train: "b" validation: "v" } model { width: 64 })");
  settings.read_text("two", R"(data { train: ["c", "d"] } model { blocks: 2 })");
  EXPECT_EQ(config.data().train_size(), 2);
  EXPECT_EQ(config.data().train(0), "c");
  EXPECT_EQ(config.data().validation_size(), 1);  // not mentioned: kept
  EXPECT_EQ(config.model().width(), 64);          // groups are merged
  settings.read_text("three", "data { train: [] }");
  EXPECT_EQ(config.data().train_size(), 0);
  settings.read_text("four", R"(data { train: "e" })");
  settings.read_option("--data.train=x");
  settings.read_option("--data.train=y");
  ASSERT_EQ(config.data().train_size(), 2);
  EXPECT_EQ(config.data().train(1), "y");
  EXPECT_TRUE(settings.problems().empty());
}

TEST(Schema, ObjectsWhereTheValueWasGiven) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("f", "model {\n  top_k: 9 }");
  settings.read_option("--parallel.expert=3");
  settings.object("model.top_k", "too many");
  settings.object("parallel.expert", "must divide 8");
  settings.object("model.experts", "too few");
  EXPECT_EQ(settings.problems(),
            (Problems{"f:2:3: model.top_k: too many", "--parallel.expert=3: must divide 8",
                      "model.experts: too few"}));
}

TEST(Schema, ResolvedTextReadsBackToItself) {
  RunConfig config = read(R"(run: "q\"uo\\te\n\001\xc3\xa9" model { norm_eps: 1e-7 expand: 2.5 }
                            data { train: ["a", "b"] sampling: CIRCULAR } init_from: "w")");
  const std::string text = resolved_text(config);
  EXPECT_NE(text.find("  norm_eps: 1e-07\n"), std::string::npos) << text;
  EXPECT_NE(text.find("  width: 192\n"), std::string::npos);  // defaults too
  const RunConfig again = read(text);
  EXPECT_EQ(resolved_text(again), text);
  EXPECT_EQ(again.run(), config.run());
  RunConfig by_library;  // it is protobuf's own text format
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &by_library));
  EXPECT_EQ(by_library.SerializeAsString(), again.SerializeAsString());
}

// Defaults obey the ranges beside them: what resolved_text() prints is legal.
TEST(Schema, FilesThatAreNoSettingsAreNotReadWhole) {
  TemporaryFolder folder;
  RunConfig config;
  Settings settings(config);
  settings.read_file(folder.put("large", std::string((1 << 20) + 1, '#')));
  settings.read_file(folder.put("full", std::string(1 << 20, '#')));
  settings.read_file(folder.put("empty", ""));
  ASSERT_EQ(settings.problems().size(), 1u);
  EXPECT_EQ(settings.problems()[0],
            folder / "large" + ": more than 1048576 bytes; is this the path of a settings file?");
}

// What reading keeps is as long as the text, not twice that.
TEST(Schema, LongWordsAndTextsAreReadToTheirEnds) {
  const std::string many(100000, 'x');
  RunConfig config;
  Settings settings(config);
  settings.read_text("f", "run: \"" + many + "\\\"\" 'y'  init_from: \"a\\\\\"\n" + many + ": 1");
  EXPECT_EQ(config.run(), many + "\"y");
  EXPECT_EQ(config.init_from(), "a\\");
  ASSERT_EQ(settings.problems().size(), 1u);
  EXPECT_EQ(settings.problems()[0].substr(0, 8), "f:2:1: x");
}

TEST(Schema, ListsHaveAnEnd) {
  std::string list = "train: [\"t\"";
  for (int i = 1; i < Settings::kMostElements; ++i) list += ",\"t\"";
  const std::string full =
      "all lists together hold at most 1000 values; prepare fewer, longer token files";
  RunConfig config;
  Settings settings(config);
  settings.read_text("f", "data { " + list + "] }");
  settings.read_text("g", "data { " + list + "]\n validation: [\"v\", \"v\"] } run: \"r\"");
  EXPECT_EQ(config.data().train_size(), Settings::kMostElements);
  EXPECT_EQ(config.data().validation_size(), 0);
  EXPECT_EQ(config.run(), "r");
  settings.read_option("--data.validation=o");
  settings.read_option("--data.train=o");
  settings.read_option("--data.validation=p");
  EXPECT_EQ(config.data().train_size() + config.data().validation_size(), 2);
  EXPECT_EQ(settings.problems(),
            (Problems{"g:2:15: data.validation: " + full, "--data.validation=o: " + full}));
}

TEST(Schema, DefaultsAreInRange) { EXPECT_NO_THROW(read(resolved_text(RunConfig()))); }

TEST(Schema, PresetsAreValid) {
  int presets = 0;
  const std::string folder = std::string(MOEMAMBA_SOURCE_DIR) + "/configs";
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    RunConfig config;
    Settings settings(config);
    settings.read_file(entry.path());
    EXPECT_NO_THROW(settings.throw_problems());
    ++presets;
  }
  EXPECT_GE(presets, 2);
}

// Any message: lists of groups, groups within themselves.
TEST(Schema, ReadsListsOfGroups) {
  google::protobuf::FileDescriptorProto file;
  Settings settings(file);
  settings.read_text("f", R"(message_type { name: "A" nested_type { name: "B" } }
                             message_type { name: "C" field { nmae: "d" } })");
  ASSERT_EQ(file.message_type_size(), 2);
  EXPECT_EQ(file.message_type(0).nested_type(0).name(), "B");
  EXPECT_EQ(settings.problems(),
            Problems{"f:2:63: message_type[1].field[0].nmae: no such setting; did you mean "
                     "\"name\"?"});
  std::string deep = "message_type { ";
  for (int i = 0; i < 5000; ++i) deep += "nested_type { ";
  Settings deeper(file);
  deeper.read_text("f", deep);
  EXPECT_FALSE(deeper.problems().empty());
}

TEST(Schema, SurvivesMutations) {
  const std::string seed_text = R"(run: "x" model { width: 8 norm: RMS_NORM experts: [1] }
    data { train: ["a", 'b'] train: "c" } train < lr: -1.5e-3 > # end
    parallel { expert: 0x10; exchange_rows: inf })";
  const Random random(7, "schema mutations");
  const std::string_view bytes = "{}[]<>:;,#\"'\\\n\0 .-+eExX0nf\xff"sv;
  uint64_t index = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = seed_text;
    for (uint64_t edit = random.integer(index++, 6) + 1; edit > 0; --edit) {
      const size_t at = random.integer(index++, text.size());
      const char byte = bytes[random.integer(index++, bytes.size())];
      switch (random.integer(index++, 4)) {
        case 0: text.erase(at, 1 + random.integer(index++, 8)); break;
        case 1: text.insert(at, 1, byte); break;
        case 2: text[at] = byte; break;
        default: text = text.substr(at) + text.substr(0, at);
      }
      if (text.empty()) text = "x";
    }
    RunConfig config;
    Settings settings(config);
    settings.read_text("m", text);
    settings.read_option("--" + text);
    EXPECT_LE(settings.problems().size(), 102u);
    RunConfig again;  // whatever was understood is legal
    Settings check(again);
    check.read_text("again", resolved_text(config));
    EXPECT_TRUE(check.problems().empty()) << text << "\n" << check.problems()[0];
  }
}

TEST(Schema, MeasuresEdits) {
  EXPECT_EQ(nearest("widht", {"width", "blocks"}), "width");
  EXPECT_EQ(nearest("WIDTH", {"width", "blocks"}), "width");
  EXPECT_EQ(nearest("x", {"width", "blocks"}), "");
  EXPECT_EQ(nearest("", {"a"}), "a");
  EXPECT_EQ(nearest(std::string(1000, 'a'), {std::string(1000, 'a')}), "");
}

}  // namespace
}  // namespace moemamba
