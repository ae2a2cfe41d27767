"""The objectives in PyTorch, for autograd: losses of a batch of pairs from per-token log-probs and entropies.

Every function takes `Scores` and returns the batch's loss, a scalar tensor. Nothing here is shared with the Rust code.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

REWARD_OFFSET = 1e-6


@dataclass
class Scores:
    """Per-token values of each pair's responses, lists of 1-D tensors; `reference`: sequence log-probs `[pairs, 2]`."""

    logp: list  # [pair][side]
    entropy: list  # [pair][side]
    reference: torch.Tensor

    def sums(self, values, length_normalize):
        rows = [[side.mean() if length_normalize else side.sum() for side in pair] for pair in values]
        return torch.stack([torch.stack(row) for row in rows])

    def lengths(self):
        return torch.tensor([[float(len(side)) for side in pair] for pair in self.logp])


def mmpo(
    scores,
    beta,
    epsilon=0.9,
    reward_group=None,
    reward_normalize=True,
    length_normalize=False,
    preference_weight=0.0,
    entropy_weight=0.0,
):
    """`reward_group=None`: all pairs of the batch are one normalisation group."""
    reference = scores.reference / scores.lengths() if length_normalize else scores.reference
    rewards = torch.tensor([epsilon, 1 - epsilon]) + beta * reference
    if reward_normalize:
        groups = rewards.split(reward_group or len(rewards))
        rewards = torch.cat([(g + REWARD_OFFSET - g.min()) / (g.max() - g.min() + REWARD_OFFSET) for g in groups])
    s = scores.sums(scores.logp, length_normalize) + rewards.detach()
    loss = -torch.logsumexp(s, dim=1).mean()
    if preference_weight:
        loss = loss - preference_weight * logsigmoid(s[:, 0] - s[:, 1]).mean()
    if entropy_weight:
        loss = loss - entropy_weight * entropy_bonus(scores, length_normalize).mean()
    return loss


def entropy_bonus(scores, length_normalize):
    """`J_ent = sum_t [P_t * stop(H_t) + H_t]` of each response; `P_t` sums the log-probs before token `t`."""
    bonuses = []
    for logps, entropies in zip(scores.logp, scores.entropy):
        for logp, entropy in zip(logps, entropies):
            before = logp.cumsum(0) - logp
            bonus = (before * entropy.detach() + entropy).sum()
            bonuses.append(bonus / len(logp) if length_normalize else bonus)
    return torch.stack(bonuses)


def dpo(scores, beta, label_smoothing=0.0):
    ratio = scores.sums(scores.logp, False) - scores.reference
    margin = beta * (ratio[:, 0] - ratio[:, 1])
    losses = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses.mean()


def simpo(scores, beta, gamma_beta_ratio):
    mean = scores.sums(scores.logp, True)
    return -logsigmoid(beta * (mean[:, 0] - mean[:, 1] - gamma_beta_ratio)).mean()


def sft(scores):
    chosen = [pair[0] for pair in scores.logp]
    return -torch.cat(chosen).mean()


def ipo(scores, beta):
    """Azar et al. 2023, equation 17, on log-ratios a token: what the authors computed, by TRL's account."""
    ratio = (scores.sums(scores.logp, False) - scores.reference) / scores.lengths()
    return ((ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)) ** 2).mean()


def orpo(scores, beta):
    """Hong et al. 2024, equations 3 to 7: the mean log-prob of a response is the logarithm of its probability."""
    log_p = scores.sums(scores.logp, True)
    log_odds = log_p - torch.log1p(-log_p.exp())
    odds_ratio = -logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    return (-log_p[:, 0] + beta * odds_ratio).mean()


def hinge(scores, beta):
    """Zhao et al. 2023, the calibration loss, on log-ratios to the reference (Liu et al. 2023)."""
    ratio = scores.sums(scores.logp, False) - scores.reference
    return torch.relu(1 - beta * (ratio[:, 0] - ratio[:, 1])).mean()


OBJECTIVES = {"mmpo": mmpo, "dpo": dpo, "simpo": simpo, "sft": sft, "ipo": ipo, "orpo": orpo, "hinge": hinge}
