#!/bin/sh
# The long parts of the tests, round after round with another seed: the fuzz targets, and every test
# program called crash_*, damage_*, reshard_* or kill_*, lease_test and resume_bits_test; with
# --faults the campaign of harm to runs under `moemamba launch` alone, the programs faults_*.
# usage: sh scripts/soak.sh --minutes M [--seed S] [--faults] [--only "PROGRAM ..."] [--jobs J]
# --only: these alone ("fuzz": its targets), with all the time, for the full count of one property.
# --jobs: so many of a program at once, each with a seed of its own; those that wait for disks and
# mounts most of their time (crash_power_test) get further that way.
# Ends with a table: property, cases, failures, first and last seed; after faults with another, of
# the times and steps that they cost. Exit code 0: no failures. Logs of rounds that failed stay in
# build/soak.
set -eu
cd "$(dirname "$0")/.."
minutes=
seed=1
faults=
only=
jobs=1
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:-}; shift ;;
    --seed) seed=${2:-}; shift ;;
    --faults) faults=yes ;;
    --only) only=${2:-}; shift ;;
    --jobs) jobs=${2:-}; shift ;;
    *) minutes= seed=; break ;;
  esac
  shift
done
usage() {
  echo "usage: sh scripts/soak.sh --minutes M [--seed S] [--faults] [--only \"PROGRAM ...\"]" \
    "[--jobs J]" >&2
  exit 2
}
case $minutes$seed$jobs in
  '' | *[!0-9]*) usage ;;
esac
if [ -z "$minutes" ] || [ -z "$seed" ] || [ "${jobs:-0}" -lt 1 ]; then usage; fi

if [ -n "$faults" ]; then sources="tests/faults_*_test.cc"
else
  sources="tests/lease_test.cc tests/crash_*_test.cc tests/damage_*_test.cc
    tests/reshard_*_test.cc tests/resume_bits_test.cc tests/kill_*_test.cc"
fi
programs=
for source in $sources; do
  [ ! -f "$source" ] || programs="$programs $(basename "$source" .cc)"
done
fuzz=1
[ -z "$faults" ] || fuzz=0
if [ -n "$only" ]; then
  fuzz=0
  chosen=
  for name in $only; do
    case "$name:$programs " in
      fuzz:*) fuzz=1 ;;
      *":"*" $name "*) chosen="$chosen $name" ;;
      *) echo "--only $name: no such program; there are fuzz$programs" >&2; exit 2 ;;
    esac
  done
  programs=$chosen
fi
sh scripts/install.sh tests
# shellcheck disable=SC2086  # a list of words
sh scripts/build.sh cpu-release moemamba $programs

# A fifth of a round for the fuzz targets, which run two at a time, the rest for the programs. Faults:
# two programs at a time, as they mostly wait.
results=build/soak
rm -rf "$results"
mkdir -p "$results"
end=$(($(date +%s) + minutes * 60))
count=$(echo "$programs" | wc -w)
round=$((minutes * 60 < 600 ? minutes * 60 : 600))
fuzz_seconds=$((round / 10 > 5 ? round / 10 : 5))
[ "$count" -gt 0 ] || fuzz_seconds=$((round / 3))
[ "$fuzz" -eq 1 ] || fuzz_seconds=0
share=$((count > 0 ? (round - 2 * fuzz_seconds) / count : 0))
[ -z "$faults" ] || share=$((round * 2 / count))
[ "$share" -ge 5 ] || share=5
lines=$results/lines  # property|cases|failures|seed
costs=$results/costs  # "kill -9 of a rank: found 0.10 next 1.50 lost 12 seed 1", a line a fault
: >"$lines"
: >"$costs"

# What a test program says of its cases: "cases: PROPERTY: N, seed S" (tests/support/soak.h),
# "P1, P18: N kills of a launch, ..." or "lengths tried: N ...".
counts() {  # seed
  sed -n '/^ranks  */d
    /^on h[0-9]/d
    /^moemamba: /d
    /^cases: /{
      s///
      s/^\([^|]*\): \([0-9][0-9]*\), seed .*/\1|\2/p
      d
    }
    s/^\(P[0-9P, ]*\): \([0-9][0-9]*\) \([^(,0-9]*\).*/\1 \3|\2/p
    s/^\([A-Za-z][^:|]*\): \([0-9][0-9]*\)\([,; ].*\)\{0,1\}$/\1|\2/p' |
    sed "s/ *|/|/; s/\$/|0|$1/"
}

fuzz_round() {
  log=$results/fuzz-$seed.log
  sh scripts/fuzz.sh "$fuzz_seconds" >"$log" 2>&1 || true
  sed -n 's/^fuzz: \([a-z_]*\): \([0-9]*\) executions.*: passed$/P23 hostile \1|\2|0|'"$seed/p" \
    "$log" >>"$lines"
  sed -n 's/^fuzz: \([a-z_]*\): \([0-9]*\) executions.*FAILED.*/P23 hostile \1|\2|1|'"$seed/p" \
    "$log" >>"$lines"
  grep -q '^fuzz: ' "$log" || echo "P23 hostile: did not run|0|1|$seed" >>"$lines"
}

run_program() {  # program, seed
  log=$results/$1-$2.log
  code=0
  (cd build/cpu-release && "./$1" --soak-seconds "$share" --seed "$2") >"$log" 2>&1 || code=$?
  sed -n 's/^fault: //p' "$log" >"$log.costs"
  tests=$(sed -n 's/^\[==========\] \([0-9]*\) tests\{0,1\} from .* ran.*/\1/p' "$log")
  failed=$(sed -n 's/^ *\([0-9]*\) FAILED TESTS\{0,1\}$/\1/p' "$log")
  [ "$code" -eq 0 ] || [ -n "$failed" ] || failed=1
  { counts "$2" <"$log"; echo "$1|${tests:-0}|${failed:-0}|$2"; } >"$log.lines"
  [ "$code" -ne 0 ] || rm "$log"
}
# What the programs that have ended found out.
gather() {
  wait
  for found in "$results"/*.log.lines; do
    [ -f "$found" ] || continue
    cat "$found" >>"$lines"
    cat "${found%.lines}.costs" >>"$costs"
    rm "$found" "${found%.lines}.costs"
  done
}

while [ "$(date +%s)" -lt "$end" ]; do
  [ "$fuzz" -eq 0 ] || fuzz_round
  running=0
  for program in $programs; do
    [ "$(date +%s)" -lt "$end" ] || break
    for job in $(seq "$jobs"); do
      run_program "$program" $((seed + job - 1)) &
    done
    running=$((running + 1))
    [ -n "$faults" ] && [ $((running % 2)) -eq 1 ] || gather
  done
  gather
  seed=$((seed + jobs))
done

if [ -s "$costs" ]; then
  echo
  printf '%-34s %6s  %-23s  %-23s  %s\n' "" "" "   found after, s" "   next step after, s" \
    "   steps lost"
  printf '%-34s %6s  %7s %7s %7s  %7s %7s %7s  %7s %7s %7s\n' fault cases p50 p99 max p50 p99 max \
    p50 p99 max
  sed 's/: found .*//' "$costs" | sort | uniq -c | while read -r cases kind; do
    printf '%-34s %6d' "$kind" "$cases"
    for what in found next lost; do
      # A negative number was not measured.
      grep -F "$kind: found " "$costs" | sed "s/.* $what \([-0-9.]*\).*/\1/" | sort -n |
        awk -v what=$what '
          $1 >= 0 { v[++n] = $1 }
          function at(share,  i) {
            i = int(share * n); if (i < share * n) ++i
            return sprintf(what == "lost" ? "%d" : "%.2f", v[i < 1 ? 1 : i])
          }
          END {
            if (n == 0) printf "  %7s %7s %7s", "-", "-", "-"
            else printf "  %7s %7s %7s", at(0.5), at(0.99), at(1)
          }'
    done
    echo
  done
fi

echo
awk -F '|' '
  !($1 in cases) { order[++n] = $1; first[$1] = $4 }
  { cases[$1] += $2; failures[$1] += $3; last[$1] = $4; all += $3 }
  END {
    printf "%-48s %14s %9s  %s\n", "property", "cases", "failures", "seeds"
    for (i = 1; i <= n; ++i) {
      p = order[i]
      printf "%-48s %14d %9d  %s\n", p, cases[p], failures[p],
        first[p] == last[p] ? first[p] : first[p] "-" last[p]
    }
    exit all > 0
  }' "$lines" || { echo "soak: FAILED, logs in $results"; exit 1; }
echo "soak: passed, $minutes minutes"
