#!/usr/bin/env bash
# The recorded run of MMPO, DPO, SimPO and SFT on the real SmolLM2-135M-Instruct: model, pairs, program, training, results.
#
#     bash benches/smollm2/run.sh [RESULTS] [options of record.py]
#
# RESULTS is benches/results/<date>-cpu-smollm2 by default. Takes about 25 minutes on two idle cores. Pictures of the MMPO run's report need
# chromium (Debian: apt-get install chromium); without it they are left out, and said so.
set -euo pipefail
cd "$(dirname "$0")/../.."
results="benches/results/$(date +%F)-cpu-smollm2"
case "${1:--}" in -*) ;; *) results=$1; shift ;; esac

tools/real_model.sh
tools/real_pairs.sh
cargo build --release --locked --bin mmpo-fast
python3 benches/smollm2/record.py "$results" "$@" >/dev/null
bash benches/smollm2/picture.sh target/smollm2/mmpo/report.html "$results/report-mmpo.png"
python3 benches/smollm2/record.py "$results" --report
