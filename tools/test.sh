#!/usr/bin/env bash
# Everything that must hold, on a machine with Rust, a C++ compiler and python3: the Rust tests, which run every kernel on
# the emulated device, then, in .venv (made on the first call), transformers loading a folder that `train` wrote, a real model
# beside transformers and TRL, and the scripts that a GPU machine runs, tried without one.
#
#     tools/test.sh            all of it
#     tools/test.sh --rust     the Rust tests alone
set -euo pipefail
cd "$(dirname "$0")/.."

stage() { printf '\n-- %s (%s s)\n' "$1" "$SECONDS"; }

stage "Rust tests: build"
cargo test --release --locked --no-run
stage "Rust tests"
cargo test --release --locked
[ "${1:-}" = --rust ] && exit 0
stage "Python environment"
bash tests/reference/setup.sh
stage "beside transformers and TRL"
bash tests/reference/check.sh
stage "a real model"
bash tests/reference/check_real_model.sh
stage "the wheel"
bash tests/python/check.sh
stage "the scripts of a GPU machine"
bash tests/gpu_scripts/check.sh
stage "done"
