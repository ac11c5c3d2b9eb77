#!/bin/bash
# one_node.sh COMMAND [ARGUMENT...]: runs the command, SLURM_CONF set, beside a Slurm of its own: one
# node, this machine, with munged, slurmctld and slurmd in a temporary folder and on free ports of
# 127.0.0.1. Partition `low` gives its jobs 15 s when `high` needs the node. When the command has
# ended, so has everything else. MOEMAMBA_SLURM_LOGS: folder that gets the daemons' logs.
# Exit code: the command's; 77 with a reason where Slurm cannot run (1 where CI=true).
set -u

cannot() {
  echo "one_node: cannot run here: $1"
  [ "${CI:-}" = true ] && exit 1
  exit 77
}
[ "$(id -u)" = 0 ] || cannot "Slurm's daemons need root"
PATH=$PATH:/usr/sbin:/sbin
for tool in munged slurmctld slurmd sbatch ss; do
  command -v $tool >/dev/null || cannot "$tool is not installed (sh scripts/install.sh)"
done

folder=$(mktemp -d)
chmod 755 "$folder"  # munged refuses a socket that others could not reach
daemons=
# Everything that lives by the node's configuration: jobs, their steps, slurmstepd.
of_this_node() {
  grep -alz "^SLURM_CONF=$folder/slurm.conf\$" /proc/[0-9]*/environ 2>/dev/null |
    sed 's|/proc/\([0-9]*\)/.*|\1|' | grep -vx -e $$ -e "$BASHPID"
}
tear_down() {
  trap - EXIT
  unset SLURM_CONF
  [ -z "$daemons" ] || kill $daemons 2>/dev/null
  for _ in $(seq 50); do
    kill -0 $daemons 2>/dev/null || break
    sleep 0.1
  done
  local left
  left=$(of_this_node)
  { kill -KILL $daemons $left; wait; } 2>/dev/null
  [ -z "${MOEMAMBA_SLURM_LOGS:-}" ] || cp "$folder"/*.log "$MOEMAMBA_SLURM_LOGS" 2>/dev/null
  rm -rf "$folder"
}
trap tear_down EXIT
trap 'exit 130' INT TERM

begin() {  # name of the log, command
  local log=$folder/$1.log
  shift
  "$@" >>"$log" 2>&1 &
  daemons="$daemons $!"
}
wait_for() {  # what is said if it does not come within a minute, command
  local what=$1
  shift
  for _ in $(seq 300); do
    "$@" >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail -n 20 "$folder"/*.log
  cannot "$what"
}
free_port() {  # from this number on
  local port=$1
  while ss -Hltn "sport = :$port" | grep -q .; do port=$((port + 1)); done
  echo "$port"
}

mkdir "$folder/munge" "$folder/state" "$folder/spool"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
begin munged munged --foreground --key-file="$folder/munge.key" \
  --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=10
wait_for "munged does not start" test -S "$folder/munge/socket"

host=$(hostname -s)
control=$(free_port $((20000 + $$ % 10000)))
node=$(free_port $((control + 1)))
# cred_expire: a requeued job waits as long (120 s by default). config_overrides: ranks may be more
# than this machine's cores.
cat >"$folder/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$control
SlurmdPort=$node
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=15 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 State=UP
END
export SLURM_CONF=$folder/slurm.conf
begin slurmctld slurmctld -D -i
begin slurmd slurmd -D
wait_for "the node does not come up" sh -c 'sinfo --noheader --format=%T | grep -q idle'

"$@"
code=$?
# Jobs end before the daemons that could end them.
scancel --quiet --full --signal=KILL --state=RUNNING 2>/dev/null
scancel --quiet --me 2>/dev/null
exit $code
