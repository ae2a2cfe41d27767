"""What bitsandbytes' optimiser computes, so that its peer's script can run without it."""

from types import SimpleNamespace

import torch

optim = SimpleNamespace(AdamW8bit=torch.optim.AdamW)
