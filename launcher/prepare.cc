#include "runtime/prepare.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "launcher/commands.h"

namespace moemamba {

namespace {

void print_split(const char* name, const SplitSummary& split) {
  std::printf("%-10s %lld documents, %lld bytes, %lld tokens, %.2f bytes per token\n", name,
              static_cast<long long>(split.documents), static_cast<long long>(split.bytes),
              static_cast<long long>(split.tokens), split.bytes_per_token());
}

int run_prepare(const PrepareRequest& request) {
  PosixFileSystem files;
  const PrepareSummary summary = prepare(files, request);
  std::printf("tokenizer  %s\n", summary.tokenizer.c_str());
  print_split("train", summary.train);
  if (summary.validation.documents > 0) print_split("validation", summary.validation);
  const std::string tokenizer =
      request.tokenizer_file.empty() && request.tokenizer == TokenizerKind::bytes
          ? "bytes"
          : tokenizer_path(request.output);
  std::printf("\nmoemamba train --data.train=%s%s%s --data.tokenizer=%s\n",
              train_path(request.output).c_str(),
              summary.validation.documents > 0 ? " --data.validation=" : "",
              summary.validation.documents > 0 ? validation_path(request.output).c_str() : "",
              tokenizer.c_str());
  return 0;
}

}  // namespace

Command add_prepare(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand("prepare", "Turn text into token files");
  auto request = std::make_shared<PrepareRequest>();
  command
      ->add_option("input", request->inputs,
                   "Texts: .txt (one document), .jsonl ({\"text\": ...} a line), .rdb (R), folders")
      ->type_name("PATH")
      ->required();
  command->add_option("--output", request->output, "Folder to write")
      ->type_name("FOLDER")
      ->required();
  command->add_option("--validation", request->validation_inputs, "Texts to hold out as a whole")
      ->type_name("PATH")
      ->allow_extra_args(false);
  command
      ->add_option("--hold-out", request->hold_out,
                   "Document to hold out, by name or number from 1; repeatable")
      ->type_name("NAME")
      ->allow_extra_args(false);
  command
      ->add_option("--held-out-fraction", request->held_out_fraction,
                   "Share of the documents to hold out, evenly spread, 0 to 0.999 (default 0);\nof "
                   "a single document its end")
      ->type_name("X")
      ->check(CLI::Range(0.0, 0.999).description(""));
  command->add_option("--tokenizer", request->tokenizer, "bytes or bpe (default bpe)")
      ->type_name("KIND")
      ->transform(CLI::CheckedTransformer(
                      std::map<std::string, TokenizerKind>{{"bytes", TokenizerKind::bytes},
                                                           {"bpe", TokenizerKind::bpe}},
                      CLI::ignore_case)
                      .description(""));
  command->add_option("--vocabulary", request->vocabulary, "Tokens of a new BPE (default 4096)")
      ->type_name("N")
      ->check(CLI::Range(2, 1 << 24).description(""));
  command->add_option("--tokenizer-file", request->tokenizer_file, "Use this tokenizer instead")
      ->type_name("FILE");
  command->add_option("--format", request->format, "megatron or llmc (default megatron)")
      ->type_name("FORMAT")
      ->transform(CLI::CheckedTransformer(
                      std::map<std::string, TokenFormat>{{"megatron", TokenFormat::megatron},
                                                         {"llmc", TokenFormat::llmc}},
                      CLI::ignore_case)
                      .description(""));
  command->add_flag("--overwrite", request->overwrite,
                    "Replace what an earlier prepare left in the folder");
  command->footer(
      "Leaves tokenizer.model, train.bin and .idx, validation.bin, .idx and .txt and summary.json "
      "in\n"
      "the folder, all or nothing, and prints the options that `moemamba train` needs for them.\n"
      "Example: moemamba prepare --output data/mine --held-out-fraction 0.05 texts/");
  return [request] { return run_prepare(*request); };
}

}  // namespace moemamba
