#!/bin/sh
# RUSTC_WRAPPER of run.sh: this program's own crate and the target count coverage, its dependencies do not. They are built
# as for `cargo test` then, and the guidance comes from the code that is under test. INSTRUMENT=all counts everywhere.
rustc=$1
shift
case "${INSTRUMENT:-own} $*" in
all*|*"--crate-name mmpo_fast "*|*"--crate-name format "*)
  exec "$rustc" "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares ;;
*) exec "$rustc" "$@" ;;
esac
