#include "runtime/checkpoints.h"

#include <chrono>
#include <cstdio>

#include "core/error.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Checkpoints::Checkpoints(FileSystem& files, ProcessGroups& groups, const ParameterStore& store,
                         Options options)
    : files_(files),
      groups_(groups),
      options_(std::move(options)),
      writer_(files, groups, store, options_.writer) {}

Checkpoints::~Checkpoints() {
  if (!thread_.joinable()) return;
  if (std::uncaught_exceptions() > 0) groups_.abort("this rank ends amid a save");
  thread_.join();
}

// LATEST and the deletion of older checkpoints: on rank 0, and never a reason to fail.
void Checkpoints::tidy() {
  if (groups_.rank != 0) return;
  const std::string& run = options_.writer.run;
  try {
    write_file(files_, join_path(checkpoints_folder(run), "LATEST"),
               checkpoint_name(facts_.step) + "\n");
    collect_garbage(files_, run, options_.writer.generation, options_.retention);
  } catch (const std::exception& error) {
    untidy_ = error.what();
  }
}

void Checkpoints::work() {
  const auto start = Clock::now();
  try {
    problem_ = writer_.write(facts_);
    if (problem_.empty()) tidy();
  } catch (...) {
    error_ = std::current_exception();
  }
  seconds_ = since(start);
}

// What became of the save, on all ranks alike.
void Checkpoints::conclude() {
  if (!running_) return;
  running_ = false;
  if (thread_.joinable()) thread_.join();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  const auto say = [&](const std::string& text) {
    if (groups_.rank == 0 && options_.say) options_.say(text);
  };
  if (problem_.empty()) {
    failed_in_a_row_ = 0;
    char text[160];
    std::snprintf(text, sizeof text,
                  "saved      %s, committed %.2f s after its step, which it held up for %.0f ms",
                  checkpoint_name(facts_.step).c_str(), seconds_, blocked_ * 1e3);
    say(text);
    if (!untidy_.empty()) say("not tidied " + std::exchange(untidy_, ""));
    return;
  }
  ++failed_;
  ++failed_in_a_row_;
  say(concat("NOT saved  after step ", facts_.step, ": ", problem_, "; ", failed_,
             " failed so far, older checkpoints are untouched"));
  check(failed_in_a_row_ < options_.max_failed, failed_in_a_row_,
        " saves in a row failed (checkpoint.max_failed_saves), the last one: ", problem_);
}

void Checkpoints::save(CheckpointFacts facts) {
  const auto start = Clock::now();
  conclude();
  facts_ = std::move(facts);
  if (options_.asynchronous) writer_.stage();  // else the state itself stands still
  running_ = true;
  if (options_.asynchronous) {
    thread_ = std::thread([this] { work(); });
    blocked_ = since(start);
    return;
  }
  work();
  blocked_ = since(start);
  conclude();
}

void Checkpoints::finish() {
  conclude();
}

}  // namespace moemamba
