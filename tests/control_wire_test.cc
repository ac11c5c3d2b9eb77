#include "runtime/control_wire.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>

#include "core/digest.h"
#include "tests/support/faulty_files.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

ControlWord heartbeat(uint64_t number) {
  ControlWord word;
  word.mutable_heartbeat()->set_number(number);
  word.mutable_heartbeat()->set_group("expert");
  return word;
}

ControlWord stack_of(size_t bytes) {
  ControlWord word;
  word.mutable_stack()->add_frames(std::string(bytes, 'x'));
  return word;
}

std::string frame(const ControlWord& word) {
  std::string bytes;
  append_control_frame(word, bytes);
  return bytes;
}

std::string framed(std::string_view bytes) {
  std::string all;
  for (int i = 0; i < 4; ++i) all += char(bytes.size() >> (8 * i) & 0xff);
  return all + std::string(bytes);
}

Hello hello_of(int32_t rank, std::string_view secret, std::string_view nonce) {
  Hello hello;
  hello.set_protocol(kControlProtocol);
  hello.set_job(std::string(32, 'a'));
  hello.set_rank(rank);
  hello.set_ranks(4);
  hello.set_proof(control_proof(secret, nonce, hello.job(), rank));
  hello.set_nonce(std::string(kNonceBytes, 'r'));
  return hello;
}

std::string hello_problem(const Hello& hello, std::string_view secret, std::string_view nonce) {
  try {
    check_hello(hello, secret, nonce);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ControlWire, FramesAreALengthAndAWord) {
  const std::string bytes = frame(heartbeat(7));
  ASSERT_GT(bytes.size(), 4u);
  EXPECT_EQ(uint8_t(bytes[0]), bytes.size() - 4);
  EXPECT_EQ(bytes.substr(1, 3), std::string(3, '\0'));
  ControlWord word;
  ASSERT_TRUE(word.ParseFromString(bytes.substr(4)));
  EXPECT_EQ(word.heartbeat().number(), 7u);
}

// What is on the wire does not change without the protocol's number.
TEST(ControlWire, ReadsTheFrameOfAnEarlierBuild) {
  ControlReader reader;
  reader.feed(std::string("\x0b\x00\x00\x00\x42\x09\x0a\x05saved\x10\x03", 15));
  const auto word = reader.next();
  ASSERT_TRUE(word);
  EXPECT_EQ(word->event().kind(), "saved");
  EXPECT_EQ(word->event().step(), 3);
}

TEST(ControlWire, ReadsWordsThatComeByteByByte) {
  std::string bytes;
  for (uint64_t i = 1; i <= 3; ++i) append_control_frame(heartbeat(i), bytes);
  ControlReader reader;
  uint64_t read = 0;
  for (char byte : bytes) {
    reader.feed({&byte, 1});
    while (const auto word = reader.next()) EXPECT_EQ(word->heartbeat().number(), ++read);
  }
  EXPECT_EQ(read, 3u);
}

TEST(ControlWire, ReadsSeveralWordsThatComeAtOnce) {
  std::string bytes;
  for (uint64_t i = 1; i <= 3; ++i) append_control_frame(heartbeat(i), bytes);
  ControlReader reader;
  reader.feed(bytes + frame(heartbeat(4)).substr(0, 5));
  for (uint64_t i = 1; i <= 3; ++i) {
    const auto word = reader.next();
    ASSERT_TRUE(word);
    EXPECT_EQ(word->heartbeat().number(), i);
  }
  EXPECT_FALSE(reader.next());
  reader.feed(frame(heartbeat(4)).substr(5));
  ASSERT_TRUE(reader.next());
}

TEST(ControlWire, TakesTheLongestWordAndRefusesALongerOne) {
  const size_t around = frame(stack_of(65000)).size() - 4 - 65000;
  ControlReader reader;
  reader.feed(frame(stack_of(kMostControlBytes - around)));
  ASSERT_TRUE(reader.next());
  std::string bytes = "before";
  EXPECT_NE(message_of([&] {
              append_control_frame(stack_of(kMostControlBytes), bytes);
            }).find("at most 65536"),
            std::string::npos);
  EXPECT_EQ(bytes, "before");
}

TEST(ControlWire, RefusesALengthBeforeItsBytesAreThere) {
  ControlReader reader;
  reader.feed(std::string("\x01\x00\x01\x00", 4));  // 65,537
  EXPECT_NE(message_of([&] { reader.next(); }).find("65537"), std::string::npos);
  reader.feed(frame(heartbeat(1)));
  EXPECT_NE(message_of([&] { reader.next(); }), "") << "it does not go on after what it refused";
}

TEST(ControlWire, HoldsStrangersToShortWords) {
  ControlReader reader(kMostGreetingBytes);
  ControlWord hello;
  *hello.mutable_hello() = hello_of(0, "secret", "nonce");
  reader.feed(frame(hello));
  ASSERT_TRUE(reader.next());
  reader.feed(frame(stack_of(kMostGreetingBytes)).substr(0, 4));
  EXPECT_NE(message_of([&] { reader.next(); }).find("at most 1024"), std::string::npos);
  ControlReader known(kMostGreetingBytes);
  known.allow(kMostControlBytes);
  known.feed(frame(stack_of(kMostGreetingBytes)));
  EXPECT_TRUE(known.next());
}

TEST(ControlWire, RefusesWhatIsNoWord) {
  const std::string word = heartbeat(1).SerializeAsString();
  for (const std::string& bytes :
       {std::string(), std::string("\xff\xff\xff"), std::string(100, 'x'), word + word,
        word + "\x01", word.substr(0, word.size() - 1), std::string("\xfa\x01\x00", 3)}) {
    ControlReader reader;
    reader.feed(framed(bytes));
    EXPECT_NE(message_of([&] { reader.next(); }).find("expected a control word"), std::string::npos)
        << bytes.size();
  }
}

TEST(ControlWire, RefusesMoreElementsThanAWordMayHave) {
  ControlWord choices, frames;
  for (size_t i = 0; i < kMostChoices; ++i) choices.mutable_experts()->add_choices(1);
  for (size_t i = 0; i < kMostFields; ++i) frames.mutable_stack()->add_frames("");
  for (ControlWord* word : {&choices, &frames}) {
    ControlReader reader;
    reader.feed(frame(*word));
    EXPECT_TRUE(reader.next());
  }
  choices.mutable_experts()->add_choices(1);
  frames.mutable_stack()->add_frames("");
  for (ControlWord* word : {&choices, &frames}) {
    std::string bytes;
    EXPECT_NE(message_of([&] { append_control_frame(*word, bytes); }), "");
    ControlReader reader;
    reader.feed(framed(word->SerializeAsString()));
    EXPECT_NE(message_of([&] { reader.next(); }), "");
  }
}

// RFC 4231, test cases 1 and 2.
TEST(ControlWire, ItsProofIsHmacOfSha256) {
  const auto hex = [](const std::string& bytes) {
    std::string text;
    for (char c : bytes) {
      text += "0123456789abcdef"[uint8_t(c) >> 4];
      text += "0123456789abcdef"[uint8_t(c) & 15];
    }
    return text;
  };
  EXPECT_EQ(hex(hmac_sha256(std::string(20, '\x0b'), "Hi There")),
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  EXPECT_EQ(hex(hmac_sha256("Jefe", "what do ya want for nothing?")),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT_EQ(control_proof("Jefe", "nonce", "job", 12), hmac_sha256("Jefe", "nonce\njob\n12"));
}

TEST(ControlWire, TakesAHelloWithItsProofAlone) {
  const std::string secret(32, 's'), nonce(32, 'n');
  const Hello good = hello_of(3, secret, nonce);
  EXPECT_EQ(hello_problem(good, secret, nonce), "");
  EXPECT_NE(hello_problem(good, std::string(32, 't'), nonce).find("secret"), std::string::npos);
  EXPECT_NE(hello_problem(good, secret, std::string(32, 'm')).find("secret"), std::string::npos);
  Hello other = good;
  other.set_rank(2);
  EXPECT_NE(hello_problem(other, secret, nonce).find("secret"), std::string::npos);
  other = good;
  other.set_job(std::string(32, 'b'));
  EXPECT_NE(hello_problem(other, secret, nonce).find("secret"), std::string::npos);
  other = good;
  other.clear_proof();
  EXPECT_NE(hello_problem(other, secret, nonce).find("secret"), std::string::npos);
  other = good;
  other.set_protocol(kControlProtocol + 1);
  EXPECT_NE(hello_problem(other, secret, nonce).find("protocol 3"), std::string::npos);
  other = good;
  other.set_rank(4);
  EXPECT_NE(hello_problem(other, secret, nonce).find("rank and ranks"), std::string::npos);
  other = good;
  other.set_job("../etc");
  EXPECT_NE(hello_problem(other, secret, nonce).find("32 hex digits"), std::string::npos);
  other = good;
  other.set_nonce("short");
  EXPECT_NE(hello_problem(other, secret, nonce).find("5 bytes"), std::string::npos);
}

TEST(ControlWire, TakesAWelcomeOfWhoKnowsTheSecretAlone) {
  const std::string secret(32, 's'), nonce(32, 'n');
  const Hello hello = hello_of(3, secret, nonce);
  EXPECT_EQ(supervisor_proof(secret, hello),
            hmac_sha256(secret, concat("supervisor\n", hello.nonce(), "\n", hello.job(), "\n3")));
  Welcome welcome;
  welcome.set_generation(7);
  welcome.set_proof(supervisor_proof(secret, hello));
  check_welcome(welcome, secret, hello);
  Hello other = hello;
  other.set_nonce(std::string(kNonceBytes, 'q'));  // of another connection
  for (const std::string& proof :
       {std::string(), hello.proof(), supervisor_proof(std::string(32, 't'), hello),
        supervisor_proof(secret, hello_of(2, secret, nonce)), supervisor_proof(secret, other),
        control_proof(secret, hello.nonce(), hello.job(), hello.rank())}) {
    welcome.set_proof(proof);
    EXPECT_NE(
        message_of([&] { check_welcome(welcome, secret, hello); }).find("does not know the secret"),
        std::string::npos);
  }
}

TEST(ControlWire, ChallengesAreFreshAndOfOneProtocol) {
  const Challenge one = make_challenge(), two = make_challenge();
  EXPECT_NE(one.nonce(), two.nonce());
  check_challenge(one);
  Challenge other = one;
  other.set_protocol(7);
  EXPECT_NE(message_of([&] { check_challenge(other); }).find("protocol 7"), std::string::npos);
  other = one;
  other.set_nonce("short");
  EXPECT_NE(message_of([&] { check_challenge(other); }).find("5 bytes"), std::string::npos);
}

TEST(ControlSecret, IsMadeOnceForThisUserAlone) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const std::string place = folder / "run/supervisor";
  const std::string secret = make_secret(files, place);
  EXPECT_EQ(secret.size(), kSecretBytes);
  EXPECT_EQ(make_secret(files, place), secret);
  EXPECT_EQ(read_secret(place), secret);
  struct stat of_file {
  }, of_folder{};
  ASSERT_EQ(stat((place + "/secret").c_str(), &of_file), 0);
  ASSERT_EQ(stat(place.c_str(), &of_folder), 0);
  EXPECT_EQ(of_file.st_mode & 0777, 0600u);
  EXPECT_EQ(of_folder.st_mode & 0777, 0700u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(place), {}), 1);
}

TEST(ControlSecret, IsRefusedWhereOthersMayReadIt) {
  TemporaryFolder folder;
  PosixFileSystem files;
  make_secret(files, folder.path());
  const std::string path = folder / "secret";
  for (mode_t mode : {0640, 0604, 0620, 0602}) {
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    EXPECT_NE(message_of([&] { read_secret(folder.path()); }).find("chmod 600"), std::string::npos);
    EXPECT_NE(message_of([&] { make_secret(files, folder.path()); }), "");
  }
}

TEST(ControlSecret, IsRefusedWhereItIsNotWhole) {
  TemporaryFolder folder;
  EXPECT_NE(message_of([&] { read_secret(folder.path()); }).find("cannot be read"),
            std::string::npos);
  const std::string path = folder / "secret";
  for (size_t bytes : {0, 31, 33}) {
    folder.put("secret", std::string(bytes, 'x'));
    ASSERT_EQ(chmod(path.c_str(), 0600), 0);
    EXPECT_NE(message_of([&] { read_secret(folder.path()); }).find("32 bytes"), std::string::npos);
  }
  std::filesystem::rename(path, folder / "elsewhere");
  std::filesystem::create_symlink(folder / "elsewhere", path);
  EXPECT_NE(message_of([&] { read_secret(folder.path()); }), "");
}

TEST(ControlSecret, LeavesNothingWhereTheDiskFails) {
  for (int64_t working = 0;; ++working) {
    ASSERT_LT(working, 20);
    TemporaryFolder folder;
    FaultyFiles files(working);
    try {
      const std::string secret = make_secret(files, folder / "supervisor");
      EXPECT_EQ(secret, read_secret(folder / "supervisor"));
      EXPECT_GT(working, 3);
      return;
    } catch (const Error&) {
      EXPECT_FALSE(file_exists(folder / "supervisor/secret"));
    }
  }
}

}  // namespace
}  // namespace moemamba
