#include "runtime/prepare.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"
#include "runtime/documents.h"

namespace moemamba {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSummaryVersion = 1;
constexpr int64_t kTrainingSample = 64 << 20;  // bytes of text that a tokenizer is trained on
constexpr int64_t kSamplePiece = 1 << 16;

// How much of a document is trained on; the rest is held out.
struct Document {
  std::string name;
  int64_t bytes = 0;
  int64_t train_bytes = 0;
};

// Letters and digits in lower case: "Pride and Prejudice" is "prideandprejudice" too.
std::string plain(const std::string& name) {
  std::string out;
  for (const char c : name) {
    const auto byte = uint8_t(c);
    if (byte >= 'A' && byte <= 'Z')
      out += char(byte + 32);
    else if ((byte >= 'a' && byte <= 'z') || (byte >= '0' && byte <= '9') || byte >= 128)
      out += c;
  }
  return out;
}

// Everything that prepare() learns about its inputs before it writes anything.
class Corpus {
 public:
  explicit Corpus(const PrepareRequest& request) {
    files_ = list_inputs(request.inputs);
    const auto survey = [&](const std::string& name, std::string_view text) {
      documents_.push_back({name, int64_t(text.size()), int64_t(text.size())});
    };
    for (const std::string& file : files_) visit_documents(file, survey);
    if (request.held_out_fraction > 0) hold_out_fraction(request.held_out_fraction);
    for (const std::string& which : request.hold_out) hold_out(which);
    const size_t trained = documents_.size();
    for (const std::string& file : list_inputs(request.validation_inputs)) {
      files_.push_back(file);
      visit_documents(file, survey);
    }
    for (size_t d = trained; d < documents_.size(); ++d) documents_[d].train_bytes = 0;
    for (const Document& document : documents_) train_bytes_ += document.train_bytes;
    check(train_bytes_ > 0, "nothing is left to train on: ", documents_.size(),
          " documents, all empty or held out");
  }

  int64_t train_bytes() const { return train_bytes_; }

  // Calls fn(train text, held-out text) for every document; one of them may be empty.
  template <class Fn>
  void visit(Fn&& fn) const {
    size_t next = 0;
    for (const std::string& file : files_) {
      visit_documents(file, [&](const std::string&, std::string_view text) {
        check(next < documents_.size() && documents_[next].bytes == int64_t(text.size()), file,
              ": changed while it was read");
        const auto cut = size_t(documents_[next++].train_bytes);
        fn(cut_at_line(text, cut), text.substr(cut_at_line(text, cut).size()));
      });
    }
  }

 private:
  // text[0, cut), shortened to whole lines where the cut falls inside the text.
  static std::string_view cut_at_line(std::string_view text, size_t cut) {
    if (cut == 0 || cut == text.size()) return text.substr(0, cut);
    const size_t newline = text.rfind('\n', cut - 1);
    return text.substr(0, newline == std::string_view::npos ? cut : newline + 1);
  }

  void hold_out_fraction(double fraction) {
    check(fraction < 1, "held-out fraction ", fraction, ": expected less than 1");
    const auto count = double(documents_.size());
    for (size_t d = 0; d < documents_.size(); ++d) {
      Document& document = documents_[d];
      if (count * fraction < 1) {  // too few documents: the end of each
        document.train_bytes -= int64_t(double(document.bytes) * fraction);
      } else if (std::floor(double(d + 1) * fraction) > std::floor(double(d) * fraction)) {
        document.train_bytes = 0;
      }
    }
  }

  void hold_out(const std::string& which) {
    bool found = false;
    for (Document& document : documents_) {
      if (plain(document.name) != plain(which)) continue;
      document.train_bytes = 0;
      found = true;
    }
    if (found) return;
    const bool digits = !which.empty() && which.size() < 10 &&
                        which.find_first_not_of("0123456789") == std::string::npos;
    const size_t number = digits ? std::stoul(which) : 0;
    std::string names;
    for (size_t d = 0; d < std::min<size_t>(documents_.size(), 12); ++d)
      names += concat(d ? ", " : "", documents_[d].name);
    check(number >= 1 && number <= documents_.size(), "--hold-out ", which, ": no such document; ",
          "expected a number up to ", documents_.size(), " or a name like ", names);
    documents_[number - 1].train_bytes = 0;
  }

  std::vector<std::string> files_;
  std::vector<Document> documents_;
  int64_t train_bytes_ = 0;
};

// All of the training text or evenly spread pieces of it.
Tokenizer make_tokenizer(const PrepareRequest& request, const Corpus& corpus) {
  if (!request.tokenizer_file.empty()) return Tokenizer::load(request.tokenizer_file);
  if (request.tokenizer == TokenizerKind::bytes) return Tokenizer::bytes();
  const int64_t stride = (corpus.train_bytes() + kTrainingSample - 1) / kTrainingSample;
  std::vector<std::string> sample;
  int64_t piece = 0;
  corpus.visit([&](std::string_view train, std::string_view) {
    if (stride == 1) {
      if (!train.empty()) sample.emplace_back(train);
      return;
    }
    for (size_t begin = 0; begin < train.size(); begin += kSamplePiece)
      if (piece++ % stride == 0) sample.emplace_back(train.substr(begin, kSamplePiece));
  });
  return Tokenizer::train_bpe(sample, request.vocabulary);
}

// Token file and, of the held-out part, the text too. Files are made with the first document.
class SplitWriter {
 public:
  SplitWriter(FileSystem& files, std::string path, TokenFormat format, const Tokenizer& tokenizer)
      : files_(files), path_(std::move(path)), format_(format), tokenizer_(tokenizer) {}

  void add(std::string_view text) {
    if (text.empty()) return;
    if (!tokens_) tokens_.emplace(files_, path_, format_, tokenizer_.vocabulary());
    ids_.clear();
    tokenizer_.encode(text, ids_);
    ids_.push_back(tokenizer_.end_of_document());
    tokens_->add_document(ids_);
    summary_.documents += 1;
    summary_.bytes += int64_t(text.size());
    summary_.tokens += int64_t(ids_.size());
  }
  SplitSummary commit() {
    if (tokens_) tokens_->commit();
    return summary_;
  }

 private:
  FileSystem& files_;
  std::string path_;
  TokenFormat format_;
  const Tokenizer& tokenizer_;
  std::optional<TokenWriter> tokens_;
  std::vector<int32_t> ids_;
  SplitSummary summary_;
};

Json to_json(const SplitSummary& split) {
  return {{"documents", split.documents}, {"bytes", split.bytes}, {"tokens", split.tokens}};
}

SplitSummary split_of(const Json& json) {
  return {.documents = json.at("documents").get<int64_t>(),
          .bytes = json.at("bytes").get<int64_t>(),
          .tokens = json.at("tokens").get<int64_t>()};
}

PrepareSummary write_folder(FileSystem& files, const PrepareRequest& request, const Corpus& corpus,
                            const std::string& folder) {
  const Tokenizer tokenizer = make_tokenizer(request, corpus);
  tokenizer.save(files, tokenizer_path(folder));
  SplitWriter train(files, train_path(folder), request.format, tokenizer);
  SplitWriter validation(files, validation_path(folder), request.format, tokenizer);
  AtomicFile held_out_text(files, validation_text_path(folder));
  corpus.visit([&](std::string_view trained, std::string_view held_out) {
    train.add(trained);
    validation.add(held_out);
    held_out_text.write(held_out);
  });
  PrepareSummary summary{.train = train.commit(),
                         .validation = validation.commit(),
                         .vocabulary = tokenizer.vocabulary(),
                         .end_of_document = tokenizer.end_of_document(),
                         .tokenizer = tokenizer.description(),
                         .tokenizer_digest = tokenizer.digest()};
  if (held_out_text.bytes() > 0) held_out_text.commit();
  const Json json = {{"version", kSummaryVersion},
                     {"train", to_json(summary.train)},
                     {"validation", to_json(summary.validation)},
                     {"vocabulary", summary.vocabulary},
                     {"end_of_document", summary.end_of_document},
                     {"tokenizer", summary.tokenizer},
                     {"tokenizer_sha256", summary.tokenizer_digest}};
  write_file(files, join_path(folder, "summary.json"), json.dump(2) + "\n");
  return summary;
}

void check_output(const std::string& output, bool overwrite) {
  check(!output.empty(), "expected an output folder, found none");
  if (!file_exists(output) || std::filesystem::is_empty(output)) return;
  check(file_exists(join_path(output, "summary.json")), output,
        " holds files that prepare did not write; choose another folder");
  check(overwrite, output, " already holds prepared text; choose another folder or --overwrite");
}

}  // namespace

PrepareSummary prepare(FileSystem& files, const PrepareRequest& request) {
  std::string output = request.output;
  while (output.size() > 1 && output.back() == '/') output.pop_back();
  check_output(output, request.overwrite);
  check(!request.inputs.empty(),
        "expected text to prepare: .txt, .jsonl, .rdb or folders of these");
  const Corpus corpus(request);
  const std::string fresh = output + ".tmp", old = output + ".old";
  remove_tree(files, fresh);
  files.make_folders(fresh);
  PrepareSummary summary;
  try {
    summary = write_folder(files, request, corpus, fresh);
  } catch (...) {
    try {
      remove_tree(files, fresh);
    } catch (const Error&) {  // the first error is the one to report
    }
    throw;
  }
  remove_tree(files, old);
  if (file_exists(output)) files.rename(output, old);
  files.rename(fresh, output);
  files.sync_folder(folder_of(output));
  remove_tree(files, old);
  return summary;
}

PrepareSummary read_summary(const std::string& folder) {
  const std::string path = join_path(folder, "summary.json");
  const Json json = Json::parse(read_file(path), nullptr, false);
  check(json.is_object() && json.value("version", 0) == kSummaryVersion, path,
        ": expected a summary of version ", kSummaryVersion, "; prepare the text again");
  try {
    return {.train = split_of(json.at("train")),
            .validation = split_of(json.at("validation")),
            .vocabulary = json.at("vocabulary").get<int64_t>(),
            .end_of_document = json.at("end_of_document").get<int32_t>(),
            .tokenizer = json.at("tokenizer").get<std::string>(),
            .tokenizer_digest = json.at("tokenizer_sha256").get<std::string>()};
  } catch (const Json::exception& error) {
    throw Error(concat(path, ": damaged: ", error.what(), "; prepare the text again"));
  }
}

std::string tokenizer_path(const std::string& folder) {
  return join_path(folder, "tokenizer.model");
}
std::string train_path(const std::string& folder) {
  return join_path(folder, "train");
}
std::string validation_path(const std::string& folder) {
  return join_path(folder, "validation");
}
std::string validation_text_path(const std::string& folder) {
  return join_path(folder, "validation.txt");
}

}  // namespace moemamba
