#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "tests/support/harness.h"
#include "tests/support/soak.h"

namespace moemamba {

namespace {

// Says last how many comparisons between backends and how many skips there were, so that a run
// without a GPU cannot be taken for more than it was.
class LastLine : public testing::EmptyTestEventListener {
 public:
  void OnTestEnd(const testing::TestInfo& test) override {
    for (int i = 0; i < test.result()->test_property_count(); ++i) {
      const testing::TestProperty& property = test.result()->GetTestProperty(i);
      if (property.key() == std::string("backend_comparisons"))
        comparisons_ += std::stoi(property.value());
    }
  }
  void OnTestProgramEnd(const testing::UnitTest& unit) override {
    std::printf("%d backend comparisons, %d tests skipped\n", comparisons_,
                unit.skipped_test_count());
  }

 private:
  int comparisons_ = 0;
};

struct Soak {
  int64_t seconds = 0;
  uint64_t seed = 1;
};
Soak& soak() {
  static Soak values;
  return values;
}

}  // namespace

int64_t soak_seconds() {
  return soak().seconds;
}

uint64_t test_seed() {
  return soak().seed;
}

}  // namespace moemamba

// gtest's own main(), and --require-cuda: no GPU is a failure then; --soak-seconds N, --seed S.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  bool require_cuda = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    require_cuda |= word == "--require-cuda";
    if (i + 1 < argc && word == "--soak-seconds")
      moemamba::soak().seconds = std::stoll(argv[i + 1]);
    if (i + 1 < argc && word == "--seed") moemamba::soak().seed = std::stoull(argv[i + 1]);
  }
  if (require_cuda && !moemamba::other_backend()) {
    std::fprintf(stderr, "--require-cuda: no GPU is there, or this build has no CUDA backend\n");
    return 1;
  }
  testing::UnitTest::GetInstance()->listeners().Append(new moemamba::LastLine);
  return RUN_ALL_TESTS();
}
