// A gradient that is not finite, once, twice and for ever, in a run under `moemamba launch`: the
// step is taken again, then from the newest checkpoint, then left out, and all of it is written
// down.
#include <cstdio>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

constexpr int64_t kSteps = 400;

class FaultNumber : public FaultTest {
 protected:
  // The run with this drill, to its end.
  void train(Launched& launched) const {
    launched.start();
    EXPECT_EQ(launched.end(kPatience), 0) << launched.said();
    EXPECT_EQ(launched.attempt(), 1) << "nobody had to be started again\n" << launched.said();
  }
  static size_t events(const Launched& launched, const std::string& kind, int64_t step) {
    size_t found = 0;
    for (const LoggedEvent& event : launched.events(kind)) found += event.step == step;
    return found;
  }
};

TEST_F(FaultNumber, IsTakenAgainRolledBackOrLeftOut) {
  const Whole whole = undisturbed(kSteps);
  const Random random(test_seed(), "spoilt gradients");
  uint64_t draw = 0;
  FaultTable table;
  const auto begin = Launched::Clock::now();
  do {
    for (const char* times : {"1", "2", "always"}) {
      // Behind the first checkpoint, so that there is something to go back to.
      const auto step = int64_t(40 + random.uniform(draw++) * double(kSteps - 60));
      const auto rank = int64_t(random.uniform(draw++) * 2);
      const bool once = *times == '1', twice = *times == '2';
      const std::string drill =
          concat(" --drill \"nan rank=", rank, " step=", step, " times=", times, "\"");
      SCOPED_TRACE(drill);
      Launched launched(*this / "", run(), drill + words(kSteps));
      train(launched);
      EXPECT_EQ(events(launched, "replayed", step), once ? 1u : twice ? 1u : 2u);
      EXPECT_EQ(events(launched, "rolled_back", step), once ? 0u : 1u);
      EXPECT_EQ(events(launched, "skipped", step), once || twice ? 0u : 1u);
      if (once || twice) {
        expect_whole(launched, whole);
      } else {
        expect_nothing_left(launched);
        const std::vector<double> steps = numbers_of(read_file(run() + "/metrics.jsonl"), "step");
        ASSERT_EQ(int64_t(steps.size()), kSteps);
        for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i], double(i));
      }
      table.add(once    ? "NaN once: taken again"
                : twice ? "NaN twice: rolled back"
                        : "NaN for ever: left out",
                -1, -1, -1);
      clear();
      if (HasFailure()) break;
    }
  } while (!HasFailure() && Launched::Clock::now() - begin < std::chrono::seconds(soak_seconds()));
  table.print();
}

}  // namespace
}  // namespace moemamba
