#!/usr/bin/env python3
"""Weak and strong scaling of `mmpo-fast train --gpus N`, for each way to shard.

    python3 benches/scaling.py --program target/release/mmpo-fast --csv scaling.csv                       on all GPUs of this machine
    python3 benches/scaling.py --program target/release/mmpo-fast --csv scaling.csv --device emulated     without a GPU

Strong: the batch of a step stays the same, and more ranks share it. Weak: it grows with the ranks. On GPUs the result is time: tokens a
second, and the share of a step in which a rank waited. On the emulated device and on the CPU time means nothing, and the result is
counted: the bytes that a rank sends in a step and the calls that it takes, by the library of tests/nccl that stands in for NCCL (built
here), and how evenly the tokens are shared. Runs of `--steps` steps are compared with runs of one, so that what is done once is left out.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS = ("none", "states", "gradients", "weights")
FIELDS = (
    "scaling,shard,ranks,pairs_per_step,device,tokens_per_second,waited,waited_most,"
    "calls_per_step,sent_bytes_per_step,most_tokens_over_mean"
).split(",")
# As tests/support/nccl.rs builds it.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"]


def gpus():
    """How many GPUs this machine has."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return len(listed.strip().splitlines())


def stand_in(folder):
    """Builds the library that stands in for NCCL, and returns the folder to find it in."""
    source = ROOT / "tests/nccl/library.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *FLAGS, "-o", folder / "libnccl.so.2", source, "-lpthread"], check=True)
    return folder


def train(arguments, shard, ranks, pairs, steps, folder):
    """One run: its metrics of each step, each rank's share of it, and what the ranks sent where that is counted."""
    output, counts = folder / f"{shard}-{ranks}-{pairs}-{steps}", folder / "counts"
    counts.unlink(missing_ok=True)
    options = {
        "output": output,
        "device": arguments.device,
        "gpus": ranks,
        "shard": shard,
        "pairs-per-step": pairs,
        "max-steps": steps,
        "save-steps": 10**6,
        "tokens-per-micro-batch": arguments.tokens,
    }
    if arguments.model:
        options |= {"model": arguments.model, "data": arguments.data}
    command = [arguments.program, "--quiet", "train"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"MMPO_FAST_CACHE": str(folder / "cache"), "FAKE_NCCL_COUNTS": str(counts)}
    if arguments.library:
        environment["LD_LIBRARY_PATH"] = str(arguments.library)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"scaling.py: {' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shares = json.loads((output / "report.json").read_text()).get("ranks") or []
    sent = [json.loads(line) for line in counts.read_text().splitlines()] if counts.exists() else []
    return [line for line in lines if "loss" in line], shares, sent


def wire(counts, ranks):
    """Bytes that the rank with the most sends, and its calls: a ring sends (R - 1) / R of a buffer to reduce or to gather it."""
    found = []
    for rank in counts:
        kinds = {name: kind for name, kind in rank.items() if isinstance(kind, dict)}
        moved = sum(kind["bytes"] * (2 if name == "all_reduce" else 1) for name, kind in kinds.items())
        found.append((moved * (ranks - 1) / ranks, sum(kind["calls"] for kind in kinds.values())))
    return max(found, default=(0, 0))


def measure(arguments, kind, shard, ranks, folder):
    pairs = arguments.pairs * (ranks if kind == "weak" else 1)
    lines, shares, sent = train(arguments, shard, ranks, pairs, arguments.steps, folder)
    row = {"scaling": kind, "shard": shard, "ranks": ranks, "pairs_per_step": pairs, "device": arguments.device}
    tokens = [share["tokens"] for share in shares] or [1]
    row["most_tokens_over_mean"] = f"{max(tokens) / statistics.mean(tokens):.3f}"
    if arguments.device == "cuda":
        # The first steps warm up.
        steady = lines[len(lines) // 3 :]
        for name, key in (("tokens_per_second", "tokens_per_second"), ("waited", "ranks/waited"), ("waited_most", "ranks/waited_most")):
            row[name] = f"{statistics.median(line.get(key, 0.0) for line in steady):.4g}"
    elif ranks > 1:
        *_, once = train(arguments, shard, ranks, pairs, 1, folder)
        (bytes_all, calls_all), (bytes_once, calls_once) = wire(sent, ranks), wire(once, ranks)
        row["sent_bytes_per_step"] = round((bytes_all - bytes_once) / (arguments.steps - 1))
        row["calls_per_step"] = round((calls_all - calls_once) / (arguments.steps - 1), 1)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--csv", required=True, type=Path)
    parser.add_argument("--device", choices=("cuda", "emulated", "cpu"), default="cuda")
    parser.add_argument("--model", help="the demo's where it is left out")
    parser.add_argument("--data")
    parser.add_argument("--ranks", type=int, nargs="+", help="1, 2, 4 .. up to the GPUs there are, else 1, 2 and 4")
    parser.add_argument("--shard", nargs="+", choices=SHARDS, default=SHARDS)
    parser.add_argument("--pairs", type=int, default=64, help="of a step on one rank")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    most = gpus() if arguments.device == "cuda" and not arguments.ranks else 4
    ranks = arguments.ranks or [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    with tempfile.TemporaryDirectory() as folder, arguments.csv.open("w") as file:
        folder = Path(folder)
        arguments.library = None if arguments.device == "cuda" else stand_in(folder)
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for kind in ("strong", "weak"):
            for shard in arguments.shard:
                for count in ranks:
                    # One rank is the same with every sharding and either way.
                    if count == 1 and (shard, kind) != (arguments.shard[0], "strong"):
                        continue
                    row = measure(arguments, kind, shard, count, folder)
                    table.writerow(row)
                    file.flush()
                    print(" ".join(f"{name}={row[name]}" for name in FIELDS if row.get(name) is not None), flush=True)


if __name__ == "__main__":
    main()
