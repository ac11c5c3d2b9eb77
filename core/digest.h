#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace moemamba {

// What proves that both sides of a connection know one secret.

// HMAC with SHA-256 (RFC 2104), as 32 bytes.
std::string hmac_sha256(std::string_view key, std::string_view data);

// Takes as long wherever two texts of one length differ, so that nobody guesses byte by byte.
bool equal_in_constant_time(std::string_view a, std::string_view b);

// From the system; nobody can guess them.
std::string random_bytes(size_t bytes);

// Two lowercase digits a byte.
std::string hex_of_bytes(std::string_view bytes);

}  // namespace moemamba
