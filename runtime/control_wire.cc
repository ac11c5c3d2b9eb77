#include "runtime/control_wire.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/digest.h"
#include "core/error.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/wire_fields.h"

namespace moemamba {

namespace {

constexpr size_t kPrefix = 4;

std::string secret_path(const std::string& folder) {
  return join_path(folder, "secret");
}

size_t length_at(std::string_view bytes) {
  size_t length = 0;
  for (size_t i = kPrefix; i-- > 0;) length = length << 8 | uint8_t(bytes[i]);
  return length;
}

// Whether protobuf may have it: one word, and no more elements than kMostFields and kMostChoices.
// Two bytes can be an element of 40, so that protobuf would otherwise take twenty times the input.
bool is_lean(std::string_view bytes) {
  WireField word;
  if (!take_field(bytes, word) || !bytes.empty() || word.kind != WireField::bytes) return false;
  const bool has_choices = word.number == ControlWord::kExpertsFieldNumber;
  std::string_view rest = word.text;
  size_t choices = 0;
  for (size_t fields = 0; !rest.empty(); ++fields) {
    WireField field;
    if (fields == kMostFields || !take_field(rest, field)) return false;
    if (has_choices && field.number == ExpertLoad::kChoicesFieldNumber)
      choices +=
          size_t(std::ranges::count_if(field.text, [](char c) { return uint8_t(c) < 0x80; }));
    if (choices > kMostChoices) return false;
  }
  return true;
}

bool is_job(std::string_view job) {
  return job.size() == 32 && job.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace

void append_control_frame(const ControlWord& word, std::string& to) {
  const std::string bytes = word.SerializeAsString();
  check(bytes.size() <= kMostControlBytes && is_lean(bytes), "a control word has at most ",
        kMostControlBytes, " bytes, ", kMostFields, " fields and ", kMostChoices,
        " choices; found ", bytes.size(), " bytes");
  for (size_t i = 0; i < kPrefix; ++i) to += char(bytes.size() >> (8 * i) & 0xff);
  to += bytes;
}

std::optional<ControlWord> ControlReader::next() {
  check(!failed_, "this connection has sent what is no control word");
  const std::string_view rest = std::string_view(bytes_).substr(at_);
  const size_t length = rest.size() < kPrefix ? 0 : length_at(rest);
  failed_ = length > most_;
  check(!failed_, "a control word has at most ", most_, " bytes, found ", length);
  if (rest.size() < kPrefix + length || rest.size() < kPrefix) {
    bytes_.erase(0, std::exchange(at_, 0));
    return std::nullopt;
  }
  const std::string_view bytes = rest.substr(kPrefix, length);
  ControlWord word;
  failed_ = !is_lean(bytes) || !word.ParseFromArray(bytes.data(), int(bytes.size())) ||
            word.word_case() == ControlWord::WORD_NOT_SET;
  check(!failed_, "expected a control word of protocol ", kControlProtocol, ", found ", length,
        " other bytes");
  at_ += kPrefix + length;
  return word;
}

Challenge make_challenge() {
  Challenge challenge;
  challenge.set_protocol(kControlProtocol);
  challenge.set_nonce(random_bytes(kNonceBytes));
  return challenge;
}

std::string control_proof(std::string_view secret, std::string_view nonce, std::string_view job,
                          int32_t rank) {
  return hmac_sha256(secret, concat(nonce, "\n", job, "\n", rank));
}

void check_hello(const Hello& hello, std::string_view secret, std::string_view nonce) {
  check(hello.protocol() == kControlProtocol, "a rank speaks control protocol ", hello.protocol(),
        ", this supervisor ", kControlProtocol, "; start both from one build");
  check(is_job(hello.job()) && hello.rank() >= 0 && hello.rank() < hello.ranks(),
        "a rank says hello without its job (32 hex digits), rank and ranks");
  check(equal_in_constant_time(hello.proof(),
                               control_proof(secret, nonce, hello.job(), hello.rank())),
        "who says to be rank ", hello.rank(), " does not know the secret of this run");
  check(hello.nonce().size() == kNonceBytes, "the nonce of rank ", hello.rank(), " has ",
        hello.nonce().size(), " bytes, expected ", kNonceBytes);
}

std::string supervisor_proof(std::string_view secret, const Hello& hello) {
  return hmac_sha256(secret,
                     concat("supervisor\n", hello.nonce(), "\n", hello.job(), "\n", hello.rank()));
}

void check_welcome(const Welcome& welcome, std::string_view secret, const Hello& hello) {
  check(equal_in_constant_time(welcome.proof(), supervisor_proof(secret, hello)),
        "who listens at the supervisor's address does not know the secret of this run; nothing "
        "that it says is obeyed");
}

void check_challenge(const Challenge& challenge) {
  check(challenge.protocol() == kControlProtocol, "the supervisor speaks control protocol ",
        challenge.protocol(), ", this rank ", kControlProtocol, "; start both from one build");
  check(challenge.nonce().size() == kNonceBytes, "the supervisor's challenge has ",
        challenge.nonce().size(), " bytes, expected ", kNonceBytes);
}

// It comes to be whole, under a name that one of several gets.
std::string make_secret(FileSystem& files, const std::string& folder) {
  const std::string path = secret_path(folder);
  if (file_exists(path)) return read_secret(folder);
  files.make_folders(folder);
  keep_private(folder);
  const std::string draft = concat(path, ".new-", fresh_nonce());
  try {
    const auto file = files.open(draft, OpenMode::create_private);
    const std::string secret = random_bytes(kSecretBytes);
    file->write(secret.data(), secret.size());
    file->sync();
    file->close();
    if (!files.rename_new(draft, path)) {
      files.link(draft, path);
      files.remove(draft);
    }
  } catch (const Error&) {
    files.remove(draft);
    if (!file_exists(path)) throw;
  }
  return read_secret(folder);
}

std::string read_secret(const std::string& folder) {
  const std::string path = secret_path(folder);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  check(fd >= 0, path, ": cannot be read: ", std::strerror(errno),
        "; ranks find it where their supervisor has made it, on a disk that all machines share");
  struct stat facts {};
  char bytes[kSecretBytes + 1];
  const bool known = fstat(fd, &facts) == 0;
  const ssize_t got = known && S_ISREG(facts.st_mode) ? ::read(fd, bytes, sizeof bytes) : -1;
  ::close(fd);
  check(known && (facts.st_mode & 077) == 0, path,
        ": others may read this secret; expected mode 0600: chmod 600 it, or delete it while no "
        "supervisor runs, and a new one is made");
  check(got == ssize_t(kSecretBytes), path, ": expected a file of ", kSecretBytes,
        " bytes; delete it while no supervisor runs, and a new one is made");
  return std::string(bytes, kSecretBytes);
}

}  // namespace moemamba
