#include "runtime/data.h"

#include <algorithm>
#include <limits>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr int kFeistelRounds = 6;

}  // namespace

uint64_t permuted(const Random& random, uint64_t epoch, uint64_t size, uint64_t index) {
  if (size <= 1) return 0;
  int half = 1;  // bits of each half: together the smallest even number of bits that holds size
  while (half < 30 && (uint64_t{1} << (2 * half)) < size) ++half;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  do {  // at most four times as many numbers as wanted: under four walks on average
    uint64_t left = index >> half, right = index & mask;
    for (int round = 0; round < kFeistelRounds; ++round) {
      const uint64_t counter = epoch << 35 | uint64_t(round) << 32 | right;
      const uint64_t mixed = left ^ (random.bits(counter)[0] & mask);
      left = right;
      right = mixed;
    }
    index = left << half | right;
  } while (index >= size);
  return index;
}

Batches::Batches(DataOptions options)
    : options_(std::move(options)), random_(options_.seed, "sample order") {
  const int64_t T = options_.sequence_length;
  check(T >= 1 && options_.global_batch >= 1, "sequence length ", T, " and global batch ",
        options_.global_batch, " must be at least 1");
  check(options_.vocabulary >= 1, "expected a vocabulary, found ", options_.vocabulary);
  check(!options_.files.empty(), "expected token files, found none; name them in data.train");
  for (const std::string& path : options_.files) {
    first_.push_back(tokens_);
    files_.emplace_back(path);
    tokens_ += files_.back().size();
  }
  first_.push_back(tokens_);
  windows_ = (tokens_ - 1) / T;
  check(windows_ >= options_.global_batch, files_[0].path(), files_.size() > 1 ? " ..." : "", ": ",
        tokens_, " tokens are too few for one batch of ", options_.global_batch, " sequences of ",
        T, "; expected at least ", options_.global_batch * T + 1,
        "; use more text, a smaller batch or shorter sequences");
  window_.resize(size_t(T) + 1);
  if (options_.sampling != Sampling::circular) return;
  check(options_.end_of_document >= 0, "circular sampling needs an end-of-document id");
  find_documents();
  drawn_.resize(size_t(T) + 4);  // a document counts for at least two tokens
}

void Batches::add_document(int64_t begin, int64_t end) {
  if (end > begin && read_one(end - 1) == options_.end_of_document) --end;
  if (end > begin) documents_.push_back({begin, end - begin});
}

void Batches::find_documents() {
  for (size_t f = 0; f < files_.size(); ++f) {
    const TokenFile& file = files_[f];
    for (int64_t d = 0; d < file.documents(); ++d)
      add_document(first_[f] + file.document_begin(d), first_[f] + file.document_begin(d + 1));
    if (file.documents() > 0) continue;
    int64_t begin = 0;
    std::vector<int32_t> ids(1 << 16);
    for (int64_t from = 0; from < file.size(); from += int64_t(ids.size())) {
      const int64_t count = std::min<int64_t>(int64_t(ids.size()), file.size() - from);
      file.read(from, count, ids.data());
      for (int64_t i = 0; i < count; ++i) {
        if (ids[size_t(i)] != options_.end_of_document) continue;
        add_document(first_[f] + begin, first_[f] + from + i + 1);
        begin = from + i + 1;
      }
    }
    add_document(first_[f] + begin, first_[f] + file.size());
  }
  check(!documents_.empty(), files_[0].path(), ": holds no documents, only ends of documents");
}

size_t Batches::file_at(int64_t position) const {
  return size_t(std::upper_bound(first_.begin(), first_.end(), position) - first_.begin()) - 1;
}

void Batches::read(int64_t position, int64_t count, int32_t* out) const {
  size_t f = file_at(position);
  while (count > 0) {
    const int64_t part = std::min(count, first_[f + 1] - position);
    files_[f].read(position - first_[f], part, out);
    for (int64_t i = 0; i < part; ++i)
      if (out[i] < 0 || out[i] >= options_.vocabulary) refuse(position + i, out[i]);
    position += part;
    out += part;
    count -= part;
    ++f;
  }
}

int32_t Batches::read_one(int64_t position) const {
  int32_t id = 0;
  read(position, 1, &id);
  return id;
}

void Batches::refuse(int64_t position, int32_t id) const {
  const size_t f = file_at(position);
  throw Error(concat(files_[f].place(position - first_[f]), ": token id ", id,
                     " is outside the vocabulary of ", options_.vocabulary,
                     "; the file was made with another tokenizer or is damaged"));
}

void Batches::take_window(int64_t window, uint8_t* starts) {
  const int64_t begin = window * options_.sequence_length;
  const int64_t end = begin + options_.sequence_length;
  read(begin, int64_t(window_.size()), window_.data());
  for (int64_t at = begin; at < end;) {
    const size_t f = file_at(at);
    const int64_t part = std::min(end, first_[f + 1]) - at;
    files_[f].mark_starts(at - first_[f], part, options_.end_of_document, starts + (at - begin));
    at += part;
  }
}

void Batches::take_crop(uint64_t sample, uint8_t* starts) {
  const int64_t T = options_.sequence_length;
  const uint64_t numbers = drawn_.size() + 1;  // of the counter that one sample may use
  int64_t total = 0, longest = 0;
  size_t count = 0;
  while (total - longest <= T) {
    const uint64_t pick = random_.integer(sample * numbers + count, documents_.size());
    const Document document = documents_[pick];
    drawn_[count++] = document;
    total += document.length + 1;
    longest = std::max(longest, document.length + 1);
  }
  int64_t start = int64_t(random_.integer(sample * numbers + numbers - 1, uint64_t(total)));
  size_t d = 0;
  while (start >= drawn_[d].length + 1) start -= drawn_[d++].length + 1;
  starts[0] = start == 0;
  for (size_t filled = 0; filled < window_.size(); start = 0, d = (d + 1) % count) {
    const int64_t room = int64_t(window_.size() - filled);
    const int64_t part = std::min(room, std::max<int64_t>(drawn_[d].length - start, 0));
    read(drawn_[d].begin + start, part, &window_[filled]);
    filled += size_t(part);
    if (part < room) window_[filled++] = options_.end_of_document;
  }
  for (int64_t t = 1; t < T; ++t) starts[t] = window_[size_t(t) - 1] == options_.end_of_document;
}

void Batches::fill(int64_t step, int64_t first_sequence, int64_t count, int32_t* inputs,
                   int32_t* targets, uint8_t* starts) {
  check(step >= 0 && first_sequence >= 0 && first_sequence + count <= options_.global_batch,
        "sequences ", first_sequence, " + ", count, " of step ", step, " asked for, a batch has ",
        options_.global_batch);
  const int64_t T = options_.sequence_length;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t sample = step * options_.global_batch + first_sequence + s;
    if (options_.sampling == Sampling::circular) {
      take_crop(uint64_t(sample), starts + s * T);
    } else {
      int64_t window = sample % windows_;
      if (options_.sampling == Sampling::epochs)
        window = int64_t(
            permuted(random_, uint64_t(sample / windows_), uint64_t(windows_), uint64_t(window)));
      take_window(window, starts + s * T);
    }
    std::copy_n(window_.begin(), T, inputs + s * T);
    std::copy_n(window_.begin() + 1, T, targets + s * T);
  }
}

double Batches::epoch(int64_t step) const {
  return double(step) * double(options_.global_batch) / double(windows_);
}

}  // namespace moemamba
