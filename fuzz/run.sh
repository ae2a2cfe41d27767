#!/usr/bin/env bash
# Coverage-guided fuzzing of one format or of all: `fuzz/run.sh FOLDER [FORMAT ...]`. What it takes from the environment:
# RUNS, executions of each format (10000); LOG, the folder of the logs (FOLDER/logs).
#
# The flags, in instrument.sh, are those of `cargo fuzz run --sanitizer none`: they need no nightly compiler, since the
# sanitizers that do are left out (the program's own code has no unsafe blocks outside src/device).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
shift
export MMPO_FAST_CUDA=off MMPO_FAST_EMULATED=off
export RUSTC_WRAPPER=$PWD/fuzz/instrument.sh
cargo build --manifest-path fuzz/Cargo.toml
target=${CARGO_TARGET_DIR:-fuzz/target}
program=$(realpath "$target/debug/format")
unset RUSTC_WRAPPER
if [ ! -d "$folder/place" ]; then
  cargo test --test fuzz -- --prepare "$folder"
fi
logs=$(realpath -m "${LOG:-$folder/logs}")
mkdir -p "$logs"
formats=("$@")
[ ${#formats[@]} -gt 0 ] || mapfile -t formats < <(ls "$folder/corpus")
for format in "${formats[@]}"; do
  # Each format has a place of its own, since inputs replace files in it.
  work=$(mktemp -d "$folder/work-$format-XXXX")
  cp -r "$folder/place/." "$work"
  mkdir -p "$work/artifacts"
  status=0
  MMPO_FAST_FUZZ_FORMAT=$format MMPO_FAST_FUZZ_FOLDER=$work HF_HUB_CACHE=$work/hub RAYON_NUM_THREADS=1 RUST_LOG=off \
    "$program" "$folder/corpus/$format" -runs="${RUNS:-10000}" -timeout=20 -rss_limit_mb=2048 -max_len=65536 \
    -artifact_prefix="$work/artifacts/" -print_final_stats=1 > "$logs/$format.log" 2>&1 || status=$?
  executed=$(sed -n 's/^stat::number_of_executed_units: *//p' "$logs/$format.log")
  echo "$format: ${executed:-no} executions, exit code $status, log $logs/$format.log"
done
