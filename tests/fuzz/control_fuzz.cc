// What a rank's or a supervisor's connection gives: a stream of frames, and one frame's word.
#include "runtime/control_wire.h"

#include <vector>

#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

// A list of protobuf doubles: a choice is 8 bytes for one of input, twice where there is room for
// more, and while the list moves the old half is there too; an empty text is 32 behind a pointer.
// Both lists are of fixed length (kMostChoices, kMostFields), as is what stays of unknown fields.
constexpr int64_t kMore = (16 << 10) + int64_t(24 * kMostChoices + 96 * kMostFields);

// Words in a stream until its end, or until one is refused. pieces: how it comes in.
std::vector<std::string> read(std::string_view stream, size_t piece) {
  std::vector<std::string> words;
  ControlReader reader;
  try {
    for (; !stream.empty(); stream.remove_prefix(std::min(piece, stream.size()))) {
      reader.feed(stream.substr(0, piece));
      while (const auto word = reader.next()) words.push_back(word->SerializeAsString());
    }
  } catch (const Error&) {
    words.push_back("refused");
  }
  return words;
}

// One reader takes all at once and drops each word before the next.
void read_within_bounds(std::string_view stream) {
  AllocationLimit limit(stream.size(), 2, kMore);
  try {
    ControlReader reader;
    reader.feed(stream);
    while (reader.next()) {
    }
  } catch (const Error&) {
  }
}

void expect_same_again(std::string_view bytes) {
  ControlWord word;
  if (!word.ParseFromArray(bytes.data(), int(bytes.size()))) return;
  std::string frame;
  try {
    append_control_frame(word, frame);
  } catch (const Error&) {
    return;  // protobuf takes more than a reader
  }
  ControlReader reader;
  reader.feed(frame);
  try {
    const auto again = reader.next();
    require(again && again->SerializeAsString() == word.SerializeAsString(),
            "what was framed reads back as the same");
  } catch (const Error&) {
    require(word.word_case() == ControlWord::WORD_NOT_SET, "what was framed is taken");
  }
}

std::string framed(std::string_view bytes) {
  std::string all;
  for (int i = 0; i < 4; ++i) all += char(bytes.size() >> (8 * i) & 0xff);
  return all += bytes;
}

// Words that ask for as much as they can.
bool read_greedy() {
  ControlWord choices, frames, text;
  for (size_t i = 0; i < kMostChoices; ++i) choices.mutable_experts()->add_choices(1);
  for (size_t i = 0; i < kMostFields; ++i) frames.mutable_stack()->add_frames("");
  text.mutable_event()->set_text(std::string(65000, 'x'));
  for (const ControlWord* word : {&choices, &frames, &text}) {
    const std::string bytes = framed(word->SerializeAsString());
    read_within_bounds(bytes);
    require(read(bytes, bytes.size()).front() != "refused", "a word at its limits is taken");
  }
  for (const char* unknown : {"\x78\x01", "\x7a\x00"}) {
    std::string fields;
    for (int i = 0; i < 30000; ++i) fields += std::string(unknown, 2);
    read_within_bounds(framed("\x3a\xe0\xd4\x03" + fields));
    read_within_bounds(framed(fields));
  }
  std::string packed = "\x3a\xc4\xea\x03\x22\xc0\xea\x03" + std::string(62784, '\x01');
  read_within_bounds(framed(packed));
  return true;
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  // protobuf makes its descriptors once in a process, whatever comes in.
  static const void* const made = ControlWord::descriptor();
  require(made, "protobuf knows the words");
  static const bool greedy = read_greedy();
  require(greedy, "greedy words were read");
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  read_within_bounds(bytes);
  require(read(bytes, 1) == read(bytes, bytes.size() + 1), "pieces do not matter");
  if (size <= kMostControlBytes) read_within_bounds(framed(bytes));
  expect_same_again(bytes);
  return 0;
}
