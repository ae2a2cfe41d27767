"""Makes tests/goldens/objectives.json: the losses of objectives.py, and their derivatives by each token's log-prob and entropy.

    python make_objective_goldens.py

Log-probs and entropies are made up, for there are cases that no small model comes to: nearly certain and nearly impossible
responses, single tokens, pairs of equal responses. PyTorch's autograd differentiates the losses, all in f64.
"""

import random

import numpy as np
import torch

from make_goldens import GOLDENS, dump, number, numbers
from objectives import OBJECTIVES, Scores

# Tokens of the chosen and the rejected response of each pair.
LENGTHS = ((3, 5), (1, 1), (7, 2), (1, 12), (9, 9))
# Name of a batch -> the largest and the smallest log-prob of a token, in nats.
BATCHES = {"plausible": (0.0, -3.0), "certain": (-1e-6, -2e-5), "impossible": (-9e3, -1.1e4), "equal": (0.0, -3.0)}
# (objective, options)
CASES = (
    ("mmpo", {"beta": 0.05}),
    ("mmpo", {"beta": 0.05, "length_normalize": True, "reward_group": 2}),
    ("mmpo", {"beta": 0.05, "reward_normalize": False, "preference_weight": 0.4}),
    ("mmpo", {"beta": 0.05, "length_normalize": True, "entropy_weight": 0.05}),
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 0.1, "label_smoothing": 0.1}),
    ("simpo", {"beta": 2.0, "gamma_beta_ratio": 1.6}),
    ("sft", {}),
    ("ipo", {"beta": 0.1}),
    ("orpo", {"beta": 0.1}),
    ("hinge", {"beta": 0.2}),
)


def in_f32(value):
    """The number that f32 holds, with all its digits: `numbers` gives the shortest ones, which f64 reads as another."""
    return float(np.float32(value))


def made_up(random_source, low, high, count):
    return [in_f32(random_source.uniform(low, high)) for _ in range(count)]


def batch(name):
    """Log-probs and entropies `[pair][side][token]`, and the reference's log-prob sums `[pair][side]`."""
    source = random.Random(name)
    high, low = BATCHES[name]
    logp = [[made_up(source, low, high, tokens) for tokens in pair] for pair in LENGTHS]
    entropy = [[made_up(source, 0.01, 4.0, tokens) for tokens in pair] for pair in LENGTHS]
    if name == "equal":
        logp = [[chosen, chosen] for chosen, _ in logp]
        entropy = [[chosen, chosen] for chosen, _ in entropy]
    # The policy has moved by a few nats from the reference; of equal responses both think the same.
    reference = [[sum(side) + source.uniform(-4, 4) for side in pair] for pair in logp]
    if name == "equal":
        reference = [[chosen, chosen] for chosen, _ in reference]
    return {"logp": logp, "entropy": entropy, "reference": [[in_f32(side) for side in pair] for pair in reference]}


def leaves(values):
    return [[torch.tensor(side, requires_grad=True) for side in pair] for pair in values]


def derivatives(loss, values):
    """Of each token of each response; one number where all tokens of a response have the same."""
    flat = [side for pair in values for side in pair]
    found = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    found = [numbers(torch.zeros_like(leaf) if grad is None else grad) for leaf, grad in zip(flat, found)]
    found = [grad[:1] if len(set(grad)) == 1 else grad for grad in found]
    return [found[at : at + 2] for at in range(0, len(found), 2)]


def case(batches, name, objective, options):
    values = batches[name]
    logp, entropy = leaves(values["logp"]), leaves(values["entropy"])
    loss = OBJECTIVES[objective](Scores(logp, entropy, torch.tensor(values["reference"])), **options)
    return {
        "batch": name,
        "objective": objective,
        "options": options,
        "loss": number(loss.detach()),
        "logp": derivatives(loss, logp),
        "entropy_slope": derivatives(loss, entropy),
    }


def main():
    torch.set_default_dtype(torch.float64)
    batches = {name: batch(name) for name in BATCHES}
    cases = [case(batches, name, *settings) for settings in CASES for name in BATCHES]
    path = GOLDENS / "objectives.json"
    path.write_text(dump({"batches": batches, "cases": cases}) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(cases)} cases")


if __name__ == "__main__":
    main()
