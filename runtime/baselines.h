#pragma once
#include <string_view>

#include "runtime/token_files.h"

namespace moemamba {

// What a model's held-out bits per byte are compared with.

// Bits per byte of `held_out` (which stands for `bytes` bytes of text) under a bigram model of
// `train`: p(b | a) = (count(ab) + d(a) p(b)) / (count(a) + d(a)) with d(a) = kinds of tokens seen
// after a (Witten and Bell, 1991), and p(b) with half a count added for every id.
double bigram_bits_per_byte(const TokenFile& train, const TokenFile& held_out, int64_t vocabulary,
                            int64_t bytes);

// gzip -9 of `text` alone.
double gzip_bits_per_byte(std::string_view text);

}  // namespace moemamba
