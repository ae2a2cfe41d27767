#!/usr/bin/env bash
# Tries the scripts that a GPU machine runs, without one. Needs .venv (tests/reference/setup.sh) and a build with the emulated device.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked --quiet --bin mmpo-fast --example random_model
programs=${CARGO_TARGET_DIR:-target}/release
kernels=$(cargo test --release --locked --no-run --test kernels --message-format=json 2> /dev/null |
  sed -n 's/.*"executable":"\([^"]*\/kernels-[^"]*\)".*/\1/p' | tail -n 1)
.venv/bin/python -W ignore tests/gpu_scripts/dry_run.py "$programs/mmpo-fast" "$kernels" "$programs/examples/random_model"
