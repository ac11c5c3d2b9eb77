#include "core/digest.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/random.h>

#include "core/error.h"

namespace moemamba {

std::string hmac_sha256(std::string_view key, std::string_view data) {
  std::string digest(32, '\0');
  unsigned length = 0;
  const unsigned char* done = HMAC(EVP_sha256(), key.data(), int(key.size()),
                                   reinterpret_cast<const unsigned char*>(data.data()), data.size(),
                                   reinterpret_cast<unsigned char*>(digest.data()), &length);
  check(done != nullptr && length == digest.size(), "HMAC-SHA256 failed; is OpenSSL complete?");
  return digest;
}

bool equal_in_constant_time(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

std::string random_bytes(size_t bytes) {
  std::string random(bytes, '\0');
  for (size_t at = 0; at < bytes;) {
    const ssize_t got = getrandom(random.data() + at, bytes - at, 0);
    check(got > 0, "the system gives no random numbers");
    at += size_t(got);
  }
  return random;
}

std::string hex_of_bytes(std::string_view bytes) {
  std::string text;
  for (unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace moemamba
