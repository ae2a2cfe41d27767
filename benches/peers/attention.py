"""Attention in PyTorch, to be compared with `mmpo-fast bench kernels --only attention`.

Variants:
    sdpa flash, sdpa cudnn, sdpa    scaled_dot_product_attention by that backend (on a CPU: PyTorch's own choice), causal, on the
                                    pairs unpacked: chosen and rejected rows with the prompt in each, padded to the longer one;
                                    on plain sequences as they are
    flex                            FlexAttention on the packed pairs, the shared-prefix mask as a block mask, compiled
On plain sequences (profile P/0/0) it stays out. All count the operations that the packed pairs need, so a rate says how fast the same pairs are done.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import common

BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


class Inputs:
    """Query, key and value heads of the packed pairs, `[heads, T, E]`, and the gradient of the output."""

    def __init__(self, shape, arguments):
        options = {"device": arguments.device, "dtype": common.dtype_of(arguments)}
        self.shape = shape
        self.q = common.normal(1, shape.heads, shape.tokens, shape.head_size, **options)
        self.k = common.normal(2, shape.kv_heads, shape.tokens, shape.head_size, **options)
        self.v = common.normal(3, shape.kv_heads, shape.tokens, shape.head_size, **options)
        self.dout = common.normal(4, shape.heads, shape.tokens, shape.head_size, **options)

    @property
    def checked_rows(self):
        """Rows that see no later ones."""
        return min(self.shape.pair_tokens, 1024) if self.shape.plain else self.shape.pair_tokens

    def rows_of(self, packed):
        """`[2 * pairs, heads, longest, E]`: the pairs unpacked, chosen rows first, zeros behind the shorter ones."""
        shape = self.shape
        pairs = packed.view(packed.shape[0], shape.pairs, shape.pair_tokens, shape.head_size).transpose(0, 1)
        if shape.plain:
            return pairs.contiguous()
        prompt, chosen, rejected = pairs.split([shape.prompt, shape.chosen, shape.rejected], dim=2)
        longest = shape.prompt + max(shape.chosen, shape.rejected)
        rows = [torch.cat([prompt, response], dim=2) for response in (chosen, rejected)]
        return torch.cat([F.pad(row, (0, 0, 0, longest - row.shape[2])) for row in rows]).contiguous()

    def packed_of(self, rows):
        """The other way round; the prompt's rows are the same in both."""
        shape = self.shape
        if shape.plain:
            pairs = rows
        else:
            chosen, rejected = rows.split(shape.pairs)
            rejected = rejected[:, :, shape.prompt : shape.prompt + shape.rejected]
            pairs = torch.cat([chosen[:, :, : shape.prompt + shape.chosen], rejected], dim=2)
        return pairs.transpose(0, 1).reshape(-1, shape.tokens, shape.head_size)

    def reference(self):
        """Output of the first pair, or of the first rows of a sequence, in f64, `[heads, rows, E]`, by the mask written out."""
        shape, rows = self.shape, self.checked_rows
        q, k, v = (part[:, :rows].double() for part in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, dim=0) for part in (k, v))
        at = torch.arange(rows, device=q.device)
        segment = (at >= shape.prompt).long() + (at >= shape.prompt + shape.chosen).long()
        sees = (at[:, None] >= at[None]) & ((segment[None] == 0) | (segment[None] == segment[:, None]))
        scores = (q @ k.transpose(1, 2) / math.sqrt(shape.head_size)).masked_fill(~sees, float("-inf"))
        return scores.softmax(-1) @ v


def pair_mask(shape, device):
    """A row sees its pair's prompt and earlier rows of its own part."""
    at = torch.arange(shape.tokens, device=device)
    pair, inside = at // shape.pair_tokens, at % shape.pair_tokens
    segment = (inside >= shape.prompt).int() + (inside >= shape.prompt + shape.chosen).int()

    def sees(batch, head, query, key):
        same_part = (segment[key] == 0) | (segment[key] == segment[query])
        return (pair[query] == pair[key]) & (query >= key) & same_part

    return create_block_mask(sees, None, None, shape.tokens, shape.tokens, device=device)


def variants_of(inputs, arguments):
    """Name -> (operands, forward of them, gradient of its output or None where it has no backward, its output packed)."""
    shape, variants = inputs.shape, {}
    operands = [inputs.q, inputs.k, inputs.v]
    rows = [inputs.rows_of(part).requires_grad_() for part in operands]
    dout = inputs.rows_of(inputs.dout)

    def sdpa(backend):
        def forward(q, k, v):
            with sdpa_kernel(backend) if backend else nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return rows, forward, dout, inputs.packed_of

    if arguments.device == "cuda":
        variants |= {name: sdpa(backend) for name, backend in BACKENDS.items()}
    else:
        variants["sdpa"] = sdpa(None)

    if shape.plain:
        return common.wanted(arguments, variants)
    mask = pair_mask(shape, arguments.device)
    on_gpu = arguments.device == "cuda"
    # A kernel of its own for every shape, as ours are.
    torch._dynamo.reset()
    attend = flex_attention if arguments.tiny else torch.compile(flex_attention, dynamic=False)
    # Its backward runs many times over one forward's results.
    torch._functorch.config.donated_buffer = False
    # It has no backward on a CPU, and refuses operands that ask for one.
    packed = [part[None].clone().requires_grad_(on_gpu) for part in operands]
    flex = lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)
    variants["flex"] = packed, flex, inputs.dout[None] if on_gpu else None, lambda out: out[0]
    return common.wanted(arguments, variants)


def measure(shape, arguments):
    dtype = common.dtype_of(arguments)
    inputs = Inputs(shape, arguments)
    reference = inputs.reference()
    forward, backward = {}, {}

    def add(name, operands, run, dout, out):
        def without_gradient():
            with torch.no_grad():
                run(*operands)

        forward[name] = without_gradient, None
        if dout is not None:
            backward[name] = lambda: torch.autograd.grad(out, operands, dout, retain_graph=True), None

    for name, (operands, run, dout, packed_of) in variants_of(inputs, arguments).items():
        if not common.has_time(arguments, f"{name} at {shape.name}"):
            continue
        with common.left_out(arguments, name):
            out = run(*operands)
            if dout is not None:
                torch.autograd.grad(out, operands, dout, retain_graph=True)
            common.check(f"attention, {name}", packed_of(out)[:, : inputs.checked_rows], reference, dtype)
            add(name, operands, run, dout, out)
    if arguments.compile_only:
        return
    stopwatch = common.Stopwatch(arguments)
    products = shape.visible * shape.heads * shape.head_size
    common.report(arguments, shape, "attention_forward", stopwatch.measure(forward), flops=4 * products)
    if backward:
        common.report(arguments, shape, "attention_backward", stopwatch.measure(backward), flops=10 * products)


def main(argv=None):
    def extra(parser):
        parser.add_argument("--compile-only", action="store_true", help="check once and time nothing: fills the compilers' caches")

    arguments = common.arguments_of(__doc__, argv, extra)
    for shape in common.shapes_of(arguments):
        measure(shape, arguments)
    common.finish(arguments)


if __name__ == "__main__":
    main()
