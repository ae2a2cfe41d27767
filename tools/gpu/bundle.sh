#!/usr/bin/env bash
# Builds target/gpu-bundle: everything that a bare GPU machine needs (driver and python3; no Rust, no network) to check the
# kernels on hardware and to time them beside their peers. Needs nvcc (tools/setup_cuda.sh); no GPU.
#
#     tools/gpu/bundle.sh                     here
#     target/gpu-bundle/run.sh RESULTS        there
#
# MMPO_FAST_BUNDLE_CANDLE=1 builds candle for CUDA too: half an hour on two cores the first time, and it needs CUDA_PATH at a toolkit
# whose lib64 holds the libraries' stubs. Wheels in tools/gpu/wheels/ go along: `pip download --no-deps -d tools/gpu/wheels liger-kernel`
# (and bitsandbytes, 43 MB, where the bundle has room).
set -euo pipefail
cd "$(dirname "$0")/../.."
export MMPO_FAST_CUDA=require
bundle=target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/smollm2-135m"

cargo build --release --locked --bin mmpo-fast --example random_model
cargo test --release --locked --no-run --test kernels --test cuda_training \
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
# Fat binaries of kernels compress to a third.
tar -C "$bundle" -czf "$bundle/bin.tar.gz" bin
rm -r "$bundle/bin"
cp -r tests/goldens "$bundle/goldens"
cp examples/demo/pairs.jsonl examples/demo/eval_pairs.jsonl "$bundle/"
cp examples/demo/model/tokenizer.json examples/demo/model/tokenizer_config.json examples/demo/model/chat_template.jinja \
  tools/gpu/smollm2-135m/config.json "$bundle/smollm2-135m/"
mkdir "$bundle/peers"
cp benches/peers/*.py benches/shapes.json "$bundle/peers/"
rm "$bundle/peers/run_cpu.py"
if compgen -G "tools/gpu/wheels/*.whl" > /dev/null; then
  mkdir "$bundle/wheels"
  cp tools/gpu/wheels/*.whl "$bundle/wheels/"
fi
cp tools/gpu/run.sh benches/summary.py "$bundle/"
git rev-parse HEAD > "$bundle/commit"
size=$(du -sm "$bundle" | cut -f1)
printf '%s: %s MiB\n' "$bundle" "$size"
[ "$size" -le 55 ] || { echo "bundle.sh: 55 MiB is what a bundle may have" >&2; exit 1; }
