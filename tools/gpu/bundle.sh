#!/usr/bin/env bash
# Builds target/gpu-bundle: everything that a bare GPU machine needs (driver and python3; no Rust, no network) to check the
# kernels on hardware and to time them beside their peers. README.md says how it is used. Needs nvcc (tools/setup_cuda.sh); no GPU.
#
#     tools/gpu/bundle.sh
#
# MMPO_FAST_BUNDLE_CANDLE=1 builds candle for CUDA too: half an hour on two cores the first time, and it needs CUDA_PATH at a toolkit
# whose lib64 holds the libraries' stubs. MMPO_FAST_BUNDLE_PROGRAMS=FOLDER packs ready programs instead of building any, and
# MMPO_FAST_BUNDLE=FOLDER puts the bundle elsewhere: for the test of these scripts.
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=${MMPO_FAST_BUNDLE:-target/gpu-bundle}
rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/peers"

build() {
  export MMPO_FAST_CUDA=require
  tools/gpu/fetch_wheels.sh || echo "bundle.sh: without Liger: its wheel could not be fetched" >&2
  cargo build --release --locked --bin mmpo-fast --example random_model
  cargo test --release --locked --no-run --test kernels --test cuda_training --test nccl \
    --message-format=json > target/gpu-tests.json
  python3 - "$bundle/bin" <<'PYTHON'
import json, shutil, sys

for line in open("target/gpu-tests.json"):
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] == ["test"]:
        shutil.copy(message["executable"], f"{sys.argv[1]}/{message['target']['name']}")
PYTHON
  tools/gpu/build_layouts.sh "$bundle/bin/layouts"
  cp target/release/mmpo-fast target/release/examples/random_model "$bundle/bin/"
  if [ -n "${MMPO_FAST_BUNDLE_CANDLE:-}" ]; then
    CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} cargo build --release --locked --package candle-peer --features cuda
    cp target/release/candle-peer "$bundle/bin/"
  fi
  strip "$bundle"/bin/*
  if compgen -G "tools/gpu/wheels/*.whl" > /dev/null; then
    mkdir "$bundle/wheels"
    cp tools/gpu/wheels/*.whl "$bundle/wheels/"
  fi
}

if [ -n "${MMPO_FAST_BUNDLE_PROGRAMS:-}" ]; then
  cp -r "$MMPO_FAST_BUNDLE_PROGRAMS"/. "$bundle/bin/"
else
  build
fi
# Fat binaries of kernels compress to a third.
tar -C "$bundle" -czf "$bundle/bin.tar.gz" bin
rm -r "$bundle/bin"
cp -r tests/goldens "$bundle/goldens"
cp examples/demo/pairs.jsonl examples/demo/eval_pairs.jsonl "$bundle/"
cp -r tools/gpu/smollm2-135m "$bundle/model"
cp examples/demo/model/tokenizer.json examples/demo/model/tokenizer_config.json examples/demo/model/chat_template.jinja "$bundle/model/"
cp benches/peers/*.py benches/shapes.json "$bundle/peers/"
rm "$bundle/peers/run_cpu.py" "$bundle/peers/generate.py"
cp tools/gpu/run.sh tools/gpu/*.py benches/summary.py benches/scaling.py benches/predictions.json "$bundle/"
git rev-parse HEAD > "$bundle/commit"
size=$(du -sm "$bundle" | cut -f1)
printf '%s: %s MiB\n' "$bundle" "$size"
[ "$size" -le 55 ] || { echo "bundle.sh: 55 MiB is what a bundle may have" >&2; exit 1; }
