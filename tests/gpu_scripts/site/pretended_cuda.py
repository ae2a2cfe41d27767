"""Lets the peers' scripts go their way on a GPU without one: tensors live on the CPU, events read the clock, and kernels that exist
for GPUs alone are replaced by what they compute."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.attention as attention
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Device(str):
    """PyTorch reads the text, `cpu`; the scripts compare it with `cuda`."""

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    __hash__ = str.__hash__


def flex_attention(query, key, value, block_mask=None, enable_gqa=False, scale=None, return_lse=False, **_):
    mask = flex.create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa, scale=scale)
    return (out, out.detach().float().sum(-1)) if return_lse else out


@contextmanager
def sdpa_kernel(*_):
    yield


def nothing(*_):
    return None


for name in ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats"):
    setattr(torch.cuda, name, nothing)
torch.cuda.Event = Event
torch.cuda.get_device_name = lambda *_: "pretended"
torch.cuda.memory_allocated = lambda *_: 0
torch.cuda.max_memory_allocated = lambda *_: 1 << 30
torch.compile = lambda function=None, **_: function
attention.sdpa_kernel = sdpa_kernel
flex.flex_attention = flex_attention

script = next(word for word in sys.orig_argv if "/peers/" in word)
sys.path.insert(0, str(Path(script).parent))
import common

arguments_of = common.arguments_of


def pretended_arguments_of(*arguments):
    found = arguments_of(*arguments)
    found.device = Device("cpu")
    return found


common.arguments_of = pretended_arguments_of
