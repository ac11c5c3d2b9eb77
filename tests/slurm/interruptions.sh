#!/bin/bash
# interruptions.sh JOB-FILE OPTION...: under one_node.sh. Submits the file with the options, once into
# run `straight` and once into run `run`, and ends the second job's ranks in three ways: as the time
# limit does, as a preemption without grace does, by a preemption with grace. Prints what became of it.
#   --limit instead of OPTIONs' first: waits for a real time limit, too, which Slurm looks after twice
#   a minute.
set -u
limit=
[ "$1" != --limit ] || { limit=yes; shift; }
file=$1
shift

fail() {
  echo "interruptions: $1"
  scontrol show job "$job"
  cat job.log
  exit 1
}
field() { scontrol show job "$job" | grep -o "\\b$1=[^ ]*" | head -n 1 | cut -d= -f2; }
lines() { cat run/metrics.jsonl 2>/dev/null | wc -l; }
# The job has been started for the N-th time and has since done ten steps.
in_full_run() {
  local what=$1 restarts=$2
  for _ in $(seq 1200); do
    [ "$(field Restarts)" = "$restarts" ] && [ "$(field JobState)" = RUNNING ] && break
    sleep 0.1
  done
  [ "$(field Restarts)" = "$restarts" ] || fail "$what: the job does not come back"
  local from
  from=$(lines)
  for _ in $(seq 1200); do
    [ "$(lines)" -ge $((from + 10)) ] && return
    sleep 0.1
  done
  fail "$what: no further steps"
}

job=$(sbatch --parsable --wait --output=straight.log "$file" --run=straight "$@") ||
  { cat straight.log; exit 1; }
job=$(sbatch --parsable --output=job.log "$file" --run=run "$@") || exit 1
in_full_run "start" 0
restarts=1
if [ -n "$limit" ]; then
  scontrol update JobId="$job" TimeLimit=2
  in_full_run "time limit" 1
  scontrol update JobId="$job" TimeLimit=600
  restarts=2
fi
scancel --batch --signal=USR1 "$job"
in_full_run "SIGUSR1 to the script" $restarts
scontrol requeue "$job"
in_full_run "requeued by Slurm" $((restarts + 1))
sbatch --wait --output=other.log --partition=high --exclusive --wrap "echo ran" || fail "the other job"
in_full_run "preempted with grace" $((restarts + 2))
for _ in $(seq 3000); do
  case $(field JobState) in RUNNING | PENDING | COMPLETING) ;; *) break ;; esac
  sleep 0.1
done
echo "job: $(field JobState) after $(field Restarts) restarts, exit code $(field ExitCode)"
