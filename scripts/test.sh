#!/bin/sh
# Installs what is missing, builds and runs every test. Exit code 0: all of them passed.
# usage: sh scripts/test.sh
#   preset cpu-release: all tests;  cpu-asan: the unit tests under the address and
#   undefined-behaviour sanitizers;  cuda-release: compiled where nvcc is found, and run where there
#   is a GPU too;
#   cpu-fuzz: every fuzz target for a minute.
# With CI=true in the environment a test that could not run (skipped) counts as failed.
set -eu
cd "$(dirname "$0")/.."
started=$(date +%s)

sh scripts/install.sh tests
sh scripts/build.sh cpu-release
sh scripts/build.sh cpu-asan unit_tests

cuda="no nvcc on this machine"
nvcc=
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  nvcc=found
  sh scripts/build.sh cuda-release
  sh scripts/kernel_report.sh build/cuda_kernels.md  # cuda_code_test reads and prints it
  cuda="compiled, but this machine has no GPU"
fi

# One ctest a preset. Each test program leaves one XML file of googletest in build/test-results.
results=$PWD/build/test-results
rm -rf "$results"
failed=
run_tests() {  # preset, further options of ctest
  preset=$1
  shift
  echo "== $preset"
  GTEST_OUTPUT="xml:$results/$preset/" ctest --test-dir "build/$preset" --output-on-failure \
    --parallel "$(nproc)" --no-tests=error "$@" || failed="$failed $preset"
}
run_tests cpu-release
run_tests cpu-asan -L unit
if [ -n "$nvcc" ]; then
  # What nvcc made of the kernels can be read without a GPU, and that there is none can be said.
  if nvidia-smi -L >/dev/null 2>&1; then run_tests cuda-release -L gpu
  else run_tests cuda-release -R '^(cuda_code_test|bad_input_test|doctor_test)$'; fi
  # Of every hot kernel: registers, stack, spills.
  grep '^  kernels/cuda' build/cuda-release/Testing/Temporary/LastTest.log || true
fi

# A minute for each target of tests/fuzz, two at a time.
echo "== fuzz"
fuzz=build/fuzz-summary.txt
sh scripts/fuzz.sh 60 >"$fuzz" || failed="$failed fuzz"
executions=$(awk '/^fuzz: .* executions/ { sum += $3 } END { print sum + 0 }' "$fuzz")

# googletest: one <testcase> a line, followed by <skipped message="file:line&#x0A;reason"> where it
# was skipped.
summary=build/test-summary.txt
find "$results" -name '*.xml' | sort | xargs awk '
  /<testcase / {
    name = $0; sub(/.*<testcase name="/, "", name); sub(/".*/, "", name)
    suite = $0; sub(/.*classname="/, "", suite); sub(/".*/, "", suite)
    ran += /status="run"/
    if (/status="notrun"/) print "skipped: " suite "." name ": disabled"
  }
  /<skipped message="/ {
    reason = $0; sub(/.*<skipped message="/, "", reason); sub(/".*/, "", reason)
    sub(/^[^&]*&#x0A;/, "", reason); gsub(/&#x0A;/, " ", reason)
    print "skipped: " suite "." name ": " reason
    ran--
  }
  /<failure message="/ && failing != suite "." name {
    failing = suite "." name
    print "failed: " failing " (" FILENAME ")"
  }
  /<property name="backend_comparisons"/ {
    count = $0; sub(/.* value="/, "", count); comparisons += count + 0
  }
  END { print "ran: " ran + 0; print "comparisons: " comparisons + 0 }' | sort -u >"$summary"
ran=$(sed -n 's/^ran: //p' "$summary")
skipped=$(grep -c '^skipped: ' "$summary" || true)
failures=$(grep -c '^failed: ' "$summary" || true)
comparisons=$(sed -n 's/^comparisons: //p' "$summary")

echo
grep -E '^(skipped|failed): ' "$summary" | sed 's/^/  /' || true
cat "$fuzz"
seconds=$(($(date +%s) - started))
verdict=passed
[ -z "$failed" ] || verdict="FAILED in$failed"
if [ "${CI:-}" = true ] && [ "$skipped" -gt 0 ]; then
  verdict="FAILED: CI=true and a test was skipped"
fi
echo "tests: $ran run, $failures failed, $skipped skipped, $executions fuzz executions, $seconds s:" \
  "$verdict"
if [ "$comparisons" -gt 0 ]; then cuda="on this machine's GPU"; fi
echo "CUDA comparisons: $comparisons ($cuda)"
[ "$verdict" = passed ]
