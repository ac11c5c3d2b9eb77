#!/bin/sh
# Configures (once) and builds a preset of CMakePresets.json.
# usage: sh scripts/build.sh [preset=cpu-release] [target...]
# Compiles through ccache where it is installed. A second call compiles nothing.
set -eu
cd "$(dirname "$0")/.."

preset=${1:-cpu-release}
[ $# -eq 0 ] || shift
build=build/$preset

if [ -z "${CMAKE_CXX_COMPILER_LAUNCHER:-}" ] && command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache
fi

# One job a core, but not more than fit in memory at 1.5 GB each.
jobs=$(nproc)
memory_jobs=$(awk '/^MemAvailable:/ { print int($2 / 1500000) }' /proc/meminfo 2>/dev/null || echo 1)
[ "${memory_jobs:-1}" -ge 1 ] || memory_jobs=1
[ "$jobs" -le "$memory_jobs" ] || jobs=$memory_jobs

if [ ! -f "$build/build.ninja" ]; then
  mkdir -p build
  if ! cmake --preset "$preset" >"build/$preset.configure.log" 2>&1; then
    cat "build/$preset.configure.log" >&2
    exit 1
  fi
  # The summary block that CMake prints at the end.
  sed -n '/^-- moemamba /,/^-- *$/p' "build/$preset.configure.log"
fi
if [ $# -eq 0 ]; then
  cmake --build "$build" -j "$jobs"
else
  cmake --build "$build" -j "$jobs" --target "$@"
fi
