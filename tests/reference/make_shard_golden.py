"""Writes ../goldens/shards.json: how transformers cuts the tests' small model into shards of at most 1000 bytes.

Packages: requirements.txt. Usage: python make_shard_golden.py
"""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import LlamaConfig, LlamaForCausalLM

# The same model as in ../checkpoint/small_model.rs.
CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def main():
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    split = split_torch_state_dict_into_shards(
        model.state_dict(), filename_pattern="model{suffix}.safetensors", max_shard_size=1000
    )
    golden = {
        "shards": len(split.filename_to_tensors),
        "metadata": split.metadata,
        "weight_map": split.tensor_to_filename,
    }
    path = Path(__file__).resolve().parent.parent / "goldens" / "shards.json"
    path.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
