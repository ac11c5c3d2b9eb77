#pragma once
#include <string>
#include <vector>

#include "core/random.h"
#include "runtime/token_files.h"

namespace moemamba {

// epochs:   windows of sequence_length + 1 tokens, sequence_length apart, each once per epoch, in
// an
//           order of its own every epoch.
// circular: the paper's: documents drawn with replacement, an end-of-document id after each, until
//           all but the longest exceed sequence_length; a window from a random start, wrapping.
// in_order: the windows of epochs in file order; for evaluation.
enum class Sampling { epochs, circular, in_order };

struct DataOptions {
  std::vector<std::string> files;  // read as one text, in this order
  int64_t vocabulary = 0;
  int32_t end_of_document = -1;  // -1: the tokens have none; circular sampling needs one
  int64_t sequence_length = 0;
  int64_t global_batch = 0;  // sequences of one step, over all ranks
  uint64_t seed = 0;
  Sampling sampling = Sampling::epochs;
};

// A batch is a pure function of (seed, step): sequence s of step k is sample k * global_batch + s
// of one endless order, whoever asks for it. Too few tokens for one batch: Error. Allocates in its
// constructor only. Not for use by several threads at once.
class Batches {
 public:
  explicit Batches(DataOptions options);

  // Sequences [first_sequence, first_sequence + count) of `step` into [count, sequence_length]
  // each. targets are inputs moved on by one token; starts is 1 where a token is the first of a
  // document, by its end-of-document id, its file's index or the file's border. A token id outside
  // the vocabulary: Error with file and offset.
  void fill(int64_t step, int64_t first_sequence, int64_t count, int32_t* inputs, int32_t* targets,
            uint8_t* starts);

  int64_t tokens() const { return tokens_; }
  int64_t windows() const { return windows_; }  // per epoch
  double epoch(int64_t step) const;             // epochs done before `step`
  const DataOptions& options() const { return options_; }

 private:
  struct Document {
    int64_t begin = 0;
    int64_t length = 0;  // without its end-of-document id
  };
  void find_documents();
  void add_document(int64_t begin, int64_t end);
  size_t file_at(int64_t position) const;
  void read(int64_t position, int64_t count, int32_t* out) const;
  int32_t read_one(int64_t position) const;
  // Into window_; starts [sequence_length] as fill() gives them.
  void take_window(int64_t window, uint8_t* starts);
  void take_crop(uint64_t sample, uint8_t* starts);
  [[noreturn]] void refuse(int64_t position, int32_t id) const;

  DataOptions options_;
  Random random_;
  std::vector<TokenFile> files_;
  std::vector<int64_t> first_;  // first_[f]: position of file f's first token; one more at the end
  std::vector<Document> documents_;  // circular only
  std::vector<Document> drawn_;
  std::vector<int32_t> window_;  // sequence_length + 1
  int64_t tokens_ = 0;
  int64_t windows_ = 0;
};

// Where `index` lies in permutation number `epoch` of 0 .. size - 1: a Feistel network, walked
// until it lands inside. No memory. REQUIRES: size < 2^60, epoch < 2^28.
uint64_t permuted(const Random& random, uint64_t epoch, uint64_t size, uint64_t index);

}  // namespace moemamba
