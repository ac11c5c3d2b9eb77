#pragma once
#include <string>

#include "core/error.h"
#include "runtime/manifest.pb.h"

namespace moemamba {

constexpr int kManifestFormat = 1;  // read: this one and the one before; written: this one

// A manifest that holds, but of a format that this program does not read: that is no damage.
struct OtherFormat : Error {
  using Error::Error;
};

// The bytes of MANIFEST.pb: the manifest and its digest.
std::string seal(const CheckpointManifest& manifest);

// The manifest of sealed bytes. Throws an Error, naming `path`, unless the digest holds, every bit
// of the file counts, the format is one that this program reads (else OtherFormat), names are
// plain, pieces lie inside their files and cover every tensor exactly, and nothing asks for more
// than the files hold.
CheckpointManifest unseal(std::string_view bytes, const std::string& path);

std::string hex_of_bytes(std::string_view bytes);

}  // namespace moemamba
