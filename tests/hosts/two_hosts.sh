#!/bin/sh
# two_hosts.sh RANKS_PER_HOST PROGRAM [ARGUMENT...]: runs the program under mpirun on two hosts,
# network namespaces "a" and "b" with an orted each, joined with mpirun's own namespace by a bridge.
# RANKS_PER_HOST 0: runs the program as it is beside the two, and an mpirun of its own reaches them.
# Exit code: mpirun's; 77 with a reason where namespaces cannot be made (1 where CI=true).
ranks=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
MOEMAMBA_HOSTS=moemamba-$$
export MOEMAMBA_HOSTS

cannot() {
  echo "two_hosts: cannot run here: $1"
  [ "$CI" = true ] && exit 1
  exit 77
}
remove() {
  for host in head a b; do ip netns del "$MOEMAMBA_HOSTS-$host" 2>/dev/null; done
  rm -rf "$scratch"
}

[ "$(id -u)" = 0 ] || cannot "network namespaces need root"
for tool in ip unshare mpirun; do
  command -v $tool >/dev/null || cannot "$tool is not installed"
done
scratch=$(mktemp -d)
trap remove EXIT
trap 'exit 130' INT TERM
for host in head a b; do
  ip netns add "$MOEMAMBA_HOSTS-$host" 2>/dev/null || cannot "ip netns add is not permitted"
  ip -n "$MOEMAMBA_HOSTS-$host" link set lo up
done
head="ip -n $MOEMAMBA_HOSTS-head"
$head link add wire type bridge 2>/dev/null || cannot "this kernel has no bridges"
$head addr add 10.77.0.1/24 dev wire
$head link set wire up
number=2
for host in a b; do
  $head link add "to_$host" type veth peer name wire netns "$MOEMAMBA_HOSTS-$host" 2>/dev/null ||
    cannot "this kernel has no veth pairs"
  $head link set "to_$host" master wire up
  ip -n "$MOEMAMBA_HOSTS-$host" addr add 10.77.0.$number/24 dev wire
  ip -n "$MOEMAMBA_HOSTS-$host" link set wire up
  number=$((number + 1))
done

if [ "$ranks" = 0 ]; then
  export OMPI_MCA_plm_rsh_agent="$here/agent.sh" OMPI_MCA_plm_rsh_no_tree_spawn=1 \
    OMPI_MCA_oob_tcp_if_include=wire OMPI_MCA_btl_tcp_if_include=wire
  TMPDIR=$scratch ip netns exec "$MOEMAMBA_HOSTS-head" timeout 300 "$@"
  exit
fi
# TMPDIR: the hosts share one file system here, and session folders must not outlive the test.
TMPDIR=$scratch ip netns exec "$MOEMAMBA_HOSTS-head" timeout 300 \
  mpirun --allow-run-as-root --bind-to none --host "a:$ranks,b:$ranks" -n $((2 * ranks)) \
  --mca plm_rsh_agent "$here/agent.sh" --mca plm_rsh_no_tree_spawn 1 \
  --mca oob_tcp_if_include wire --mca btl tcp,self --mca btl_tcp_if_include wire \
  --mca mpi_yield_when_idle 1 -x ASAN_OPTIONS=detect_leaks=0 "$@"
