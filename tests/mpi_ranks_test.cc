// The communicator suite as processes of mpirun.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <string>

#include "parallel/world.h"

namespace moemamba {
namespace {

// The exit code of `ranks` processes of communicator_mpi_test. As root, on any number of cores, in
// containers that forbid one process to read another's memory.
int run_ranks(int ranks) {
  const std::string command =
      "OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_rmaps_base_oversubscribe=1 "
      "ASAN_OPTIONS=detect_leaks=0 timeout 300 mpirun --allow-run-as-root --oversubscribe "
      "--bind-to none -n " +
      std::to_string(ranks) + " " MOEMAMBA_BINARY_DIR "/communicator_mpi_test";
  const int status = std::system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

class MpiRanks : public testing::TestWithParam<int> {};

TEST_P(MpiRanks, KeepThePromises) { EXPECT_EQ(run_ranks(GetParam()), 0); }

INSTANTIATE_TEST_SUITE_P(Ranks, MpiRanks, testing::Values(1, 2, 3, 5, 8),
                         testing::PrintToStringParamName());

TEST(Facts, OfEqualRanksDoNotDiffer) {
  const Facts facts = {{"a", "1"}, {"b", ""}};
  EXPECT_EQ(describe_differences({facts, facts, facts}), "");
}

TEST(Facts, ThatDifferAreNamedWithRanksAndValues) {
  const Facts first = {{"a", "1"}, {"b", "x"}}, second = {{"a", "2"}, {"b", "x"}};
  EXPECT_EQ(describe_differences({first, second, {{"a", "1"}}}),
            "\n  a: ranks 0 2 \"1\", rank 1 \"2\""
            "\n  b: ranks 0 1 \"x\", rank 2 \"(nothing)\"");
}

TEST(Facts, ManyDifferencesAreCounted) {
  Facts ones, twos;
  for (int i = 0; i < 30; ++i) {
    ones.emplace_back("line " + std::to_string(i), "1");
    twos.emplace_back("line " + std::to_string(i), "2");
  }
  EXPECT_NE(describe_differences({ones, twos}).find("and 20 more"), std::string::npos);
}

}  // namespace
}  // namespace moemamba
