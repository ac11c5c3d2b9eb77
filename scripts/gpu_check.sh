#!/bin/sh
# Everything that is known about the CUDA backend, proven on a machine with GPUs; needs no network.
# usage: sh scripts/gpu_check.sh FOLDER [part...]
#   FOLDER gets the logs; the last lines printed are a short table.
#   parts: tests, ranks (mpirun over the GPUs, where there are two), sanitizer, bench; default: all.
# Exit code 0: all that ran passed.
set -eu
cd "$(dirname "$0")/.."

[ $# -ge 1 ] || { echo "usage: sh scripts/gpu_check.sh FOLDER [tests|ranks|sanitizer|bench ...]" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=${*:-tests ranks sanitizer bench}
started=$(date +%s)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

if ! nvidia-smi -L >"$out/gpus.txt" 2>&1 || [ ! -s "$out/gpus.txt" ]; then
  echo "gpu_check: no GPU here (nvidia-smi -L)" >&2
  exit 2
fi
gpus=$(grep -c . "$out/gpus.txt")

# NCCL may be somewhere that no linker looks, say among Python's packages.
if [ -z "${NCCL_ROOT:-}" ] && command -v python3 >/dev/null; then
  nccl=$(python3 -c 'import nvidia.nccl, os; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null || true)
  [ -z "$nccl" ] || export NCCL_ROOT="$nccl" LD_LIBRARY_PATH="$nccl/lib:${LD_LIBRARY_PATH:-}"
fi

if ! sh scripts/build.sh cuda-release >"$out/build.log" 2>&1; then
  grep -E 'error:|Error:|^FAILED|undefined' "$out/build.log" | head -40
  tail -5 "$out/build.log"
  echo "gpu_check: the build failed, see build.log"
  exit 1
fi
built=$(date +%s)
build=build/cuda-release

# table PART NAME RESULT...: one line of the table at the end.
: >"$out/table.txt"
table() { printf '%-10s %-28s %s\n' "$1" "$2" "$3" >>"$out/table.txt"; }
failed=0
table build all "$((built - started)) s"

# One test program; what it compared and whether it passed.
run_test() {
  name=$1
  log="$out/$name.log"
  if timeout 300 "$build/$name" --require-cuda >"$log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
  count=$(sed -n 's/^\([0-9]*\) backend comparisons.*/\1/p' "$log")
  echo "$name ${count:-0} $verdict" >>"$out/tests.txt"
}

backend_tests="norm_test pointwise_test positions_test embedding_test adamw_test attention_test
scan_test conv_test matmul_test cross_entropy_test routing_test routing_rows_test harness_test
core_test expert_exchange_test gradient_buckets_test reference_test cuda_training_test
cuda_checkpoint_test state_hash_test cuda_code_test cuda_sanitizer_test cuda_interference_test"

# compute-sanitizer TOOL over the tests that FILTER names; its verdict in TOOL.verdict.
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitize() {
  tool=$1
  log="$out/$tool.log"
  options=
  [ "$tool" != racecheck ] || options="--racecheck-report all"
  begun=$(date +%s)
  # shellcheck disable=SC2086
  if timeout 240 "$sanitizer" --tool "$tool" $options --error-exitcode 9 \
    "$build/cuda_sanitizer_test" --require-cuda --gtest_filter="$2" >"$log" 2>&1; then
    verdict=passed
  else
    verdict="FAILED ($?)"
  fi
  summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1 | sed 's/^=* *//')
  case "$verdict, $summary" in
    passed*": 0 "*) ;;  # no report of any kind
    passed*) verdict=FAILED ;;
  esac
  verdict="$verdict, ${summary:-no summary}"
  echo "$verdict, $(($(date +%s) - begun)) s" >"$out/$tool.verdict"
}

for part in $parts; do
  case $part in
    tests)
      : >"$out/tests.txt"
      for name in $backend_tests; do run_test "$name"; done
      while read -r name count verdict; do
        table tests "$name" "$count comparisons, $verdict"
        [ "$verdict" = passed ] || failed=1
      done <"$out/tests.txt"
      ;;
    ranks)
      if [ "$gpus" -lt 2 ]; then
        table ranks "two GPUs" "not run: $gpus GPU"
        continue
      fi
      for name in communicator_nccl_mpi_test cuda_ranks_mpi_test; do
        log="$out/$name.log"
        if ! timeout 300 mpirun -n 2 --oversubscribe "$build/$name" >"$log" 2>&1; then
          table ranks "$name" FAILED
          failed=1
        elif grep -q ': skipped: ' "$log"; then
          table ranks "$name" "FAILED: $(grep -m 1 ': skipped: ' "$log")"  # two GPUs are there
          failed=1
        else
          table ranks "$name" passed
        fi
      done
      ;;
    sanitizer)
      if [ ! -x "$sanitizer" ]; then
        table sanitizer "compute-sanitizer" "not run: it is not installed"
        continue
      fi
      rm -f "$out"/*.verdict
      # Side by side: each spends its time on the host. Only initcheck needs memory never written.
      sanitize memcheck 'CudaSanitizer.*' &
      sanitize racecheck 'CudaSanitizer.*' &
      sanitize initcheck 'CudaInitcheck.*' &
      wait
      for tool in memcheck racecheck initcheck; do
        verdict=$(cat "$out/$tool.verdict" 2>/dev/null || echo "FAILED: no verdict")
        table "$tool" cuda_sanitizer_test "$verdict"
        case $verdict in FAILED*) failed=1 ;; esac
      done
      ;;
    bench)
      for name in scan matmul pointwise; do
        [ -x "$build/bench_cuda_$name" ] || continue
        timeout 120 "$build/bench_cuda_$name" >"$out/bench_$name.txt" 2>&1 || failed=1
        sed 's/^/  /' "$out/bench_$name.txt" >>"$out/bench.txt"
      done
      step="--config configs/moe_mamba_32_25m.textproto --model.vocabulary=50304
        --model.capacity_factor=0 --data.tokenizer=none --data.sampling=EPOCHS
        --model.compute_dtype=BF16 --device=CUDA --profile"
      timeout 200 "$build/moemamba" bench step $step >"$out/bench_step.txt" 2>&1 || failed=1
      sed 's/^/  /' "$out/bench_step.txt" >>"$out/bench.txt"
      ;;
    *) echo "gpu_check: no part '$part'" >&2; exit 2 ;;
  esac
done

[ ! -f "$out/bench.txt" ] || cat "$out/bench.txt"
cat "$out/table.txt"
verdict=passed
[ $failed -eq 0 ] || verdict=FAILED
echo "gpu_check: $gpus GPUs ($(sed -n '1s/ (UUID.*//p' "$out/gpus.txt")), $(($(date +%s) - started)) s: $verdict"
exit $failed
