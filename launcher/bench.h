#pragma once
#include "launcher/commands.h"
#include "launcher/settings.h"
#include "runtime/trainer.h"

namespace moemamba {

struct Rank;

// Each adds its sub-command to `moemamba bench` and returns what runs it.
Command add_bench_step(CLI::App& bench, const Words& words);
Command add_bench_kernels(CLI::App& bench, const Words& words);
Command add_bench_exchange(CLI::App& bench, const Words& words);
Command add_bench_checkpoint(CLI::App& bench, const Words& words);
Command add_bench_tune(CLI::App& bench, const Words& words);

// What they share.
void add_repeat_option(CLI::App& app, int64_t& repeat);

// The settings of the model that is measured where no file gives others; options on the line
// change them.
const Words& small_model();  // about that of the quickstart
const Words& large_model();  // the paper's 25M with 32 experts, 64 x 1024 tokens, in bf16
RunConfig read_bench_settings(const SettingsSource& source, const Words& model, int ranks);
bool will_use_gpu(const SettingsSource& source);  // as far as one can know before ranks start

// A trainer's options, its token files included: those of the settings, or random ones that are as
// frequent as those of a text, in the temporary folder. Every rank calls it.
TrainerOptions bench_trainer(Rank& rank, const RunConfig& config);

}  // namespace moemamba
