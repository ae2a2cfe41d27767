#!/usr/bin/env bash
# Trains a few steps on two golden models, scores the folders that came out, and lets transformers load them: it must
# find every tensor and come to the log-probs and logits that we came to. Then token ids beside TRL's. Needs .venv
# (setup.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MMPO_FAST_CACHE="$work/cache" HF_HUB_DISABLE_PROGRESS_BARS=1

cargo build --release --locked --quiet --bin mmpo-fast --example token_scores --example token_ids
program=${CARGO_TARGET_DIR:-target}/release

# An untied single file, and a tied model with a head size of its own.
for model in base tied; do
  "$program/mmpo-fast" --quiet train --model "tests/goldens/$model/model" --data tests/goldens/pairs.jsonl \
    --output "$work/$model" --max-length 160 --max-prompt-length 64 --pairs-per-step 4 --epochs 2 --learning-rate 1e-3 \
    --device cpu >"$work/$model.log"
  "$program/examples/token_scores" "$work/$model/model" tests/goldens/pairs.jsonl >"$work/$model.json"
  printf '%-6s' "$model"
  .venv/bin/python tests/reference/check_saved_model.py "$work/$model/model" "$work/$model.json"
done

# The benchmark's peers, on the smallest shapes.
.venv/bin/python -W ignore tests/reference/check_peers.py "$program/mmpo-fast"

# Token ids over real tokenizers and chat templates, which are fetched on the first call, against TRL's.
.venv/bin/python -W ignore tests/reference/check_tokens.py "$program/examples/token_ids"
