#!/usr/bin/env python3
"""Trains the same model on the same pairs with mmpo-fast and with TRL, and puts both beside each other.

    python3 benches/trl/compare.py RESULTS             all runs, then the report; benches/trl/run.sh calls it so
    python3 benches/trl/compare.py RESULTS --report    the report alone, from the raw rows that are there

RESULTS gets runs.csv (a row a command: wall time, seconds of the steps, peak memory), steps.csv (a row a step and number),
about.txt, README.md and two charts. Each run is a process of its own, with no cache from before; they take turns, ours first
and last. Keep the machine idle. Needs .venv (tests/reference/setup.sh) and the model (tools/real_model.sh).
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path("benches/trl")
PYTHON = Path(".venv/bin/python")
OURS = "mmpo-fast"
LEARNING_RATES = {"dpo": 1e-5, "sft": 2e-5, "simpo": 1e-5}
PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers")
# What is compared step by step: the names are the same in both. CPOTrainer's log-probs are means over tokens, ours are sums.
METRICS = {
    "dpo": ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"),
    "sft": ("loss", "grad_norm"),
    "simpo": ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"),
}
# Settings of TRL. In f32, so that numbers can be compared; the first of an objective is the one whose steps are shown.
TRL = {
    "dpo": {
        "TRL, no checkpointing": [],
        "TRL, its default checkpointing": ["--checkpointing"],
        "TRL, references first": ["--precompute"],
        "TRL, references first, a pair at a time": ["--precompute", "--micro-batch", "1"],
    },
    "sft": {"TRL, no checkpointing": [], "TRL, a pair at a time": ["--micro-batch", "1"]},
    "simpo": {"TRL, no checkpointing": [], "TRL, a pair at a time": ["--micro-batch", "1"]},
}


def chatml(turns):
    """A conversation as the model's template writes it, with the assistant's turn opened."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    system = {"from": "system", "value": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    turns = turns if turns[0]["from"] == "system" else [system, *turns]
    written = [f"<|im_start|>{roles[turn['from']]}\n{turn['value']}<|im_end|>\n" for turn in turns]
    return "".join(written) + "<|im_start|>assistant\n"


def as_text(records):
    """Plain-text pairs. CPOTrainer puts an end token after the line break with which the template closes a turn; from plain text
    both programs make the same tokens."""
    return [
        {
            "prompt": chatml(record["conversations"]),
            "chosen": record["chosen"]["value"],
            "rejected": record["rejected"]["value"],
        }
        for record in records
    ]


def pairs_for(objective, records, folder):
    """The file of pairs that both programs read."""
    path = folder / f"pairs-{objective}.json"
    path.write_text(json.dumps(as_text(records) if objective == "simpo" else records, ensure_ascii=False))
    return path


def our_command(program, objective, model, pairs, output, options):
    command = [str(program), "--quiet", "train", "--device", "cpu", "--objective", objective]
    flags = {
        "model": model,
        "data": pairs,
        "output": output,
        "learning-rate": LEARNING_RATES[objective],
        "schedule": "constant",
        "warmup-steps": 0,
        "pairs-per-step": options.pairs_per_step,
        "max-length": 1024,
        "threads": options.threads,
    }
    if options.steps:
        flags["max-steps"] = options.steps
    return command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def trl_command(objective, model, pairs, output, options, settings):
    flags = {
        "objective": objective,
        "model": model,
        "pairs": pairs,
        "output": output,
        "learning-rate": LEARNING_RATES[objective],
        "pairs-per-step": options.pairs_per_step,
        "threads": options.threads,
    }
    if options.steps:
        flags["steps"] = options.steps
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [str(PYTHON), "-W", "ignore", str(HERE / "train_trl.py"), *words, *settings]


def measure(command, threads, scratch):
    """Runs a command; its wall time in seconds and the most memory it held, in bytes."""
    caches = {name: str(scratch / name.lower()) for name in ("MMPO_FAST_CACHE", "HF_HOME", "XDG_CACHE_HOME")}
    environment = os.environ | caches | {"OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with open(scratch / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        # Not `wait`: only wait4 says what the command used.
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)}\nended with {process.returncode}:\n{log.read()[-4000:]}")
    return seconds, used.ru_maxrss * 1024


def read_steps(path, metrics):
    """Step -> metric -> value of a metrics.jsonl, evaluations left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: {name: line[name] for name in metrics} for line in lines if "loss" in line}


def our_step_seconds(path, pairs_per_step):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sum(pairs_per_step / line["pairs_per_second"] for line in lines if "loss" in line)


def run(objective, engine, model, records, options):
    """One command: its row, its steps, and how it was called."""
    with tempfile.TemporaryDirectory(prefix="mmpo-fast-trl-") as name:
        scratch = Path(name)
        pairs, output = pairs_for(objective, records, scratch), scratch / "output"
        if engine == OURS:
            command = our_command(options.program, objective, model, pairs, output, options)
        else:
            command = trl_command(objective, model, pairs, output, options, TRL[objective][engine])
        seconds, peak = measure(command, options.threads, scratch)
        if engine == OURS:
            inner = our_step_seconds(output / "metrics.jsonl", options.pairs_per_step)
        else:
            inner = json.loads((output / "run.json").read_text())["steps_seconds"]
        steps = read_steps(output / "metrics.jsonl", METRICS[objective])
        shown = shlex.join(command).replace(str(scratch), "SCRATCH").replace(str(ROOT) + "/", "")
    row = {"objective": objective, "engine": engine, "wall_seconds": f"{seconds:.3f}", "steps_seconds": f"{inner:.3f}"}
    return row | {"peak_rss_bytes": peak, "command": shown}, steps


def turns(objective):
    """Our run comes first and last: a machine that slows down shows."""
    return [OURS, *TRL[objective], OURS]


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def text_of(*command):
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def about(options, records):
    """Lines of `name: value` for about.txt: all that one needs to know before reading the numbers."""
    dirty = " with uncommitted changes" if text_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    versions = "import importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in %r))" % (PACKAGES,)
    return [
        f"date: {datetime.date.today()}",
        f"command: {shlex.join(['python3', 'benches/trl/compare.py', *sys.argv[1:]])}",
        f"commit: {text_of('git', 'rev-parse', 'HEAD')}{dirty}",
        f"processor: {processor()}, {os.cpu_count()} CPUs, {options.threads} threads used; load average at the start "
        f"{os.getloadavg()[0]:.2f}",
        f"system: {platform.system()} {platform.release()}, {text_of('rustc', '--version')}, Python {platform.python_version()}",
        f"packages: {text_of(str(ROOT / PYTHON), '-c', versions)}",
        "model: SmolLM2-135M-Instruct (tools/real_model.sh), trained in f32 everywhere",
        f"pairs: the first {len(records)} of benches/trl/pairs.json, one epoch, {options.pairs_per_step} a step, constant learning rate",
    ]


def record(folder, options):
    """Runs everything and writes the raw rows."""
    records = json.loads((ROOT / HERE / "pairs.json").read_text())[: options.pairs]
    if options.steps:
        print(f"compare.py: {options.steps} steps only: for trying out, not for recording", file=sys.stderr)
    if os.getloadavg()[0] > 0.5:
        print("compare.py: something else runs on this machine: times will be off", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.txt").write_text("\n".join(about(options, records)) + "\n")
    runs, steps = [], []
    for objective in options.objective or TRL:
        for turn, engine in enumerate(turns(objective)):
            row, numbers = run(objective, engine, options.model, records, options)
            runs.append(row)
            print(f"{objective}, {engine}: {row['wall_seconds']} s", file=sys.stderr)
            for step, values in numbers.items() if turn <= len(TRL[objective]) else ():
                name = {"objective": objective, "engine": engine, "step": step}
                steps += [name | {"metric": metric, "value": repr(value)} for metric, value in values.items()]
            # After each run: what was measured before one fails is kept.
            write_rows(folder / "runs.csv", runs)
            write_rows(folder / "steps.csv", steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--report", action="store_true", help="only write the report, from runs.csv and steps.csv")
    parser.add_argument("--program", type=Path, default=Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release/mmpo-fast")
    parser.add_argument("--model", type=Path, default=Path("target/real/SmolLM2-135M-Instruct"))
    parser.add_argument("--objective", action="append", choices=TRL, help="default: all")
    parser.add_argument("--pairs", type=int, default=24, help="so many of pairs.json")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.report:
        record(options.results, options)
    import report

    print(report.write(options.results))


if __name__ == "__main__":
    main()
