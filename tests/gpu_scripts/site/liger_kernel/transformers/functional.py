"""What Liger's function computes, so that its peer's script can run without it."""

import torch.nn.functional as F


def liger_fused_linear_cross_entropy(hidden, weight, targets, reduction, chunk_mem_const=None):
    loss = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction=reduction)
    # Two losses or one, as its versions differ.
    return loss if chunk_mem_const is None else (loss, None)
