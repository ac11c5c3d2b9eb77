#!/bin/sh
# What mpirun calls instead of ssh: agent.sh HOST COMMAND... runs the command in the network
# namespace that two_hosts.sh made for HOST, under that host name. MOEMAMBA_HOSTS: common prefix of
# the namespaces' names.
host=$1
shift
exec ip netns exec "$MOEMAMBA_HOSTS-$host" unshare --uts sh -c 'hostname "$1"; shift; eval "$*"' \
  agent "$host" "$@"
