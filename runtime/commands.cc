#include "runtime/commands.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "model/counts.h"
#include "runtime/model_kind.h"
#include "runtime/plot.h"
#include "runtime/progress.h"
#include "runtime/run_folder.h"
#include "runtime/token_check.h"
#include "runtime/trainer.h"
#include "runtime/weights.h"

namespace moemamba {

namespace {

std::vector<std::string> list(const google::protobuf::RepeatedPtrField<std::string>& values) {
  return {values.begin(), values.end()};
}

// The model of a finished run, for reading only.
Session open_session(ProcessGroups& groups, const UseRequest& request, const ModelSizes& sizes,
                     int64_t sequences, int64_t length) {
  return Session(groups, sizes, request.threads, sequences, length,
                 request.parallel.exchange_rows(), Session::Memory::values);
}

void load_newest_weights(const std::string& path, Session& session, ProcessGroups& groups) {
  const FoundWeights found = find_weights(path, groups, session.host);
  load_weights(found.path, session.store, groups);
  if (groups.rank == 0) std::fprintf(stderr, "weights    %s\n", describe(found).c_str());
}

}  // namespace

int64_t vocabulary_of(const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? tokenizer->vocabulary() : 0;
}
int32_t end_of_document_of(const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? tokenizer->end_of_document() : -1;
}

EvaluatorOptions evaluator_options(const TrainConfig& train,
                                   const std::optional<Tokenizer>& tokenizer) {
  return {.routing_group = train.routing_group(),
          .most_tokens = train.eval_tokens(),
          .end_of_document = end_of_document_of(tokenizer)};
}

std::optional<Tokenizer> checked_tokenizer(const DataConfig& data, const ModelConfig& model,
                                           bool trains) {
  std::optional<Tokenizer> tokenizer = open_tokenizer(data.tokenizer());
  const int64_t vocabulary = tokenizer ? tokenizer->vocabulary() : model.vocabulary();
  if (trains) check_token_files("data.train", list(data.train()), tokenizer, vocabulary);
  check_token_files("data.validation", list(data.validation()), tokenizer, vocabulary);
  return tokenizer;
}

std::optional<Tokenizer> open_tokenizer(const std::string& setting) {
  if (setting == "none") return {};
  if (setting == "bytes") return Tokenizer::bytes();
  try {
    return Tokenizer::load(setting);
  } catch (const Error& error) {
    throw Error(concat(
        "--data.tokenizer=", setting, ": ", error.what(),
        "; expected \"bytes\", \"none\" or a tokenizer.model as `moemamba prepare` writes it"));
  }
}

Evaluation run_evaluation(ProcessGroups& groups, const UseRequest& request) {
  check(request.data.validation_size() > 0,
        "data.validation: no token file to evaluate on; --data.validation=FILE");
  const std::optional<Tokenizer> tokenizer = checked_tokenizer(request.data, request.model, false);
  const BatchShare share =
      share_of_batch(request.train.global_batch_size(), request.train.routing_group(),
                     request.train.micro_batch_size(), groups.rank, groups.layout.ranks());
  const int64_t length = request.train.sequence_length();
  const ModelSizes sizes = model_sizes(request.model, vocabulary_of(tokenizer), length);
  Session session = open_session(groups, request, sizes, share.micro_batch, length);
  load_newest_weights(request.weights, session, groups);
  Evaluator evaluator(session, open_held_out(list(request.data.validation())),
                      evaluator_options(request.train, tokenizer));
  return evaluator.run();
}

std::string run_generation(ProcessGroups& groups, const UseRequest& request,
                           const std::string& prompt, const SamplingOptions& options, FILE* out) {
  const std::optional<Tokenizer> tokenizer = open_tokenizer(request.data.tokenizer());
  check(tokenizer.has_value(),
        "--data.tokenizer=none: this model was trained on ids alone, which no tokenizer turns into "
        "text; give the tokenizer that made its token files: --data.tokenizer=FILE");
  constexpr int64_t kPiece = 64;  // tokens of the prompt that are read at once
  const ModelSizes sizes =
      model_sizes(request.model, tokenizer->vocabulary(), request.train.sequence_length());
  Session session = open_session(groups, request, sizes, 1, kPiece);
  load_newest_weights(request.weights, session, groups);
  if (groups.rank == 0) std::fputs(prompt.c_str(), out);
  const auto piece = [out](std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), out);
    std::fflush(out);
  };
  const std::string text = generate(session, *tokenizer, prompt, options, piece);
  if (groups.rank == 0) std::fputs("\n", out);
  return text;
}

std::string expert_table(const std::vector<double>& counts, int64_t experts) {
  std::string table = "layer   load of each expert, as a multiple of the even share\n";
  for (size_t first = 0; first < counts.size(); first += size_t(experts)) {
    double sum = 0;
    for (size_t e = first; e < first + size_t(experts); ++e) sum += counts[e];
    char cell[32];
    std::snprintf(cell, sizeof cell, "%5lld ", static_cast<long long>(first / size_t(experts)));
    table += cell;
    for (size_t e = first; e < first + size_t(experts); ++e) {
      std::snprintf(cell, sizeof cell, " %5.2f", sum > 0 ? counts[e] * double(experts) / sum : 0);
      table += cell;
    }
    table += "\n";
  }
  return table;
}

}  // namespace moemamba
