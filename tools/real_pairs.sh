#!/usr/bin/env bash
# Fetches 300 real preference pairs, for tests and benchmarks: dpo_en_demo.json of LLaMA-Factory (Apache-2.0), from the source
# archive of its PyPI package (5 MB).
#
#     tools/real_pairs.sh [FILE]       default: target/real/dpo_en_demo.json; prints the file's path
#
# A file with the right checksum is left alone. Exit code 3: the archive cannot be had.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
file=${1:-"$root/target/real/dpo_en_demo.json"}
release=0.9.5
checksum=b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3
is_right() { [ -f "$1" ] && echo "$checksum  $1" | sha256sum --check --status; }

if ! is_right "$file"; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # pip asks a source archive for its metadata, and for that builds in an environment of its own, which takes a while.
  python="$root/.venv/bin/python"
  [ -x "$python" ] || python=python3
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llamafactory --dest "$work" \
    "llamafactory==$release" >&2 || {
    echo "real_pairs.sh: llamafactory $release cannot be had from PyPI: the pairs are not here" >&2
    exit 3
  }
  tar -xzf "$work/llamafactory-$release.tar.gz" -C "$work" "llamafactory-$release/data/dpo_en_demo.json"
  pairs="$work/llamafactory-$release/data/dpo_en_demo.json"
  is_right "$pairs" || {
    echo "real_pairs.sh: dpo_en_demo.json of llamafactory $release is not the file that the records were made with" >&2
    exit 1
  }
  mkdir -p "$(dirname "$file")"
  # Renamed from the same folder, so that the file is there whole or not at all.
  mv "$pairs" "$file.partial"
  mv "$file.partial" "$file"
fi
echo "$file"
