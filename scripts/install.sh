#!/bin/sh
# Installs with apt-get what the build needs and this Debian 12 machine does not have yet.
# usage: sh scripts/install.sh [tests]        (as root, or as a user who may use sudo)
# With "tests" also what only tests need.
# MOEMAMBA_MORE_PACKAGES names further ones (scripts/fuzz.sh: clang). A tool that is in PATH counts as installed, wherever it came from.
# Where nothing is missing it changes nothing, asks for no privilege and takes milliseconds.
set -eu

packages="g++ cmake ninja-build pkg-config libopenmpi-dev openmpi-bin libprotobuf-dev
protobuf-compiler libopenblas-dev libssl-dev zlib1g-dev libcli11-dev nlohmann-json3-dev
libsentencepiece-dev libhwloc-dev libboost-dev libgtest-dev libbenchmark-dev procps xz-utils bzip2
ca-certificates ${MOEMAMBA_MORE_PACKAGES:-}"
more=${1:-}
# Slurm (3 MB to fetch) and a browser: tests run one of their own.
[ "$more" != tests ] || packages="$packages iproute2 strace e2fsprogs mount slurmctld slurmd
slurm-client munge chromium"

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "install: this is not a Debian system; install by hand what provides:" $packages >&2
  exit 1
fi

installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $packages 2>/dev/null |
  sed -n 's/^installed //p' | tr '\n' ' ')
for tool in g++:g++ cmake:cmake ninja:ninja-build pkg-config:pkg-config protoc:protobuf-compiler; do
  ! command -v "${tool%%:*}" >/dev/null || installed="$installed ${tool#*:} "
done
missing=
for package in $packages; do
  case " $installed " in
    *" $package "*) ;;
    *) missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0

root=
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "install: needs root; as root run: apt-get install$missing" >&2
    exit 1
  fi
  root=sudo
fi

fetch_and_install() {
  $root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 \
    --no-install-recommends $missing >"$log" 2>&1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "install:$missing"
# The package lists may be missing or old, which shows as a failure; then they are fetched.
if ! fetch_and_install; then
  if ! $root apt-get update --quiet=2 >"$log" 2>&1 || ! fetch_and_install; then
    cat "$log" >&2
    echo "install: apt-get failed, see above; is this Debian 12 with a reachable mirror?" >&2
    exit 1
  fi
fi
echo "install: done"
