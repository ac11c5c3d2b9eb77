#include "runtime/baselines.h"

#include <zlib.h>

#include <cmath>
#include <unordered_map>
#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

// All tokens of a file, in pieces. fn(ids) sees one token of the piece before, so that every pair
// of neighbours is inside exactly one piece.
template <class Fn>
void for_each_piece(const TokenFile& file, int64_t vocabulary, Fn&& fn) {
  constexpr int64_t kPiece = 1 << 16;
  std::vector<int32_t> ids;
  for (int64_t begin = 0; begin < file.size(); begin += kPiece) {
    const int64_t from = begin == 0 ? 0 : begin - 1;
    ids.resize(size_t(std::min(begin + kPiece, file.size()) - from));
    file.read(from, int64_t(ids.size()), ids.data());
    for (size_t i = 0; i < ids.size(); ++i)
      check(ids[i] >= 0 && ids[i] < vocabulary, file.place(from + int64_t(i)), ": token id ",
            ids[i], " is outside the vocabulary of ", vocabulary);
    fn(ids);
  }
}

struct Bigrams {
  std::vector<int64_t> counts;      // of each token
  std::vector<int64_t> followed;    // how often something came after it
  std::vector<int64_t> successors;  // how many different ones
  std::unordered_map<uint64_t, int64_t> pairs;
  int64_t total = 0;

  static uint64_t key(int32_t a, int32_t b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }
  double probability(int32_t b) const {
    return (double(counts[size_t(b)]) + 0.5) / (double(total) + 0.5 * double(counts.size()));
  }
  double probability(int32_t a, int32_t b) const {
    const double kinds = double(successors[size_t(a)]);
    if (kinds == 0) return probability(b);
    const auto pair = pairs.find(key(a, b));
    const double seen = pair == pairs.end() ? 0 : double(pair->second);
    return (seen + kinds * probability(b)) / (double(followed[size_t(a)]) + kinds);
  }
};

Bigrams count(const TokenFile& train, int64_t vocabulary) {
  Bigrams bigrams;
  bigrams.counts.resize(size_t(vocabulary));
  bigrams.followed.resize(size_t(vocabulary));
  bigrams.successors.resize(size_t(vocabulary));
  bool first = true;
  for_each_piece(train, vocabulary, [&](const std::vector<int32_t>& ids) {
    for (size_t i = first ? 0 : 1; i < ids.size(); ++i) {
      ++bigrams.counts[size_t(ids[i])];
      ++bigrams.total;
      if (i == 0) continue;
      ++bigrams.followed[size_t(ids[i - 1])];
      if (++bigrams.pairs[Bigrams::key(ids[i - 1], ids[i])] == 1)
        ++bigrams.successors[size_t(ids[i - 1])];
    }
    first = false;
  });
  return bigrams;
}

}  // namespace

double bigram_bits_per_byte(const TokenFile& train, const TokenFile& held_out, int64_t vocabulary,
                            int64_t bytes) {
  check(bytes > 0, held_out.path(), ": expected the number of bytes of its text, found ", bytes);
  const Bigrams bigrams = count(train, vocabulary);
  double bits = 0;
  bool first = true;
  for_each_piece(held_out, vocabulary, [&](const std::vector<int32_t>& ids) {
    if (first) bits -= std::log2(bigrams.probability(ids[0]));
    first = false;
    for (size_t i = 1; i < ids.size(); ++i)
      bits -= std::log2(bigrams.probability(ids[i - 1], ids[i]));
  });
  return bits / double(bytes);
}

double gzip_bits_per_byte(std::string_view text) {
  check(!text.empty(), "expected text to compress, found none");
  z_stream stream{};
  constexpr int kGzip = 15 + 16;  // the largest window, gzip's header
  check(deflateInit2(&stream, 9, Z_DEFLATED, kGzip, 8, Z_DEFAULT_STRATEGY) == Z_OK,
        "zlib does not start");
  std::vector<unsigned char> out(1 << 16);
  int64_t compressed = 0;
  size_t fed = 0;
  int status = Z_OK;
  while (status == Z_OK) {
    if (stream.avail_in == 0) {  // zlib counts in 32 bits
      const size_t part = std::min<size_t>(text.size() - fed, 1 << 30);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data() + fed));
      stream.avail_in = uInt(part);
      fed += part;
    }
    stream.next_out = out.data();
    stream.avail_out = uInt(out.size());
    status = deflate(&stream, fed == text.size() ? Z_FINISH : Z_NO_FLUSH);
    compressed += int64_t(out.size() - stream.avail_out);
  }
  deflateEnd(&stream);
  check(status == Z_STREAM_END, "zlib failed with ", status);
  return 8.0 * double(compressed) / double(text.size());
}

}  // namespace moemamba
