"""Writes ../goldens/rope.json: rotary tables of several configs as transformers' Llama computes them on the CPU.

Packages: requirements.txt. Usage: python make_rope_goldens.py
"""

import copy
import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

POSITIONS = [0, 1, 2, 17, 2311, 8191]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Old keys and new ones, as they stand in published config.json files.
CASES = {
    "default": {"rope_theta": 10000.0},
    "smollm2": {"rope_theta": 100000, "rope_scaling": None},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-3.2-1b": {
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama-3.1-8b": {
        "head_dim": 128,
        "rope_parameters": {
            **LLAMA3,
            "rope_theta": 500000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.3}, "max_position_embeddings": 16384},
    "yarn": {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
    },
    "yarn-mscale": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 32,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_fast": 24,
            "beta_slow": 2,
            "truncate": False,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn-attention-factor": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "attention_factor": 1.25},
        "original_max_position_embeddings": 2048,
    },
    "longrope": {
        "head_dim": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.05, 1.1, 1.3, 1.7, 2.2, 2.9, 3.5],
            "long_factor": [1.0, 1.2, 2.0, 4.0, 8.0, 16.0, 20.0, 32.0],
            "original_max_position_embeddings": 16384,
        },
    },
    "proportional": {
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25, "factor": 8.0}
    },
    "head-of-80": {"head_dim": 80, "rope_theta": 10000},
}


def main():
    goldens = []
    for name, keys in CASES.items():
        config = {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            **copy.deepcopy(keys),
        }
        embedding = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config)))
        cos, sin = embedding(torch.zeros(1), torch.tensor([POSITIONS]))
        half = config["head_dim"] // 2
        table = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
        goldens.append(
            {
                "name": name,
                "config": config,
                "positions": POSITIONS,
                "inverse_frequencies": embedding.inv_freq.tolist(),
                "table": table.tolist(),
            }
        )
    path = Path(__file__).resolve().parent.parent / "goldens" / "rope.json"
    # Nine digits give every f32 back exactly.
    text = json.dumps(json.loads(json.dumps(goldens), parse_float=lambda digits: float(f"{float(digits):.9g}")))
    path.write_text(text.replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
