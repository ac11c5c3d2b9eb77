#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "tests/support/harness.h"

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

}  // namespace

}  // namespace moemamba

// gtest's own main(), and --require-cuda: no GPU is a failure then.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  bool require_cuda = false;
  for (int i = 1; i < argc; ++i) require_cuda |= argv[i] == std::string("--require-cuda");
  if (require_cuda && !moemamba::other_backend()) {
    std::fprintf(stderr, "--require-cuda: no GPU is there, or this build has no CUDA backend\n");
    return 1;
  }
  testing::UnitTest::GetInstance()->listeners().Append(new moemamba::LastLine);
  return RUN_ALL_TESTS();
}
