#include "runtime/checkpoints.h"

#include <chrono>
#include <cstdio>

#include "core/error.h"
#include "parallel/gather_blobs.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/checkpoint_reread.h"

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

// Out of the way, as the loader does it, but kept.
std::string Checkpoints::set_aside(const std::string& problem) {
  const std::string& run = options_.writer.run;
  try {
    check(!options_.writer.may_write || options_.writer.may_write(),
          "another launch has taken over this run");
    const std::string folder = checkpoints_folder(run),
                      kept = damaged_place(run, facts_.step, options_.writer.generation);
    files_.rename(join_path(folder, checkpoint_name(facts_.step)), kept);
    files_.sync_folder(folder);
    return concat("read again, it does not hold: ", problem, "; kept as ", kept);
  } catch (const std::exception& error) {
    return concat("read again, it does not hold: ", problem, "; and stays, for ", error.what());
  }
}

// Rank 0, of a checkpoint that is there though its save failed: that it is this save's, and for
// good.
void Checkpoints::check_is_ours(const std::string& path) {
  const Checkpoint checkpoint(path);
  const CheckpointManifest& there = checkpoint.manifest().facts();
  check(there.run_id() == facts_.run_id && there.generation() == options_.writer.generation &&
            there.chain() == facts_.chain,
        path, ": was not written by this launch, or on another way to its step");
  try {
    files_.sync_folder(checkpoints_folder(options_.writer.run));
  } catch (const std::exception& error) {  // its bytes may be whole
    throw Unavailable(error.what());
  }
}

// "" where every rank found on the disk what it wrote; the same on all of them. One that could not
// be read, for a reason that is not its own, stays where it is.
std::string Checkpoints::reread(bool may_be_anothers) {
  const auto start = Clock::now();
  const std::string path =
      join_path(checkpoints_folder(options_.writer.run), checkpoint_name(facts_.step));
  std::string damage, trouble;
  const auto told = [&](const std::exception& error) {
    return concat("rank ", groups_.rank, ": ", error.what());
  };
  try {
    if (may_be_anothers && groups_.rank == 0) check_is_ours(path);
    reread_own_files(path, groups_.rank, groups_.layout.ranks());
  } catch (const Unavailable& error) {
    trouble = told(error);
  } catch (const Error& error) {
    damage = told(error);
  } catch (const std::exception& error) {  // no memory, no thread
    trouble = told(error);
  }
  Stream stream = Stream::immediate();
  const auto first_of_ranks = [&](const std::string& own) {
    std::string first;
    for (const std::string& of_rank : gather_blobs(*groups_.checkpoint, stream, own))
      if (first.empty()) first = of_rank;
    return first;
  };
  damage = first_of_ranks(damage);
  trouble = first_of_ranks(trouble);
  std::string answer;  // "", or what is wrong behind a sign: whether it stays for that
  if (groups_.rank == 0 && !damage.empty())
    answer = "-" + set_aside(damage);
  else if (groups_.rank == 0 && !trouble.empty())
    answer = "+it is there, but could not be read again: " + trouble;
  answer = broadcast_blob(*groups_.checkpoint, stream, answer);
  unread_ = answer.rfind('+', 0) == 0;
  reread_seconds_ = since(start);
  return answer.empty() ? "" : answer.substr(1);
}

// LATEST and the deletion of older checkpoints: on rank 0, and never a reason to fail.
void Checkpoints::tidy() {
  if (groups_.rank != 0) return;
  const std::string& run = options_.writer.run;
  try {
    // A stale owner does not know which ones its successor needs.
    if (options_.writer.may_write && !options_.writer.may_write()) return;
    if (options_.verify) options_.retention.always = facts_.step;
    write_file(files_, join_path(checkpoints_folder(run), "LATEST"),
               checkpoint_name(facts_.step) + "\n");
    collect_garbage(files_, run, options_.writer.generation, options_.retention,
                    options_.writer.may_write);
  } catch (const std::exception& error) {
    untidy_ = error.what();
  }
}

void Checkpoints::work() {
  const auto start = Clock::now();
  try {
    problem_ = writer_.write(facts_);
    seconds_ = since(start);
    if (problem_.empty() && options_.verify) problem_ = reread();
    if (problem_.empty()) tidy();
  } catch (...) {
    error_ = std::current_exception();
  }
  ended_ = true;
}

void Checkpoints::announce() {
  if (running_ && ended_ && !told_ && !error_) tell();
}

// Counted and said, once.
void Checkpoints::tell() {
  told_ = true;
  if (groups_.rank == 0 && options_.on_end)
    options_.on_end({.step = facts_.step,
                     .problem = problem_,
                     .seconds = seconds_ + (options_.verify ? reread_seconds_ : 0)});
  using Speech = std::function<void(const std::string&)>;
  const auto say = [&](const Speech& how, const std::string& text) {
    if (groups_.rank == 0 && how) how(text);
  };
  const Speech& warn = options_.warn ? options_.warn : options_.say;
  if (!problem_.empty()) {
    ++failed_;
    ++failed_in_a_row_;
    return say(warn, concat("NOT saved  after step ", facts_.step, ": ", problem_, "; ", failed_,
                            " failed so far, older checkpoints are untouched"));
  }
  failed_in_a_row_ = 0;
  newest_ = facts_.step;
  char text[200];
  int length =
      std::snprintf(text, sizeof text,
                    "saved      %s, committed %.2f s after its step, which it held up for %.0f ms",
                    checkpoint_name(facts_.step).c_str(), seconds_, blocked_ * 1e3);
  if (options_.verify)
    std::snprintf(text + length, sizeof text - size_t(length), "; read again in %.2f s",
                  reread_seconds_);
  say(options_.say, text);
  if (!untidy_.empty()) say(warn, "not tidied " + std::exchange(untidy_, ""));
}

// Ends a save, on all ranks alike.
void Checkpoints::conclude() {
  if (!running_) return;
  if (thread_.joinable()) thread_.join();
  running_ = false;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  if (!told_) tell();
  check(!limited_ || failed_in_a_row_ < options_.max_failed, failed_in_a_row_,
        " saves in a row failed (checkpoint.max_failed_saves), the last one: ", problem_);
}

Event Checkpoints::save(CheckpointFacts facts, Stream* compute) {
  const InPhase in_phase(groups_.activity, Phase::saving);
  const auto start = Clock::now();
  conclude();
  facts_ = std::move(facts);
  const Event staged = writer_.stage(compute);
  running_ = true;
  told_ = ended_ = unread_ = false;
  if (options_.asynchronous) {
    thread_ = std::thread([this] { work(); });
    blocked_ = since(start);
    return staged;
  }
  work();
  blocked_ = since(start);
  conclude();
  return staged;
}

void Checkpoints::loaded(int64_t step) {
  check(!running_, "checkpoints: loaded step ", step, " amid the save of step ", facts_.step);
  newest_ = options_.retention.always = step;
}

void Checkpoints::look_again(int64_t step) {
  check(!running_, "checkpoints: looked at step ", step, " amid the save of step ", facts_.step);
  if (facts_.step != step || problem_.empty()) return;
  const InPhase in_phase(groups_.activity, Phase::saving);
  const std::string place =
      join_path(checkpoints_folder(options_.writer.run), checkpoint_name(step));
  Stream stream = Stream::immediate();
  const bool there = groups_.rank == 0 && file_exists(join_path(place, kManifestName));
  if (broadcast_blob(*groups_.checkpoint, stream, there ? "there" : "").empty()) return;
  const std::string problem = reread(true);
  if (problem.empty() || unread_) problem_ = problem;
  if (problem.empty()) {
    tidy();
    return tell();
  }
  const auto& warn = options_.warn ? options_.warn : options_.say;
  if (groups_.rank == 0 && warn)
    warn(concat("looked     at ", checkpoint_name(step), ": ", problem));
}

void Checkpoints::finish() {
  const InPhase in_phase(groups_.activity, Phase::saving);
  conclude();
}

}  // namespace moemamba
