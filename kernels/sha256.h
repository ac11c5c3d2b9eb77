#pragma once
#include <cstddef>
#include <cstdint>

namespace moemamba {

// SHA-256 of several messages at once, on the host (no operator: it knows no tensors). A
// processor's SHA-256 instructions wait for one another; those of other messages run meanwhile, so
// that three messages take 0.62 of the time that they take one by one.
constexpr int kSha256Chains = 3;
bool can_chain_sha256();  // the processor has such instructions

// Goes on with `chains` (2 or 3) messages by `blocks` blocks of 64 bytes of each; states are the
// eight words of FIPS 180-4. REQUIRES: can_chain_sha256().
void sha256_blocks(int chains, uint32_t* const* states, const uint8_t* const* data, size_t blocks);

}  // namespace moemamba
