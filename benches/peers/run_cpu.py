#!/usr/bin/env python3
"""Times one training step on the CPU: mmpo-fast, PyTorch and candle in turn, round after round, on the same work.

    python3 benches/peers/run_cpu.py                    all engines and shapes, into benches/results/<date>-<machine>/
    python3 benches/peers/run_cpu.py --engine candle    some engines alone (may be repeated)

The table of README, one pair of UltraFeedback's lengths, in less than 12 minutes on two cores:

    python3 benches/peers/run_cpu.py --shape smollm2-135m --profile ultrafeedback --pairs 1 \
        --rounds 2 --warmups 1 --steps 2 --minutes 11

Needs .venv (tests/reference/setup.sh) for PyTorch; builds the two Rust engines itself. Keep the machine idle.
Every run is a process of its own, so peak memory is that engine's alone. Engines alternate (A B C A B C), so that a
machine that slows down slows them all. README.md beside this file says what a step is.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = Path("benches/peers")
PYTHON = Path(".venv/bin/python")
VARIANTS = ("padded", "sliced", "compile", "packed")
PRECISIONS = ("f32", "bf16")
OURS, BASELINE = "mmpo-fast-f32", "pytorch-padded-f32"
ENGINES = (
    *(f"mmpo-fast-{precision}" for precision in PRECISIONS),
    *(f"pytorch-{variant}-{precision}" for precision in PRECISIONS for variant in VARIANTS),
    "candle",
)
# Warm-up and timed steps of one process.
STEPS = {"smollm2-135m": (2, 5), "smollm2-360m": (1, 3), "tiny-5m": (5, 20)}
DEFAULT_SHAPES = ("smollm2-135m", "tiny-5m")
MIB = 1 << 20


def text_of(*command):
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def build(*cargo):
    """Builds one executable with cargo and returns its path from the root."""
    print("$ cargo", *cargo, file=sys.stderr)
    output = subprocess.run(
        ["cargo", *cargo, "--message-format=json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    paths = [message["executable"] for message in messages if message.get("executable")]
    return os.path.relpath(paths[-1], ROOT)


def commands(engines, arguments):
    """Engine -> the command that runs it, without the arguments common to all."""
    found = {}
    for engine in engines:
        *_, variant, precision = ("", "", *engine.split("-"))
        if engine.startswith("mmpo-fast"):
            program = arguments.program or build("build", "--release", "--bin", "mmpo-fast")
            found[engine] = [program, "--quiet", "bench", "step", "--device", "cpu", "--precision", precision]
        elif engine == "candle":
            found[engine] = [build("build", "--release", "--package", "candle-peer"), "step", "--device", "cpu"]
        else:
            if not (ROOT / PYTHON).exists():
                sys.exit("run_cpu.py: there is no .venv: run tests/reference/setup.sh, or choose engines with --engine")
            script = [str(PYTHON), str(PEERS / "step.py"), "--device", "cpu"]
            found[engine] = [*script, "--variant", variant, "--precision", precision]
    return found


def measure(command, shape, arguments):
    warmup, steps = STEPS[shape]
    warmup = warmup if arguments.warmups is None else arguments.warmups
    options = {
        "shape": shape,
        "pairs": arguments.pairs,
        "profile": arguments.profile or f"{arguments.prompt}/{arguments.response}/{arguments.response}",
        "threads": arguments.threads,
        "warmups": warmup,
        "calls": arguments.steps or steps,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run = subprocess.run([*command, *flags, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def loss_deviation(losses, baseline):
    """Largest relative difference of two loss curves of the same training."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, baseline))


def summary(shape, runs):
    """Markdown table of one shape; `runs`: engine -> reports, one a round."""
    reference = runs.get(OURS) or runs.get(BASELINE) or next(iter(runs.values()))
    seconds = {engine: [s for report in reports for s in report["seconds"]] for engine, reports in runs.items()}
    medians = {engine: statistics.median(values) for engine, values in seconds.items()}
    base = medians[reference[0]["name"]]
    lines = [
        f"## {shape}: {reference[0]['pairs']} pairs, prompt {reference[0]['prompt']}, responses {reference[0]['chosen']}",
        "",
        f"| engine | s/step, median | quartiles | range | pair tokens/s | time, {reference[0]['name']} = 1 | peak MiB | above start MiB | loss differs by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    curve = (runs.get(BASELINE) or reference)[0]["losses"]
    for engine, reports in runs.items():
        values = seconds[engine]
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        peak = max(report["peak_rss_bytes"] for report in reports)
        above = max(report["peak_rss_bytes"] - report["baseline_rss_bytes"] for report in reports)
        deviation = max(loss_deviation(report["losses"], curve) for report in reports)
        lines.append(
            f"| {engine} | {medians[engine]:.4f} | {low:.4f} to {high:.4f} | {min(values):.4f} to {max(values):.4f} "
            f"| {reports[0]['pair_tokens'] / medians[engine]:.0f} | {medians[engine] / base:.2f} "
            f"| {peak / MIB:.0f} | {above / MIB:.0f} | {deviation:.1e} |"
        )
    return lines


def fastest_peer(runs):
    """Sentences that set the fastest run of ours beside the fastest variant of each peer."""
    medians = {engine: statistics.median(s for report in reports for s in report["seconds"]) for engine, reports in runs.items()}
    peak = {engine: max(report["peak_rss_bytes"] for report in reports) for engine, reports in runs.items()}
    ours = min((engine for engine in medians if engine.startswith("mmpo-fast")), key=medians.get, default=None)
    lines = [""]
    for family in ("pytorch", "candle"):
        theirs = min((engine for engine in medians if engine.startswith(family)), key=medians.get, default=None)
        if ours and theirs:
            lines.append(
                f"{ours} takes {medians[ours] / medians[theirs]:.2f} of the time of {theirs}, the fastest of its family, "
                f"and {peak[ours] / peak[theirs]:.2f} of its peak memory."
            )
    return lines


def trl_rows(folder):
    """What benches/trl recorded of DPO in `folder`, whole commands: lines of Markdown."""
    with (folder / "runs.csv").open(newline="") as file:
        runs = [row for row in csv.DictReader(file) if row["objective"] == "dpo"]
    if not runs:
        sys.exit(f"run_cpu.py: --trl {folder} has no run of DPO in runs.csv")
    engines = dict.fromkeys(row["engine"] for row in runs)
    medians = {e: statistics.median(float(row["wall_seconds"]) for row in runs if row["engine"] == e) for e in engines}
    steps = {e: statistics.median(float(row["steps_seconds"]) for row in runs if row["engine"] == e) for e in engines}
    peaks = {e: max(int(row["peak_rss_bytes"]) for row in runs if row["engine"] == e) for e in engines}
    ours = medians.get("mmpo-fast", float("nan"))
    name = folder.resolve().name
    lines = [
        "## TRL's DPOTrainer: whole commands on the real SmolLM2-135M",
        "",
        f"Quoted from [{name}](../{name}/README.md), where model, pairs, versions and every step's numbers stand; both programs in f32.",
        "",
        "| program | whole command, s | times mmpo-fast's | steps alone, s | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for engine in engines:
        lines.append(
            f"| {engine} | {medians[engine]:.1f} | {medians[engine] / ours:.2f} | {steps[engine]:.1f} | {peaks[engine] / MIB:.0f} |"
        )
    return lines


def processor():
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def versions(runs):
    """Engine family -> version, as each says."""
    reports = (report for by_engine in runs.values() for reports in by_engine.values() for report in reports)
    return {report["engine"]: report["version"] for report in reports}


def write_results(folder, runs, arguments, load):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "raw.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["shape", "engine", "round", "step", "seconds", "peak_rss_bytes", "baseline_rss_bytes", "loss"])
        for shape, by_engine in runs.items():
            for engine, reports in by_engine.items():
                for number, report in enumerate(reports):
                    for step, seconds in enumerate(report["seconds"]):
                        loss = report["losses"][report["warmup"] + step]
                        memory = report["peak_rss_bytes"], report["baseline_rss_bytes"]
                        rows.writerow([shape, engine, number, step, f"{seconds:.6f}", *memory, f"{loss:.7g}"])
    dirty = " with uncommitted changes" if text_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    lines = [
        "# One training step on the CPU against PyTorch and candle",
        "",
        f"- command: `{' '.join(['python3', 'benches/peers/run_cpu.py', *sys.argv[1:]])}`",
        f"- commit: {text_of('git', 'rev-parse', 'HEAD')}{dirty}",
        f"- processor: {processor()}, {os.cpu_count()} CPUs, {arguments.threads} threads used; load average at the start {load:.2f}",
        f"- {platform.system()} {platform.release()}, {text_of('rustc', '--version')}, Python {platform.python_version()}",
        *(f"- {engine}: {version}" for engine, version in versions(runs).items()),
        f"- {arguments.rounds} rounds, engines in turn, each run a process of its own; raw.csv has every timed step",
        "",
        "A step is forward, MMPO loss, backward and AdamW; the same weights and pairs everywhere, in f32, or with bf16 products",
        "(PyTorch: bf16 autocast; mmpo-fast: bf16 storage with f32 master weights). The column of losses shows that they do the same: the",
        "largest relative difference from PyTorch's over all steps. Pair tokens count each prompt once, also where an engine computes it twice. `benches/peers/README.md` says more.",
    ]
    for shape, by_engine in runs.items():
        lines += ["", *summary(shape, by_engine), *fastest_peer(by_engine)]
    if arguments.trl:
        lines += ["", *trl_rows(arguments.trl)]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--shape", action="append", choices=STEPS, help=f"default: {' and '.join(DEFAULT_SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--profile", help="lengths by a name in shapes.json, instead of --prompt and --response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmups", type=int, help="steps before the timed ones; default: 2, smollm2-360m 1, tiny-5m 5")
    parser.add_argument("--program", help="the mmpo-fast to measure, instead of building one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run when these are over")
    parser.add_argument("--steps", type=int, help="timed steps of a process; default: 5, smollm2-360m 3, tiny-5m 20")
    parser.add_argument("--trl", type=Path, help="a results folder of benches/trl, whose rows of DPO are quoted")
    parser.add_argument("--machine", help="name for the results folder; default: from the processor's")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / "results")
    arguments = parser.parse_args()

    if arguments.trl:
        # A wrong folder ends the run before it begins.
        trl_rows(arguments.trl)
    found = commands(arguments.engine or ENGINES, arguments)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"run_cpu.py: load average is {load:.2f}: something else runs here, figures will be off", file=sys.stderr)
    end = time.monotonic() + 60 * arguments.minutes
    runs = {shape: {engine: [] for engine in found} for shape in arguments.shape or DEFAULT_SHAPES}
    for number in range(arguments.rounds):
        for shape, by_engine in runs.items():
            for engine, reports in by_engine.items():
                if time.monotonic() > end:
                    print(f"round {number}, {shape}, {engine}: left out, the time of --minutes is over", file=sys.stderr)
                    continue
                report = measure(found[engine], shape, arguments) | {"name": engine}
                reports.append(report)
                print(f"round {number}, {shape}, {engine}: {report['seconds_median']:.4f} s", file=sys.stderr)
    runs = {shape: {engine: reports for engine, reports in by_engine.items() if reports} for shape, by_engine in runs.items()}
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)|CPU|@.*", " ", processor()).lower()).strip("-")
    machine = arguments.machine or f"{slug}-{arguments.threads}-threads"
    write_results(arguments.output / f"{datetime.date.today()}-{machine}", runs, arguments, load)


if __name__ == "__main__":
    main()
