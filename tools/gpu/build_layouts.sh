#!/usr/bin/env bash
# Builds the emulated device's own cases for a real GPU: one stripped program that needs the driver and nothing else, and says of
# each fragment layout, tensor copy, barrier and instruction whether the hardware does what the emulated device does.
#
#     tools/gpu/build_layouts.sh PROGRAM      nvcc: NVCC, CUDA_HOME, .toolchain/ (tools/setup_cuda.sh), or PATH
set -euo pipefail
program=$(realpath -m "${1:?usage: build_layouts.sh PROGRAM}")
cd "$(dirname "$0")/../.."

# Planted faults and counters mean something on the emulated device alone.
cases="layouts tensors collectives instructions programs multicast registry"

find_nvcc() {
  local candidate
  for candidate in "${NVCC:-}" "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" "${CUDA_PATH:+$CUDA_PATH/bin/nvcc}" \
    .toolchain/nvidia/cu13/bin/nvcc "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
    # nvcc reads nvcc.profile beside the path it is called by: a symlink from elsewhere does not work.
    if [ -x "$candidate" ]; then realpath "$candidate"; return; fi
  done
  echo "build_layouts.sh: no nvcc; run tools/setup_cuda.sh, or set NVCC" >&2
  return 1
}

nvcc=$(find_nvcc)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
pids=()
for name in $cases; do
  "$nvcc" -std=c++17 -O2 -Ikernels -Itests/emulator -gencode arch=compute_90a,code=sm_90a -Xcompiler -Wall,-Wextra \
    -c "tests/emulator/$name.cu" -o "$objects/$name.o" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
mkdir -p "$(dirname "$program")"
root=$(dirname "$(dirname "$nvcc")")
"$nvcc" -std=c++17 -O2 -Xcompiler -Wall,-Wextra,-static-libstdc++,-static-libgcc -cudart static -L"$root/lib64" -L"$root/lib" \
  tests/emulator/gpu_main.cpp "$objects"/*.o -o "$program"
strip "$program"
