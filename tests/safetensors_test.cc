#include "runtime/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/random.h"
#include "tests/support/cases.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

std::string file_of(const std::string& header, const std::string& values) {
  std::string length(8, '\0');
  const uint64_t bytes = header.size();
  std::memcpy(length.data(), &bytes, 8);
  return length + header + values;
}

constexpr const char* kTwo = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"BF16","shape":[],"data_offsets":[8,10]}})";

TEST(Safetensors, GivesBackWhatWasWritten) {
  TemporaryFolder folder;
  PosixFileSystem files;
  Case c(1);
  const Tensor padded = c.normal({3, 5}), vector = c.normal({7}, 1, DType::bf16);
  const Tensor empty = c.empty({0, 4}), deep = c.normal({2, 3, 2, 3});
  const Tensor ints = c.integers({6}, -5, 5);
  SafetensorsWriter writer(files, folder / "w.safetensors",
                           {{.name = "padded", .dtype = DType::f32, .shape = {3, 5}},
                            {.name = "a vector \"quoted\"\n", .dtype = DType::bf16, .shape = {7}},
                            {.name = "empty", .dtype = DType::f32, .shape = {0, 4}},
                            {.name = "deep", .dtype = DType::f32, .shape = {2, 3, 2, 3}},
                            {.name = "ints", .dtype = DType::i32, .shape = {6}}},
                           {{"format", "moemamba"}, {"step", "7"}});
  for (const Tensor& tensor : {padded, vector, empty, deep, ints}) writer.write(tensor);
  EXPECT_FALSE(file_exists(folder / "w.safetensors"));
  writer.commit();

  const SafetensorsReader reader(folder / "w.safetensors");
  EXPECT_EQ(reader.metadata().at("step"), "7");
  ASSERT_EQ(reader.tensors().size(), 5u);
  for (const auto& [name, written] : {std::pair{"padded", padded},
                                      {"a vector \"quoted\"\n", vector},
                                      {"empty", empty},
                                      {"deep", deep},
                                      {"ints", ints}}) {
    const StoredTensor* stored = reader.find(name);
    ASSERT_NE(stored, nullptr) << name;
    const Tensor found = c.empty(written.shape, written.dtype);
    reader.read(*stored, found);
    EXPECT_EQ(to_doubles(found), to_doubles(written)) << name;
  }
  EXPECT_EQ(reader.find("other"), nullptr);
}

TEST(Safetensors, PadsItsHeaderTo64Bytes) {
  TemporaryFolder folder;
  PosixFileSystem files;
  Case c(2);
  for (int extra = 0; extra < 70; ++extra) {
    const std::string name = "n" + std::string(size_t(extra), 'x');
    SafetensorsWriter writer(files, folder / "w", {{.name = name, .shape = {2}}});
    writer.write(c.normal({2}));
    writer.commit();
    const std::string content = read_file(folder / "w");
    uint64_t length = 0;
    std::memcpy(&length, content.data(), 8);
    EXPECT_EQ((8 + length) % 64, 0u);
    EXPECT_EQ(content.size(), 8 + length + 8);
    EXPECT_NO_THROW(SafetensorsReader(folder / "w"));
  }
}

TEST(Safetensors, ReadsAnOldFile) {
  TemporaryFolder folder;
  std::string values(10, '\0');
  const float two[] = {1.5f, -2.0f};
  std::memcpy(values.data(), two, 8);
  values[8] = char(0x80);
  values[9] = char(0x3F);  // 1 as bf16
  const SafetensorsReader reader(folder.put("old", file_of(kTwo, values)));
  Case c(3);
  const Tensor a = c.empty({2}), a16 = c.empty({2}, DType::bf16);
  reader.read(*reader.find("a"), a);
  reader.read(*reader.find("a"), a16);
  EXPECT_EQ(to_doubles(a), (std::vector<double>{1.5, -2}));
  EXPECT_EQ(to_doubles(a16), (std::vector<double>{1.5, -2}));
  EXPECT_EQ(reader.find("b")->shape.dims, 0);
  float b = 0;
  Shape scalar;
  reader.read(*reader.find("b"), view(&b, scalar));
  EXPECT_EQ(b, 1.0f);
  EXPECT_NE(message_of([&] {
              reader.read(*reader.find("a"), c.empty({3}));
            }).find("expected shape [3], found [2]"),
            std::string::npos);
}

TEST(Safetensors, RefusesTruncationAtEveryByte) {
  TemporaryFolder folder;
  const std::string whole = file_of(kTwo, std::string(10, 'v'));
  EXPECT_NO_THROW(SafetensorsReader(folder.put("w", whole)));
  for (size_t size = 0; size < whole.size(); ++size)
    EXPECT_THROW(SafetensorsReader(folder.put("w", whole.substr(0, size))), Error) << size;
  EXPECT_THROW(SafetensorsReader(folder.put("w", whole + "x")), Error);
}

TEST(Safetensors, RefusesHostileHeaders) {
  TemporaryFolder folder;
  const std::string ten(10, 'v');
  const std::string headers[] = {
      "", "[]", "{", " {}", R"({"a":1})",
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",  // hole at the end
      // overlap, hole, order of offsets, wrong size
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[6,10]}})",
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
      R"("b":{"dtype":"U8","shape":[5],"data_offsets":[5,10]}})",
      R"({"a":{"dtype":"U8","shape":[10],"data_offsets":[10,0]}})",
      R"({"a":{"dtype":"F32","shape":[10],"data_offsets":[0,10]}})",
      // the same name twice, at both levels
      R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
      R"("a":{"dtype":"U8","shape":[5],"data_offsets":[5,10]}})",
      R"({"a":{"dtype":"U8","dtype":"U8","shape":[10],"data_offsets":[0,10]}})",
      // numbers that are none, negative, overflowing, fractional
      R"({"a":{"dtype":"U8","shape":[-10],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":[10.0],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":["10"],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":[10],"data_offsets":[0,18446744073709551615]}})",
      R"({"a":{"dtype":"U8","shape":[1,1,1,1,10],"data_offsets":[0,10]}})",
      // wrong kinds, missing and foreign fields
      R"({"a":{"dtype":"F99","shape":[10],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":7,"shape":[10],"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":10,"data_offsets":[0,10]}})",
      R"({"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10,10]}})",
      R"({"a":{"dtype":"U8","shape":[10]}})",
      R"({"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10],"more":1}})",
      R"({"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]}})",
      R"({"__metadata__":7,"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]}})",
      "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}",
      "{\"\xFF\":{\"dtype\":\"U8\",\"shape\":[10],\"data_offsets\":[0,10]}}"};
  for (const std::string& header : headers)
    EXPECT_THROW(SafetensorsReader(folder.put("w", file_of(header, ten))), Error)
        << header.substr(0, 200);
  std::string bomb = file_of("{}", ten);  // a header of 2^63 bytes
  bomb[7] = char(0x80);
  EXPECT_NE(message_of([&] { SafetensorsReader(folder.put("w", bomb)); }).find("100000000"),
            std::string::npos);
}

TEST(Safetensors, SaysWhatIsWrongWithAHeader) {
  TemporaryFolder folder;
  const auto entry = [](const std::string& name, const std::string& rest) {
    return "{\"" + name + "\":{" + rest + "}}";
  };
  const std::string good = R"("dtype":"U8","shape":[10],"data_offsets":[0,10])";
  std::string texts;
  for (int i = 0; i <= 100; ++i) texts += concat(i ? "," : "", "\"", i, "\":\"\"");
  const std::pair<std::string, std::string> cases[] = {
      {entry("a", R"("dtype":"F99")"),
       ": a: dtype F99 is not known; expected F32, BF16, F64, I32, I64, U8"},
      {entry("a", R"("dtype":7)"), ": a: damaged: expected a text in quotes at byte 14, found '7'"},
      {entry("a", R"("shape":[-1])"),
       ": a: damaged: expected an integer from 0 to 2^62 - 1 at byte 15, found '-'"},
      {entry("a", R"("shape":[1.5])"),
       ": a: damaged: expected an integer from 0 to 2^62 - 1 at byte 15, found '1'"},
      {entry("a", R"("shape":[1,1,1,1,1])"), ": a: expected at most 4 dims"},
      {entry("a", R"("data_offsets":[1])"), ": a: expected two data_offsets, found 1"},
      {entry("a", R"("more":1)"),
       ": a: expected dtype, shape and data_offsets, once each, nothing else"},
      {entry("a", R"("dtype":"U8")"), ": a: expected dtype, shape and data_offsets"},
      {entry("a", R"("dtype":"U8","shape":[9],"data_offsets":[0,10])"),
       ": a: U8[9] has 9 bytes, its offsets say 0 to 10"},
      {entry(std::string(1001, 'n'), good), "a name of 1001 bytes; expected at most 1000"},
      {"{\"__metadata__\":{" + texts + "}}",
       ": __metadata__: expected at most 100 texts with names of at most 1000 bytes"},
      {R"({"__metadata__":{},"__metadata__":{}})", "__metadata__ appears twice"},
      {"{\"a\\uD800\":1}", ": damaged: expected two halves of a character after \\u at byte 3"},
      {"{\"\xFF\":1}", ": damaged: expected UTF-8 at byte 2, found a byte 255"},
      {entry("a", good) + "x", ": damaged: expected nothing more at byte 55, found 'x'"}};
  for (const auto& [header, expected] : cases) {
    const std::string path = folder.put("w", file_of(header, std::string(10, 'v')));
    const std::string message = message_of([&] { SafetensorsReader reader(path); });
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(message.find(path), 0u) << message;
  }
}

TEST(Safetensors, ReadsEveryEscapeOfJson) {
  TemporaryFolder folder;
  const std::string path = folder.put(
      "w", file_of(R"({"__metadata__":{"k\u0065y":"\"\\\/\b\f\n\r\t\u20AC\ud83d\ude00"},)"
                   R"("\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                   "v"));
  const SafetensorsReader reader(path);
  EXPECT_NE(reader.find("a"), nullptr);
  EXPECT_EQ(reader.metadata().at("key"), "\"\\/\b\f\n\r\t\xE2\x82\xAC\xF0\x9F\x98\x80");
}

TEST(Safetensors, FollowsALinkOnlyWhereItMay) {
  TemporaryFolder folder;
  folder.put("w", file_of(kTwo, std::string(10, 'v')));
  std::filesystem::create_symlink("w", folder / "link");
  EXPECT_NO_THROW(SafetensorsReader(folder / "link"));
  EXPECT_NE(message_of([&] {
              SafetensorsReader(folder / "link", Links::refused);
            }).find("link: is a symlink; expected the file itself: copy what it points to (cp -L)"),
            std::string::npos);
}

// Whatever happens to a byte of the header: an Error or a file whose tensors can be read.
TEST(Safetensors, SurvivesDamageAnywhere) {
  TemporaryFolder folder;
  const Random random(5, "damage");
  const std::string whole = file_of(kTwo, std::string(10, 'v'));
  int accepted = 0;
  for (uint64_t i = 0; i < 1500; ++i) {
    std::string damaged = whole;
    damaged[random.integer(i * 2, damaged.size() - 10)] = char(random.integer(i * 2 + 1, 256));
    try {
      const SafetensorsReader reader(folder.put("w", damaged));
      for (const StoredTensor& tensor : reader.tensors()) {
        std::vector<std::byte> copy(reader.data(tensor),
                                    reader.data(tensor) + (tensor.end - tensor.begin));
        accepted += !copy.empty();
      }
    } catch (const Error&) {
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(Safetensors, WriterKeepsItsOrder) {
  TemporaryFolder folder;
  PosixFileSystem files;
  Case c(4);
  {
    SafetensorsWriter writer(files, folder / "w",
                             {{.name = "a", .shape = {2}}, {.name = "b", .shape = {3}}});
    EXPECT_NE(message_of([&] { writer.write(c.normal({3})); }).find("a"), std::string::npos);
    EXPECT_THROW(writer.commit(), Error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  EXPECT_THROW(SafetensorsWriter(files, folder / "w", {{.name = "a"}, {.name = "a"}}), Error);
}

}  // namespace
}  // namespace moemamba
