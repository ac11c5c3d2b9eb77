#include "tests/support/status_scene.h"

#include <chrono>
#include <cmath>

#include "core/error.h"
#include "runtime/json_text.h"
#include "runtime/metrics.h"

namespace moemamba {

namespace {

constexpr double kNow = 754;  // of the scene's clock at its begin

RankView scene_rank(int rank) {
  RankView view{.rank = rank,
                .host = rank < 2 ? "node1" : "node2",
                .gpu = "",
                .pid = 4000 + rank,
                .state = RankState::alive,
                .activity = {.phase = rank == 2 ? Phase::backward : Phase::forward,
                             .step = 340,
                             .layer = 2 + rank % 2,
                             .collective = 51234 + rank,
                             .group = "",
                             .in_collective = rank == 1,
                             .rows_expected = 4096,
                             .rows_received = 3072 + 512 * (rank % 2),
                             .progress = 99},
                .group = "expert",
                .heard = kNow - 0.1 * rank,
                .progressed = kNow - 0.2,
                .resident_bytes = (int64_t(412) + 9 * rank) << 20,
                .gpu_bytes = 0,
                .step = 339,
                .step_seconds = 0.221 + 0.002 * rank,
                .busy_seconds = 0.171 + 0.012 * rank,
                .exchange_seconds = 0.031 - 0.002 * rank,
                .straggler = rank == 3};
  return view;
}

ExpertView scene_experts() {
  ExpertView view{.step = 339, .dropped_rows = 12, .layers = 6, .experts = 8, .choices = {}};
  for (int layer = 0; layer < view.layers; ++layer)
    for (int expert = 0; expert < view.experts; ++expert) {
      const double share = 1 + 0.45 * std::sin(1.7 * layer + 2.3 * expert);
      view.choices.push_back(uint64_t(512 * share));
    }
  view.choices[2 * 8 + 5] = 1740;
  view.choices[4 * 8 + 1] = 0;
  return view;
}

}  // namespace

RunView scene_view() {
  RunView view{.run = "runs/quickstart",
               .run_id = "5f0c2a7be1d94c36",
               .job = "00112233445566778899aabbccddeeff",
               .state = RunState::training,
               .state_text = "training",
               .steps = 660,
               .global_batch = 32,
               .sequence_length = 256,
               .ranks = 4,
               .expert_ranks = 2,
               .started = 410,
               .restarts = 1,
               .steps_lost = 9,
               .saved_step = 330,
               .failed_saves = 0,
               .skipped_steps = 1,
               .save_seconds = 0.41,
               .of_ranks = {},
               .hosts_left_out = {},
               .experts = scene_experts(),
               .events = {},
               .hang_report = ""};
  for (int rank = 0; rank < view.ranks; ++rank) view.of_ranks.push_back(scene_rank(rank));
  const double at = 1764072000;
  view.events = {
      {at, "started", -1, "attempt 1: 4 ranks on node1, node2, 1.2 s after their start"},
      {at + 61, "saved", 110, "checkpoints/step-00000110"},
      {at + 118, "saved", 220, "checkpoints/step-00000220"},
      {at + 131, "lost", 229, "rank 2 on node2 (process 3987) was killed by signal 9"},
      {at + 132, "restarting", 220, "all ranks start again from step 220, restart 1 of 5"},
      {at + 135, "started", -1, "attempt 2: 4 ranks on node1, node2, 1.1 s after their start"},
      {at + 171, "skipped", 301, "step 302: not finite, also when taken again; left out"},
      {at + 189, "saved", 330, "checkpoints/step-00000330"}};
  return view;
}

std::string weird_text() {
  std::string text = "</script><img src=x onerror=alert(1)>\"'\\`${x}&amp;\u2028 \xed\xa0\x80 ";
  for (int c = 0; c < 256; ++c) text += char(c);
  return text;
}

void make_weird(RunView& view) {
  view.run = view.run_id = view.job = view.state_text = view.hang_report = weird_text();
  view.hosts_left_out = {weird_text(), ""};
  for (RankView& rank : view.of_ranks) rank.host = rank.gpu = rank.group = weird_text();
  view.of_ranks[0].step_seconds = NAN;
  view.of_ranks[1].step_seconds = HUGE_VAL;
  view.save_seconds = -HUGE_VAL;
  view.of_ranks[2].activity.phase = Phase(99);
  for (EventView& event : view.events) event.kind = event.text = weird_text();
  view.events[0].wall_seconds = 1e15;
}

std::string scene_metrics(int64_t steps) {
  std::string text;
  char line[kMetricsLine];
  for (int64_t step = 0; step < steps; ++step) {
    const double t = double(step);
    const double noise = std::sin(t * 12.9898) * 43758.5453;
    const double jitter = noise - std::floor(noise) - 0.5;
    StepRecord record{
        .step = step,
        .loss = 2.9 + 5.4 * std::exp(-t / 90) + 0.16 * jitter + 0.02,
        .ce = 2.9 + 5.4 * std::exp(-t / 90) + 0.16 * jitter,
        .balance_loss = 0.0121,
        .grad_norm = 0.5 + 3 * std::exp(-t / 40) + 0.3 * std::abs(jitter),
        .lr = 3e-3 * std::min(1.0, (t + 1) / 40) * (0.55 + 0.45 * std::cos(3.14159 * t / 660)),
        .tokens_per_second = 36500 + 2500 * jitter,
        .load_max_over_mean = 1.45,
        .dead_experts = 1,
        .dropped_rows = int64_t(40 * std::exp(-t / 60) + 6 * (jitter + 0.5)),
        .seconds = {.data = 0.001,
                    .forward = 0.06,
                    .backward = 0.11,
                    .exchange = 0.028,
                    .reduction = 0.012,
                    .optimizer = 0.006,
                    .all = 0.22}};
    if (step == 301) record.loss = record.ce = record.grad_norm = NAN;
    if (step % 55 == 54) {
      record.val_loss = 3.02 + 5.1 * std::exp(-t / 95);
      record.val_bpb = *record.val_loss * 0.56;
    }
    text.append(line, format_metrics(record, line, sizeof line)) += '\n';
  }
  return text;
}

std::string scene_samples() {
  std::string text;
  const auto add = [&](int64_t step, const char* prompt, const char* sample) {
    text += concat("{\"step\":", step, ",\"prompt\":", json_text(prompt),
                   ",\"text\":", json_text(sample), "}\n");
  };
  add(164, "Sir Walter Elliot, of Kellynch Hall,", " was the and of her the such to be a");
  add(329, "Sir Walter Elliot, of Kellynch Hall,",
      " in the evening, was obliged to be in the room;\nand Mrs. Weston, who had been so much "
      "pleased with his father, could not <b>think</b> of it.");
  return text;
}

StatusScene::StatusScene(StatusOptions options, RunView view) : view_(std::move(view)) {
  if (options.run.empty()) options.run = folder_.emplace(concat("-", this)).path();
  const auto start = std::chrono::steady_clock::now();
  server_.emplace(context_, std::move(options), view_, [start] {
    return kNow + std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  });
  port_ = server_->port();
  url_ = server_->url();
  thread_ = std::thread([this] { context_.run(); });
}

StatusScene::~StatusScene() {
  stop();
  work_.reset();
  thread_.join();
}

std::string StatusScene::url() const {
  return url_;
}

void StatusScene::change(const std::function<void(RunView& view)>& change) {
  std::promise<void> done;
  boost::asio::post(context_, [&] {
    change(view_);
    done.set_value();
  });
  done.get_future().wait();
}

void StatusScene::stop() {
  change([this](RunView&) { server_.reset(); });
}

}  // namespace moemamba
