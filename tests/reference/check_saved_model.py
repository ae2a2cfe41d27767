"""Loads a folder that mmpo-fast saved with transformers and compares log-probs.

Usage: python check_saved_model.py FOLDER SCORES.json [--tolerance 1e-3]

SCORES.json: {"sequences": [{"token_ids": [..], "logps": [..]}, ..]}, `logps` being ours of token_ids[1:], each given all
tokens before it, in nats; a null is not compared. Optional per sequence: "logits", ours at the last position, [V].

The weights are read as they are stored (bf16) and all arithmetic is f32. Exits with 1 and says why where a tensor is
missing or too much, a weight is not bf16, the tokenizer does not load, or a number differs by more than the tolerance,
relative to max(1, |theirs|). Packages: requirements.txt.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind, names in info.items():
        if names:
            sys.exit(f"{folder}: {kind}: {sorted(map(str, names))}")
    if model.config.architectures != [type(model).__name__]:
        sys.exit(f"{folder}: architectures is {model.config.architectures}")
    return model.eval()


def check_files(folder):
    config = json.loads((folder / "config.json").read_text())
    if config.get("dtype") != "bfloat16":
        sys.exit(f"{folder}: config.json says dtype {config.get('dtype')!r}")
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if file.metadata() != {"format": "pt"}:
                sys.exit(f"{path}: metadata {file.metadata()}")
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype != "BF16":
                    sys.exit(f"{path}: {name} is {dtype}")
    if (folder / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(folder)


def worst_error(ours, theirs):
    """Largest |ours - theirs| / max(1, |theirs|); NaN counts as infinite."""
    error = (ours - theirs).abs() / theirs.abs().clamp(min=1.0)
    return torch.nan_to_num(error, nan=float("inf")).max().item() if error.numel() else 0.0


def check_sequence(model, sequence):
    ids = torch.tensor([sequence["token_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    if len(sequence["logps"]) != ids.shape[1] - 1:
        sys.exit(f"{ids.shape[1]} tokens need {ids.shape[1] - 1} log-probs, not {len(sequence['logps'])}")
    theirs = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    given = torch.tensor([logp is not None for logp in sequence["logps"]], dtype=torch.bool)
    ours = torch.tensor([logp for logp in sequence["logps"] if logp is not None])
    error = worst_error(ours, theirs[given])
    if "logits" in sequence:
        error = max(error, worst_error(torch.tensor(sequence["logits"]), logits[-1]))
    return error, int(given.sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    arguments = parser.parse_args()
    check_files(arguments.folder)
    model = load(arguments.folder)
    sequences = json.loads(arguments.scores.read_text())["sequences"]
    compared = 0
    worst = 0.0
    for number, sequence in enumerate(sequences):
        error, tokens = check_sequence(model, sequence)
        if not error <= arguments.tolerance:
            sys.exit(f"sequence {number}: error {error:.3e} exceeds {arguments.tolerance:.0e}")
        worst = max(worst, error)
        compared += tokens
    if compared == 0:
        sys.exit(f"{arguments.scores}: nothing to compare")
    print(f"{compared} log-probs of {len(sequences)} sequences agree; largest relative error {worst:.3e}")


if __name__ == "__main__":
    main()
