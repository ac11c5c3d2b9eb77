#include "runtime/manifest.h"

#include <gtest/gtest.h>

#include "core/file.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// Two files and two tensors, the second of which lies in both.
CheckpointManifest small_manifest() {
  CheckpointManifest m;
  m.set_format(kManifestFormat);
  m.set_run_id("run");
  m.set_step(7);
  m.set_loss(1.5);
  m.set_state_hash(0xfedcba9876543210);
  for (const char* name : {"a.safetensors", "b.safetensors"}) {
    auto* file = m.add_files();
    file->set_name(name);
    file->set_bytes(1000);
    file->set_sha256(std::string(32, 'x'));
  }
  for (const char* name : {"state", "weight"}) {
    auto* tensor = m.add_tensors();
    tensor->set_name(name);
    tensor->add_shape(2);
    tensor->add_shape(3);
  }
  const auto add = [](auto* pieces, int64_t begin, int64_t end, int file, int64_t offset) {
    auto* piece = pieces->Add();
    piece->set_begin(begin);
    piece->set_end(end);
    piece->set_file(file);
    piece->set_offset(offset);
  };
  add(m.mutable_tensors(0)->mutable_value(), 0, 6, 0, 64);
  add(m.mutable_tensors(1)->mutable_value(), 0, 6, 1, 64);
  for (auto* pieces :
       {m.mutable_tensors(1)->mutable_exp_avg(), m.mutable_tensors(1)->mutable_exp_avg_sq()}) {
    add(pieces, 0, 4, 0, 128);
    add(pieces, 4, 6, 1, 256);
  }
  return m;
}

// The seal of any bytes.
std::string sealed(const std::string& manifest) {
  SealedManifest sealed;
  sealed.set_manifest(manifest);
  const std::string hex = sha256(manifest);
  for (size_t i = 0; i < hex.size(); i += 2)
    sealed.mutable_sha256()->push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return sealed.SerializeAsString();
}

std::string refusal(const std::string& bytes) {
  return message_of([&] { unseal(bytes, "MANIFEST.pb"); });
}

TEST(Manifest, GivesBackWhatWasSealed) {
  const Manifest m = unseal(seal(small_manifest()), "MANIFEST.pb");
  EXPECT_EQ(m.facts().step(), 7);
  EXPECT_EQ(m.facts().run_id(), "run");
  EXPECT_EQ(m.facts().loss(), 1.5);
  EXPECT_EQ(m.facts().state_hash(), 0xfedcba9876543210);
  EXPECT_EQ(m.facts().files_size() + m.facts().tensors_size(), 0);
  ASSERT_EQ(m.files_size(), 2);
  EXPECT_EQ(m.files(1).name(), "b.safetensors");
  EXPECT_EQ(m.files(1).bytes(), 1000);
  EXPECT_EQ(m.files(1).sha256(), std::string(32, 'x'));
  ASSERT_EQ(m.tensors_size(), 2);
  EXPECT_EQ(m.find("weigh"), std::nullopt);
  EXPECT_EQ(m.find("weights"), std::nullopt);
  EXPECT_TRUE(m.find("state")->exp_avg().empty());
  const Manifest::Tensor weight = *m.find("weight");
  EXPECT_EQ(weight.name(), "weight");
  EXPECT_EQ(weight.shape(), (Shape{2, 3}));
  std::string pieces;
  for (const auto& piece : weight.exp_avg_sq())
    pieces += concat(piece.begin(), " ", piece.end(), " ", piece.file(), " ", piece.offset(), ";");
  EXPECT_EQ(pieces, "0 4 0 128;4 6 1 256;");
}

TEST(Manifest, SaysWhatIsWrong) {
  struct {
    void (*change)(CheckpointManifest& m);
    const char* expected;
  } const cases[] = {
      {[](auto& m) { m.mutable_files(0)->set_name("../a"); },
       "a file is called \"../a\"; expected letters, digits, '.', '_' and '-'"},
      {[](auto& m) { m.mutable_files(0)->set_name(std::string("a\0b", 3)); }, "a file is called"},
      {[](auto& m) { m.mutable_files(0)->set_name(std::string(129, 'a')); }, "a file is called"},
      {[](auto& m) { m.mutable_files(1)->set_name("a.safetensors"); },
       "a.safetensors is listed twice"},
      {[](auto& m) { m.mutable_files(0)->clear_sha256(); }, "file 0 has no name or no digest"},
      {[](auto& m) { m.mutable_files(0)->set_bytes(-1); },
       "a.safetensors: size or digest makes no sense"},
      {[](auto& m) { m.mutable_tensors(0)->Clear(); }, "tensor 0 has neither name nor shape"},
      {[](auto& m) { m.mutable_tensors(0)->set_name(std::string(1001, 'a')); },
       "a tensor's name has 1001 bytes; expected at most 1000"},
      {[](auto& m) { m.mutable_tensors(0)->set_name("weight"); },
       "tensors are not in order at weight"},
      {[](auto& m) { for (int d = 0; d < 3; ++d) m.mutable_tensors(0)->add_shape(1); },
       "state has more than 4 dims"},
      {[](auto& m) { m.mutable_tensors(0)->set_shape(0, -1); }, "state: the shape makes no sense"},
      {[](auto& m) { m.mutable_tensors(1)->mutable_exp_avg(1)->set_begin(5); },
       "weight: the pieces of exp_avg do not cover it: one has elements 5 to 6 where 4 comes next"},
      {[](auto& m) { m.mutable_tensors(1)->mutable_exp_avg(1)->set_file(2); },
       "weight: a piece lies in file 2 of 2"},
      {[](auto& m) { m.mutable_tensors(1)->mutable_exp_avg(1)->set_offset(996); },
       "weight: a piece ends behind b.safetensors"},
      {[](auto& m) {
         m.mutable_files(1)->set_bytes(INT64_MAX);
         m.mutable_tensors(1)->mutable_exp_avg(1)->set_offset(INT64_MIN);
       },
       "weight: a piece ends behind b.safetensors"},
      {[](auto& m) { m.mutable_tensors(1)->clear_exp_avg_sq(); },
       "weight: the pieces of exp_avg_sq end at element 0 of 6"}};
  for (const auto& [change, expected] : cases) {
    CheckpointManifest m = small_manifest();
    change(m);
    const std::string message = refusal(seal(m));
    EXPECT_EQ(message.find(concat("MANIFEST.pb: ", expected)), 0u) << message << "\n" << expected;
  }
}

// What protobuf would take, but never writes.
TEST(Manifest, IsInTheOneFormThatIsWritten) {
  const std::string good = small_manifest().SerializeAsString();
  EXPECT_NO_THROW(unseal(sealed(good), "MANIFEST.pb"));
  const char* damaged = "it has fields that no manifest of its format has, or not in their order";
  for (const std::string& strange :
       {good + std::string("\x20\x07", 2),              // a field after those of higher numbers
        good + std::string("\xa0\x06\x01", 3),          // an unknown field
        std::string("\x08\x01", 2) + good,             // a single field twice
        good + std::string("\x82\x01\xff\xff\x03", 5),  // a length that is only claimed
        std::string("\x08\x01\x15\0\0\0\0", 7)})       // four bytes, of which there are none
    EXPECT_NE(refusal(sealed(strange)).find(damaged), std::string::npos) << strange;
  std::string twice = sealed(good);
  EXPECT_NE(refusal(twice + twice).find("not a sealed manifest"), std::string::npos);
  twice.insert(twice.size() - 33, "\x20");
  twice[twice.size() - 33] = char(0xa0);  // the digest's length in two bytes
  EXPECT_NE(refusal(twice).find("not a sealed manifest"), std::string::npos);
  EXPECT_NE(refusal(seal(small_manifest()).replace(20, 1, "!")).find("do not have the digest"),
            std::string::npos);
}

}  // namespace
}  // namespace moemamba
