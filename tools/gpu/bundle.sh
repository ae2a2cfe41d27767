#!/usr/bin/env bash
# Builds target/gpu-bundle: everything that a bare GPU machine needs (driver and python3; no Rust, no network) to check the
# kernels on hardware and to time a training run. Needs nvcc (tools/setup_cuda.sh); no GPU.
#
#     tools/gpu/bundle.sh                     here
#     target/gpu-bundle/run.sh RESULTS        there
set -euo pipefail
cd "$(dirname "$0")/../.."
export MMPO_FAST_CUDA=require
bundle=target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/smollm2-135m"

cargo build --release --locked --bin mmpo-fast --example random_model
cargo test --release --locked --no-run --test kernels --test cuda_training --bench memory_bound \
  --message-format=json > target/gpu-tests.json
python3 - "$bundle/bin" <<'PYTHON'
import json, shutil, sys

for line in open("target/gpu-tests.json"):
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"] in (["test"], ["bench"]):
        shutil.copy(message["executable"], f"{sys.argv[1]}/{message['target']['name']}")
PYTHON
tools/gpu/build_layouts.sh "$bundle/bin/layouts"
cp target/release/mmpo-fast target/release/examples/random_model "$bundle/bin/"
strip "$bundle"/bin/*
# Fat binaries of kernels compress to a third.
tar -C "$bundle" -czf "$bundle/bin.tar.gz" bin
rm -r "$bundle/bin"
cp -r tests/goldens "$bundle/goldens"
cp examples/demo/pairs.jsonl examples/demo/eval_pairs.jsonl "$bundle/"
cp examples/demo/model/tokenizer.json examples/demo/model/tokenizer_config.json examples/demo/model/chat_template.jinja \
  tools/gpu/smollm2-135m/config.json "$bundle/smollm2-135m/"
cp tools/gpu/run.sh "$bundle/"
git rev-parse HEAD > "$bundle/commit"
du -sm "$bundle" | cut -f1 | xargs printf '%s: %s MiB\n' "$bundle"
