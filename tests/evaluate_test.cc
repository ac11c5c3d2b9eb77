#include "runtime/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/cases.h"
#include "tests/support/in_world.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

constexpr int64_t kLength = 8;
constexpr int32_t kEnd = 16, kVocabulary = 17;
constexpr double kBound = 1e-5;  // f32 against sums of other sizes in double precision

ModelSizes sizes_of(bool resets, float capacity_factor = 0) {
  ModelConfig config;
  config.set_vocabulary(kVocabulary);
  config.set_width(12);
  config.set_blocks(2);
  config.set_state(4);
  config.set_experts(5);
  config.set_expert_hidden(9);
  config.set_init_scale(1);
  config.set_reset_at_documents(resets);
  config.set_capacity_factor(capacity_factor);
  return model_sizes(config, 0);
}

// Weights large enough that what a token has before it matters.
void initialise(ParameterStore& store) {
  store.initialise(5);
  for (const Parameter& p : store.parameters()) {
    if (p.name.find("mamba.") == std::string::npos || p.name.ends_with("A_log")) continue;
    std::vector<double> values = to_doubles(p.value);
    for (double& value : values) value *= 2;
    from_doubles(values, p.value);
  }
}

// A token file of documents of the given lengths, ends included.
std::vector<int32_t> write_text(const std::string& path, const std::vector<int64_t>& lengths) {
  PosixFileSystem files;
  TokenWriter writer(files, path, TokenFormat::llmc, kVocabulary);
  const Random random(4, path.substr(path.rfind('/')));
  std::vector<int32_t> tokens;
  for (int64_t length : lengths) {
    std::vector<int32_t> document;
    for (int64_t i = 0; i + 1 < length; ++i)
      document.push_back(int32_t(random.integer(tokens.size() + uint64_t(i), kEnd)));
    document.push_back(kEnd);
    writer.add_document(document);
    tokens.insert(tokens.end(), document.begin(), document.end());
  }
  writer.commit();
  return tokens;
}

struct Text {
  TemporaryFolder folder;
  std::vector<std::vector<int32_t>> tokens;  // of each file
  HeldOut open(int64_t bytes = 0) const {
    HeldOut held_out;
    for (const char* name : {"a", "b"}) held_out.files.emplace_back(folder / name);
    held_out.bytes = bytes;
    return held_out;
  }
  Text() {
    tokens.push_back(write_text(folder / "a", {3, 9, 1, 14, 18}));  // 45: the last window has 4
    tokens.push_back(write_text(folder / "b", {20, 7}));            // 27: the last window has 2
  }
};
constexpr int64_t kPredicted = 45 + 27 - 2;

Evaluation evaluate(const Text& text, const ModelSizes& sizes, int ranks, int expert,
                    EvaluatorOptions options = {}, int64_t bytes = 0, int64_t sequences = 2) {
  options.end_of_document = kEnd;
  Evaluation result;
  in_world(RankLayout(ranks, expert, 5), [&](ProcessGroups& groups) {
    Session session(groups, sizes, 1, sequences, kLength, 1.25, Session::Memory::values);
    initialise(session.store);
    const Evaluation own = Evaluator(session, text.open(bytes), options).run();
    if (groups.rank == 0) result = own;
  });
  return result;
}

// Cross-entropy of tokens[first + 1 ..] in double precision, from the logits after each of `count`
// tokens that a model reads with nothing before them.
double loss_alone(Session& session, const std::vector<int32_t>& tokens, int64_t first,
                  int64_t count) {
  std::vector<int32_t> ids(tokens.begin() + first, tokens.begin() + first + count);
  Case keeper(1);
  Step step = session.begin(1, 1);
  session.model.forward(step, view(ids.data(), {count}), session.saved, nullptr);
  const Tensor logits = keeper.empty({count, kVocabulary});
  session.model.logits(step, session.saved.x, logits);
  double loss = 0;
  for (int64_t t = 0; t < count; ++t) {
    const float* row = logits.row<float>(t);
    double sum = 0;
    for (int32_t v = 0; v < kVocabulary; ++v) sum += std::exp(double(row[v]));
    loss += std::log(sum) - double(row[tokens[size_t(first + t + 1)]]);
  }
  return loss;
}

// Each window of each file by itself; with `resets` each document's part of it by itself.
double expected_loss(const Text& text, bool resets) {
  double loss = 0;
  in_world(RankLayout(1, 1, 5), [&](ProcessGroups& groups) {
    Session session(groups, sizes_of(false), 1, 1, kLength, 1.25, Session::Memory::values);
    initialise(session.store);
    for (const std::vector<int32_t>& tokens : text.tokens) {
      const auto last = int64_t(tokens.size()) - 1;
      for (int64_t at = 0; at < last;) {
        int64_t end = std::min(last, at / kLength * kLength + kLength);
        for (int64_t t = at; resets && t + 1 < end; ++t)
          if (tokens[size_t(t)] == kEnd) end = t + 1;
        loss += loss_alone(session, tokens, at, end - at);
        at = end;
      }
    }
  });
  return loss;
}

void expect_near(double found, double expected) {
  EXPECT_LE(std::abs(found / expected - 1), kBound) << found << ", expected " << expected;
}

TEST(Evaluate, GivesTheLossOfEveryWindowByItself) {
  const Text text;
  const double expected = expected_loss(text, false);
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {3, 3}, {4, 2}}) {
    const Evaluation found = evaluate(text, sizes_of(false), ranks, expert);
    expect_near(found.loss_sum, expected);
    EXPECT_EQ(found.tokens, kPredicted);
    EXPECT_EQ(found.loss, found.loss_sum / double(kPredicted));
  }
}

TEST(Evaluate, ResetsAtDocumentStartsWhereTheModelDoes) {
  const Text text;
  const double expected = expected_loss(text, true);
  EXPECT_GT(std::abs(expected / expected_loss(text, false) - 1), 100 * kBound) << "no difference";
  for (auto [ranks, expert] : {std::pair{1, 1}, {3, 3}})
    expect_near(evaluate(text, sizes_of(true), ranks, expert).loss_sum, expected);
}

TEST(Evaluate, CountsTheTextsTokensAloneAndNoPadding) {
  const Text text;
  for (int64_t group : {1, 2, 4}) {  // 8 full windows and two short ones
    const EvaluatorOptions options{.routing_group = group};
    const Evaluation found = evaluate(text, sizes_of(false), 2, 2, options, 0, 4);
    double choices = 0;
    for (double count : found.counts) choices += count;
    EXPECT_EQ(choices, 2 * kPredicted) << group;  // two layers, one choice a token
    expect_near(found.loss_sum, expected_loss(text, false));
  }
}

TEST(Evaluate, DropsTheSameRowsOnEveryLayout) {
  const Text text;
  const EvaluatorOptions options{.routing_group = 3};  // the last group has two windows
  const ModelSizes sizes = sizes_of(false, 0.3f);
  const Evaluation alone = evaluate(text, sizes, 1, 1, options, 0, 3);
  EXPECT_GT(std::abs(alone.loss_sum / expected_loss(text, false) - 1), 10 * kBound);
  for (int64_t sequences : {3, 6})
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}, {3, 1}})
      expect_near(evaluate(text, sizes, ranks, expert, options, 0, sequences).loss_sum,
                  alone.loss_sum);
}

TEST(Evaluate, StopsAfterTheTokensThatWereAskedFor) {
  const Text text;
  double expected = 0;
  in_world(RankLayout(1, 1, 5), [&](ProcessGroups& groups) {
    Session session(groups, sizes_of(false), 1, 1, kLength, 1.25, Session::Memory::values);
    initialise(session.store);
    expected = loss_alone(session, text.tokens[0], 0, kLength) +
               loss_alone(session, text.tokens[0], kLength, 3);
  });
  const Evaluation found = evaluate(text, sizes_of(false), 2, 1, {.most_tokens = kLength + 3});
  EXPECT_EQ(found.tokens, kLength + 3);
  expect_near(found.loss_sum, expected);
  EXPECT_EQ(evaluate(text, sizes_of(false), 1, 1, {.most_tokens = 1000}).tokens, kPredicted);
}

// Nats to bits, over the bytes that the predicted tokens stand for: their share of all tokens but
// the first of each file.
TEST(Evaluate, TellsBitsPerByteWhereTheBytesAreKnown) {
  const Text text;
  EXPECT_FALSE(evaluate(text, sizes_of(false), 1, 1).bits_per_byte);
  const Evaluation all = evaluate(text, sizes_of(false), 1, 1, {}, 200);
  EXPECT_DOUBLE_EQ(*all.bits_per_byte, all.loss_sum / std::log(2.0) / 200);
  const Evaluation part = evaluate(text, sizes_of(false), 1, 1, {.most_tokens = 35}, 200);
  EXPECT_DOUBLE_EQ(*part.bits_per_byte, part.loss_sum / std::log(2.0) / 100);
}

TEST(Evaluate, RefusesTextOfFewerThanTwoTokens) {
  TemporaryFolder folder;
  write_text(folder / "one", {1});
  in_world(RankLayout(1, 1, 5), [&](ProcessGroups& groups) {
    Session session(groups, sizes_of(false), 1, 1, kLength, 1.25, Session::Memory::values);
    HeldOut held_out;
    held_out.files.emplace_back(folder / "one");
    const std::string message =
        message_of([&] { Evaluator(session, std::move(held_out), EvaluatorOptions{}); });
    EXPECT_NE(message.find("fewer than two tokens"), std::string::npos) << message;
  });
}

}  // namespace
}  // namespace moemamba
