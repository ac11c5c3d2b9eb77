#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

namespace moemamba {
namespace {

// The rules of docs/house.md and docs/style.md that a program can read.

namespace fs = std::filesystem;
using Lines = std::vector<std::string>;

constexpr size_t kFileLines = 600, kFunctionLines = 100, kColumns = 100;

// Which rooms a room may include besides itself.
const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"core", {}},
    {"kernels", {"core"}},
    {"parallel", {"core"}},
    {"model", {"core", "kernels", "parallel"}},
    {"runtime", {"core", "kernels", "parallel", "model"}},
    {"launcher", {"core", "kernels", "parallel", "model", "runtime"}},
    {"tests", {"core", "kernels", "parallel", "model", "runtime", "launcher"}},
};

struct ThirdParty {
  const char* name;
  const char* header;  // pattern of the name between < and >
  const char* where;   // pattern of the files that may include it
};
// tests/ may include all of it.
const ThirdParty kThirdParties[] = {
    {"protobuf", "google/protobuf/.*", "core/.*|runtime/manifest\\.cc|launcher/build_facts\\.cc"},
    {"OpenSSL", "openssl/.*", "core/.*"},
    {"OpenBLAS", "cblas\\.h|openblas.*", "kernels/cpu/[^/]*"},
    {"SIMD intrinsics", "immintrin\\.h", "kernels/cpu/simd/.*"},
    {"CUDA", "cuda.*|cublas.*|cooperative_groups.*|cub/.*",
     "core/device_cuda\\.cc|kernels/cuda/.*|parallel/cuda/.*|parallel/communicator_nccl\\.cc"},
    {"NCCL", "nccl\\.h", "parallel/(cuda/.*|communicator_nccl\\.cc)"},
    {"MPI", "mpi\\.h", "parallel/(communicator_mpi|world)\\.cc"},
    {"SentencePiece", "sentencepiece.*", "runtime/.*"},
    {"nlohmann-json", "nlohmann/.*", "runtime/.*"},
    {"zlib and zstd", "z(lib|std)\\.h", "runtime/.*"},
    {"Boost.Asio and Beast", "boost/(asio|beast|system)(/.*|\\.hpp)", "runtime/.*|launcher/.*"},
    {"CLI11", "CLI/.*", "launcher/.*"},
    {"hwloc", "hwloc.*", "launcher/.*"},
    {"libFuzzer's sanitizers", "sanitizer/.*", "tests/fuzz/.*"},
    {"GoogleTest", "gtest/.*", "tests/.*"},
    {"Google Benchmark", "benchmark/.*", "tests/.*"},
    {"the operating system",
     "sys/.*|linux/.*|net.*/.*|arpa/.*|"
     "(cxxabi|dirent|dlfcn|errno|execinfo|fcntl|ifaddrs|poll|pthread|pwd|sched|signal|spawn|"
     "termios|time|unistd)\\.h",
     "(core|parallel|runtime|launcher)/.*"},
};

fs::path root() {
  return MOEMAMBA_SOURCE_DIR;
}

Lines read_lines(const std::string& file) {
  std::ifstream in(root() / file);
  Lines lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

// Every source file of every room, named from the root, in order.
std::vector<std::string> sources() {
  const std::set<std::string> kinds{".h", ".cc", ".cu", ".cuh", ".proto"};
  std::vector<std::string> files;
  for (const auto& [room, may_include] : kMayInclude) {
    if (!fs::exists(root() / room)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root() / room))
      if (kinds.contains(entry.path().extension().string()))
        files.push_back(fs::relative(entry.path(), root()).generic_string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string room_of(const std::string& file) {
  return file.substr(0, file.find('/'));
}

// Calls body(header, quoted) for every #include of a file.
template <class Body>
void for_includes(const std::string& file, Body body) {
  static const std::regex include("\\s*#\\s*include\\s*([<\"])([^>\"]+)[>\"].*");
  std::smatch match;
  for (const std::string& line : read_lines(file))
    if (std::regex_match(line, match, include)) body(match[2].str(), match[1] == "\"");
}

// Fails for each line with `word` outside of the files that `where` matches.
void expect_only_in(const std::string& word, const std::regex& where, const char* reason) {
  const std::regex whole_word("\\b" + word + "\\b");
  for (const std::string& file : sources()) {
    if (std::regex_match(file, where)) continue;
    const Lines lines = read_lines(file);
    for (size_t i = 0; i < lines.size(); ++i)
      EXPECT_FALSE(lines[i].find(word) != std::string::npos &&
                   std::regex_search(lines[i], whole_word))
          << file << ":" << i + 1 << ": " << word << ": " << reason;
  }
}

size_t columns(const std::string& line) {  // of UTF-8: continuation bytes do not count
  return size_t(std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

TEST(House, HasRoomsToRead) {
  EXPECT_GT(sources().size(), 20u) << "no sources below " << root();
}

TEST(House, RoomsIncludeDownwardOnly) {
  for (const std::string& file : sources())
    for_includes(file, [&](const std::string& header, bool quoted) {
      if (!quoted) return;
      const std::string from = room_of(file), to = room_of(header);
      ASSERT_TRUE(kMayInclude.contains(to))
          << file << " includes \"" << header << "\"; headers are named from the root";
      EXPECT_TRUE(from == to || kMayInclude.at(from).contains(to))
          << file << " includes " << header << ", but " << from << " may not know " << to;
    });
}

TEST(House, ThirdPartiesStayInTheirRooms) {
  static const std::regex standard("[a-z_0-9]+");
  for (const std::string& file : sources())
    for_includes(file, [&](const std::string& header, bool quoted) {
      if (quoted || std::regex_match(header, standard)) return;
      const auto* party = std::find_if(
          std::begin(kThirdParties), std::end(kThirdParties), [&](const ThirdParty& candidate) {
            return std::regex_match(header, std::regex(candidate.header));
          });
      ASSERT_NE(party, std::end(kThirdParties))
          << file << " includes <" << header
          << ">, which the table of third parties (docs/house.md and this test) does not have";
      EXPECT_TRUE(room_of(file) == "tests" || std::regex_match(file, std::regex(party->where)))
          << file << " includes <" << header << ">: " << party->name << " is for " << party->where
          << " alone";
    });
}

TEST(House, FilesCompiledForOneInstructionSetIncludeNoInlineHeaders) {
  static const std::regex allowed("immintrin\\.h|cstdint|cstddef|kernels/cpu/simd/.*");
  for (const std::string& file : sources()) {
    if (!file.starts_with("kernels/cpu/simd/")) continue;
    for_includes(file, [&](const std::string& header, bool) {
      EXPECT_TRUE(std::regex_match(header, allowed)) << file << " includes " << header;
    });
  }
}

TEST(House, FilesAndLinesFitTheScreen) {
  for (const std::string& file : sources()) {
    const Lines lines = read_lines(file);
    EXPECT_LE(lines.size(), kFileLines) << file << ": cut it into two units";
    for (size_t i = 0; i < lines.size(); ++i)
      EXPECT_LE(columns(lines[i]), kColumns) << file << ":" << i + 1 << ": too long a line";
  }
}

// A function of namespace scope reaches from a line that starts in the first column to the next
// line that is a closing brace alone.
TEST(House, FunctionsFitTheScreen) {
  for (const std::string& file : sources()) {
    if (file.ends_with(".proto")) continue;
    const Lines lines = read_lines(file);
    size_t start = 0;
    for (size_t i = 0; i < lines.size(); ++i) {
      if (lines[i] == "}") {
        EXPECT_LE(i - start + 1, kFunctionLines)
            << file << ":" << start + 1 << ": " << lines[start];
      }
      if (!lines[i].empty() && lines[i][0] != ' ' && lines[i][0] != '#') start = i;
    }
  }
}

TEST(House, HeadersAreGuardedByPragmaOnce) {
  for (const std::string& file : sources()) {
    if (!file.ends_with(".h") && !file.ends_with(".cuh")) continue;
    const Lines lines = read_lines(file);
    EXPECT_TRUE(!lines.empty() && lines[0] == "#pragma once") << file;
  }
}

TEST(House, DefinesNoMacros) {
  static const std::regex define("\\s*#\\s*define\\b.*");
  for (const std::string& file : sources()) {
    const Lines lines = read_lines(file);
    for (size_t i = 0; i < lines.size(); ++i)
      EXPECT_FALSE(std::regex_match(lines[i], define)) << file << ":" << i + 1;
  }
}

TEST(House, OnlyTheLauncherReadsTheEnvironment) {
  const std::regex launcher("launcher/.*");
  for (const char* prefix : {"", "secure_"})
    expect_only_in(std::string(prefix) + "get" + "env", launcher, "settings are passed down");
}

TEST(House, LeavesNothingForLater) {
  for (std::string word : {"TO DO", "FIX ME"}) {
    word.erase(word.find(' '), 1);  // apart, for this file is read as well
    expect_only_in(word, std::regex(""), "do it, or write an issue");
  }
}

TEST(House, HidesNoStateInThreads) {
  expect_only_in(std::string("thread_") + "local", std::regex(""), "pass it");
}

}  // namespace
}  // namespace moemamba
