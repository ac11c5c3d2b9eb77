#include "runtime/generate.h"

#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "tests/support/cases.h"
#include "tests/support/in_world.h"
#include "tests/support/systems.h"

namespace moemamba {
namespace {

ModelSizes sizes_of(int experts, int top_k, bool final_norm, const char* model = "") {
  ModelConfig config;
  config.set_vocabulary(37);
  config.set_width(24);
  config.set_blocks(2);
  config.set_state(8);
  config.set_experts(experts);
  config.set_top_k(top_k);
  config.set_expert_hidden(24);
  config.set_final_norm(final_norm);
  config.set_init_scale(1);
  check(google::protobuf::TextFormat::MergeFromString(model, &config), "not a model: ", model);
  return model_sizes(config, 0, 64);
}

std::vector<int32_t> some_tokens(int64_t count) {
  const Random random(3, "prompt");
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(int32_t(random.integer(uint64_t(i), 37)));
  return ids;
}

// logits [T, V] of all prefixes at once.
std::vector<double> forward_logits(ProcessGroups& groups, const ModelSizes& sizes,
                                   std::vector<int32_t> ids) {
  const auto T = int64_t(ids.size());
  Session session(groups, sizes, 1, 1, T, 4, Session::Memory::values);
  session.store.initialise(5);
  Step step = session.begin(1, 1);
  session.model.forward(step, view(ids.data(), {T}), session.saved, nullptr);
  Case keeper(1);
  const Tensor logits = keeper.empty({T, sizes.V});
  session.model.logits(step, session.saved.x, logits);
  return to_doubles(logits);
}

// Feeds `ids` in pieces of the given lengths, again and again, and compares after each.
void expect_decoding(ProcessGroups& groups, const ModelSizes& sizes, int64_t held,
                     const std::vector<int64_t>& pieces) {
  const std::vector<int32_t> ids = some_tokens(29);
  ModelSizes dropless = sizes;  // a capacity depends on who else is there
  dropless.capacity_factor = 0;
  const std::vector<double> expected = forward_logits(groups, dropless, ids);
  Session session(groups, sizes, 1, 1, held, 1.25, Session::Memory::values);
  session.store.initialise(5);
  Decoder decoder(session, 64);
  for (int again : {0, 1}) {
    size_t fed = 0;
    for (size_t i = 0; fed < ids.size(); ++i) {
      const size_t piece = std::min(ids.size() - fed, size_t(pieces[i % pieces.size()]));
      const float* logits = decoder.feed(std::span(ids).subspan(fed, piece));
      fed += piece;
      const size_t row = (fed - 1) * size_t(sizes.V);
      EXPECT_LE(
          relative_error({logits, logits + sizes.V}, {expected.begin() + int64_t(row),
                                                      expected.begin() + int64_t(row) + sizes.V}),
          1e-5)
          << "prefix of " << fed << ", time " << again;
    }
    decoder.reset();
  }
}

TEST(Decoder, TokenByTokenGivesTheLogitsOfTheWholeForwardPass) {
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    const ModelSizes sizes = sizes_of(7, 1, false, system.model);
    in_world(RankLayout(1, 1, int(sizes.E)), [&](ProcessGroups& groups) {
      expect_decoding(groups, sizes, 1, {1});
      expect_decoding(groups, sizes, 8, {3, 1, 11, 2});
    });
  }
}

TEST(Decoder, HasNoTokenBeyondACapacity) {
  ModelSizes sizes = sizes_of(7, 2, false);
  sizes.capacity_factor = 0.5;
  in_world(RankLayout(1, 1, 7), [&](ProcessGroups& groups) {
    expect_decoding(groups, sizes, 8, {3, 1});
  });
}

TEST(Decoder, RefusesMoreTokensThanItHasRoomOrPositionsFor) {
  const ModelSizes sizes = sizes_of(2, 1, false, "pattern: 'attention, moe' positions: LEARNED");
  in_world(RankLayout(1, 1, 2), [&](ProcessGroups& groups) {
    Session session(groups, sizes, 1, 1, 4, 1.25, Session::Memory::values);
    EXPECT_THROW(Decoder(session, 65), Error);  // 64 positions
    Decoder decoder(session, 5);
    decoder.feed(std::vector<int32_t>{1, 2, 3, 4, 5});
    EXPECT_THROW(decoder.feed(std::vector<int32_t>{6}), Error);
    decoder.reset();
    EXPECT_NO_THROW(decoder.feed(std::vector<int32_t>{6}));
  });
}

TEST(Decoder, FindsItsExpertsOnOtherRanks) {
  const ModelSizes sizes = sizes_of(7, 2, false);
  in_world(RankLayout(3, 3, 7), [&](ProcessGroups& groups) {
    expect_decoding(groups, sizes, 4, {1, 5});
  });
}

TEST(Decoder, WantsAToken) {
  const ModelSizes sizes = sizes_of(2, 1, false);
  in_world(RankLayout(1, 1, 2), [&](ProcessGroups& groups) {
    Session session(groups, sizes, 1, 1, 4, 1.25, Session::Memory::values);
    Decoder decoder(session, 64);
    EXPECT_THROW(decoder.feed({}), Error);
  });
}

constexpr float kLogits[] = {0.5f, 2.0f, -1.0f, 2.0f, 1.0f};

// How often each id is chosen.
std::map<int32_t, int> histogram(const SamplingOptions& options, int times) {
  Sampler sampler(options, std::size(kLogits));
  std::map<int32_t, int> counts;
  for (int i = 0; i < times; ++i) ++counts[sampler.choose(kLogits, uint64_t(i))];
  return counts;
}

TEST(Sampler, TakesTheLikeliestAtTemperatureZeroTheLowerIdOfEquals) {
  EXPECT_EQ(histogram({.temperature = 0}, 50), (std::map<int32_t, int>{{1, 50}}));
  EXPECT_EQ(histogram({.top_k = 1}, 50), (std::map<int32_t, int>{{1, 50}}));
  EXPECT_EQ(histogram({.top_p = 1e-9}, 50), (std::map<int32_t, int>{{1, 50}}));
}

TEST(Sampler, KeepsTheKLikeliest) {
  const auto counts = histogram({.top_k = 3}, 500);
  EXPECT_EQ(counts.size(), 3u);
  for (int32_t id : {1, 3, 4}) EXPECT_TRUE(counts.contains(id)) << id;
  EXPECT_EQ(histogram({.top_k = 99}, 2000).size(), 5u);
}

TEST(Sampler, KeepsTheFewestThatReachP) {
  // Probabilities: two of 0.363, then 0.134, 0.081, 0.018.
  EXPECT_EQ(histogram({.top_p = 0.36}, 500).size(), 1u);
  EXPECT_EQ(histogram({.top_p = 0.4}, 500).size(), 2u);
  EXPECT_EQ(histogram({.top_p = 0.9}, 500).size(), 4u);
}

TEST(Sampler, DrawsByProbabilityAtItsTemperature) {
  constexpr int kTimes = 20000;
  for (double temperature : {0.5, 1.0, 3.0}) {
    double sum = 0;
    for (float logit : kLogits) sum += std::exp(logit / temperature);
    for (auto [id, count] : histogram({.temperature = temperature}, kTimes)) {
      const double p = std::exp(kLogits[id] / temperature) / sum;
      EXPECT_NEAR(count, p * kTimes, 5 * std::sqrt(kTimes * p * (1 - p)) + 1) << id;
    }
  }
}

TEST(Sampler, IsAPureFunctionOfSeedAndIndex) {
  EXPECT_EQ(histogram({.seed = 1}, 300), histogram({.seed = 1}, 300));
  EXPECT_NE(histogram({.seed = 1}, 300), histogram({.seed = 2}, 300));
  Sampler forward({.seed = 9}, 5), backward({.seed = 9}, 5);
  std::vector<int32_t> a(50), b(50);
  for (size_t i = 0; i < 50; ++i) a[i] = forward.choose(kLogits, i);
  for (size_t i = 50; i-- > 0;) b[i] = backward.choose(kLogits, i);
  EXPECT_EQ(a, b);
}

TEST(Sampler, TakesAnIdWhateverTheLogits) {
  constexpr float kSome[] = {NAN, 1, NAN, 2, -INFINITY}, kNone[] = {NAN, NAN, NAN, NAN, NAN};
  Sampler greedy({.temperature = 0}, 5), random({.temperature = 1}, 5);
  EXPECT_EQ(greedy.choose(kSome, 0), 3);
  for (uint64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(random.choose(kSome, i) % 2, 1) << i;
    const int32_t id = random.choose(kNone, i);
    EXPECT_TRUE(id >= 0 && id < 5) << id;
  }
}

TEST(Sampler, RefusesWhatMakesNoSense) {
  for (const SamplingOptions& wrong :
       {SamplingOptions{.temperature = -1}, {.top_k = -1}, {.top_p = 0}, {.top_p = 1.5}})
    EXPECT_THROW(Sampler(wrong, 5), Error);
}

TEST(Generate, GivesTheSameTextForTheSameSeedOnEveryLayout) {
  ModelSizes sizes = sizes_of(6, 1, false);
  const Tokenizer tokenizer = Tokenizer::bytes();
  sizes.V = tokenizer.vocabulary();
  std::map<std::string, int> texts;
  for (int ranks : {1, 1, 2}) {
    in_world(RankLayout(ranks, ranks, 6), [&](ProcessGroups& groups) {
      Session session(groups, sizes, 1, 1, 16, 1.25, Session::Memory::values);
      session.store.initialise(5);
      std::string shown;
      const std::string text =
          generate(session, tokenizer, "It is a truth", {.tokens = 30, .temperature = 0.7},
                   [&](std::string_view piece) { shown += piece; });
      if (groups.rank != 0) return;
      EXPECT_EQ(shown, text);
      ++texts[text];
    });
  }
  EXPECT_EQ(texts.size(), 1u);
}

// A text of 2000 tokens and more, of characters of one to four bytes, some of them many times.
std::string many_characters() {
  std::string text;
  for (int i = 0; i < 300; ++i)
    text += "h\xC3\xA9 \xD0\xB6\xD0\xB4\xE2\x82\xAC" + std::to_string(i % 7) + "\xF0\x9F\x90\x8D\n";
  return text;
}

void expect_same_text_piece_by_piece(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  ASSERT_GT(ids.size(), 2000u);
  size_t decoded = 0;
  std::string shown;
  TextStream stream(
      [&](std::span<const int32_t> made) {
        decoded += made.size();
        return tokenizer.decode(made);
      },
      [&](std::string_view part) {
        EXPECT_FALSE(part.empty());
        EXPECT_NE(uint8_t(part[0]) & 0xC0, 0x80) << "begins inside a character";
        shown += part;
      });
  for (int32_t id : ids) {
    stream.add(id);
    EXPECT_LT(stream.text().size() - shown.size(), 4u) << "more is held back than one character";
  }
  stream.finish();
  EXPECT_EQ(decoded, ids.size()) << "a token is decoded once";
  EXPECT_EQ(shown, text);
  EXPECT_EQ(stream.text(), tokenizer.decode(ids));
}

TEST(TextStream, ShowsWholeCharactersAndDecodesEveryTokenOnce) {
  const std::string text = many_characters();
  expect_same_text_piece_by_piece(Tokenizer::bytes(), text);
  // Trained without the snake and the euro sign, whose bytes become tokens of their own.
  const std::vector<std::string> sample(50, "h\xC3\xA9 \xD0\xB6\xD0\xB4 0123456\n");
  expect_same_text_piece_by_piece(Tokenizer::train_bpe(sample, 280), text);
}

TEST(TextStream, GivesBackBytesThatAreNoUtf8) {
  const Tokenizer tokenizer = Tokenizer::bytes();
  std::string shown;
  TextStream stream([&](std::span<const int32_t> made) { return tokenizer.decode(made); },
                    [&](std::string_view part) { shown += part; });
  const std::string text = "a\xFF\x80\x80\x80\x80\xE2z\xF0\x9F";
  for (int32_t id : tokenizer.encode(text)) stream.add(id);
  stream.finish();
  EXPECT_EQ(shown, text);
}

}  // namespace
}  // namespace moemamba
