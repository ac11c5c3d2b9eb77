#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/simd/level.h"
#include "tests/support/training.h"

namespace moemamba {

namespace {
constexpr SimdLevel kLevels[] = {SimdLevel::avx2, SimdLevel::avx512};

bool can_run(SimdLevel level) {
  if (level == SimdLevel::avx2) return __builtin_cpu_supports("avx2") > 0;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

SimdLevel widest() {
  return can_run(SimdLevel::avx512) ? SimdLevel::avx512 : SimdLevel::avx2;
}
SimdLevel forced_level = widest();  // simd_level() has no arguments to pass it in
}  // namespace

// In place of kernels/cpu/level.cc, which the linker then leaves out: all kernels of this program
// run at the level that a test asks for.
SimdLevel simd_level() {
  return forced_level;
}
const char* name_of(SimdLevel level) {
  return level == SimdLevel::avx512 ? "avx512" : "avx2";
}

namespace {

namespace fs = std::filesystem;

// Fifty losses of two ranks that share seven experts, with accumulation and two experts a token.
// Sizes at which OpenBLAS, the SIMD tails and several row blocks all take part.
constexpr TrainingCase kCase{.experts = 7,
                             .top_k = 2,
                             .width = 40,
                             .hidden = 52,
                             .vocabulary = 131,
                             .batch = 6,
                             .micro_batch = 2,
                             .length = 48,
                             .activation = ModelConfig::SWIGLU,
                             .steps = 50};

fs::path golden_folder() {
  return fs::path(MOEMAMBA_SOURCE_DIR) / "tests" / "golden";
}

// Bits depend on OpenBLAS' kernels; the vector width is named for the day when they depend on it.
std::string golden_name(SimdLevel level) {
  std::string name = blas_core() + " " + name_of(level) + ".txt";
  for (char& c : name) c = c == ' ' ? '-' : char(std::tolower(c));
  return name;
}

std::vector<double> losses(int threads, SimdLevel level = widest()) {
  forced_level = level;
  TrainingCase c = kCase;
  c.threads = threads;
  const TrainingResult result = train(c, 2, 2);
  EXPECT_TRUE(result.ranks_agree);
  std::vector<double> list;
  for (const StepRecord& record : result.records) list.push_back(record.loss);
  return list;
}

// One loss a line, as C99 writes it in hexadecimal: exact, and readable by anything.
std::string to_text(const std::vector<double>& values) {
  std::string text;
  char line[64];
  for (double value : values) {
    std::snprintf(line, sizeof line, "%a\n", value);
    text += line;
  }
  return text;
}

std::vector<double> read_losses(const fs::path& path) {
  std::ifstream in(path);
  std::vector<double> values;
  for (std::string line; std::getline(in, line);)
    values.push_back(std::strtod(line.c_str(), nullptr));
  return values;
}

// The file whose name begins most like this machine's.
fs::path nearest_golden() {
  const std::string own = golden_name(widest());
  fs::path nearest;
  long longest = -1;
  for (const auto& entry : fs::directory_iterator(golden_folder())) {
    const std::string name = entry.path().filename().string();
    const auto end = std::ranges::mismatch(name, own).in1;
    const bool better = end - name.begin() > longest;
    const bool equal = end - name.begin() == longest && entry.path() < nearest;
    if (!better && !equal) continue;
    longest = end - name.begin();
    nearest = entry.path();
  }
  check(!nearest.empty(), golden_folder().string(),
        ": no golden losses; write them with golden_test --write-golden");
  return nearest;
}

// Rounding of other BLAS kernels, grown over fifty steps.
constexpr double kOtherKernels = 1e-4;

class GoldenBits : public testing::TestWithParam<SimdLevel> {};

TEST_P(GoldenBits, AreThoseOfTheFileOfThisKind) {
  if (!can_run(GetParam()))
    GTEST_SKIP() << "this processor has no " << name_of(GetParam())
                 << ": run golden_test on one that has it";
  const fs::path path = golden_folder() / golden_name(GetParam());
  if (!fs::exists(path))
    GTEST_SKIP() << "no tests/golden/" << path.filename().string()
                 << " to compare bits with: once the losses are known to be right, "
                    "build/cpu-release/golden_test --write-golden makes it";
  const std::vector<double> found = losses(1, GetParam()), expected = read_losses(path);
  ASSERT_EQ(found.size(), expected.size()) << path;
  for (size_t k = 0; k < found.size(); ++k)
    ASSERT_EQ(found[k], expected[k]) << "step " << k << " differs from " << path
                                     << "; a change that moves numbers says so and brings a new "
                                        "file (golden_test --write-golden)";
}

INSTANTIATE_TEST_SUITE_P(Levels, GoldenBits, testing::ValuesIn(kLevels),
                         [](const auto& level) { return name_of(level.param); });

TEST(Golden, LossesAreCloseToThoseOfTheNearestKind) {
  const std::vector<double> found = losses(1);
  const fs::path path = nearest_golden();
  const std::vector<double> expected = read_losses(path);
  ASSERT_EQ(found.size(), expected.size()) << path;
  for (size_t k = 0; k < found.size(); ++k)
    ASSERT_NEAR(found[k], expected[k], kOtherKernels * expected[k]) << "step " << k << ", " << path;
}

TEST(Golden, BothVectorWidthsGiveTheSameBits) {
  if (!can_run(SimdLevel::avx512)) GTEST_SKIP() << "this processor has AVX2 only";
  EXPECT_EQ(to_text(losses(1, SimdLevel::avx2)), to_text(losses(1, SimdLevel::avx512)));
}

TEST(Golden, TwoThreadsAndASecondRunGiveTheSameBits) {
  const std::string once = to_text(losses(1));
  EXPECT_EQ(once, to_text(losses(2)));
  EXPECT_EQ(once, to_text(losses(1)));
}

// Makes the files of this machine's kind, one for each vector width that it has.
void write_golden() {
  fs::create_directories(golden_folder());
  for (SimdLevel level : kLevels) {
    if (!can_run(level)) continue;
    const fs::path path = golden_folder() / golden_name(level);
    std::ofstream(path) << to_text(losses(1, level));
    std::printf("wrote %s\n", path.c_str());
  }
}

}  // namespace
}  // namespace moemamba

// gtest's own main(), and --write-golden.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc != 2 || argv[1] != std::string("--write-golden")) return RUN_ALL_TESTS();
  moemamba::write_golden();
  return 0;
}
