"""The log-prob head in PyTorch: hidden rows times the vocabulary, log-probs of the targets, and back; to be compared with
`mmpo-fast bench kernels --only logp_head`. Each response's log-prob has a weight of its own, as MMPO's gradient has it.

Variants:
    eager       linear, f32 logits, cross entropy
    compile     the same under torch.compile
    chunked     `compile` on 1024 rows at a time, their logits computed again in the backward
    liger       Liger kernels' fused linear cross entropy, where the package is; its sum weighs all tokens alike
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import common

CHUNK = 1024


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

    def check(self, what, gradients, coefficients, dtype):
        """Gradients of some hidden rows against f64."""
        rows = slice(0, min(64, len(self.hidden)))
        hidden = self.hidden[rows].detach().double().cpu().requires_grad_()
        weight = self.weight.detach().double().cpu()
        loss = -F.cross_entropy(hidden @ weight.T, self.targets[rows].cpu(), reduction="none")
        (loss * coefficients[rows].double().cpu()).sum().backward()
        common.check(what, gradients[0][rows], hidden.grad, dtype)


def liger(inputs):
    """Its forward computes the gradients; the loss is the negative sum of the log-probs."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss():
        result = liger_fused_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="sum")
        # Some versions return a second loss beside it.
        return result[0] if isinstance(result, tuple) else result

    return loss


def variants_of(inputs, arguments):
    """Name -> the sum of the weighted log-probs, or of the negative ones for Liger."""
    operands = inputs.hidden, inputs.weight, inputs.targets
    compiled = torch.compile(logps) if not arguments.tiny else logps

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
    if arguments.device == "cuda":
        try:
            variants["liger"] = liger(inputs)
        except ImportError as error:
            print(f"liger: not on this machine: {error}", flush=True)
    return common.wanted(arguments, variants)


def measure(shape, arguments):
    dtype = common.dtype_of(arguments)
    inputs = Inputs(shape, arguments)
    runs = {}
    for name, loss in variants_of(inputs, arguments).items():
        gradients = lambda loss=loss: torch.autograd.grad(loss(), (inputs.hidden, inputs.weight))
        coefficients = inputs.coefficients if name != "liger" else -torch.ones_like(inputs.coefficients)
        inputs.check(f"head, {name}", gradients(), coefficients, dtype)
        runs[name] = gradients, None
    flops = 6 * shape.scored * shape.vocabulary * shape.hidden
    seconds = common.Stopwatch(arguments).measure(runs)
    common.report(arguments, shape, "logp_head forward and backward", seconds, flops=flops)


def main(argv=None):
    arguments = common.arguments_of(__doc__, argv)
    for shape in common.shapes_of(arguments):
        measure(shape, arguments)


if __name__ == "__main__":
    main()
