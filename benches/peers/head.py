"""The log-prob head in PyTorch: hidden rows times the vocabulary, log-probs of the targets, and back; to be compared with
`mmpo-fast bench kernels --only logp_head`. Each response's log-prob has a weight of its own, as MMPO's gradient has it.

Variants:
    eager       linear, f32 logits, cross entropy
    compile     the same under torch.compile
    chunked     `compile` on 1024 rows at a time, their logits computed again in the backward
    liger triton    Liger kernels' fused linear cross entropy by Triton, where the package is; its sum weighs all tokens alike
    liger cute      the same by CuTe, which it prefers where CUTLASS's Python package is
    liger whole     the one it prefers, with all rows in one chunk: the fastest cut, and the most memory
    three products  the bare products alone, by cuBLASLt: logits, gradient of the rows, gradient of the weights
"""

import importlib.util
import os
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common

CHUNK = 1024
# Chooses the implementation of the cross-entropy kernel; the products are cuBLAS's either way.
LIGER_CHOICE = "LIGER_KERNEL_IMPL_CROSS_ENTROPY_LOSS_AND_GRAD"


def logps(hidden, weight, targets):
    """`[N]`, in f32."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class Inputs:
    def __init__(self, shape, arguments):
        options = {"device": arguments.device, "dtype": common.dtype_of(arguments)}
        self.hidden = common.normal(1, shape.scored, shape.hidden, **options).requires_grad_()
        self.weight = common.normal(2, shape.vocabulary, shape.hidden, scale=0.05, **options).requires_grad_()
        tokens = common.pair_tokens(shape)[:, shape.prompt :].reshape(-1)
        self.targets = tokens.to(arguments.device)
        self.coefficients = common.normal(3, shape.scored, device=arguments.device, dtype=torch.float32)
        self.reference = self.gradients_of_logps()

    def gradients_of_logps(self):
        """Of some rows' log-probs to their hidden rows, in f64."""
        rows = slice(0, min(64, len(self.hidden)))
        hidden = self.hidden[rows].detach().double().requires_grad_()
        logps = -F.cross_entropy(hidden @ self.weight.detach().double().T, self.targets[rows], reduction="none")
        return torch.autograd.grad(logps.sum(), hidden)[0]

    def check(self, what, gradients, coefficients, dtype):
        rows = len(self.reference)
        common.check(what, gradients[0][:rows], self.reference * coefficients[:rows, None].double(), dtype)


def liger(inputs, implementation=None, **options):
    """Its forward computes the gradients; the loss is the negative sum of the log-probs."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss():
        if implementation:
            os.environ[LIGER_CHOICE] = implementation
        try:
            result = liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="sum", **options)
        finally:
            os.environ.pop(LIGER_CHOICE, None)
        # Some versions return a second loss beside it.
        return result[0] if isinstance(result, tuple) else result

    return loss


def liger_variants(inputs):
    """Those that this version of the package and this machine have."""
    cute = importlib.util.find_spec("cutlass")
    try:
        variants = {"liger triton": liger(inputs, "nvidia-triton" if cute else None)}
    except ImportError as error:
        print(f"liger: not on this machine: {error}", flush=True)
        return {}
    if cute:
        variants["liger cute"] = liger(inputs)
    vocabulary, width = inputs.weight.shape
    variants["liger whole"] = liger(inputs, chunk_mem_const=-(-vocabulary // width))
    return variants


@contextmanager
def cublaslt():
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    yield
    torch.backends.cuda.preferred_blas_library(before)


def three_products(inputs):
    """What every head must do at least; dlogits are random, since zeros would be faster."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    dlogits = common.normal(4, len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)

    def run():
        with cublaslt() if hidden.is_cuda else nullcontext():
            torch.mm(hidden, weight.T)
            torch.mm(dlogits, weight)
            torch.mm(dlogits.T, hidden)

    return run


def variants_of(inputs, arguments):
    """Name -> the sum of the weighted log-probs, or of the negative ones for Liger."""
    operands = inputs.hidden, inputs.weight, inputs.targets
    # A kernel of its own for every shape, as ours are.
    torch._dynamo.reset()
    compiled = torch.compile(logps, dynamic=False) if not arguments.tiny else logps

    def chunked():
        total = 0.0
        for start in range(0, len(inputs.hidden), CHUNK):
            part = slice(start, start + CHUNK)
            scores = checkpoint(compiled, inputs.hidden[part], inputs.weight, inputs.targets[part], use_reentrant=False)
            total = total + (scores * inputs.coefficients[part]).sum()
        return total

    variants = {
        "eager": lambda: (logps(*operands) * inputs.coefficients).sum(),
        "compile": lambda: (compiled(*operands) * inputs.coefficients).sum(),
        "chunked": chunked,
    }
    if arguments.device == "cuda" or arguments.interpret:
        variants |= liger_variants(inputs)
    return common.wanted(arguments, variants)


def measure(shape, arguments):
    dtype = common.dtype_of(arguments)
    inputs = Inputs(shape, arguments)
    runs, workspaces = {}, {}
    for name, loss in variants_of(inputs, arguments).items():
        if not common.has_time(arguments, f"{name} at {shape.name}"):
            continue
        gradients = lambda loss=loss: torch.autograd.grad(loss(), (inputs.hidden, inputs.weight))
        coefficients = -torch.ones_like(inputs.coefficients) if name.startswith("liger") else inputs.coefficients
        with common.left_out(arguments, name):
            inputs.check(f"head, {name}", gradients(), coefficients, dtype)
            runs[name], workspaces[name] = (gradients, None), common.workspace(arguments, gradients)
    if arguments.compile_only:
        return
    runs |= common.wanted(arguments, {"three products": (three_products(inputs), None)})
    flops = 6 * shape.scored * shape.vocabulary * shape.hidden
    seconds = common.Stopwatch(arguments).measure(runs)
    common.report(arguments, shape, "logp_head forward and backward", seconds, flops=flops, workspaces=workspaces)


def main(argv=None):
    def extra(parser):
        parser.add_argument("--compile-only", action="store_true", help="check once and time nothing: fills the compilers' caches")
        parser.add_argument("--interpret", action="store_true", help="Liger on a CPU too, by TRITON_INTERPRET=1: to see that it runs")

    arguments = common.arguments_of(__doc__, argv, extra)
    for shape in common.shapes_of(arguments):
        measure(shape, arguments)
    common.finish(arguments)


if __name__ == "__main__":
    main()
