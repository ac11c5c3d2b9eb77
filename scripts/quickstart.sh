#!/bin/sh
# From nothing to a trained mixture of experts on a Debian 12 machine: installs what is missing,
# builds, fetches Jane Austen's six novels, trains on five of them across two MPI ranks under a
# supervisor, kills one of the ranks amid the run with SIGKILL (the supervisor goes on from the newest
# checkpoint by itself), kills all of the run, supervisor included, goes on with it on another layout
# (the experts are spread over both ranks now), and compares the result on the sixth with compressors.
# usage: sh scripts/quickstart.sh
# Where there are GPUs and nvcc it trains on these, one rank a GPU, at most two; one without NCCL.
# Started again, it installs and builds nothing that is there, and trains anew in runs/quickstart.
# Its last line is for programs; `seconds` are those of training. Exit code 0 only if the held-out
# bits per byte are at most 1.90.
set -eu
cd "$(dirname "$0")/.."
started=$(date +%s)
most_bits=1.90
ranks=2
tokens=data/austen/tokens
run=runs/quickstart
save_interval=110  # steps
kill_step=300      # of 660
stop_step=400
preset=cpu-release
gpus=0
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
if [ "$gpus" -gt 0 ]; then
  preset=cuda-release
  [ "$gpus" -ge 2 ] || ranks=1
fi
moemamba=build/$preset/moemamba

say() { printf '\n== %s\n' "$*"; }

say "install and build"
sh scripts/install.sh
sh scripts/build.sh "$preset" moemamba
# Without NCCL a run on GPUs has one rank.
if [ "$gpus" -gt 0 ] && grep -q '^NCCL_.*NOTFOUND' "build/$preset/CMakeCache.txt"; then
  echo "no NCCL was found: one rank"
  ranks=1
fi
[ "$gpus" -eq 0 ] || nvidia-smi -L

say "corpus: Debian's r-cran-janeaustenr, unpacked, not installed; Persuasion is held out"
sh scripts/fetch_austen.sh "$moemamba"

set -- --run="$run" --config configs/quickstart.textproto \
  --data.train="$tokens/train" --data.validation="$tokens/validation" \
  --data.tokenizer="$tokens/tokenizer.model" --train.save_interval="$save_interval"
# Descendants of a process, itself not among them.
descendants() {
  for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
    echo "$child"
    descendants "$child"
  done
}
# The process of the last rank.
last_rank() {
  for process in $(descendants "$supervisor"); do
    rank=$(tr '\0' '\n' 2>/dev/null <"/proc/$process/environ" |
      sed -n 's/^OMPI_COMM_WORLD_RANK=//p')
    [ -z "$rank" ] || echo "$rank $process"
  done | sort -n | tail -n 1 | cut -d ' ' -f 2
}
steps_done() { wc -l 2>/dev/null <"$run/metrics.jsonl" || echo 0; }
# Waits until the run has done so many steps; fails where its supervisor ends before.
wait_for_step() {
  until [ "$(steps_done)" -ge "$1" ]; do
    kill -0 "$supervisor" 2>/dev/null || { wait "$supervisor"; exit 1; }
    sleep 0.2
  done
}

say "train under a supervisor, on $ranks ranks with all experts each; after step $kill_step a rank is killed"
train_started=$(date +%s)
rm -f "$run/metrics.jsonl" "$run/events.jsonl" "$run/supervisor/status_url"  # of the run before
"$moemamba" launch --ranks "$ranks" "$@" --overwrite=true --parallel.expert=1 &
supervisor=$!
trap 'kill "$supervisor" 2>/dev/null; exit 1' INT TERM
wait_for_step 1
echo "quickstart: the run can be watched at $(cat "$run/supervisor/status_url")"
wait_for_step "$kill_step"
victim=$(last_rank)
kill -KILL "$victim"
echo "quickstart: rank process $victim was killed with SIGKILL after $(steps_done) steps"
until grep -q '"kind":"resumed"' "$run/events.jsonl"; do
  kill -0 "$supervisor" 2>/dev/null || { wait "$supervisor"; exit 1; }
  sleep 0.2
done
[ "$(last_rank)" != "$victim" ]
wait_for_step "$stop_step"
say "all processes of the run are killed, as where a machine goes down"
# The supervisor first, or it would start others.
# shellcheck disable=SC2046  # a list of numbers
kill -KILL "$supervisor" $(descendants "$supervisor") 2>/dev/null || true
wait "$supervisor" || true
trap - INT TERM
echo "quickstart: killed with SIGKILL after $(steps_done) steps"

if [ "$ranks" -gt 1 ]; then
  say "go on from the newest checkpoint, the experts now spread over both ranks"
else
  say "go on from the newest checkpoint"
fi
"$moemamba" inspect list "$run"
"$moemamba" launch --ranks "$ranks" "$@" --overwrite=false --parallel.expert="$ranks"
seconds=$(($(date +%s) - train_started))

say "Persuasion, which the model has not seen"
evaluation=$run/evaluation.txt
"$moemamba" evaluate --ranks "$ranks" --run "$run" >"$evaluation"
experts=$(sed -n 's/^ *experts: *\([0-9]*\).*/\1/p' "$run/config.textproto" | head -n 1)
val_bpb=$(sed -n 's/^held-out: .*bits per byte \([0-9.]*\).*/\1/p' "$evaluation")
bigram_bpb=$(sed -n 's/^bigram.*: \([0-9.]*\) bits per byte.*/\1/p' "$evaluation")
text=$tokens/validation.txt
packed() {  # command -> bits per byte of the held-out text
  "$1" -9 -c "$text" | wc -c |
    awk -v plain="$(wc -c <"$text")" '{ printf "%.3f", $1 * 8 / plain }'
}
xz_bpb=$(packed xz)
if [ -z "$val_bpb" ]; then
  cat "$evaluation" >&2
  echo "quickstart: evaluate gave no bits per byte, see above" >&2
  exit 1
fi
echo "bits per byte"
printf '  %-38s %.3f\n' "this model" "$val_bpb" \
  "bigram model over the same tokens" "$bigram_bpb" \
  "bzip2 -9" "$(packed bzip2)" "xz -9" "$xz_bpb" "gzip -9" "$(packed gzip)"

say "where tokens went"
sed -n '/^layer/,$p' "$evaluation"

say "200 tokens of new text"
"$moemamba" generate --ranks "$ranks" --run "$run" --tokens 200 --temperature 0.8 --top-p 0.95

say "done in $(($(date +%s) - started)) s, $seconds s of them training"
echo "curve   $run/loss.svg"
echo "metrics $run/metrics.jsonl"
echo "weights $run/weights"
verdict=0
if awk -v found="$val_bpb" -v most="$most_bits" 'BEGIN { exit !(found > most) }'; then
  echo "quickstart: FAILED: $val_bpb held-out bits per byte, expected at most $most_bits"
  verdict=1
fi
echo "quickstart: val_bpb=$val_bpb xz_bpb=$xz_bpb ranks=$ranks experts=$experts seconds=$seconds"
exit $verdict
