// What is wrong with what a user gives: the message, the exit code, and that nothing half-written
// stays.
#include <cstdio>
#include <filesystem>

#include "core/file.h"
#include "core/gpu.h"
#include "runtime/token_files.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

class BadInput : public ProgramTest {
 protected:
  // `command` must fail with `code`, say each of `parts` once, and leave the run's folder alone.
  void expect_refused(const std::string& command, int code, std::vector<std::string> parts) const {
    const Result result = shell(command);
    EXPECT_EQ(result.code, code) << command << "\n" << result.err;
    for (const std::string& part : parts)
      EXPECT_EQ(count(result.err, part), 1) << part << "\nin\n" << result.err;
    EXPECT_EQ(result.out, "") << command;
    EXPECT_FALSE(file_exists(run())) << command;
  }
  void copy(const std::string& from, const std::string& to, uintmax_t bytes = UINTMAX_MAX) const {
    std::filesystem::copy_file(*this / from, *this / to);
    if (bytes != UINTMAX_MAX) std::filesystem::resize_file(*this / to, bytes);
  }
};

TEST_F(BadInput, TokenFilesThatCannotBeRead) {
  const std::string train = "$moemamba train" + small_training(3);
  std::filesystem::create_directory(*this / "folder");
  put("empty.bin", "");
  put("odd.bin", std::string(1001, 'a'));
  copy("tokens/train.bin", "short.bin", 1000);
  copy("tokens/train.idx", "short.idx");
  copy("tokens/train.bin", "index.bin");
  copy("tokens/train.idx", "index.idx", 40);
  const std::string next_step = "expected token files as `moemamba prepare` writes them";
  const std::pair<const char*, const char*> cases[] = {
      {"nothing", "nothing.bin: cannot open: No such file or directory"},
      {"folder", "folder: expected a regular file, found a folder"},
      {"empty.bin", "empty.bin: holds no tokens"},
      {"odd.bin", "odd.bin: expected 16-bit tokens, found 1001 bytes: the file is cut off"},
      {"short", "short.bin: cut off: sequence 0 ends at byte "},
      {"index", "index.idx: 1 sequences and 1 documents need 62 bytes, found 40"}};
  for (const auto& [file, message] : cases) {
    for (const std::string setting : {"data.train", "data.validation"}) {
      const std::string option = "--" + setting + "=" + file;
      expect_refused(train + option, 1, {"moemamba: " + option + ": " + message, next_step});
    }
  }
  const Result result = shell(train + "--ranks 2 --data.train=nothing");
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.err.find("--data.train=nothing: nothing.bin: cannot open"), std::string::npos);
  EXPECT_FALSE(file_exists(run()));
}

// What a file alone cannot tell: an llm.c file has no index, a Megatron pair may lose its own.
// This build has no CUDA, or this machine no GPU, or there is one: then nothing is wrong.
TEST_F(BadInput, ADeviceThatIsNotThere) {
  if (!gpu::devices().empty()) return;
  const std::string train = "$moemamba train" + small_training(3);
  expect_refused(train + " --device=cuda", 1, {"--device=CUDA: no GPU (", "use --device=CPU"});
  expect_refused(train + " --model.compute_dtype=bf16", 2,
                 {"model.compute_dtype: the CPU computes in F32 only", "no GPU ("});
  expect_refused(train + " --device=gpu", 2, {"expected AUTO, CPU or CUDA"});
}

// AUTO goes on without one. A build that could use a GPU says why it does not, once for all ranks.
TEST_F(BadInput, AutoWithoutAGpuIsTheCpu) {
  if (!gpu::devices().empty()) return;
  const int lines = gpu::build() == "no CUDA" ? 0 : 1;
  for (const std::string ranks : {"1", "2"}) {
    const Result result = shell("$moemamba train" + small_training(3) + " --overwrite=true " +
                                "--device=auto --ranks " + ranks);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(count(result.err, "moemamba: no GPU ("), lines) << result.err;
    EXPECT_EQ(count(result.err, "): on the CPU\n"), lines) << result.err;
    EXPECT_EQ(count(result.err, "GPU"), lines) << result.err;
    EXPECT_TRUE(file_exists(run() + "/weights/model.safetensors"));
  }
}

TEST_F(BadInput, TokenFilesThatAreNotWhatTheirSummaryTells) {
  const std::string train = "$moemamba train" + small_training(3);
  const int64_t tokens = TokenFile(*this / "tokens/train").size();
  std::filesystem::create_directory(*this / "other");
  for (const char* name : {"summary.json", "tokenizer.model", "train.bin", "validation.bin"})
    copy(std::string("tokens/") + name, std::string("other/") + name);
  for (const std::string split : {"train", "validation"}) {
    const std::string option = "--data." + split + "=other/" + split;
    expect_refused(train + option, 1,
                   {option + ": other/" + split + ".idx: missing; `moemamba prepare` wrote it"});
  }
  PosixFileSystem files;
  TokenWriter writer(files, *this / "other/train", TokenFormat::megatron, 257);
  writer.add_document(std::vector<int32_t>(1000, 1));
  writer.commit();
  expect_refused(train + "--data.train=other/train", 1,
                 {"other/train.bin: expected the " + std::to_string(tokens) +
                  " tokens of other/summary.json, found 1000: the file is cut off"});
}

TEST_F(BadInput, TokensOutsideTheVocabulary) {
  const std::string train = "$moemamba train" + small_training(200);
  std::string wild(10000, '\0');
  wild[5000] = wild[5001] = '\xff';
  put("wild.bin", wild);
  for (const std::string setting : {"data.train", "data.validation"})
    expect_refused(train + "--" + setting + "=wild.bin", 1,
                   {"wild.bin, token 2500 (byte 5000): token id 65535 is outside the vocabulary of "
                    "257; the file was made with another tokenizer or is damaged"});
}

TEST_F(BadInput, TokenizersThatDoNotFit) {
  const std::string train = "$moemamba train" + small_training(3);
  ASSERT_EQ(shell("$moemamba prepare --vocabulary 300 --output bpe text.txt").code, 0);
  expect_refused(train + "--data.tokenizer=bpe/tokenizer.model", 1,
                 {"tokens/train.bin: was made with the tokenizer tokens/tokenizer.model (bytes, "
                  "vocabulary 257), data.tokenizer is another (bpe, vocabulary 300); give "
                  "--data.tokenizer=tokens/tokenizer.model"});
  expect_refused(train + "--data.train=bpe/train", 1,
                 {"(bpe, vocabulary 300), data.tokenizer is another (bytes, vocabulary 257)"});
  expect_refused(train + "--model.vocabulary=300", 1,
                 {"model.vocabulary: 300, but the tokenizer has 257 entries; leave it 0"});
  expect_refused(train + "--data.tokenizer=none.model", 1,
                 {"--data.tokenizer=none.model: none.model: cannot open"});
  expect_refused(train + "--data.tokenizer=text.txt", 1,
                 {"text.txt: neither a SentencePiece model nor a bytes tokenizer",
                  "expected \"bytes\", \"none\" or a tokenizer.model"});
  expect_refused(train + "--data.tokenizer=none --data.sampling=CIRCULAR", 2,
                 {"model.vocabulary: data.tokenizer is \"none\": give the number of ids",
                  "--data.sampling=CIRCULAR: CIRCULAR puts an end-of-document id"});
}

// llm.c's GPT-2 tokens: 50257 ids, of which no file here says what they mean.
TEST_F(BadInput, TokensWithoutATokenizerAreTrainedOnAndEvaluatedButMakeNoText) {
  const std::string train = "$moemamba train --data.tokenizer=none" + small_training(2) +
                            "--data.train=gpt2.bin --data.validation=gpt2.bin ";
  PosixFileSystem files;
  TokenWriter writer(files, *this / "gpt2", TokenFormat::llmc, 50257);
  std::vector<int32_t> ids(2000);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = int32_t(i * 7919 % 50257);
  ids[1234] = 50256;
  writer.add_document(ids);
  writer.commit();
  expect_refused(train + "--model.vocabulary=50256", 1,
                 {"gpt2.bin, token 1234 (byte 3492): token id 50256 is outside the vocabulary of "
                  "50256"});
  Result result = shell(train + "--model.vocabulary=50257");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_FALSE(file_exists(run() + "/tokenizer.model"));
  result = shell("$moemamba evaluate --run run");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.out, "held-out: 1999 tokens, loss "), 1) << result.out;
  result = shell("$moemamba generate --run run --tokens 3");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(count(result.err, "--data.tokenizer=none: this model was trained on ids alone"), 1)
      << result.err;
}

TEST_F(BadInput, TooLittleTextForOneBatch) {
  expect_refused("$moemamba train" + small_training(3) + "--train.global_batch_size=4096", 1,
                 {"tokens are too few for one batch of 4096 sequences of 16; expected at least "
                  "65537; use more text, a smaller batch or shorter sequences"});
}

TEST_F(BadInput, LayoutsAndSettingsBeforeAnythingIsWritten) {
  const std::string train = "$moemamba train" + small_training(3);
  expect_refused(train + "--ranks 4 --parallel.expert=4", 2, {"4 ranks cannot share 2 experts"});
  expect_refused(train + "--ranks 3 --parallel.expert=2", 2,
                 {"must divide the 3 ranks that were started; try 1 or 3"});
  expect_refused(train + "--train.stepz=3", 2, {"did you mean \"--train.steps\"?"});
  expect_refused(train + "--train.beta1=1.5", 2, {"out of range"});
  const Result result =
      shell("$mpirun -n 3 $moemamba" + train.substr(train.find(" ")) + "--parallel.expert=2");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.err.find("must divide the 3 ranks that were started; try 1 or 3"),
            std::string::npos)
      << result.err;
  EXPECT_FALSE(file_exists(run()));
}

TEST_F(BadInput, FoldersThatAreTaken) {
  const std::string train = "$moemamba train" + small_training(3);
  ASSERT_EQ(shell(train).code, 0);
  const std::string metrics = read_file(run() + "/metrics.jsonl");
  Result result = shell(train);
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err,
                  "already holds a run; choose another --run or set "
                  "--overwrite=true to replace it"),
            1)
      << result.err;
  // Not even with leave to overwrite, before all else is known to be right.
  result = shell(train + "--overwrite=true --data.train=nothing");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(read_file(run() + "/metrics.jsonl"), metrics);
  EXPECT_TRUE(file_exists(run() + "/weights/model.safetensors"));
  result = shell(train + "--overwrite=true --run=tokens");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err, "tokens holds files that are no run's"), 1) << result.err;
  result = shell(train + "--run=text.txt");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err, "text.txt: cannot make folder"), 1) << result.err;
}

TEST_F(BadInput, WeightsOfAnotherShape) {
  const std::string train = "$moemamba train" + small_training(3);
  ASSERT_EQ(shell(train + "--run=first").code, 0);
  const std::vector<std::string> differs = {
      "blocks.0.moe.router.weight: [2, 16], the model wants [3, 16]",
      "blocks.0.moe.experts.2.up.weight: missing; the model wants [48, 16]"};
  expect_refused(train + "--init-from=first --model.experts=3", 1, differs);
  expect_refused(
      "$moemamba evaluate --run first --data.validation=tokens/validation "
      "--model.experts=3",
      1, differs);
  expect_refused(train + "--init-from=tokens", 1, {"tokens: no weights here; expected a run's"});
  expect_refused(train + "--init-from=text.txt", 1, {"damaged, or no safetensors file"});
  expect_refused("$moemamba evaluate --run first", 1, {"no token file to evaluate on"});
  expect_refused(train + "--init-from=first --model.top_k=2", 1,
                 {"first/weights: these weights belong to another kind of model:\n"
                  "  model.top_k: 1 there, 2 here\n"});
  EXPECT_EQ(shell(train + "--init-from=first").code, 0);
}

// A limit on the size of files refuses writes as a full disk does; no privilege is needed. PMIx is
// told to do without its own large files.
TEST_F(BadInput, AFullDiskCostsLinesOfMetricsOnly) {
  const Result result =
      shell("export PMIX_MCA_gds=hash; trap '' XFSZ; ulimit -f 100; $moemamba train" +
            small_training(300) + "--model.width=8 --data.validation=tokens/validation");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.err, "training goes on without these lines"), 2)
      << result.err;  // once each
  EXPECT_EQ(count(result.err, "run/metrics.jsonl: cannot write"), 1) << result.err;
  EXPECT_EQ(count(result.err, " of the run's records were lost"), 1) << result.err;
  EXPECT_NE(result.err.find("step 300/300"), std::string::npos) << result.err;
  const std::string metrics = read_file(run() + "/metrics.jsonl");
  const int kept = count(metrics, "\n");
  EXPECT_TRUE(kept > 10 && kept < 290) << kept;
  EXPECT_EQ(metrics.back(), '\n');
  EXPECT_EQ(count(result.err, "metrics: " + std::to_string(300 - kept) + " of the run's lines"), 1)
      << result.err;
  EXPECT_TRUE(file_exists(run() + "/weights/model.safetensors"));
}

// The real thing, where this process may mount: full for a while, then somebody makes room.
TEST_F(BadInput, MetricsGoOnWhenADiskHasRoomAgain) {
  constexpr int kRefused = 77;
  const std::string words = small_training(1'000'000'000);
  const Result result = shell(
      "mkdir run && mount -t tmpfs -o size=16m none run || exit 77; "
      "$moemamba train" +
      words +
      "2>said & id=$!; "
      "until [ -s run/metrics.jsonl ]; do sleep 0.1; done; "
      "dd if=/dev/zero of=run/hog bs=4k 2>/dev/null; "
      "until grep -q '^metrics: .*training goes on' said; do sleep 0.1; done; rm run/hog; sleep 1; "
      "kill -TERM $id; wait $id; code=$?; cp -r run kept; umount run; exit $code");
  if (result.code == kRefused)
    GTEST_SKIP() << "mount is refused here (" << result.err
                 << "): run as root with CAP_SYS_ADMIN to fill a real disk";
  const std::string said = read_file(*this / "said");
  EXPECT_EQ(result.code, 75) << said;
  EXPECT_EQ(count(said, "run/metrics.jsonl: cannot write: No space left on device"), 1) << said;
  EXPECT_EQ(count(said, " of the run's lines were lost"), 1) << said;
  const std::string metrics = read_file(*this / "kept/metrics.jsonl");
  const std::vector<double> steps = numbers_of(metrics, "step");
  ASSERT_FALSE(steps.empty());
  EXPECT_EQ(metrics.back(), '\n');
  EXPECT_LT(double(steps.size()), steps.back() + 1);  // some are missing, whole lines
  EXPECT_EQ(count(metrics, "{\"step\":"), count(metrics, "\"}\n"));
  EXPECT_TRUE(file_exists(*this / "kept/weights/model.safetensors"));
}

TEST_F(BadInput, TextThatCannotBePrepared) {
  put("bad.jsonl", "{\"text\": \"fine\"}\n{\"txt\": \"no\"}\n");
  put("picture.png", "x");
  for (const char* words : {"no-such.txt", "bad.jsonl", "picture.png"}) {
    const Result result =
        shell(std::string("$moemamba prepare --tokenizer bytes --output out ") + words);
    EXPECT_EQ(result.code, 1) << result.err;
    EXPECT_EQ(count(result.err, words), 1) << result.err;
    EXPECT_FALSE(file_exists(*this / "out"));
    EXPECT_FALSE(file_exists(*this / "out.tmp"));
  }
}

}  // namespace
}  // namespace moemamba
