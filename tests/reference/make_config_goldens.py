"""Writes ../goldens/configs.json: log-probs that transformers gives to small models with the config.json keys of
published ones. Weights come from a formula that tests/training/published_configs.rs repeats, so that none is committed.

Packages: requirements.txt. Usage: python make_config_goldens.py
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# A key with the value ABSENT is taken out of BASE.
ABSENT = "(absent)"
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

# Name of the model or kind: keys, and optionally how the tensors are named ("names") and stored ("stored").
CASES = {
    "llama-1": {"max_position_embeddings": ABSENT, "num_key_value_heads": ABSENT, "rms_norm_eps": 1e-6, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "max_sequence_length": 2048, "transformers_version": "4.27.0.dev0"},
    "llama-2": {"pretraining_tp": 1, "rope_scaling": None, "pad_token_id": 0},
    "llama-2-70b": {"pretraining_tp": 2, "num_attention_heads": 4, "num_key_value_heads": 1},
    "llama-3": {"rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": [2, 128001], "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
    "llama-3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072, "torch_dtype": "bfloat16"},
    "llama-3.2": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 8, "tie_word_embeddings": True, "num_attention_heads": 4},
    "llama-3.1-whole-numbers": {"rope_theta": 500000, "rope_scaling": {**LLAMA3, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
    "vicuna-16k": {"_name_or_path": "vicuna-7b-v1.5-16k", "max_sequence_length": 16384, "pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "longchat": {"rope_scaling": {"type": "linear", "factor": 8}, "max_position_embeddings": 16384},
    "yi": {"rope_theta": 5000000.0, "num_attention_heads": 4, "num_key_value_heads": 1, "pad_token_id": 0},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rope_scaling": None},
    "deepseek-llm": {"aux_loss_alpha": 0.001, "num_experts_per_tok": None, "pretraining_tp": 1, "seq_aux": True, "moe_layer_freq": 1},
    "code-llama": {"rope_theta": 1000000, "pretraining_tp": 1, "vocab_size": 101},
    "smollm2": {"attention_bias": False, "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "transformers.js_config": {"dtype": "q4"}, "pad_token_id": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
    "open-llama": {"rms_norm_eps": 1e-06, "max_position_embeddings": 2048, "num_key_value_heads": None, "pad_token_id": 0},
    "wizard": {"torch_dtype": "float32", "tokenizer_class": "LlamaTokenizer", "max_length": 4096, "pad_token": "</s>"},
    "nous-capybara": {"_commit_hash": "0f1e2d3c", "auto_map": {"AutoConfig": "configuration_yi.YiConfig"}, "architectures": ["YiForCausalLM"]},
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1", "pad_token_id": 4, "torch_dtype": "bfloat16", "use_cache": False},
    "axolotl": {"use_cache": False, "gradient_checkpointing": True, "neftune_noise_alpha": 5, "model_max_length": 2048},
    "dynamic-ntk": {"rope_scaling": {"factor": 2.0, "type": "dynamic"}},
    "dynamic-alpha": {"rope_scaling": {"factor": 1.7, "type": "dynamic", "alpha": 1000.0}, "rope_theta": 10000},
    "yarn": {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}, "max_position_embeddings": 64},
    "yarn-mscale": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 20000.0, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 8, "beta_slow": 2, "truncate": False, **YARN}},
    "yarn-attention-factor": {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.3, **YARN}, "original_max_position_embeddings": 8},
    "longrope": {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0, 2.2, 2.5, 3.0, 4.0], "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}, "max_position_embeddings": 256},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 500000.0}},
    "rope-default-with-factor": {"rope_scaling": {"rope_type": "default", "factor": 1.0}},
    "rope-without-a-type": {"rope_scaling": {"factor": 3.0}, "rope_theta": 20000.0},
    "rope-default-partial": {"partial_rotary_factor": 0.5},
    "rope-parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}, "rope_theta": 7.0},
    "rope-both": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "rope-empty": {"rope_scaling": {}, "rope_theta": 500.0},
    "linear-below-one": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "llama3-bands-turned": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
    "swish": {"hidden_act": "swish"},
    "sliding-window": {"sliding_window": 8, "rope_theta": 10000.0},
    "layer-types": {"layer_types": ["full_attention", "full_attention"], "use_sliding_window": False},
    "sliding-layer-types": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "classifier": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "flash": {"log_scale": False, "use_flashattn": True, "_attn_implementation": "sdpa"},
    "eager": {"attn_implementation": "eager", "_flash_attn_2_enabled": False},
    "strange-multipliers": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "attention_multiplier": 2.0, "embedding_multiplier": 3.0},
    "token-ids": {"unk_token_id": 0, "mask_token_id": 5, "sep_token_id": 6, "cls_token_id": 7},
    "no-token-ids": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    "bos-beyond": {"bos_token_id": 128000},
    "dtype-auto": {"torch_dtype": ABSENT, "dtype": "float32"},
    "attention-dropout": {"attention_dropout": 0.1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim-null": {"head_dim": None},
    "head-of-12": {"head_dim": 12},
    "head-of-80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 2},
    "no-architectures": {"architectures": ABSENT},
    "odd-vocabulary": {"vocab_size": 97, "intermediate_size": 43},
    "causal": {"is_causal": True, "is_decoder": True, "add_cross_attention": False},
    "chunked": {"chunk_size_feed_forward": 4, "attention_chunk_size": 8},
    "bare-names": {"names": "bare"},
    "double-names": {"names": "double", "tie_word_embeddings": True},
    "tied-bare-names": {"names": "bare", "tie_word_embeddings": True},
    "tied-with-a-head": {"names": "with_head", "tie_word_embeddings": True},
    "tied-head-alone": {"names": "head_alone", "tie_word_embeddings": True},
    "float16": {"stored": "float16"},
    "bfloat16": {"stored": "bfloat16"},
    "mixed-dtypes": {"stored": "mixed"},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "rope_theta": 1000000.0, "head_dim": 12, "num_attention_heads": 4},
    "mistral-defaults": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096, "attention_bias": True, "num_attention_heads": 8, "num_key_value_heads": ABSENT},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen2-yarn": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "rope_scaling": {"type": "yarn", **YARN}},
    "qwen2-layer-types": {"model_type": "qwen2", "architectures": ["Qwen2Model"], "layer_types": ["full_attention", "full_attention"], "num_key_value_heads": None, "names": "bare"},
}

PROMPT = [(7 * i + 3) % 89 for i in range(20)]
CHOSEN = [(11 * i + 5) % 89 for i in range(24)]
REJECTED = [(5 * i * i + 2) % 89 for i in range(17)]


def weight(name, shape):
    """Bytes of a hash of name and index, as multiples of a power of two, exact in bfloat16."""
    salt = 2166136261
    for byte in name.encode():
        salt = ((salt ^ byte) * 16777619) % 2**32
    index = numpy.arange(int(numpy.prod(shape)), dtype=numpy.uint64)
    mixed = (index * numpy.uint64(2654435761) + numpy.uint64(salt)) % numpy.uint64(2**32)
    mixed = (mixed ^ (mixed >> numpy.uint64(15))) * numpy.uint64(2246822519) % numpy.uint64(2**32)
    mixed = mixed ^ (mixed >> numpy.uint64(13))
    signed = (mixed >> numpy.uint64(24)).astype(numpy.int64) - 128
    if "norm" in name:
        values = 1.0 + (signed >> 4) / 32.0
    else:
        values = signed / (64.0 if "embed" in name or "lm_head" in name else 256.0)
    return torch.tensor(values.astype(numpy.float32)).reshape(shape)


def stored_name(name, names):
    if names == "bare":
        return name.removeprefix("model.")
    if names == "double":
        return "model." + name
    if names == "head_alone" and name == "model.embed_tokens.weight":
        return "lm_head.weight"
    return name


def dtype_of(position, stored):
    order = [torch.float32, torch.float16, torch.bfloat16]
    return order[position % 3] if stored == "mixed" else getattr(torch, stored)


def write_folder(folder, config, names, stored):
    (folder / "config.json").write_text(json.dumps(config))
    shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    tensors = {}
    for position, (name, value) in enumerate(sorted(shapes.items())):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensors[stored_name(name, names)] = weight(name, value.shape).to(dtype_of(position, stored))
    if names == "with_head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def log_prob(model, response):
    ids = torch.tensor([PROMPT + response])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    rows = torch.arange(len(PROMPT) - 1, len(PROMPT) + len(response) - 1)
    return logp[rows, torch.tensor(response)].sum().item()


def main():
    goldens = []
    for name, keys in CASES.items():
        keys = copy.deepcopy(keys)
        names, stored = keys.pop("names", "plain"), keys.pop("stored", "float32")
        config = {key: value for key, value in {**BASE, **keys}.items() if value != ABSENT}
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), config, names, stored)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        golden = {"name": name, "config": config, "names": names, "stored": stored}
        golden["logp_chosen"], golden["logp_rejected"] = log_prob(model, CHOSEN), log_prob(model, REJECTED)
        goldens.append(golden)
    same = {round(golden["logp_chosen"], 3) for golden in goldens}
    assert len(same) > 20, "many cases should differ"
    lines = ",\n".join(json.dumps(golden) for golden in goldens)
    ids = {"prompt_ids": PROMPT, "chosen_ids": CHOSEN, "rejected_ids": REJECTED}
    path = Path(__file__).resolve().parent.parent / "goldens" / "configs.json"
    path.write_text(f'{{"ids": {json.dumps(ids)}, "models": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
