"""AdamW in PyTorch over as many weights as an MLP's products have; to be compared with `mmpo-fast bench kernels --only adamw`.

Variants:
    fused f32       torch.optim.AdamW(fused=True) on f32 weights
    fused master    the same on a GPU's f32 master copy, then the copy to the bf16 weights: what mmpo-fast does in one kernel
    8-bit           bitsandbytes' AdamW8bit, where the package is; reported as `adamw 8-bit`
"""

import torch

import common


def settings_of(step):
    return {
        "lr": step["learning_rate"],
        "betas": (step["beta1"], step["beta2"]),
        "eps": step["adam_epsilon"],
        "weight_decay": step["weight_decay"],
    }


def expected(weight, gradient, settings):
    """The first update, in f64: both moments' corrections leave the gradient and its size."""
    weight, gradient = weight.detach().double(), gradient.double()
    step = gradient / (gradient.abs() + settings["eps"])
    return weight * (1 - settings["lr"] * settings["weight_decay"]) - settings["lr"] * step


def parameter(count, arguments):
    weight = torch.nn.Parameter(common.normal(1, count, device=arguments.device, dtype=torch.float32, scale=0.02))
    weight.grad = common.normal(2, count, device=arguments.device, dtype=torch.float32)
    return weight


def measure(shape, arguments):
    count = 3 * shape.hidden * shape.mlp
    settings = settings_of(common.SHAPES["step"])
    runs = {}

    def add(name, optimizer, weight, after=lambda: None):
        before = weight.detach().clone()

        def run():
            optimizer.step()
            after()

        run()
        change, wanted = weight.detach() - before, expected(before, weight.grad, settings) - before.double()
        # The changes are a few units in the last place of the weights.
        common.check(f"adamw, {name}", change, wanted, torch.bfloat16)
        runs[name] = run, None

    weight = parameter(count, arguments)
    add("fused f32", torch.optim.AdamW([weight], fused=True, **settings), weight)
    if arguments.device == "cuda":
        master = parameter(count, arguments)
        half = master.detach().bfloat16()
        add("fused master", torch.optim.AdamW([master], fused=True, **settings), master, lambda: half.copy_(master.detach()))
    runs = common.wanted(arguments, runs)
    stopwatch = common.Stopwatch(arguments)
    common.report(arguments, shape, "adamw", stopwatch.measure(runs), bytes_=28 * count)

    if arguments.device == "cuda":
        try:
            import bitsandbytes
        except ImportError as error:
            print(f"8-bit: not on this machine: {error}", flush=True)
            return
        runs.clear()
        weight = parameter(count, arguments)
        add("8-bit", bitsandbytes.optim.AdamW8bit([weight], **settings), weight)
        common.report(arguments, shape, "adamw 8-bit", stopwatch.measure(runs), bytes_=16 * count)


def main(argv=None):
    arguments = common.arguments_of(__doc__, argv)
    for shape in common.shapes_of(arguments):
        measure(shape, arguments)


if __name__ == "__main__":
    main()
