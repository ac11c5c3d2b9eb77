#!/bin/sh
# Jane Austen's six novels as tokens in data/austen/tokens: Debian's r-cran-janeaustenr is fetched
# and unpacked, not installed; BPE of 4096 pieces; Persuasion is held out. What is there stays.
# usage: sh scripts/fetch_austen.sh MOEMAMBA
set -eu
cd "$(dirname "$0")/.."
moemamba=$1
corpus=data/austen
tokens=$corpus/tokens
novels=$corpus/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

if [ -f "$tokens/summary.json" ]; then
  echo "$tokens is there"
  exit 0
fi

fetch() { (cd "$corpus" && apt-get download --quiet=2 r-cran-janeaustenr 2>download.log); }
if [ ! -f "$novels" ]; then
  rm -rf "$corpus"
  mkdir -p "$corpus"
  if ! fetch; then  # no package lists, or old ones
    root=
    [ "$(id -u)" -eq 0 ] || root=sudo
    $root apt-get update --quiet=2 || true
    fetch || { cat "$corpus/download.log" >&2; exit 1; }
  fi
  dpkg-deb -x "$corpus"/r-cran-janeaustenr_*.deb "$corpus"
fi
echo "$novels, $(wc -c <"$novels") bytes"

"$moemamba" prepare --output "$tokens" --tokenizer bpe --vocabulary 4096 \
  --hold-out Persuasion "$novels"
