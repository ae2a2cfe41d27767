"""LoRA adapters beside PEFT's: log-probs, a training step and merged weights, in both directions.

    python check_adapters.py PROGRAM

On three golden models (untied; tied; with biases and shards), with adapters of one form and with rank_pattern and alpha_pattern:
- an adapter that `mmpo-fast train` made is loaded by PEFT, which must come to the log-probs of `mmpo-fast score --adapter`;
- an adapter that PEFT made, of several forms, is scored by `mmpo-fast`, which must come to PEFT's log-probs;
- that adapter after a step is loaded by PEFT again, with the log-probs of `mmpo-fast`;
- one step of DPO from that adapter, in which the reference is the model with its adapter off, must give the matrices that
  PyTorch's autograd and AdamW give;
- `mmpo-fast merge` must write what `merge_and_unload` leaves, but for the rounding to bf16.

All arithmetic is f32 on the CPU. Packages: requirements.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
# Relative to a response's log-prob, and to a step's largest change of a matrix.
TOLERANCE, STEP_TOLERANCE = 2e-5, 2e-4
# Half a unit in the last place of bf16, and a little for the f32 sum before it.
BF16 = 2.0**-8 * 1.01
LENGTHS = ["--max-length", 160, "--max-prompt-length", 64]
BETA, RATE, EPSILON = 0.1, 0.05, 1e-2

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A golden model, what our `train` is told, and the form of PEFT's adapter.
CASES = [
    ("base", ["--lora", "all", "--lora-rank", 8], dict(r=4, lora_alpha=8, target_modules=ALL)),
    ("tied", ["--lora", "q,v,down", "--lora-rank", 3, "--lora-alpha", 5, "--lora-rslora", "--lora-dropout", 0.1],
             dict(r=6, lora_alpha=3, target_modules=["k_proj", "o_proj", "up_proj"], use_rslora=True)),
    ("bias", ["--lora", "all", "--lora-rank", 16, "--lora-dropout", 0.05],
             dict(r=8, lora_alpha=16, target_modules="all-linear")),
    # Ranks and scales by patterns: a suffix, an expression, the first of several that match, and one that matches nothing.
    ("base", ["--lora", "q,up"],
             dict(r=4, lora_alpha=8, target_modules=ALL,
                  rank_pattern={"q_proj": 2, r"layers\.1\..*(down|up)_proj": 7, "self_attn.q_proj": 9, "proj": 5},
                  alpha_pattern={r"^model\.layers\.0\.mlp.*": 3, "v_proj": 12, "(?!o)._proj": 6.5})),
    ("bias", ["--lora", "k,down"],
             dict(r=6, lora_alpha=3, target_modules=["k_proj", "v_proj", "down_proj"], use_rslora=True,
                  rank_pattern={"model.layers.0.self_attn.k_proj": 1}, alpha_pattern={"down_proj": 4})),
]


def run(program, *words):
    done = subprocess.run([program, "--quiet", *map(str, words)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stderr}")


def base_model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_prob(model, prompt, response):
    logits = model(torch.tensor([prompt + response])).logits[0, :-1].double()
    targets = torch.tensor((prompt + response)[1:])
    return logits.log_softmax(-1).gather(-1, targets[:, None])[len(prompt) - 1 :, 0].sum()


def pair_log_probs(model, pair):
    return [log_prob(model, pair["prompt_ids"], pair[f"{side}_ids"]) for side in ("chosen", "rejected")]


def compare_scores(what, program, folder, adapter, model, pairs, work):
    """Our scores of the adapted model beside those of PEFT's `model`; returns the records that we score."""
    run(program, "score", "--model", folder, "--adapter", adapter, "--data", GOLDENS / "pairs.jsonl",
        "--output", work / "scores.jsonl", "--device", "cpu", *LENGTHS)
    lines = [json.loads(line) for line in (work / "scores.jsonl").read_text().splitlines()]
    worst = 0.0
    with torch.no_grad():
        for line in lines:
            theirs = pair_log_probs(model, pairs[line["record"] - 1])
            for side, logp in zip(("chosen", "rejected"), theirs):
                error = abs(line[f"logp_{side}"] - logp.item()) / max(1.0, abs(logp.item()))
                if not error <= TOLERANCE:
                    sys.exit(f"{what}, record {line['record']}, {side}: {line[f'logp_{side}']}, PEFT's {logp.item()}")
                worst = max(worst, error)
    return [line["record"] - 1 for line in lines], worst


def compare_merged(what, program, folder, adapter, model, work):
    """Our merged folder beside PEFT's merged `model`, tensor by tensor."""
    run(program, "merge", "--model", folder, "--adapter", adapter, "--output", work / "merged")
    theirs = model.merge_and_unload().state_dict()
    ours = {}
    for file in sorted((work / "merged").glob("*.safetensors")):
        ours |= load_file(file)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if ours.keys() != theirs.keys() - tied:
        sys.exit(f"{what}: merged tensors {sorted(ours.keys() ^ theirs.keys())} are in one folder only")
    for name, tensor in ours.items():
        error = (tensor.float() - theirs[name]).abs() - BF16 * theirs[name].abs()
        if not bool((error <= 1e-9).all()):
            sys.exit(f"{what}: merged {name} is off by up to {error.max().item()} more than a rounding")


def compare_step(what, program, folder, adapter, model, pairs, work):
    """One step of DPO from the adapter, ours beside PyTorch's."""
    records = len(pairs)
    run(program, "train", "--model", folder, "--adapter", adapter, "--data", GOLDENS / "pairs.jsonl", "--output",
        work / "run", "--objective", "dpo", "--beta", BETA, "--max-steps", 1, "--pairs-per-step", records,
        "--learning-rate", RATE, "--warmup-steps", 0, "--schedule", "constant", "--max-grad-norm", 0, "--adam-epsilon", EPSILON,
        "--weight-decay", 0.1, "--device", "cpu", *LENGTHS)
    before = {name: tensor.clone() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.1)
    for pair in pairs:
        with torch.no_grad(), model.disable_adapter():
            reference = pair_log_probs(model, pair)
        chosen, rejected = pair_log_probs(model, pair)
        margin = BETA * ((chosen - reference[0]) - (rejected - reference[1]))
        (-torch.nn.functional.logsigmoid(margin) / records).backward()
    optimizer.step()
    ours = load_file(work / "run" / "adapter" / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    if ours.keys() != before.keys():
        sys.exit(f"{what}: the trained adapter's tensors differ from those that it began with")
    worst = 0.0
    for name, tensor in ours.items():
        theirs = parameters[name.replace(".weight", ".default.weight")].detach()
        change = (theirs - before[name]).abs().max()
        error = ((tensor - theirs).abs().max() / change).item()
        if not error <= STEP_TOLERANCE or change == 0:
            sys.exit(f"{what}: after a step {name} is off by {error:.1e} of its largest change {change:.1e}")
        worst = max(worst, error)
    return worst


def peft_adapter(folder, form, target):
    """Saves an adapter that PEFT made, both of its matrices random."""
    torch.manual_seed(5)
    model = get_peft_model(base_model(folder), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **form))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.3)
    model.save_pretrained(target)


def check(program, name, options, form, work):
    folder = GOLDENS / name / "model"
    pairs = json.loads((GOLDENS / name / "golden.json").read_text())["pairs"]
    run(program, "train", "--model", folder, "--data", GOLDENS / "pairs.jsonl", "--output", work / "ours", "--max-steps", 4,
        "--pairs-per-step", 4, "--learning-rate", 1e-2, "--device", "cpu", *LENGTHS, *options)
    ours = work / "ours" / "adapter"
    model = PeftModel.from_pretrained(base_model(folder), ours).eval()
    records, first = compare_scores(f"{name}, trained here", program, folder, ours, model, pairs, work)
    compare_merged(f"{name}, trained here", program, folder, ours, model, work)

    theirs = work / "theirs"
    peft_adapter(folder, form, theirs)
    model = PeftModel.from_pretrained(base_model(folder), theirs, is_trainable=True).eval()
    _, second = compare_scores(f"{name}, PEFT's", program, folder, theirs, model, pairs, work)
    step = compare_step(f"{name}, PEFT's", program, folder, theirs, model, [pairs[record] for record in records], work)
    # What our step made of it, back in PEFT.
    continued = work / "run" / "adapter"
    model = PeftModel.from_pretrained(base_model(folder), continued).eval()
    _, third = compare_scores(f"{name}, PEFT's after a step here", program, folder, continued, model, pairs, work)
    model = PeftModel.from_pretrained(base_model(folder), theirs).eval()
    compare_merged(f"{name}, PEFT's", program, folder, theirs, model, work)
    return max(first, second, third), step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: str(Path(path).resolve()))
    program = parser.parse_args().program
    scores, steps = 0.0, 0.0
    for name, options, form in CASES:
        with tempfile.TemporaryDirectory() as work:
            score, step = check(program, name, options, form, Path(work))
        scores, steps = max(scores, score), max(steps, step)
    print(f"{len(CASES)} forms of adapters agree with PEFT's both ways: log-probs within {scores:.1e}, a step within {steps:.1e} "
          "of its changes, merged weights within a rounding")


if __name__ == "__main__":
    main()
