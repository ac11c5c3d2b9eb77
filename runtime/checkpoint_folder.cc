#include "runtime/checkpoint_folder.h"

#include <sys/random.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <set>

#include "core/error.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStep = "step-", kAttempt = ".tmp-", kTrash = ".trash-",
                           kDamaged = ".damaged-";
constexpr size_t kStepDigits = 8;

// All of `text` as a number without sign.
std::optional<int64_t> number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size() && value >= 0;
  return whole && !text.empty() && text[0] != '-' ? std::optional(value) : std::nullopt;
}

struct Attempt {
  int64_t step, generation;
};
// Of an attempt's name.
std::optional<Attempt> attempt_of(const std::string& name) {
  const size_t at = name.find(kAttempt);
  if (at == std::string::npos) return std::nullopt;
  const std::optional<int64_t> step = step_of_name(name.substr(0, at));
  const std::string rest = name.substr(at + kAttempt.size());
  const size_t dash = rest.find('-');
  if (!step || dash == std::string::npos) return std::nullopt;
  const std::optional<int64_t> generation = number(rest.substr(0, dash));
  return generation ? std::optional(Attempt{*step, *generation}) : std::nullopt;
}

// Renames what is to be deleted, and returns its new path. Errors go to the caller; what is left is
// trash for the next time.
std::string discard(FileSystem& files, const std::string& folder, const std::string& name) {
  const std::string trash = join_path(folder, concat(kTrash, name, "-", fresh_nonce()));
  files.rename(join_path(folder, name), trash);
  return trash;
}

// Asks only behind the rename whether this launch may: if it still has the lease then, nobody who
// takes it later has seen the name; else a successor may have, between our decision and the rename.
void bury(FileSystem& files, const std::string& folder, const std::string& name,
          const std::function<bool()>& may_write) {
  const std::string trash = discard(files, folder, name), place = join_path(folder, name);
  if (may_write && !may_write()) {
    // An ordinary rename of a folder fails too where one with anything in it has that name.
    if (!files.rename_new(trash, place)) files.rename(trash, place);
    throw Error(concat(place, ": is not deleted: another launch has taken over this run"));
  }
  files.sync_folder(folder);
  remove_tree(files, trash);
}

// Of an attempt that a launch was about to delete when it died.
std::optional<Attempt> attempt_of_trash(const std::string& name) {
  return name.rfind(kTrash, 0) == 0 ? attempt_of(name.substr(kTrash.size())) : std::nullopt;
}

}  // namespace

// One that cannot be read may hold anything.
std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error, missing;
  for (int looks = 0; looks < 4; ++looks) {  // it may be made, or go, between the two below
    names.clear();
    error.clear();
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
      names.push_back(at->path().filename().string());
    if (!error) break;
    if (fs::symlink_status(folder, missing).type() == fs::file_type::not_found) return {};
  }
  check(!error, folder, ": cannot be listed: ", error.message());
  std::sort(names.begin(), names.end());
  return names;
}

std::string checkpoints_folder(const std::string& run) {
  return join_path(run, "checkpoints");
}

std::string checkpoint_name(int64_t step) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%0*lld", int(kStepDigits), static_cast<long long>(step));
  return concat(kStep, digits);
}

std::string attempt_name(int64_t step, int64_t generation, uint64_t nonce) {
  return concat(checkpoint_name(step), kAttempt, generation, "-", nonce);
}

std::string damaged_name(int64_t step, int64_t generation) {
  return concat(checkpoint_name(step), kDamaged, generation);
}

std::string damaged_place(const std::string& run, int64_t step, int64_t generation) {
  const std::string place = join_path(checkpoints_folder(run), damaged_name(step, generation));
  std::string free = place;
  for (int i = 2; file_exists(free); ++i) free = concat(place, "-", i);
  return free;
}

std::optional<int64_t> step_of_name(const std::string& name) {
  if (name.rfind(kStep, 0) != 0 || name.size() < kStep.size() + kStepDigits) return std::nullopt;
  const std::optional<int64_t> step = number(std::string_view(name).substr(kStep.size()));
  return step && checkpoint_name(*step) == name ? step : std::nullopt;
}

std::vector<CheckpointPlace> list_checkpoints(const std::string& run) {
  const std::string folder = checkpoints_folder(run);
  std::vector<CheckpointPlace> places;
  for (const std::string& name : names_in(folder)) {
    const std::optional<int64_t> step = step_of_name(name);
    if (!step) continue;
    const std::string path = join_path(folder, name);
    std::error_code error;
    const fs::file_type type = fs::symlink_status(path, error).type();
    check(type != fs::file_type::none, path, ": cannot be looked at: ", error.message());
    if (type == fs::file_type::directory) places.push_back({*step, path});
  }
  std::sort(places.begin(), places.end(),
            [](const auto& a, const auto& b) { return a.step > b.step; });
  return places;
}

std::vector<std::string> list_damaged(const std::string& run) {
  std::vector<std::string> names = names_in(checkpoints_folder(run));
  std::erase_if(names, [](const auto& name) { return kind_of_name(name) != NameKind::damaged; });
  std::reverse(names.begin(), names.end());
  return names;
}

NameKind kind_of_name(const std::string& name) {
  const std::string prefix = name.substr(0, name.find('.'));
  if (step_of_name(name)) return NameKind::checkpoint;
  if (name.rfind(kTrash, 0) == 0) return NameKind::trash;
  if (attempt_of(name)) return NameKind::attempt;
  if (step_of_name(prefix) && name.rfind(kDamaged, prefix.size()) == prefix.size())
    return NameKind::damaged;
  return NameKind::other;
}

std::vector<CheckpointPlace> superseded(const std::string& run, const Retention& retention) {
  std::vector<CheckpointPlace> others;
  int64_t kept = 0;
  for (const CheckpointPlace& place : list_checkpoints(run)) {
    const bool every = retention.keep_every > 0 && place.step % retention.keep_every == 0;
    if (kept++ < std::max<int64_t>(1, retention.keep_last) || every ||
        place.step == retention.always)
      continue;
    others.push_back(place);
  }
  return others;
}

void collect_garbage(FileSystem& files, const std::string& run, int64_t generation,
                     const Retention& retention, const std::function<bool()>& may_write) {
  const std::string folder = checkpoints_folder(run);
  fence_attempts(files, run, generation + 1, may_write);  // first: halves would count as kept
  for (const CheckpointPlace& place : superseded(run, retention))
    bury(files, folder, checkpoint_name(place.step), may_write);
  for (const std::string& name : names_in(folder))
    if (name.rfind(kTrash, 0) == 0) remove_tree(files, join_path(folder, name));
}

bool is_half_published(const std::string& run, int64_t step) {
  const fs::path place = join_path(checkpoints_folder(run), checkpoint_name(step));
  std::error_code error;
  return fs::symlink_status(place, error).type() == fs::file_type::directory &&
         fs::symlink_status(place / kManifestName, error).type() == fs::file_type::not_found;
}

void fence_attempts(FileSystem& files, const std::string& run, int64_t generation,
                    const std::function<bool()>& may_write) {
  const std::string folder = checkpoints_folder(run);
  std::set<int64_t> steps;
  std::vector<std::string> trash;
  for (const std::string& name : names_in(folder)) {
    const std::optional<Attempt> attempt = attempt_of(name), dead = attempt_of_trash(name);
    if (dead) {
      steps.insert(dead->step);
      trash.push_back(join_path(folder, name));
    } else if (attempt && attempt->generation < generation) {
      steps.insert(attempt->step);
      trash.push_back(discard(files, folder, name));
    }
  }
  if (trash.empty()) return;
  files.sync_folder(folder);
  // Only now, for their owners may have been about to make them; and before the attempts are
  // deleted, for by these it is known what they are.
  for (int64_t step : steps)
    if (is_half_published(run, step)) bury(files, folder, checkpoint_name(step), may_write);
  for (const std::string& attempt : trash) remove_tree(files, attempt);
}

uint64_t fresh_nonce() {
  uint64_t nonce = 0;
  check(getrandom(&nonce, sizeof nonce, 0) == ssize_t(sizeof nonce),
        "the system gives no random numbers");
  return nonce >> 1;
}

}  // namespace moemamba
