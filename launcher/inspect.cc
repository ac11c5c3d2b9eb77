#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <numeric>

#include "core/schema.h"
#include "launcher/commands.h"
#include "launcher/inspect_text.h"
#include "launcher/settings.h"
#include "runtime/lease.h"
#include "runtime/reshard.h"
#include "runtime/run_folder.h"

namespace moemamba {

namespace {

struct InspectOptions {
  std::string run;
  std::string a, b;  // diff
  std::optional<int64_t> step;
  bool json = false, tensors = false;
  std::string output;  // reshard
  int ranks = 0;
  std::optional<int> expert;
  bool weights_only = false;
  int64_t keep_last = 0, keep_every = 0;  // prune
  bool dry_run = false;
};

int print(const std::string& text, int code = 0) {
  std::fputs(text.c_str(), stdout);
  return code;
}

// What the command line names must be there; that is usage, not a failure.
std::string named_checkpoint(const std::string& place, std::optional<int64_t> step) {
  try {
    return find_checkpoint(place, step);
  } catch (const Error& error) {
    throw BadSettings(error.what());
  }
}

int list(const InspectOptions& options) {
  if (!std::filesystem::is_directory(options.run))
    throw BadSettings(concat(options.run, ": no run is there"));
  const std::vector<ListedCheckpoint> found = list_run(options.run);
  if (options.json) return print(list_json(options.run, found));
  if (found.empty()) return print(concat(options.run, ": no checkpoints\n"));
  return print(list_text(found));
}

int show(const InspectOptions& options) {
  const Checkpoint checkpoint(named_checkpoint(options.run, options.step));
  return print(options.json ? show_json(checkpoint, options.tensors)
                            : show_text(checkpoint, options.tensors));
}

int verify(const InspectOptions& options) {
  std::vector<std::string> paths = {named_checkpoint(options.run, options.step)};
  if (!options.step && list_checkpoints(options.run).size() > 1) {
    paths.clear();
    for (const CheckpointPlace& place : list_checkpoints(options.run)) paths.push_back(place.path);
  }
  std::vector<CheckpointVerdict> verdicts;
  bool good = true;
  for (const std::string& path : paths) {
    verdicts.push_back(verify_checkpoint(path));
    good = good && verdicts.back().problems.empty();
    if (!options.json) print(verdict_text(verdicts.back()));
  }
  if (options.json) print(verify_json(verdicts));
  return good ? 0 : 1;
}

// PATH, or RUN:STEP.
std::string place_of_words(const std::string& words) {
  const size_t colon = words.rfind(':');
  const bool has_step = colon != std::string::npos && colon + 1 < words.size() &&
                        words.size() - colon < 20 &&
                        words.find_first_not_of("0123456789", colon + 1) == std::string::npos;
  if (!has_step || std::filesystem::exists(words)) return named_checkpoint(words, {});
  return named_checkpoint(words.substr(0, colon), std::stoll(words.substr(colon + 1)));
}

std::map<std::string, std::string> settings_of(const Checkpoint& checkpoint) {
  RunConfig config;  // problems are left alone: they are settings of other versions
  Settings(config).read_text(checkpoint.path(), checkpoint.manifest().facts().config());
  const auto values = resolved_values(config);
  return {values.begin(), values.end()};
}

// Settings and facts that differ. How and where a run runs does not make its state another one.
std::vector<FactDifference> facts_that_differ(const Checkpoint& a, const Checkpoint& b) {
  std::vector<FactDifference> facts;
  const auto fact = [&](const std::string& name, const auto& of_a, const auto& of_b, bool counts) {
    if (of_a != of_b) facts.push_back({name, concat(of_a), concat(of_b), counts});
  };
  const CheckpointManifest &m = a.manifest().facts(), &n = b.manifest().facts();
  fact("step", m.step(), n.step(), true);
  fact("next sample", m.next_sample(), n.next_sample(), true);
  fact("loss", m.loss(), n.loss(), true);
  fact("chain", m.chain(), n.chain(), true);
  fact("tokenizer", m.tokenizer(), n.tokenizer(), true);
  fact("ranks", m.ranks(), n.ranks(), false);
  fact("expert ranks", m.expert_ranks(), n.expert_ranks(), false);
  fact("run id", m.run_id(), n.run_id(), false);
  const auto settings_a = settings_of(a), settings_b = settings_of(b);
  for (const auto& [name, value] : settings_a)
    if (const auto other = settings_b.find(name); other != settings_b.end())
      fact(name, value, other->second,
           !is_about_the_run(name) && name.rfind("parallel.", 0) != 0 &&
               name.rfind("checkpoint.", 0) != 0);
  return facts;
}

// Exit codes as of diff: 0 equal, 1 different, 2 one cannot be read.
int diff(const InspectOptions& options) {
  try {
    const Checkpoint a(place_of_words(options.a)), b(place_of_words(options.b));
    const CheckpointDifference difference = compare_checkpoints(a, b);
    const std::vector<FactDifference> facts = facts_that_differ(a, b);
    bool equal = difference.tensors.empty();
    for (const FactDifference& fact : facts) equal = equal && !fact.counts;
    return print(options.json ? diff_json(a, b, difference, facts, equal)
                              : diff_text(difference, facts, equal),
                 equal ? 0 : 1);
  } catch (const Error& error) {
    throw BadSettings(error.what());
  }
}

// The checkpoint's settings on the layout that is asked for.
ReshardRequest reshard_request(const InspectOptions& options, const Checkpoint& from) {
  RunConfig config;
  Settings settings(config);
  settings.read_text(from.path(), from.manifest().facts().config());
  settings.throw_problems();
  const auto embedding = from.find("embedding.weight");
  check(embedding && embedding->shape().dims == 2, from.path(), ": has no embedding");
  const ModelSizes sizes =
      model_sizes(config.model(), config.model().vocabulary() ? 0 : embedding->shape()[0],
                  config.train().sequence_length());
  const int ranks = options.weights_only ? 1 : options.ranks;
  const int expert = options.weights_only
                         ? 1
                         : options.expert.value_or(std::gcd(config.parallel().expert(), ranks));
  config.mutable_parallel()->set_expert(expert);
  try {
    return {.output = std::filesystem::path(options.output + "/").parent_path().string(),
            .layout = RankLayout(ranks, expert, int(sizes.E)),
            .sizes = sizes,
            .config = resolved_text(config)};
  } catch (const Error& error) {
    throw BadSettings(concat("--ranks ", ranks, " --expert ", expert, ": ", error.what()));
  }
}

int reshard_run(const InspectOptions& options) {
  if (!options.weights_only && options.ranks == 0)
    throw BadSettings("reshard: give --ranks, or --weights-only");
  if (options.weights_only && (options.ranks > 0 || options.expert))
    throw BadSettings("--weights-only writes one file; --ranks and --expert do not go with it");
  const Checkpoint from(named_checkpoint(options.run, options.step));
  const ReshardRequest request = reshard_request(options, from);
  PosixFileSystem files;
  if (options.weights_only)
    export_weights(files, from, request);
  else
    reshard(files, from, request);
  const CheckpointManifest& m = from.manifest().facts();
  if (options.json)
    return print(reshard_json(from, {.output = request.output,
                                     .ranks = request.layout.ranks(),
                                     .expert_ranks = request.layout.expert_size(),
                                     .weights_only = options.weights_only}));
  return print(options.weights_only
                   ? concat(request.output, ": weights of step ", m.step(), "\n")
                   : concat(request.output, ": step ", m.step(), ", ", m.ranks(), " ranks -> ",
                            request.layout.ranks(), ", experts over ", m.expert_ranks(), " -> ",
                            request.layout.expert_size(), "\n"));
}

// The newest checkpoint of which every byte holds is never deleted.
int64_t newest_good_step(const std::string& run) {
  for (const CheckpointPlace& place : list_checkpoints(run)) {
    const CheckpointVerdict verdict = verify_checkpoint(place.path);
    if (verdict.problems.empty()) return place.step;
    std::fprintf(stderr, "moemamba: %s\n", verdict.problems.front().c_str());
  }
  throw Error(concat(run, ": none of its checkpoints holds; nothing is deleted"));
}

Lease::Options lease_options(const std::string& run) {
  RunConfig config;
  Settings settings(config);
  settings.read_file(join_path(run, "config.textproto"));
  settings.throw_problems();
  return {.lifetime =
              std::chrono::milliseconds(int64_t(config.checkpoint().lease_seconds() * 1e3))};
}

int prune(const InspectOptions& options) {
  if (!holds_run(options.run)) throw BadSettings(concat(options.run, ": no run is there"));
  Pruned pruned{.run = options.run, .dry_run = options.dry_run, .deleted = {}, .kept = {}};
  if (list_checkpoints(options.run).empty())
    return print(options.json ? prune_json(pruned) : concat(options.run, ": no checkpoints\n"));
  PosixFileSystem files;
  std::optional<Lease> lease;
  if (!options.dry_run) lease.emplace(files, options.run, lease_options(options.run));
  const Retention retention{.keep_last = options.keep_last,
                            .keep_every = options.keep_every,
                            .always = newest_good_step(options.run)};
  pruned.deleted = superseded(options.run, retention);
  if (lease)
    collect_garbage(files, options.run, lease->generation(), retention,
                    [&] { return lease->ours(); });
  const auto is_deleted = [&](const CheckpointPlace& place) {
    return std::ranges::count(pruned.deleted, place.step, &CheckpointPlace::step) > 0;
  };
  for (const CheckpointPlace& place : list_checkpoints(options.run))
    if (!options.dry_run || !is_deleted(place)) pruned.kept.push_back(place);
  if (options.json) return print(prune_json(pruned));
  for (const CheckpointPlace& place : pruned.deleted)
    print(concat(options.dry_run ? "would delete " : "deleted ", place.path, "\n"));
  return print(concat(pruned.kept.size(), options.dry_run ? " would stay\n" : " stay\n"));
}

using Act = int (*)(const InspectOptions&);

CLI::App* add(CLI::App& app, const char* name, const char* help, InspectOptions& options,
              const char* place = "A run's folder") {
  CLI::App* command = app.add_subcommand(name, help);
  if (place) command->add_option("run", options.run, place)->type_name("FOLDER")->required();
  return command;
}

void add_step(CLI::App& command, InspectOptions& options) {
  command.add_option("--step", options.step, "The checkpoint of this step (default: the newest)")
      ->type_name("N")
      ->check(CLI::NonNegativeNumber.description(""));
}

void add_json(CLI::App& command, InspectOptions& options) {
  command.add_flag("--json", options.json, "One JSON object for programs");
}

void add_looks(CLI::App& app, InspectOptions& options) {
  add_json(*add(app, "list", "Checkpoints of a run, newest first", options), options);
  CLI::App* show = add(app, "show", "What a checkpoint's manifest says", options,
                       "A run's folder or a checkpoint's");
  add_step(*show, options);
  add_json(*show, options);
  show->add_flag("--tensors", options.tensors, "Every tensor and where its pieces lie");
  CLI::App* verify = add(app, "verify", "Read every byte again and name all that is wrong", options,
                         "A run's folder (all its checkpoints) or a checkpoint's");
  verify->add_option("--step", options.step, "The checkpoint of this step alone (default: all)")
      ->type_name("N")
      ->check(CLI::NonNegativeNumber.description(""));
  add_json(*verify, options);
  verify->footer("Exit codes: 0 all is well; 1 it is not; 2 usage.");
  CLI::App* diff = add(app, "diff", "How two checkpoints differ", options, nullptr);
  diff->add_option("a", options.a, "A checkpoint's folder, or RUN[:STEP]")
      ->type_name("A")
      ->required();
  diff->add_option("b", options.b, "Another one")->type_name("B")->required();
  add_json(*diff, options);
  diff->footer(
      "Exit codes: 0 equal in step, position, values, moments and settings (layout, folder and\n"
      "the like do not count); 1 different; 2 one of them cannot be read, or usage.");
}

void add_changes(CLI::App& app, InspectOptions& options) {
  CLI::App* reshard = add(app, "reshard", "Write a checkpoint as another layout would have",
                          options, "A run's folder or a checkpoint's");
  add_step(*reshard, options);
  reshard->add_option("--output", options.output, "Folder to write; it must not exist")
      ->type_name("FOLDER")
      ->required();
  reshard->add_option("--ranks", options.ranks, "Ranks of the layout, 1 to 4096; 1: single files")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
  reshard
      ->add_option("--expert", options.expert,
                   "Its parallel.expert (default: the checkpoint's, as far as it divides)")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
  reshard->add_flag("--weights-only", options.weights_only,
                    "Instead: the values alone, in one model.safetensors");
  add_json(*reshard, options);
  CLI::App* prune = add(app, "prune", "Delete old checkpoints as training does", options);
  prune->add_option("--keep-last", options.keep_last, "Newest checkpoints that stay")
      ->type_name("K")
      ->required()
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000'000}).description(""));
  prune
      ->add_option("--keep-every", options.keep_every,
                   "Those of steps that are multiples of this stay too (default: none)")
      ->type_name("M")
      ->check(CLI::Range(int64_t{0}, int64_t{1'000'000'000'000}).description(""));
  prune->add_flag("--dry-run", options.dry_run, "Say what would go; change nothing");
  add_json(*prune, options);
  prune->footer(
      "The newest checkpoint of which every byte holds always stays. A run that somebody works on\n"
      "is left alone (exit code 1).");
}

}  // namespace

Command add_inspect(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand(
      "inspect", "Look at checkpoints: list, show, verify, diff, reshard, prune");
  auto options = std::make_shared<InspectOptions>();
  command->require_subcommand(1);
  add_looks(*command, *options);
  add_changes(*command, *options);
  command->footer("Needs neither GPU nor MPI. Example: moemamba inspect verify runs/mine");
  return [command, options]() -> int {
    const std::pair<const char*, Act> acts[] = {{"list", list},           {"show", show},
                                                {"verify", verify},       {"diff", diff},
                                                {"reshard", reshard_run}, {"prune", prune}};
    for (const auto& [name, act] : acts)
      if (command->got_subcommand(name)) return act(*options);
    return 2;
  };
}

}  // namespace moemamba
