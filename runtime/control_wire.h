#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/file.h"
#include "runtime/control.pb.h"

namespace moemamba {

// Ranks and the supervisor of their run: how words of control.proto become bytes and back, and how
// a rank and a supervisor prove to each other that they belong to the run. Nothing here knows of
// sockets.

constexpr uint32_t kControlProtocol = 2;
constexpr size_t kMostControlBytes = 65536;  // of a word
constexpr size_t kMostGreetingBytes = 1024;  // of a word from whom nothing is known yet
constexpr size_t kMostChoices = 8192;        // of ExpertLoad
constexpr size_t kMostFields = 512;          // of a word, lists counted by their elements
constexpr size_t kNonceBytes = 32, kSecretBytes = 32;

// Appends the frame of a word. An Error where it is longer than a reader takes, or has more
// elements; `to` is then as it was.
void append_control_frame(const ControlWord& word, std::string& to);

// Words from bytes as they come in. What it holds is at most a word, and what was fed since the
// last one came out; no length that a peer claims is believed before its bytes are there.
class ControlReader {
 public:
  explicit ControlReader(size_t most = kMostControlBytes) : most_(most) {}
  void allow(size_t most) { most_ = most; }  // bytes of a word, from the next one on
  void feed(std::string_view bytes) { bytes_.append(bytes); }
  // The next word; nothing: more bytes are needed. An Error where these are no words, and from then
  // on: the connection is of no more use.
  std::optional<ControlWord> next();

 private:
  size_t most_;
  std::string bytes_;  // not yet taken
  size_t at_ = 0;      // of them, already given out
  bool failed_ = false;
};

Challenge make_challenge();  // of a fresh nonce

// Hello.proof: who knows the secret of a run's folder can make it, for this connection alone.
std::string control_proof(std::string_view secret, std::string_view nonce, std::string_view job,
                          int32_t rank);
// An Error unless it speaks this protocol, is whole, and its proof is right for this nonce.
void check_hello(const Hello& hello, std::string_view secret, std::string_view nonce);
// An Error unless the challenge is of this protocol.
void check_challenge(const Challenge& challenge);
// Welcome.proof, in answer to a Hello. No proof of a rank is one of a supervisor.
std::string supervisor_proof(std::string_view secret, const Hello& hello);
// An Error unless its proof is right for this Hello.
void check_welcome(const Welcome& welcome, std::string_view secret, const Hello& hello);

// The secret in `folder` (<run>/supervisor), made where there is none; the folder is then made as
// well, for this user alone. Of several that make one at a time, all get the same.
std::string make_secret(FileSystem& files, const std::string& folder);
// An Error where it is missing, is not such a file, or others may read it.
std::string read_secret(const std::string& folder);

}  // namespace moemamba
