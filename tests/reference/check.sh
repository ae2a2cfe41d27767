#!/usr/bin/env bash
# Trains a few steps on two golden models, scores the folders that came out, and lets transformers load them: it must
# find every tensor and come to the log-probs and logits that we came to. Then token ids and losses beside TRL's, and the
# event files beside TensorBoard. Needs .venv
# (setup.sh).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MMPO_FAST_CACHE="$work/cache" HF_HUB_DISABLE_PROGRESS_BARS=1

cargo build --release --locked --quiet --bin mmpo-fast --example token_scores --example token_ids \
  --example token_pieces \
  --example render_templates
program=${CARGO_TARGET_DIR:-target}/release

# An untied single file, a tied model with a head size of its own, and another family.
for model in base tied qwen2; do
  "$program/mmpo-fast" --quiet train --model "tests/goldens/$model/model" --data tests/goldens/pairs.jsonl \
    --output "$work/$model" --max-length 160 --max-prompt-length 64 --pairs-per-step 4 --epochs 2 --learning-rate 1e-3 \
    --device cpu >"$work/$model.log"
  "$program/examples/token_scores" "$work/$model/model" tests/goldens/pairs.jsonl >"$work/$model.json"
  printf '%-6s' "$model"
  .venv/bin/python tests/reference/check_saved_model.py "$work/$model/model" "$work/$model.json"
done

# A model trained with a template that ends its turns otherwise: transformers must find that template and that end.
template=$work/other.jinja
cat >"$template" <<'JINJA'
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
JINJA
"$program/mmpo-fast" --quiet train --model examples/demo/model --data examples/demo/pairs.jsonl --output "$work/demo" \
  --chat-template "$template" --max-steps 2 --device cpu >"$work/demo.log"
.venv/bin/python tests/reference/check_saved_template.py "$work/demo/model" "$template" "$program/examples/render_templates" \
  --base examples/demo/model --end '<|endoftext|>'
# And one trained with its own.
.venv/bin/python tests/reference/check_saved_template.py "$work/base/model" tests/goldens/base/model/chat_template.jinja \
  "$program/examples/render_templates" --base tests/goldens/base/model

tests/reference/check_templates.sh "$program/examples/render_templates"

# The benchmark's peers, on the smallest shapes.
.venv/bin/python -W ignore tests/reference/check_peers.py "$program/mmpo-fast"

# Token ids over real tokenizers and chat templates, which are fetched on the first call, against TRL's.
.venv/bin/python -W ignore tests/reference/check_tokens.py "$program/examples/token_ids"
# Log-probs with Llama 2's tokenizer, against transformers'.
.venv/bin/python -W ignore tests/reference/check_scores.py "$program/mmpo-fast"

# Event files, read by TensorBoard.
.venv/bin/python -W ignore tests/reference/check_tensorboard.py "$program/mmpo-fast"

# Adapters, against PEFT: log-probs, a training step and merged weights, both ways.
.venv/bin/python -W ignore tests/reference/check_adapters.py "$program/mmpo-fast"

# Two ranks that torchrun starts, and starts again where one is killed.
tests/reference/check_torchrun.sh "$program/mmpo-fast"

# The losses and derivatives that the objectives are tested with, against TRL's own loss functions.
.venv/bin/python -W ignore tests/reference/check_trl_losses.py
