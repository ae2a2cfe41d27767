#!/usr/bin/env bash
# clang-format over the kernels, the PTX machine and the stand-in for NCCL, pinned, from PyPI: `tools/format_kernels.sh` rewrites, `--check` only compares.
# Not over tests/emulator: a planted fault is found by the line of its comment.
set -euo pipefail
cd "$(dirname "$0")/.."
version=20.1.8
tool=.toolchain-format/$version

if [ ! -x "$tool/bin/clang-format" ]; then
  python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location --target "$tool" "clang-format==$version"
fi
files=$(git ls-files 'kernels/*.cu' 'kernels/*.cuh' 'kernels/*.cpp' 'kernels/*.h' 'kernels/*/*.cuh' 'kernels/*/*.cpp' 'kernels/*/*.h' \
  'tests/ptx_machine/*.cpp' 'tests/ptx_machine/*.h' 'tests/nccl/*.cpp' 'tests/nccl/*.h')
files=$(printf '%s\n' $files | grep -E '\.(cu|cuh|cpp|h)$' | sort -u)
case "${1:-}" in
  --check) PYTHONPATH=$tool "$tool/bin/clang-format" --dry-run -Werror $files ;;
  *) PYTHONPATH=$tool "$tool/bin/clang-format" -i $files ;;
esac
