"""Makes tests/goldens/*/golden.json with transformers and autograd, or checks this script against another's golden.

    python make_goldens.py [NAME ...]           remakes the goldens of the committed models, or of these
    python make_goldens.py --check FOLDER       compares with FOLDER/golden.json; the model is FOLDER/model, the pairs
                                                are FOLDER/pairs.jsonl or the file of that name beside FOLDER

The way is the plain one, on purpose: every response is its own padded row with its own copy of the prompt, the whole
logits tensor, log_softmax, autograd. Weights are read as stored, all arithmetic is f32, one thread.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives import OBJECTIVES, Scores

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
BETA = 0.05
ADAMW = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
# Three steps at this rate take the policy well away from the reference.
THREE_STEPS_LR = 1e-3

# name -> (objective, options)
ALL = {
    "mmpo": ("mmpo", {"beta": BETA}),
    "mmpo_length": ("mmpo", {"beta": BETA, "length_normalize": True}),
    "mmpo_group2": ("mmpo", {"beta": BETA, "length_normalize": True, "reward_group": 2}),
    "mmpo_raw": ("mmpo", {"beta": BETA, "length_normalize": True, "reward_normalize": False}),
    "mmpo_preference": ("mmpo", {"beta": BETA, "length_normalize": True, "preference_weight": 1.0}),
    "mmpo_entropy": ("mmpo", {"beta": BETA, "entropy_weight": BETA}),
    "mmpo_entropy_length": ("mmpo", {"beta": BETA, "length_normalize": True, "entropy_weight": BETA}),
    "dpo": ("dpo", {"beta": BETA}),
    "dpo_smoothing": ("dpo", {"beta": BETA, "label_smoothing": 0.1}),
    "simpo": ("simpo", {"beta": BETA, "gamma_beta_ratio": 1.6}),
    "sft": ("sft", {}),
    "ipo": ("ipo", {"beta": 0.1}),
    "orpo": ("orpo", {"beta": 0.1}),
    "hinge": ("hinge", {"beta": BETA}),
}
# The variants differ from the base model below the objective, so a few objectives tell all there is to tell.
FEW = {name: ALL[name] for name in ("mmpo_length", "mmpo_entropy_length", "dpo", "sft")}
THREE_STEPS = ("mmpo", "mmpo_length", "mmpo_entropy_length", "dpo", "simpo", "ipo", "orpo", "hinge")
PROMPTS = ("What is the capital of France?", "Name three colours.")
LIMITS = {"max_length": 160, "max_prompt_length": 64}
ROPE_POSITIONS = (0, 1, 2, 17, 100, 511)


def number(value):
    """The shortest decimal that reads back as the same f32."""
    return float(str(np.float32(float(value))))


def numbers(values):
    return [number(value) for value in values]


def tokenise_pair(tokenizer, pair, max_length, max_prompt_length):
    """Prompt and responses are templated together but tokenised apart; the prompt is cut from the left."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    ids = {"prompt_ids": tokenizer(prompt, add_special_tokens=False).input_ids[-max_prompt_length:]}
    for side in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        assert whole.startswith(prompt), (prompt, whole)
        response = tokenizer(whole[len(prompt) :], add_special_tokens=False).input_ids
        ids[f"{side}_ids"] = response[: max_length - len(ids["prompt_ids"])]
    return ids


def score(model, pairs):
    """Per-token log-probs and entropies, each `[pair][side]`, and the logits `[2 * pairs, T, V]`."""
    rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs for side in ("chosen", "rejected")]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_softmax = logits.log_softmax(dim=-1)
    logp, entropy = [], []
    for index, row in enumerate(rows):
        prompt = len(pairs[index // 2]["prompt_ids"])
        scored = log_softmax[index, prompt - 1 : len(row) - 1]
        targets = torch.tensor(row[prompt:])
        logp.append(scored.gather(1, targets[:, None])[:, 0])
        entropy.append(-(scored.exp() * scored).sum(dim=1))
    return list(zip(*[iter(logp)] * 2)), list(zip(*[iter(entropy)] * 2)), logits


@torch.no_grad()
def sequence_logps(model, pairs):
    logp, _, _ = score(model, pairs)
    return torch.tensor([[side.sum() for side in pair] for pair in logp])


def adamw(model, lr):
    settings = ADAMW | {"lr": lr, "betas": tuple(ADAMW["betas"])}
    return torch.optim.AdamW(model.parameters(), **settings)


def loss_of(model, pairs, reference, objective, options):
    logp, entropy, _ = score(model, pairs)
    scores = Scores(logp, entropy, reference)
    return OBJECTIVES[objective](scores, **options), scores


def objective_record(model, pairs, reference, objective, options):
    """Loss, derivatives, gradient norms and one AdamW step of a copy of `model`."""
    model = copy.deepcopy(model)
    loss, scores = loss_of(model, pairs, reference, objective, options)
    leaves = [side for pair in scores.logp for side in pair]
    entropies = [side for pair in scores.entropy for side in pair]
    # A token's derivative; without an entropy term it is the same for all tokens of a response but for length
    # normalisation, and then the first one is dL/d(sequence log-prob).
    a = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    a = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, a)]
    record = {"options": {"objective": objective} | options, "loss": number(loss.detach())}
    if options.get("entropy_weight"):
        b = torch.autograd.grad(loss, entropies, retain_graph=True)
        record["token_coefficients"] = [
            {"logp_chosen": numbers(a[2 * i]), "logp_rejected": numbers(a[2 * i + 1])}
            | {"entropy_chosen": number(b[2 * i][0]), "entropy_rejected": number(b[2 * i + 1][0])}
            for i in range(2)
        ]
    else:
        record["dloss_dlogp_chosen"] = numbers(grad[0] for grad in a[0::2])
        record["dloss_dlogp_rejected"] = numbers(grad[0] for grad in a[1::2])
    loss.backward()
    norms = {name: weight.grad.norm() for name, weight in model.named_parameters()}
    record["grad_norm"] = number(math.sqrt(sum(float(norm) ** 2 for norm in norms.values())))
    record["grad_norms"] = {name: number(norm) for name, norm in norms.items()}
    record["adamw"] = ADAMW | {"clip": None}
    adamw(model, ADAMW["lr"]).step()
    record["logps_after_one_step"] = [numbers(row) for row in sequence_logps(model, pairs)]
    return record


def three_steps_record(model, pairs, reference, objective, options):
    model = copy.deepcopy(model)
    optimizer = adamw(model, THREE_STEPS_LR)
    record = {"lr": THREE_STEPS_LR, "losses": [], "grad_norms": [], "logps": []}
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = loss_of(model, pairs, reference, objective, options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        record["losses"].append(number(loss.detach()))
        record["grad_norms"].append(number(norm))
        record["logps"].append([numbers(row) for row in sequence_logps(model, pairs)])
    return record


def rope_record(model):
    """cos and sin `[positions, head_dim / 2]`: the second half of each row repeats the first."""
    positions = torch.tensor([ROPE_POSITIONS])
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return {
        "inverse_frequencies": numbers(model.model.rotary_emb.inv_freq),
        "positions": list(ROPE_POSITIONS),
        "cos": [numbers(row) for row in cos[0, :, :half]],
        "sin": [numbers(row) for row in sin[0, :, :half]],
    }


@torch.no_grad()
def logits_record(model, pairs):
    """All logits at a few positions of the first pair's prompt and chosen response."""
    _, _, logits = score(model, pairs[:1])
    prompt, chosen = len(pairs[0]["prompt_ids"]), len(pairs[0]["chosen_ids"])
    positions = (0, prompt - 1, prompt + chosen - 1)
    return [{"position": position, "values": numbers(logits[0, position])} for position in positions]


@torch.no_grad()
def generation_record(model, tokenizer, text):
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[0, ids.shape[1] :]
    gaps = [float((top := logits[0].topk(2).values)[0] - top[1]) for logits in out.logits]
    return {
        "prompt": text,
        "prompt_ids": ids[0].tolist(),
        "new_ids": new.tolist(),
        "new_text": tokenizer.decode(new, skip_special_tokens=True),
        # How far the best logit was ahead of the second best, at the closest call.
        "smallest_gap": number(min(gaps)),
    }


def make_golden(folder, raw_pairs, max_length, max_prompt_length, objectives, three_steps):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    pairs = [tokenise_pair(tokenizer, pair, max_length, max_prompt_length) for pair in raw_pairs]
    with torch.no_grad():
        logp, entropy, _ = score(model, pairs)
    reference = torch.tensor([[side.sum() for side in pair] for pair in logp])
    for pair, logps, entropies in zip(pairs, logp, entropy):
        pair["logp_chosen"], pair["logp_rejected"] = numbers(side.sum() for side in logps)
        pair["entropy_chosen"], pair["entropy_rejected"] = numbers(side.sum() for side in entropies)
    golden = {
        "beta": BETA,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "normalisation_group": "all pairs listed, unless the options say reward_group",
        "pairs": pairs,
        "objectives": {
            name: objective_record(model, pairs, reference, *objectives[name]) for name in objectives
        },
        "three_steps": {
            name: three_steps_record(model, pairs, reference, *objectives[name]) for name in three_steps
        },
        "rope": rope_record(model),
        "logits": logits_record(model, pairs),
        "generate": [generation_record(model, tokenizer, text) for text in PROMPTS],
    }
    return golden


def differences(theirs, ours, path=""):
    """Yields `(path, relative difference)` of each leaf of `theirs` that `ours` has too; infinite if not comparable."""
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            if key in ours:
                yield from differences(value, ours[key], f"{path}/{key}")
    elif isinstance(theirs, list):
        if theirs and all(isinstance(value, float) for value in theirs):
            # Relative to the list's largest: weights that underflow to 1e-38 beside others near 1 are rounding.
            scale = max(max(map(abs, theirs)), 1e-30)
            yield path, max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) / scale
        else:
            for index, (value, own) in enumerate(zip(theirs, ours, strict=True)):
                yield from differences(value, own, f"{path}/{index}")
    elif isinstance(theirs, float):
        yield path, abs(theirs - ours) / max(abs(theirs), 1e-30)
    elif path.rsplit("/", 1)[-1] not in ("variant", "normalisation_group"):
        yield path, 0.0 if theirs == ours else math.inf


def check(folder, tolerance=1e-4):
    golden = json.loads((folder / "golden.json").read_text())
    assert golden["beta"] == BETA, golden["beta"]
    candidates = folder / "pairs.jsonl", folder.parent / "pairs.jsonl"
    with next(path for path in candidates if path.exists()).open(encoding="utf-8") as lines:
        raw_pairs = [json.loads(line) for line, _ in zip(lines, golden["pairs"])]
    objectives = {name: ALL[name] for name in golden["objectives"]}
    limits = golden["max_length"], golden["max_prompt_length"]
    ours = make_golden(folder / "model", raw_pairs, *limits, objectives, golden.get("three_steps", ()))
    found = list(differences(golden, ours))
    worst = max(found, key=lambda row: row[1])
    print(f"{len(found)} values compared, largest relative difference {worst[1]:.2e} at {worst[0]}")
    return worst[1] <= tolerance


def dump(value, indent=""):
    """JSON with one line for a list that holds no objects, so that diffs stay readable and the file small."""
    inner = indent + " "
    if isinstance(value, dict):
        rows = [f"{inner}{json.dumps(key)}: {dump(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + dump(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        sys.exit(0 if check(arguments.check) else 1)
    raw_pairs = [json.loads(line) for line in (GOLDENS / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for folder in sorted(path.parent for path in GOLDENS.glob("*/model")):
        if arguments.names and folder.name not in arguments.names:
            continue
        base = folder.name == "base"
        objectives, three_steps = (ALL, THREE_STEPS) if base else (FEW, ("mmpo_length",))
        golden = make_golden(folder / "model", raw_pairs, *LIMITS.values(), objectives, three_steps)
        (folder / "golden.json").write_text(dump(golden) + "\n", encoding="utf-8")
        print(folder.name, [row["new_text"] for row in golden["generate"]])


if __name__ == "__main__":
    main()
