#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <vector>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/faulty_files.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

TEST(File, WritesAndReadsWhatIsNotText) {
  TemporaryFolder folder;
  PosixFileSystem files;
  std::string content;
  for (int i = 0; i < 700000; ++i) content += char(i * 31 >> 3);  // several buffers
  AtomicFile file(files, folder / "a");
  for (size_t at = 0; at < content.size(); at += 1000)
    file.write(std::string_view(content).substr(at, 1000));
  file.write_at(3, "xyz", 3);
  content.replace(3, 3, "xyz");
  EXPECT_FALSE(file_exists(folder / "a"));
  EXPECT_EQ(file.bytes(), int64_t(content.size()));
  file.commit();
  EXPECT_EQ(read_file(folder / "a"), content);
  EXPECT_FALSE(file_exists(folder / "a.tmp"));
}

TEST(File, KeepsTheOldContentWhateverOperationFails) {
  TemporaryFolder folder;
  PosixFileSystem real;
  int64_t needed = 0;
  for (int64_t working = 0; needed == 0; ++working) {
    ASSERT_LT(working, 20);
    write_file(real, folder / "a", "old");
    FaultyFiles files(working);
    try {
      write_file(files, folder / "a", "new content");
      needed = working;
    } catch (const Error&) {
      const std::string now = read_file(folder / "a");
      EXPECT_TRUE(now == "old" || now == "new content") << now;
    }
  }
  EXPECT_EQ(needed, 6);  // open, write, sync, close, rename, sync of the folder
  EXPECT_EQ(read_file(folder / "a"), "new content");
}

TEST(File, LeavesNothingWhenNotCommitted) {
  TemporaryFolder folder;
  PosixFileSystem files;
  { AtomicFile(files, folder / "a").write("half"); }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(File, AppendsAndCutsBack) {
  TemporaryFolder folder;
  PosixFileSystem files;
  folder.put("a", "one\n");
  auto file = files.open(folder / "a", OpenMode::append);
  file->write("two\nthr", 7);
  file->truncate(8);
  file->write("3\n", 2);
  file->close();
  EXPECT_EQ(read_file(folder / "a"), "one\ntwo\n3\n");
}

// Memory that begins on a border of blocks.
struct Aligned {
  static constexpr size_t kBytes = 8 * kDirectBlock;
  Aligned() : data(static_cast<char*>(std::aligned_alloc(kDirectBlock, kBytes))) {
    for (size_t i = 0; i < kBytes; ++i) data[i] = char(i * 2654435761u >> 13);
  }
  ~Aligned() { std::free(data); }
  char* data;
};

void expect_direct_files_are_the_same(const std::string& folder) {
  const Aligned memory;
  PosixFileSystem files;
  // Lengths of the writes: whole blocks, a rest, then bytes that no longer lie on a border.
  const std::vector<std::vector<size_t>> kinds = {{4 * kDirectBlock},
                                                  {kDirectBlock, 2 * kDirectBlock},
                                                  {1},
                                                  {kDirectBlock + 1},
                                                  {2 * kDirectBlock, 64},
                                                  {64, 2 * kDirectBlock},
                                                  {2 * kDirectBlock + 512, 7},
                                                  {kDirectBlock - 1, 1, 2 * kDirectBlock}};
  for (const std::vector<size_t>& kind : kinds) {
    const std::string path = concat(folder, "/", &kind - kinds.data());
    const auto file = files.open(path, OpenMode::create_direct);
    size_t at = 0;
    for (size_t bytes : kind) {
      file->write(memory.data + at, bytes);
      at += bytes;
    }
    file->sync();
    file->close();
    EXPECT_TRUE(read_file(path) == std::string_view(memory.data, at)) << path;
    EXPECT_NE(message_of([&] { files.open(path, OpenMode::create_direct); }).find("exists"),
              std::string::npos);
  }
}

TEST(File, IsTheSamePastThePageCacheOrNot) {
  const TemporaryFolder folder;
  expect_direct_files_are_the_same(folder.path());
  const MemoryFolder memory("file-test");  // where there is nothing else but the cache
  expect_direct_files_are_the_same(memory.path());
}

// The end of a file past the page cache is a whole block for a moment, which there is no room for.
TEST(File, EndsWhereItMayNotBeLonger) {
  const TemporaryFolder folder;
  const Aligned memory;
  PosixFileSystem files;
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (size_t rest : {size_t{1}, size_t{512}, size_t{3072}}) {
    const size_t bytes = 2 * kDirectBlock + rest;
    const rlimit just{bytes, before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &just), 0);
    const std::string path = folder / concat(rest);
    const auto file = files.open(path, OpenMode::create_direct);
    file->write(memory.data, bytes);
    file->sync();
    EXPECT_NE(message_of([&] { file->write("x", 1); }).find(path + ": cannot write"),
              std::string::npos);
    file->close();
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
    EXPECT_TRUE(read_file(path) == std::string_view(memory.data, bytes)) << rest;
  }
  std::signal(SIGXFSZ, handler);
}

TEST(File, SaysWhichFileAndWhy) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const std::string missing = folder / "none/file";
  EXPECT_NE(message_of([&] { read_file(missing); }).find("No such file"), std::string::npos);
  EXPECT_NE(message_of([&] { files.open(missing, OpenMode::create); }).find(missing),
            std::string::npos);
  EXPECT_NE(message_of([&] { MappedFile(folder.path()); }).find("a folder"), std::string::npos);
}

TEST(File, MapsAnEmptyFile) {
  TemporaryFolder folder;
  const MappedFile file(folder.put("empty", ""));
  EXPECT_EQ(file.text(), "");
  MappedFile other(folder.put("full", "abc"));
  MappedFile moved = std::move(other);
  EXPECT_EQ(moved.text(), "abc");
}

TEST(File, RemovesTrees) {
  TemporaryFolder folder;
  PosixFileSystem files;
  files.make_folders(folder / "tree/b/c");
  folder.put("tree/b/c/file", "1");
  folder.put("tree/file", "2");
  remove_tree(files, folder / "tree");
  EXPECT_FALSE(file_exists(folder / "tree"));
  remove_tree(files, folder / "tree");
}

TEST(File, DigestsAsTheStandardSays) {  // FIPS 180-2, appendix B.1
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  TemporaryFolder folder;
  EXPECT_EQ(sha256_of_file(folder.put("empty", "")),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

}  // namespace
}  // namespace moemamba
