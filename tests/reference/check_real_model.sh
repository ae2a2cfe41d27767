#!/usr/bin/env bash
# Holds mmpo-fast against transformers and TRL on a real model, where that can be had: greedy text, log-probs, two steps of
# DPO and of SFT. Makes the model first (tools/real_model.sh, about a minute, once). Needs .venv (setup.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MMPO_FAST_CACHE="$work/cache" HF_HOME="$work/huggingface" OMP_NUM_THREADS=2

code=0
model=$(bash tools/real_model.sh) || code=$?
if [ "$code" = 3 ]; then
  echo "SKIPPED: no real model here (its Python packages cannot be had): nothing was held against TRL" >&2
  exit 0
fi
[ "$code" = 0 ] || exit "$code"
cargo build --release --locked --quiet --bin mmpo-fast
.venv/bin/python -W ignore tests/reference/check_real_model.py "${CARGO_TARGET_DIR:-target}/release/mmpo-fast" "$model" "$work"
