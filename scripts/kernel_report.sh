#!/bin/sh
# What ptxas says of every kernel on sm_90a: registers, shared memory, stack, spills. Writes
# docs/cuda_kernels.md, to which cuda_code_test holds the sources. Needs nvcc, no GPU.
# usage: sh scripts/kernel_report.sh [file=docs/cuda_kernels.md]
# Compiles each .cu of kernels/cuda and parallel/cuda once more, for sm_90a alone and without
# linking, with the flags of the build that reach the device; a second call compiles what is newer.
set -eu
cd "$(dirname "$0")/.."

to=${1:-docs/cuda_kernels.md}
nvcc=$(command -v nvcc || true)
[ -n "$nvcc" ] || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
[ -x "$nvcc" ] || { echo "kernel_report: no nvcc in PATH, CUDA_HOME or /usr/local/cuda" >&2; exit 2; }
export nvcc
export logs=build/kernel_report
mkdir -p "$logs"
# A header may be included by any of them.
newest=$(find kernels core parallel \( -name '*.h' -o -name '*.cuh' -o -name '*.inc' \) \
  -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
export newest

find kernels/cuda parallel/cuda -name '*.cu' | sort | xargs -P "$(nproc)" -I{} sh -c '
  log="$logs/$(echo {} | tr / _).txt"
  if [ -f "$log" ] && [ "$log" -nt {} ] && [ "$log" -nt "$newest" ]; then exit 0; fi
  if "$nvcc" -I. -O3 -DNDEBUG -DMOEMAMBA_CUDA -std=c++20 --expt-relaxed-constexpr -lineinfo \
    -diag-suppress=20012 -gencode arch=compute_90a,code=sm_90a -Xptxas -v -cubin \
    -o "$log.cubin" {} >"$log.new" 2>&1; then
    rm "$log.cubin"
    mv "$log.new" "$log"
  else
    cat "$log.new" >&2
    exit 255
  fi'

# One line a kernel: file, name with its template arguments, numbers. ptxas gives each kernel three
# lines (Function properties, stack and spills, Used); other functions have no "Used".
# c++filt gives "void room::(anonymous namespace)::kernel<...>(arguments)".
rows=$(for source in $(find kernels/cuda parallel/cuda -name '*.cu' | sort); do
  c++filt <"$logs/$(echo "$source" | tr / _).txt" | awk -v source="$source" '
    function number_before(text, what) {
      if (!match(text, "[0-9]+ " what)) return 0
      return substr(text, RSTART, RLENGTH - length(what) - 1) + 0
    }
    /Compiling entry function/ {
      stack = spills = 0
      name = $0
      sub(/^[^\047]*\047/, "", name)
      sub(/\047 for \047.*/, "", name)
      gsub(/\(anonymous namespace\)::/, "", name)
      gsub(/moemamba::/, "", name)
      sub(/^void /, "", name)
      depth = 0  # the arguments begin at the first parenthesis outside of the angle brackets
      for (i = 1; i <= length(name); ++i) {
        c = substr(name, i, 1)
        if (c == "<") ++depth
        if (c == ">") --depth
        if (c == "(" && depth == 0) { name = substr(name, 1, i - 1); break }
      }
      gsub(/\(bool\)0/, "false", name); gsub(/\(bool\)1/, "true", name)
      gsub(/\([a-z ]*\)/, "", name)
      gsub(/__nv_bfloat16/, "bf16", name)
      if (name ~ /^cub::/) {  # its template arguments fill pages
        sub(/<.*/, "", name)
        sub(/.*::/, "cub::", name)
      }
      gsub(/\|/, "\\|", name)
    }
    /bytes stack frame/ {
      n = number_before($0, "bytes stack frame")
      if (n > stack) stack = n
      spills += number_before($0, "bytes spill stores") + number_before($0, "bytes spill loads")
    }
    /Used [0-9]+ registers/ {
      match($0, /Used [0-9]+/)
      printf "| %s | `%s` | %d | %d | %d | %d |\n", source, name,
        substr($0, RSTART + 5, RLENGTH - 5), number_before($0, "bytes smem"), stack, spills
    }'
done | LC_ALL=C sort -u)

{
  cat <<'END'
# Kernels of the CUDA backend

Written by `sh scripts/kernel_report.sh`; `cuda_code_test` fails where a kernel of the sources is
missing here, or where a hot one spills. Per thread: registers, bytes of stack, bytes of spill stores
and loads. Per block: bytes of static shared memory (what a launch asks for besides is not known to
the compiler).

END
  echo "Compiler: $("$nvcc" --version | sed -n 's/.*\(release [0-9.]*, V[0-9.]*\).*/nvcc \1/p'), sm_90a."
  echo "Kernels: $(echo "$rows" | wc -l), with spills: $(echo "$rows" | grep -vc '| 0 |$' || true)."
  echo
  echo "| file | kernel | registers | shared | stack | spills |"
  echo "|---|---|---|---|---|---|"
  echo "$rows"
} >"$to.new"
mv "$to.new" "$to"
echo "kernel_report: $(echo "$rows" | wc -l) kernels in $to"
