#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/file.h"

namespace moemamba {

// Names in <run>/checkpoints:
//   step-00001000                    a checkpoint: it came to be by one rename, with its manifest
//   step-00001000.tmp-GENERATION-N   an attempt to write one, under that generation of the lease
//   step-00001000.damaged-GENERATION one that did not hold, kept
//   .trash-...                       what is being deleted
//   LATEST                           a hint for people, never needed, never believed
std::string checkpoints_folder(const std::string& run);
std::string checkpoint_name(int64_t step);
std::string attempt_name(int64_t step, int64_t generation, uint64_t nonce);
std::string damaged_name(int64_t step, int64_t generation);
// Where such a one can go: that name in the run's folder, with a number behind it where it is
// taken.
std::string damaged_place(const std::string& run, int64_t step, int64_t generation);
constexpr const char* kManifestName = "MANIFEST.pb";

struct CheckpointPlace {
  int64_t step = 0;
  std::string path;
};
// Newest first; only folders (no symlinks) with exactly such a name. A folder that is missing holds
// none; one that cannot be listed is an Error.
std::vector<CheckpointPlace> list_checkpoints(const std::string& run);
// Whatever is in a folder, sorted; nothing where it is not there; an Error where it cannot be
// listed.
std::vector<std::string> names_in(const std::string& folder);
// Names of those that did not hold and were set aside, the newest first.
std::vector<std::string> list_damaged(const std::string& run);
// The step, if `name` is a checkpoint's, else nothing.
std::optional<int64_t> step_of_name(const std::string& name);

enum class NameKind : uint8_t { checkpoint, attempt, damaged, trash, other };
NameKind kind_of_name(const std::string& name);

// What stays of the checkpoints: the last `keep_last`, every one whose step is a multiple of
// `keep_every` (0: none for that), and the step `always` (-1: none).
struct Retention {
  int64_t keep_last = 2, keep_every = 0, always = -1;
};
// The others, newest first.
std::vector<CheckpointPlace> superseded(const std::string& run, const Retention& retention);
// Deletes the others: each is renamed first, so that what is half deleted looks like nothing. Also
// attempts, but those of later generations, and older trash. Never touches a name it cannot read.
// `may_write`: the lease is still ours; empty: always. What was renamed when it no longer was gets
// its name back, and that is an Error: a successor may count on it.
// REQUIRES: no save of `generation` is on its way.
void collect_garbage(FileSystem& files, const std::string& run, int64_t generation,
                     const Retention& retention, const std::function<bool()>& may_write = {});
// A folder of that step's name without a manifest. Where its attempt is there too, it was being
// published by links.
bool is_half_published(const std::string& run, int64_t step);
// Moves away attempts of generations before `generation`, and then what they had published by
// halves. Without its attempt a stale owner can publish nothing more, not even a half: all that it
// renames and links comes out of that folder. `may_write` as above.
void fence_attempts(FileSystem& files, const std::string& run, int64_t generation,
                    const std::function<bool()>& may_write = {});
// Something about the time and the process that no other attempt has.
uint64_t fresh_nonce();

}  // namespace moemamba
