#!/usr/bin/env bash
# Coverage-guided fuzzing of one format or of all: `fuzz/run.sh FOLDER [FORMAT ...]`. What it takes from the environment:
#   RUNS     executions of each format (10000)
#   ROUND    executions of one process (100000): another one follows, so that what a library keeps for each input adds up
#            to no fault
#   SECONDS_EACH  ends a format after this time, however many executions it had (no limit)
#   LOG      the folder of the logs (FOLDER/logs)
#   PROGRAM  a program that is built already, instead of building one
# FOLDER is best on a disk in memory, for files are written in each execution.
#
# The flags, in instrument.sh, are those of `cargo fuzz run --sanitizer none`: they need no nightly compiler, since the
# sanitizers that do are left out (the program's own code has no unsafe blocks outside src/device).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "$1")
shift
export MMPO_FAST_CUDA=off MMPO_FAST_EMULATED=off
program=${PROGRAM:-}
if [ -z "$program" ]; then
  RUSTC_WRAPPER=$PWD/fuzz/instrument.sh cargo build --manifest-path fuzz/Cargo.toml
  target=${CARGO_TARGET_DIR:-fuzz/target}
  program=$(realpath "$target/debug/format")
fi
if [ ! -d "$folder/place" ]; then
  cargo test --test fuzz -- --prepare "$folder"
fi
logs=$(realpath -m "${LOG:-$folder/logs}")
mkdir -p "$logs"
formats=("$@")
[ ${#formats[@]} -gt 0 ] || mapfile -t formats < <(ls "$folder/corpus")
summary=$logs/summary.csv
[ -f "$summary" ] || echo "format,executions,seconds,inputs,coverage,features,slowest_s,peak_mb,finds" > "$summary"

for format in "${formats[@]}"; do
  # Each format has a place of its own, since inputs replace files in it.
  work=$(mktemp -d "$folder/work-$format-XXXX")
  cp -r "$folder/place/." "$work"
  mkdir -p "$work/artifacts"
  log=$logs/$format.log
  wanted=${RUNS:-10000} executed=0 peak=0 slowest=0 started=$(date +%s) status=0 last=
  : > "$log"
  while [ "$executed" -lt "$wanted" ] && [ "$status" -eq 0 ]; do
    passed=$(($(date +%s) - started))
    limit=0
    if [ -n "${SECONDS_EACH:-}" ]; then
      limit=$((SECONDS_EACH - passed))
      [ "$limit" -gt 0 ] || break
    fi
    left=$((wanted - executed))
    round=$((left < ${ROUND:-100000} ? left : ${ROUND:-100000}))
    MMPO_FAST_FUZZ_FORMAT=$format MMPO_FAST_FUZZ_FOLDER=$work HF_HUB_CACHE=$work/hub RAYON_NUM_THREADS=1 RUST_LOG=off \
      "$program" "$folder/corpus/$format" -runs="$round" -max_total_time="$limit" -timeout=20 -rss_limit_mb=2048 \
      -max_len="${MAX_LEN:-16384}" -artifact_prefix="$work/artifacts/" -print_final_stats=1 > "$work/round.log" 2>&1 || status=$?
    stat() { sed -n "s/^stat::$1: *//p" "$work/round.log" | tail -1; }
    last=$(grep -E '^#[0-9]+' "$work/round.log" | tail -1) || true
    number=$(stat number_of_executed_units)
    # A process that ends at a find prints no statistics.
    [ -n "$number" ] || number=$(sed -E 's/^#([0-9]+).*/\1/' <<< "${last:-#0}")
    executed=$((executed + number))
    round_peak=$(stat peak_rss_mb) round_slowest=$(stat slowest_unit_time_sec)
    peak=$((${round_peak:-0} > peak ? ${round_peak:-0} : peak))
    slowest=$((${round_slowest:-0} > slowest ? ${round_slowest:-0} : slowest))
    cat "$work/round.log" >> "$log"
  done
  finds=$(find "$work/artifacts" -type f | wc -l)
  coverage=$(sed -nE 's/.* cov: ([0-9]+) .*/\1/p' <<< "$last")
  features=$(sed -nE 's/.* ft: ([0-9]+) .*/\1/p' <<< "$last")
  inputs=$(find "$folder/corpus/$format" -type f | wc -l)
  seconds=$(($(date +%s) - started))
  echo "$format,$executed,$seconds,$inputs,$coverage,$features,$slowest,$peak,$finds" >> "$summary"
  echo "$format: $executed executions in $seconds s, $finds finds, exit code $status, log $log"
done
