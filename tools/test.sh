#!/usr/bin/env bash
# Everything that must hold, on a machine with Rust, a C++ compiler and python3: the Rust tests, which run every kernel on
# the emulated device, and beside them, in .venv (made on the first call), transformers loading a folder that `train` wrote, a
# real model beside transformers and TRL, and the scripts that a GPU machine runs, tried without one.
#
#     tools/test.sh            all of it
#     tools/test.sh --rust     the Rust tests alone
set -euo pipefail
cd "$(dirname "$0")/.."

stage() { printf '\n-- %s (%s s)\n' "$1" "$SECONDS"; }

stage "Rust tests: build"
cargo test --release --locked --no-run
if [ "${1:-}" = --rust ]; then
  stage "Rust tests"
  exec cargo test --release --locked
fi

# Many of the Rust tests, and most of Python's checks, leave a core idle: they run side by side. What the Rust tests say is
# shown when these checks are through, whatever became of those.
stage "Rust tests, beside what follows"
log=${CARGO_TARGET_DIR:-target}/rust-tests.log
cargo test --release --locked > "$log" 2>&1 &
rust=$!
show_rust_tests() {
  local checks=$? tests=0
  trap - EXIT
  # Still there where a check failed, or where the script is stopped.
  wait "$rust" || tests=$?
  stage "Rust tests"
  cat "$log"
  if [ "$checks" != 0 ]; then echo "a check before the Rust tests failed, see above" >&2; fi
  [ "$checks" = 0 ] && [ "$tests" = 0 ] || exit "$((checks != 0 ? checks : tests))"
}
trap show_rust_tests EXIT
trap 'kill "$rust" 2> /dev/null; exit 130' INT TERM

# PyTorch's threads shall not spin while they wait: the Rust tests need the core.
export OMP_WAIT_POLICY=passive
stage "Python environment"
bash tests/reference/setup.sh
stage "beside transformers and TRL"
bash tests/reference/check.sh
stage "a real model"
bash tests/reference/check_real_model.sh
show_rust_tests

# Alone, because these scripts have faults that are to be found within seconds.
stage "the scripts of a GPU machine"
bash tests/gpu_scripts/check.sh
# And because what packs the wheel takes the program away for a moment.
stage "the wheel"
bash tests/python/check.sh
stage "done"
