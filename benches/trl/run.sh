#!/usr/bin/env bash
# mmpo-fast beside TRL: model, program, all runs in turn, results.
#
#     bash benches/trl/run.sh [RESULTS] [options of compare.py]
#
# RESULTS is benches/results/<date>-cpu-trl by default. Takes about 22 minutes on two idle cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
results="benches/results/$(date +%F)-cpu-trl"
case "${1:--}" in -*) ;; *) results=$1; shift ;; esac

tools/real_model.sh
cargo build --release --locked --bin mmpo-fast
python3 benches/trl/compare.py "$results" "$@"
