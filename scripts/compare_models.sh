#!/bin/sh
# Trains six systems of the paper on Jane Austen at one small size: the same active parameters,
# steps, text and learning rate. Writes one table and one picture of held-out loss over steps.
# usage: sh scripts/compare_models.sh [further settings of `moemamba train`...]
# About a quarter of an hour on two cores. Results: runs/comparison/comparison.md and .svg.
set -eu
cd "$(dirname "$0")/.."
started=$(date +%s)
tokens=data/austen/tokens
moemamba=build/cpu-release/moemamba
runs=runs/comparison

sh scripts/install.sh
sh scripts/build.sh cpu-release moemamba
sh scripts/fetch_austen.sh "$moemamba"

folders=
for system in mamba transformer transformer_moe mamba_mlp moe_mamba parallel_moe_mamba; do
  printf '\n== %s\n' "$system"
  "$moemamba" train --ranks 2 --config configs/comparison/common.textproto \
    --config "configs/comparison/$system.textproto" --run="$runs/$system" --overwrite=true \
    --data.train="$tokens/train" --data.validation="$tokens/validation" \
    --data.tokenizer="$tokens/tokenizer.model" "$@"
  folders="$folders $runs/$system"
done

printf '\n== comparison\n'
# shellcheck disable=SC2086  # a list of folders
"$moemamba" compare --output "$runs" $folders
echo "comparison: $(($(date +%s) - started)) s, $runs/comparison.md and $runs/comparison.svg"
