#include "runtime/samples.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace moemamba {

namespace {

constexpr double kTemperature = 0.8;
constexpr int64_t kFirstTokens = 24, kFewestTokens = 6;  // of the held-out text

// Whole words, as far as its tokens let us see where one ends.
std::vector<int32_t> first_words(const HeldOut& held_out, const Tokenizer& tokenizer,
                                 int64_t most) {
  const TokenFile& file = held_out.files.front();
  std::vector<int32_t> ids(size_t(std::min({kFirstTokens + 1, most + 1, file.size()})));
  file.read(0, int64_t(ids.size()), ids.data());
  ids.erase(std::ranges::find(ids, tokenizer.end_of_document()), ids.end());
  const auto begins_word = [&](size_t i) {
    const std::string text = tokenizer.decode(std::span(&ids[i], 1));
    return !text.empty() && (text[0] == ' ' || text[0] == '\n');
  };
  const size_t all = std::min(ids.size(), size_t(std::min(kFirstTokens, most)));
  for (size_t count = ids.size(); count-- > size_t(kFewestTokens);)
    if (begins_word(count)) {
      ids.resize(count);
      return ids;
    }
  ids.resize(all);
  return ids;
}

std::vector<int32_t> prompt_ids(Session& session, const Tokenizer& tokenizer,
                                const HeldOut& held_out, const SamplesOptions& options) {
  const int64_t most = sample_room(options.tokens, session.length) - options.tokens;
  check(most > 0, "train.sample_tokens: ", options.tokens, " tokens and a prompt are more than ",
        "train.sequence_length ", session.length, "; take at most ", session.length - 1);
  std::vector<int32_t> ids = options.prompt.empty() ? first_words(held_out, tokenizer, most)
                                                    : tokenizer.encode(options.prompt);
  check(int64_t(ids.size()) <= most, "train.sample_prompt: ", ids.size(), " tokens, room is for ",
        most, "; take a shorter one",
        most < kMostPromptTokens ? " or a lower train.sample_tokens" : "");
  if (ids.empty()) ids.push_back(tokenizer.end_of_document());
  return ids;
}

}  // namespace

Samples::Samples(Session& session, const Tokenizer& tokenizer, const HeldOut& held_out,
                 const SamplesOptions& options)
    : session_(session),
      tokenizer_(tokenizer),
      sampling_{.tokens = options.tokens, .temperature = kTemperature, .seed = options.seed},
      ids_(prompt_ids(session, tokenizer, held_out, options)),
      prompt_(tokenizer.decode(ids_)),
      decoder_(session, sample_room(options.tokens, session.length)) {}

std::string Samples::take() {
  std::string text = generate(session_, decoder_, tokenizer_, ids_, sampling_, [](auto) {});
  session_.exchange.take_seconds();  // they are no step's
  return text;
}

std::string sample_line(int64_t step, const std::string& prompt, const std::string& text) {
  const nlohmann::ordered_json row = {{"step", step}, {"prompt", prompt}, {"text", text}};
  return row.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace moemamba
