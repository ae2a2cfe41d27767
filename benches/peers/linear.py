#!/usr/bin/env python3
"""bf16 products of linear layers on the CPU: mmpo-fast and PyTorch (oneDNN) in turn, round after round, on the same shapes.

    .venv/bin/python benches/peers/linear.py --program target/release/mmpo-fast --threads 2

The shapes are the layers of a model over --tokens rows; the forms are forward, gradient of the input and gradient of the weight. The
least time of all rounds counts, because on a machine with other work it is the one that was disturbed least. mmpo-fast adds the weight's
gradient to f32 sums, as training does; PyTorch assigns it in bf16, which writes a quarter of the bytes.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SHAPES = json.loads((Path(__file__).resolve().parent.parent / "shapes.json").read_text())
MODELS = [name for name in SHAPES["models"] if not name.startswith("tiny")]
FORMS = ("linear_forward", "linear_backward_input", "linear_backward_weight")


def layers_of(model):
    """Name -> inputs and outputs."""
    config = dict(SHAPES["common"], **SHAPES["models"][model])
    hidden, mlp, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "qkv": (hidden, (heads + 2 * kv_heads) * size),
        "attention_out": (heads * size, hidden),
        "gate_up": (hidden, 2 * mlp),
        "down": (mlp, hidden),
    }


def ours(model, arguments):
    """Operation -> microseconds, the least of a process."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        command = [arguments.program, "--quiet", "bench", "kernels", "--device", "cpu", "--precision", "bf16"]
        for form in FORMS:
            command += ["--only", form]
        quarter = arguments.tokens // 4
        lengths = f"{arguments.tokens - 2 * quarter}/{quarter}/{quarter}"
        command += ["--shape", model, "--profile", lengths, "--pairs", "1"]
        command += ["--threads", str(arguments.threads), "--calls", str(arguments.calls), "--csv", str(rows)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with rows.open(newline="") as file:
            return {row["op"]: float(row["min_us"]) for row in csv.DictReader(file)}


def least(run, calls):
    run()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times)


@torch.no_grad()
def theirs(model, arguments):
    times = {}
    for name, (inputs, outputs) in layers_of(model).items():
        x, weight, dout = (
            torch.randn(*size).bfloat16()
            for size in ((arguments.tokens, inputs), (outputs, inputs), (arguments.tokens, outputs))
        )
        runs = (lambda: torch.nn.functional.linear(x, weight), lambda: dout @ weight, lambda: dout.T @ x)
        for form, run in zip(FORMS, runs):
            times[f"{form} {name}"] = least(run, arguments.calls)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="target/release/mmpo-fast")
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated [default: all]")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--least", type=float, help="fail where our rate is below this share of PyTorch's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"torch {torch.__version__}, {arguments.tokens} rows, {arguments.threads} threads, {arguments.rounds} rounds in turn\n")
    print("| model | product | mmpo-fast GFLOP/s | PyTorch GFLOP/s | ratio |\n|---|---|---|---|---|")
    ratios = []
    for model in arguments.model or MODELS:
        best = ({}, {})
        for _ in range(arguments.rounds):
            for times, found in zip(best, (ours(model, arguments), theirs(model, arguments))):
                times.update({op: min(value, times.get(op, value)) for op, value in found.items()})
        for name, (inputs, outputs) in layers_of(model).items():
            for form in FORMS:
                mine, other = (times[f"{form} {name}"] for times in best)
                flops = 2e-3 * arguments.tokens * inputs * outputs
                ratios.append(other / mine)
                print(f"| {model} | {form} {name} | {flops / mine:.0f} | {flops / other:.0f} | {other / mine:.2f} |", flush=True)
    print(f"\nleast ratio {min(ratios):.2f}, geometric mean {torch.tensor(ratios).log().mean().exp():.2f}")
    if arguments.least and not min(ratios) >= arguments.least:
        sys.exit(f"a product runs at {min(ratios):.2f} of PyTorch's rate, {arguments.least} is asked for")


if __name__ == "__main__":
    main()
