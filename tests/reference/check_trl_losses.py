"""Holds tests/goldens/objectives.json against TRL's own loss functions: losses, and derivatives by each token's log-prob.

    python check_trl_losses.py

The goldens are what the Rust objectives are tested with. TRL's functions get the same log-probs, without a model, in f64.
Cases with options that TRL does not have are left out, and counted. Packages: requirements.txt.
"""

import contextlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch  # noqa: E402

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "objectives.json"
# The goldens are rounded to f32.
TOLERANCE = 1e-6


class Pairs:
    """A golden batch: log-probs of each response's tokens as leaves, padded to rows as TRL has them."""

    def __init__(self, batch):
        self.reference = torch.tensor(batch["reference"])
        # All chosen responses, then all rejected ones.
        sides = [[pair[side] for pair in batch["logp"]] for side in (0, 1)]
        self.responses = [torch.tensor(tokens, requires_grad=True) for side in sides for tokens in side]
        self.tokens = torch.tensor([float(len(response)) for response in self.responses])

    def rows(self):
        """Log-probs `[2 * pairs, longest]`, 0 where a row is over."""
        return torch.nn.utils.rnn.pad_sequence(self.responses, batch_first=True)

    def mask(self):
        """1 for each response token of rows that begin with one prompt token."""
        return torch.tensor([[0.0] + [1.0 * (at < tokens) for at in range(int(self.tokens.max()))] for tokens in self.tokens])

    def means(self):
        return (self.rows().sum(dim=1) / self.tokens).chunk(2)

    def derivatives(self, loss):
        """Those by the tokens, `[pair][side]`."""
        found = torch.autograd.grad(loss, self.responses)
        pairs = len(found) // 2
        return [[found[pair].tolist(), found[pairs + pair].tolist()] for pair in range(pairs)]


@contextlib.contextmanager
def keep_f64():
    """TRL narrows some log-probs to f32, in which 1 - e^x is 0 for the smallest of ours."""
    narrow, torch.Tensor.float = torch.Tensor.float, lambda tensor: tensor
    try:
        yield
    finally:
        torch.Tensor.float = narrow


def dpo_trainer(loss_type):
    """`DPOTrainer`'s loss of that type, from a model that returns the golden log-probs."""

    def loss(pairs, options):
        from trl import DPOTrainer

        rows, mask = pairs.rows(), pairs.mask()
        zeros = torch.zeros_like(rows)
        outputs = SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        same = lambda values: values  # noqa: E731
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
            ld_alpha=None,
            precompute_ref_logps=True,
            aux_loss_enabled=False,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            label_smoothing=0.0,
            use_weighting=False,
            beta=options["beta"],
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {
            "completion_mask": mask,
            "input_ids": mask.long(),
            "attention_mask": mask,
            "ref_chosen_logps": pairs.reference[:, 0],
            "ref_rejected_logps": pairs.reference[:, 1],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    return loss


def orpo_trainer(pairs, options):
    """TRL's odds ratio, and the paper's likelihood of the chosen response: TRL adds that of the prompt to it."""
    from trl.experimental.orpo import ORPOTrainer

    means = pairs.means()
    trainer = SimpleNamespace(beta=options["beta"], accelerator=SimpleNamespace(device="cpu"))
    with keep_f64():
        losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[0], means[1])
    return -(means[0] + losses).mean()


def simpo_trainer(pairs, options):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        label_smoothing=0.0,
        beta=options["beta"],
        simpo_gamma=options["gamma_beta_ratio"] * options["beta"],
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, *pairs.means())
    return losses.mean()


TRL = {
    "dpo": dpo_trainer("sigmoid"),
    "ipo": dpo_trainer("ipo"),
    "orpo": orpo_trainer,
    "hinge": dpo_trainer("hinge"),
    "simpo": simpo_trainer,
}


def difference(ours, theirs):
    """Relative, of lists relative to their largest. A list of one number stands for all tokens."""
    if isinstance(ours, list):
        ours = ours * len(theirs) if len(ours) == 1 else ours
        scale = max(*map(abs, theirs), 1e-9) if len(theirs) > 1 else max(abs(theirs[0]), 1e-9)
        return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / scale
    return abs(ours - theirs) / max(abs(theirs), 1e-9)


def main():
    torch.set_default_dtype(torch.float64)
    golden = json.loads(GOLDENS.read_text())
    worst, left_out = defaultdict(float), 0
    for case in golden["cases"]:
        name, options = case["objective"], case["options"]
        if name not in TRL or "label_smoothing" in options:
            left_out += 1
            continue
        pairs = Pairs(golden["batches"][case["batch"]])
        loss = TRL[name](pairs, options)
        found = [difference(case["loss"], loss.item())]
        for ours, theirs in zip(case["logp"], pairs.derivatives(loss), strict=True):
            found += [difference(*sides) for sides in zip(ours, theirs, strict=True)]
        if not max(found) <= TOLERANCE:
            sys.exit(f"{name} {options}, {case['batch']}: the golden differs from TRL's by {max(found):.1e}")
        worst[name] = max(worst[name], *found)
    found = ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
    print(f"losses and derivatives are TRL's; largest relative differences: {found}; {left_out} cases are not TRL's")


if __name__ == "__main__":
    main()
