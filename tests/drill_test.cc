// Faults on purpose: what --drill takes, and that they happen.
#include "launcher/drill.h"

#include <gtest/gtest.h>

#include <fstream>

#include "core/schema.h"
#include "tests/support/program.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

TEST(Drill, IsReadFromItsText) {
  const Drill crash = parse_drill("crash rank=1 step=20");
  EXPECT_EQ(crash.kind, Drill::Kind::crash);
  EXPECT_EQ(crash.rank, 1);
  EXPECT_EQ(crash.step, 20);
  EXPECT_EQ(crash.times, 1);
  const Drill nan = parse_drill("  nan step=7   times=always rank=0 ");
  EXPECT_EQ(nan.kind, Drill::Kind::nan);
  EXPECT_EQ(nan.step, 7);
  EXPECT_EQ(nan.times, Drill::kAlways);
  EXPECT_EQ(nan.text, "nan rank=0 step=7 times=always") << "in one order";
  EXPECT_EQ(parse_drill("hang rank=0 step=3 times=2").times, 2);
  const Drill slow = parse_drill("slow rank=3 factor=1.5 from=10");
  EXPECT_EQ(slow.kind, Drill::Kind::slow);
  EXPECT_EQ(slow.factor, 1.5);
  EXPECT_EQ(slow.step, 10);
  EXPECT_EQ(parse_drill("stop rank=0 step=0").kind, Drill::Kind::stop);
  for (const Drill& drill : {crash, nan, slow}) EXPECT_EQ(parse_drill(drill.text).text, drill.text);
}

TEST(Drill, RefusesWhatItDoesNotKnow) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "no drill \"\""},
      {"crush rank=1 step=2", "no drill \"crush\""},
      {"crash rank=1", "step is missing"},
      {"crash step=1", "rank is missing"},
      {"crash rank=1 step=2 step=3", "step is given twice"},
      {"crash rank=1 step=x", "step=x is no number from 0"},
      {"crash rank=-1 step=2", "rank=-1 is no number from 0"},
      {"crash rank=1 step=2.5", "step=2.5"},
      {"crash rank=1 step=2 now", "\"now\" is no key=value"},
      {"crash rank=1 step=2 factor=3", "crash has no factor"},
      {"crash rank=1 step=2 times=0", "times=0 is no number from 1"},
      {"slow rank=1 factor=2 from=0 times=2", "slow has no times"},
      {"slow rank=1 factor=0.5 from=0", "factor=0.5 is no number from 1"},
      {"slow rank=1 factor=nan from=0", "factor=nan"}};
  for (const auto& [text, why] : cases) {
    const std::string said = message_of([&, text = text] { parse_drill(text); });
    EXPECT_NE(said.find(why), std::string::npos) << text << ": " << said;
    EXPECT_NE(said.find("crash rank=N step=N [times=N|always]"), std::string::npos) << said;
    EXPECT_NE(said.find("slow rank=N factor=N from=N"), std::string::npos) << said;
  }
}

TEST(Drill, HappensOnItsRankAlone) {
  TrainRequest request;
  wire_drills({parse_drill("nan rank=1 step=3"), parse_drill("slow rank=1 factor=2 from=0")}, 0,
              request);
  EXPECT_FALSE(request.spoil);
  EXPECT_FALSE(request.before_step);
  EXPECT_FALSE(request.before_verdict);
}

// The next launch of the run finds what this one has done.
TEST(Drill, HappensSoManyTimesInARun) {
  TemporaryFolder folder;
  const std::vector<Drill> drills = {parse_drill("nan rank=0 step=3 times=3"),
                                     parse_drill("nan rank=0 step=5 times=always")};
  int done = 0;
  for (int launch = 0; launch < 4; ++launch) {
    TrainRequest request;
    request.run = folder.path();
    wire_drills(drills, 0, request);
    EXPECT_FALSE(request.spoil(2));
    done += request.spoil(3);
    if (launch == 0) done += request.spoil(3);
    EXPECT_TRUE(request.spoil(5));
  }
  EXPECT_EQ(done, 3);
}

TEST(Drill, TakesItsTimeOnASlowRank) {
  TrainRequest request;
  wire_drills({parse_drill("slow rank=0 factor=3 from=5")}, 0, request);
  const auto seconds_of = [&](int64_t step) {
    const auto begun = std::chrono::steady_clock::now();
    request.before_verdict(step, 0.1);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  };
  EXPECT_GE(seconds_of(5), 0.2);
  EXPECT_GE(seconds_of(6), 0.2);
  EXPECT_LT(seconds_of(4), 0.1);
}

class Drills : public ProgramTest {
 protected:
  Result train(const std::string& words, int64_t steps = 12) const {
    return shell(
        "$moemamba train --ranks 2 --parallel.expert=2 --train.progress=off "
        "--train.save_interval=4 --parallel.deadline_seconds=3 " +
        small_training(steps) + words);
  }
  std::string lines() const { return read_file(run() + "/metrics.jsonl"); }
};

TEST_F(Drills, CrashOnceAndTheSameCommandGoesOn) {
  // Late enough for what is saved behind the steps after step 4.
  const std::string crash =
      "--drill 'crash rank=1 step=8' "
      "--drill 'slow rank=0 factor=50 from=6'";
  const Result crashed = train(crash);
  EXPECT_EQ(crashed.code, 75) << crashed.err;
  EXPECT_LT(count(lines(), "\n"), 9);
  const Result again = train(crash);
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(count(lines(), "\n"), 12);
  const std::string events = read_file(run() + "/events.jsonl");
  EXPECT_EQ(count(events, "\"kind\":\"resumed\",\"step\":4"), 1) << events;
  EXPECT_EQ(count(events, "\"kind\":\"saved\",\"step\":12"), 1) << events;
}

TEST_F(Drills, AHangOfOneIsALossToTheOthers) {
  const Result hung = train("--drill 'hang rank=1 step=6'");
  EXPECT_EQ(hung.code, 75) << hung.err;
  EXPECT_NE(hung.err.find("nothing heard for 3000 ms from rank 1"), std::string::npos) << hung.err;
}

TEST_F(Drills, ANanIsReplayed) {
  const Result spoilt = train("--drill 'nan rank=1 step=6'");
  EXPECT_EQ(spoilt.code, 0) << spoilt.err;
  const std::string events = read_file(run() + "/events.jsonl");
  EXPECT_EQ(count(events, "\"kind\":\"replayed\",\"step\":6"), 1) << events;
  EXPECT_NE(events.find("gradient of rank 1"), std::string::npos) << events;
}

TEST_F(Drills, AreCheckedBeforeAnythingElse) {
  const Result wrong = train("--drill 'crash rank=1'");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_NE(wrong.err.find("step is missing"), std::string::npos) << wrong.err;
  EXPECT_EQ(count(wrong.err, "step is missing"), 1) << "said once, before ranks are started";
  const Result far = train("--drill 'crash rank=7 step=1'", 2);
  EXPECT_EQ(far.code, 0) << far.err;
  EXPECT_NE(far.err.find("there is no such rank among 2"), std::string::npos) << far.err;
}

}  // namespace
}  // namespace moemamba
