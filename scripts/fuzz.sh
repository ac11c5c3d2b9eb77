#!/bin/sh
# Feeds invented files to what reads files of others: one libFuzzer program for each target under
# the address and undefined-behaviour sanitizers, as many at once as there are cores.
# usage: sh scripts/fuzz.sh SECONDS       (each target runs that long)
# Prints one line a target with its executions. Exit code 0: none crashed, hung, or allocated more
# than it may (tests/fuzz/fuzz.h). Inputs that reached new code stay in build/fuzz/TARGET for the
# next time; one that fails stays as build/fuzz/TARGET-crash-... and is named.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:?usage: sh scripts/fuzz.sh SECONDS}
targets="safetensors manifest weights_index token_files settings control http"

MOEMAMBA_MORE_PACKAGES="clang libclang-rt-14-dev" sh scripts/install.sh
sh scripts/build.sh cpu-fuzz fuzz >build/cpu-fuzz.build.log 2>&1 ||
  { cat build/cpu-fuzz.build.log >&2; exit 1; }

mkdir -p build/fuzz
rm -f build/fuzz/*.code
for target in $targets; do
  mkdir -p "build/fuzz/$target"
  echo "$target"
done | xargs -P "$(nproc)" -I TARGET sh -c '
  code=0
  build/cpu-fuzz/TARGET_fuzz -max_total_time="$0" -timeout=20 -rss_limit_mb=1024 \
    -malloc_limit_mb=64 -print_final_stats=1 -artifact_prefix=build/fuzz/TARGET- \
    build/fuzz/TARGET tests/fuzz/corpus/TARGET >build/fuzz/TARGET.log 2>&1 || code=$?
  echo "$code" >build/fuzz/TARGET.code' "$seconds"

verdict=0
for target in $targets; do
  log=build/fuzz/$target.log
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
  code=$(cat "build/fuzz/$target.code" 2>/dev/null || echo missing)
  result=passed
  if [ "$code" != 0 ]; then
    verdict=1
    result="FAILED with $(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1), see $log"
    grep -E '^(expected|SUMMARY|ERROR|.*ERROR:)' "$log" | head -n 5 | sed 's/^/  /'
  fi
  echo "fuzz: $target: ${executions:-0} executions in $seconds s: $result"
done
exit $verdict
