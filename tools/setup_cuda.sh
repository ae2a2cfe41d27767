#!/bin/sh
# Puts nvcc 13.0, its libraries, cuobjdump and libclang (for tools/bindings) into .toolchain/: about 300 MB, no root.
# build.rs finds it there. CUDA 13.0 matches drivers 580 and later.
set -eu
cd "$(dirname "$0")/.."

# All packages in ONE pip command: a second `pip install --target` would replace the shared nvidia/ folder.
rm -rf .toolchain.new
python3 -m pip install --quiet --no-deps --no-compile --disable-pip-version-check --no-warn-script-location \
    --target .toolchain.new \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-crt==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51 libclang==18.1.1

# The finished folder appears at once, so that an interrupted installation is never taken for a whole one.
rm -rf .toolchain
mv .toolchain.new .toolchain
# Cargo does not watch a folder that was not there.
touch build.rs
.toolchain/nvidia/cu13/bin/nvcc --version | tail -n 2
