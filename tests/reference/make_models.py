"""Makes the tiny models of tests/goldens: tokenizer, random weights, a short training so that log-probs are uneven.

The folders are committed: run this only to make new ones (then `make_goldens.py`). Seeded, one thread; another
processor may still round differently. Usage: python make_models.py NAME ...
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
# A multiple of 8 and of no larger power of two: a tile of 16 or more columns ends ragged.
VOCABULARY = 392
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

COMMON = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
# Head size 16 is hidden / heads; SMALL's 64 is not, and is one that GPU kernels take.
BASE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SMALL = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# name -> configuration, how it is saved
VARIANTS = {
    "base": (BASE | {"rope_parameters": DEFAULT_ROPE}, {}),
    # A padding token that the pairs use: its row of the embedding gets no gradient as an input, only as an output.
    "tied": (SMALL | {"rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True, "pad_token_id": 2}, {}),
    "bias": (
        SMALL
        | {"rope_parameters": DEFAULT_ROPE, "attention_bias": True, "mlp_bias": True, "pad_token_id": None},
        {"max_shard_size": "48KB"},
    ),
    "rope_llama3": (SMALL | {"rope_parameters": LLAMA3_ROPE, "eos_token_id": [2, 0]}, {}),
    "rope_linear": (SMALL | {"rope_parameters": LINEAR_ROPE}, {"dtype": torch.float16}),
    # Biases on q, k and v alone; a tied head.
    "qwen2": (
        SMALL
        | {"model_type": "qwen2", "rope_parameters": DEFAULT_ROPE, "tie_word_embeddings": True, "max_window_layers": 2},
        {},
    ),
    "mistral": (SMALL | {"model_type": "mistral", "rope_parameters": DEFAULT_ROPE, "sliding_window": None}, {}),
}
OLD_KEYS = ("rope_llama3", "rope_linear")


def read_pairs():
    return [json.loads(line) for line in (GOLDENS / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tokenizer(pairs):
    texts = [message["content"] for pair in pairs for side in pair.values() for message in side]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + ["user", "assistant", "system"] * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    fast.chat_template = TEMPLATE
    assert len(fast) == VOCABULARY, len(fast)
    return fast


def make_weights(config):
    """Wide random weights: with transformers' 0.02, zero biases and unit norms most mistakes would go unseen."""
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.1)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1)
            else:
                weight.normal_(0.0, 0.1)
    return model


def train_briefly(model, rows, steps=120):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        row = torch.tensor([rows[step % len(rows)]])
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def old_keys(config):
    """The same configuration as transformers 4 wrote it: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    config = dict(config)
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    return dict(sorted(config.items()))


def main():
    torch.set_num_threads(1)
    pairs = read_pairs()
    tokenizer = make_tokenizer(pairs)
    rows = [
        tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], return_dict=False)[:256] for pair in pairs
    ]
    for seed, (name, (shape, saving)) in enumerate(VARIANTS.items()):
        if name not in sys.argv[1:]:
            continue
        torch.manual_seed(seed)
        saving = dict(saving)
        dtype = saving.pop("dtype", torch.bfloat16)
        keys = COMMON | shape
        model = make_weights(AutoConfig.for_model(keys.pop("model_type", "llama"), **keys))
        train_briefly(model, rows)
        folder = GOLDENS / name / "model"
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder, **saving)
        tokenizer.save_pretrained(folder)
        if name in OLD_KEYS:
            config = json.loads((folder / "config.json").read_text())
            old = old_keys(config)
            assert LlamaConfig.from_dict(copy.deepcopy(old)).rope_parameters == model.config.rope_parameters, old
            (folder / "config_old_keys.json").write_text(json.dumps(old, indent=2) + "\n")
        print(name, sum(weight.numel() for weight in model.parameters()), "parameters")


if __name__ == "__main__":
    main()
