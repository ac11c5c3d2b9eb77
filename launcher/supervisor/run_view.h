#pragma once
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "core/activity.h"

namespace moemamba {

// What the supervisor knows of a run: kept by it, read by the status server (both on one thread).
// Times are seconds on the steady clock since the supervisor began, unless said otherwise.

enum class RankState { absent, alive, silent, hanging, ended };

struct RankView {
  int rank = 0;
  std::string host, gpu;
  int64_t pid = 0;
  RankState state = RankState::absent;
  Activity::Now activity;            // of its latest heartbeat; its `group` is always ""
  std::string group;                 // of the latest collective
  double heard = 0, progressed = 0;  // when: the latest heartbeat; the latest that showed progress
  int64_t resident_bytes = 0, gpu_bytes = 0;
  int64_t step = -1;                                                // latest that ended
  double step_seconds = 0, busy_seconds = 0, exchange_seconds = 0;  // of that step
  bool straggler = false;
  bool reported = false;  // the end of a step, after the latest heartbeat
};
// Where a rank was when it was last heard of: at its latest heartbeat, or, where a step has
// ended after that, before the next one.
Activity::Now latest_of(const RankView& rank);

struct ExpertView {
  int64_t step = -1, dropped_rows = 0;
  int layers = 0, experts = 0;
  std::vector<uint64_t> choices;  // [layers, experts]
};

struct EventView {
  double wall_seconds = 0;  // since 1970, for people
  std::string kind;         // of RunEvent, or the supervisor's own: started, lost, hang, straggler,
                     // restarting, host_left_out, crash_loop, preempted, taken_over, done, failed
  int64_t step = -1;
  std::string text;
};

enum class RunState { starting, training, stopping, recovering, done, stopped, failed };

struct RunView {
  std::string run;  // folder
  std::string run_id, job;
  RunState state = RunState::starting;
  std::string trouble;     // what people should look at, though it goes on; empty: nothing
  std::string state_text;  // one sentence for people: why it is in this state, what comes next
  int64_t steps = 0;       // of the whole run
  int64_t global_batch = 0, sequence_length = 0;
  int ranks = 0, expert_ranks = 0;
  double started = 0;       // this attempt
  int restarts = 0;         // of this supervisor
  int64_t steps_lost = 0;   // done twice because of restarts
  int64_t saved_step = -1;  // newest checkpoint that is known to be there
  int64_t failed_saves = 0, skipped_steps = 0;
  double save_seconds = 0;  // of the latest save
  std::vector<RankView> of_ranks;
  std::vector<std::string> hosts_left_out;
  int64_t refused_connections = 0;  // to the control server: wrong secret, job, rank or words
  ExpertView experts;
  std::deque<EventView> events;  // the newest 200; all of them are in <run>/events.jsonl
  std::string hang_report;       // of the latest hang or loss; empty: none
};

}  // namespace moemamba
