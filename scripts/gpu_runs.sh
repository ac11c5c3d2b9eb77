#!/bin/sh
# Trainings on GPUs that are too long for tests: what they printed stands in docs/benchmarks.md.
# usage: sh scripts/gpu_runs.sh FOLDER [single|double ...]   (after scripts/gpu_check.sh has built)
#   single: one GPU; austen: bf16 beside f32; quickstart; tuned: the table of products; pair: a step
#   on two; perf: the kernels of a step; lost: a rank of two that ends or stops; tables: `moemamba
#   bench`; double: trainings on two. Text: data/austen/tokens (scripts/fetch_austen.sh).
set -eu
cd "$(dirname "$0")/.."
out=$1
shift
mkdir -p "$out"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
moemamba=build/cuda-release/moemamba
tokens=data/austen/tokens
text="--data.train=$tokens/train --data.validation=$tokens/validation --data.tokenizer=$tokens/tokenizer.model"
peers="--config configs/moe_mamba_32_25m.textproto --model.vocabulary=50304 --model.capacity_factor=0
  --data.tokenizer=none --data.sampling=EPOCHS --model.compute_dtype=BF16 --device=CUDA"

# name, then a command: its last lines, and how long it took.
try() {
  label=$1
  shift
  begun=$(date +%s)
  code=0
  timeout 280 "$@" >"$out/$label.log" 2>&1 || code=$?
  echo "== $label: code $code, $(($(date +%s) - begun)) s"
  tail -n "${lines:-6}" "$out/$label.log"
}
# Columns of metrics.jsonl of two runs that must be the same.
chain_of() { sed -n 's/.*"chain": *"\([0-9a-f]*\)".*/\1/p' "$1/metrics.jsonl" | tail -n 1; }

for part in "$@"; do
  case $part in
    single)
      lines=40 try step_32 "$moemamba" bench step $peers --profile
      try step_32_f32 "$moemamba" bench step $peers --model.compute_dtype=F32 --steps 5 --warmup 2
      try moe_42 "$moemamba" train --config configs/moe_mamba_25m.textproto --run="$out/r42" \
        --model.vocabulary=0 --model.experts=42 $text --data.sampling=EPOCHS --train.steps=500 \
        --train.global_batch_size=64 --train.routing_group=64 --train.sequence_length=1024 \
        --train.warmup_steps=50 --train.log_interval=100 --train.eval_interval=250 \
        --model.compute_dtype=BF16 --device=CUDA --train.save_interval=1000
      ;;
    austen)
      beside() {  # NAME CONFIG SETTINGS..: bf16 beside f32 over 200 steps
        name=$1 config=$2
        shift 2
        for dtype in F32 BF16; do
          lines=1 try "${name}_$dtype" "$moemamba" train --config "$config" $text \
            --run="$out/$name$dtype" --parallel.expert=1 --train.steps=200 --train.log_interval=50 \
            --model.compute_dtype=$dtype --device=CUDA --model.vocabulary=0 \
            --data.sampling=EPOCHS "$@"
        done
        python3 - "$name" "$out/${name}F32/metrics.jsonl" "$out/${name}BF16/metrics.jsonl" <<'END'
import json, sys
of = [[json.loads(line) for line in open(name)] for name in sys.argv[2:]]
apart = [abs(a["ce"] - b["ce"]) for a, b in zip(*of)]
at = max(range(len(apart)), key=apart.__getitem__)
print(f"{sys.argv[1]}: bf16 within {max(apart):.4f} of f32 (step {at + 1} of {len(apart)}), "
      f"{sum(a <= 0.02 for a in apart)} steps within 0.02, {apart[-1]:.4f} at the end, "
      f"where the loss is {of[0][-1]['ce']:.4f}")
END
      }
      beside quick_5e-4 configs/quickstart.textproto --train.lr=5e-4 --train.warmup_steps=100
      beside quick_1e-3 configs/quickstart.textproto --train.lr=1e-3 --train.warmup_steps=20
      beside moe_25m configs/moe_mamba_32_25m.textproto --train.global_batch_size=16 \
        --train.routing_group=16 --train.lr=5e-4 --train.warmup_steps=150
      ;;
    quickstart)
      lines=60 try quickstart sh scripts/quickstart.sh
      ;;
    tuned)  # the table of products: its lines for this GPU, and a step with and without it
      try tune "$moemamba" bench tune $peers
      try step_tuned "$moemamba" bench step $peers
      cp kernels/cuda/matmul_table.inc "$out/table.inc"
      sed -i '/^\/\//!d' kernels/cuda/matmul_table.inc
      sh scripts/build.sh cuda-release moemamba >"$out/untuned_build.log" 2>&1
      try step_untuned "$moemamba" bench step $peers
      cp "$out/table.inc" kernels/cuda/matmul_table.inc
      sh scripts/build.sh cuda-release moemamba >>"$out/untuned_build.log" 2>&1
      ;;
    perf)  # proofs of the kernels that a step spends its time in, their times, and a step; the head's
      # products in the table, and the step with them
      for name in cross_entropy_test matmul_test cuda_training_test expert_exchange_test; do
        lines=2 try "$name" build/cuda-release/"$name" --require-cuda
      done
      for name in matmul scan; do
        lines=60 try "bench_$name" build/cuda-release/bench_cuda_$name
      done
      lines=40 try step_32 "$moemamba" bench step $peers --profile
      lines=1 try tune "$moemamba" bench tune $peers
      awk '/^\{/ { keep = /\{2048, 512, 50304|\{50304, 512, 2048/ } !/^\/\// && keep' "$out/tune.log" \
        >"$out/head.inc"
      grep -B 1 '{2048, 512, 50304\|{50304, 512, 2048' "$out/tune.log" || true
      cat "$out/head.inc" >>kernels/cuda/matmul_table.inc
      sh scripts/build.sh cuda-release moemamba >"$out/perf_build.log" 2>&1
      lines=40 try step_32_tuned "$moemamba" bench step $peers --profile
      ;;
    lost)  # one of two ranks is killed, or stopped, amid its steps: how long until all have ended
      for signal in KILL STOP; do
        "$moemamba" train --ranks 2 --config configs/quickstart.textproto $text \
          --run="$out/lost$signal" --parallel.expert=2 --device=CUDA --train.steps=100000 \
          --parallel.deadline_seconds=8 >"$out/lost_$signal.log" 2>&1 &
        launcher=$!
        until [ "$(wc -l 2>/dev/null <"$out/lost$signal/metrics.jsonl" || echo 0)" -ge 50 ]; do
          kill -0 $launcher
          sleep 0.05
        done
        victim=$(pgrep -P "$(pgrep -P $launcher mpirun | head -n 1)" | tail -n 1)
        begun=$(date +%s%N)
        kill -$signal "$victim"
        code=0
        wait $launcher || code=$?
        echo "== rank process $victim got SIG$signal: all ended with $code after" \
          "$((($(date +%s%N) - begun) / 1000000)) ms"
        grep -v '^step' "$out/lost_$signal.log" | tail -n 12
      done
      ;;
    pair)
      for rows in 1.25 2; do
        lines=12 try "two_32_rows_$rows" "$moemamba" bench step --ranks 2 $peers \
          --parallel.expert=2 --parallel.exchange_rows=$rows --train.global_batch_size=128 \
          --train.routing_group=64 --profile
      done
      ;;
    tables)
      lines=60 try kernels "$moemamba" bench kernels --device=CUDA --model.compute_dtype=BF16
      lines=40 try exchange "$moemamba" bench exchange --ranks 2 --device=CUDA \
        --model.compute_dtype=BF16 --parallel.expert=2
      lines=30 try checkpoint "$moemamba" bench checkpoint --run="$out/saves" --device=CUDA
      lines=60 try tune "$moemamba" bench tune $peers
      ;;
    double)
      lines=40 try two_32 "$moemamba" bench step --ranks 2 $peers --parallel.expert=2 \
        --train.global_batch_size=128 --train.routing_group=64 --profile
      try two_32_dp "$moemamba" bench step --ranks 2 $peers --parallel.expert=1 \
        --train.global_batch_size=128 --train.routing_group=64
      try moe_100m "$moemamba" bench step --ranks 2 --config configs/moe_mamba_100m.textproto \
        --model.experts=42 --parallel.expert=2 --data.tokenizer=none --data.sampling=EPOCHS \
        --model.compute_dtype=BF16 --device=CUDA --train.global_batch_size=32 \
        --train.routing_group=16 --steps 5 --warmup 2
      small="--config configs/quickstart.textproto $text --model.experts=42 --train.steps=50
        --train.global_batch_size=16 --device=CUDA --model.compute_dtype=BF16 --train.log_interval=25"
      for n in 1 2; do
        try "chain_$n" "$moemamba" train --ranks 2 $small --run="$out/c$n" --parallel.expert=2
      done
      echo "chains: $(chain_of "$out/c1") $(chain_of "$out/c2")"
      # Killed amid its steps, resumed: the same chain. Then on one GPU, then on the CPU.
      (
        "$moemamba" train --ranks 2 $small --run="$out/k" --parallel.expert=2 \
          --train.save_interval=10 >"$out/kill.log" 2>&1 &
        launcher=$!
        until [ "$(wc -l 2>/dev/null <"$out/k/metrics.jsonl" || echo 0)" -ge 25 ]; do sleep 0.01; done
        pkill -KILL -P "$(pgrep -P $launcher mpirun | head -n 1)" || true
        wait $launcher || echo "killed: code $?"
      )
      try resumed "$moemamba" train --ranks 2 $small --run="$out/k" --parallel.expert=2 \
        --overwrite=false
      echo "chain of the killed and resumed run: $(chain_of "$out/k")"
      try one_gpu "$moemamba" train $small --run="$out/k" --parallel.expert=1 --overwrite=false \
        --train.steps=55
      try cpu "$moemamba" train $small --run="$out/k" --parallel.expert=1 --overwrite=false \
        --train.steps=57 --device=CPU --model.compute_dtype=F32
      ;;
  esac
done
