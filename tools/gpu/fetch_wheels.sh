#!/usr/bin/env bash
# Fetches the Python packages that peers need and a bare GPU machine may lack into tools/gpu/wheels, from where the bundle takes
# them: Liger kernels (1 MB). bitsandbytes (43 MB) only with MMPO_FAST_BUNDLE_BITSANDBYTES: it does not fit beside candle.
set -euo pipefail
cd "$(dirname "$0")"
packages=(liger-kernel==0.8.5 ${MMPO_FAST_BUNDLE_BITSANDBYTES:+bitsandbytes})
for package in "${packages[@]}"; do
  name=${package%%=*}
  # A wheel's file name has underscores.
  compgen -G "wheels/${name//-/_}-*.whl" > /dev/null && continue
  # Python and platform of the GPU machine, whatever runs here; their own needs (PyTorch, Triton) are there.
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 --dest wheels "$package"
done
