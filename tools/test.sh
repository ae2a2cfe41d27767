#!/usr/bin/env bash
# Everything that must hold, on a machine with Rust, a C++ compiler and python3: the Rust tests, which run every kernel on
# the emulated device, then, in .venv (made on the first call), transformers loading a folder that `train` wrote, and a real model
# beside transformers and TRL.
#
#     tools/test.sh            all of it
#     tools/test.sh --rust     the Rust tests alone
set -euo pipefail
cd "$(dirname "$0")/.."

cargo test --release --locked
[ "${1:-}" = --rust ] && exit 0
bash tests/reference/setup.sh
bash tests/reference/check.sh
bash tests/reference/check_real_model.sh
