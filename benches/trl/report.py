"""README.md and charts of a results folder of compare.py, from its runs.csv, steps.csv and about.txt."""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from summary import COLORS, line, svg, text  # noqa: E402

OURS = "mmpo-fast"
MIB = 1 << 20
# Differences are relative to the number, but for numbers that are about zero: a reward is a difference of log-probs, times beta.
FLOOR = {"rewards/chosen": 1.0, "rewards/rejected": 1.0, "rewards/margins": 1.0}
TITLES = {"dpo": "DPO", "sft": "SFT", "simpo": "SimPO"}
TRAINERS = {"dpo": "DPOTrainer", "sft": "SFTTrainer", "simpo": "CPOTrainer of trl.experimental, loss_type simpo"}


def difference(metric, ours, theirs):
    return abs(ours - theirs) / max(abs(theirs), FLOOR.get(metric, 1e-12))


class Run:
    """All rows of one engine: ours has two."""

    def __init__(self, rows):
        self.wall = [float(row["wall_seconds"]) for row in rows]
        self.steps = [float(row["steps_seconds"]) for row in rows]
        self.peak = max(int(row["peak_rss_bytes"]) for row in rows)
        self.command = rows[0]["command"]

    @property
    def median(self):
        return statistics.median(self.wall)


def read_runs(folder):
    rows = defaultdict(lambda: defaultdict(list))
    with (folder / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["objective"]][row["engine"]].append(row)
    return {objective: {engine: Run(found) for engine, found in engines.items()} for objective, engines in rows.items()}


def read_steps(folder):
    """objective -> engine -> metric -> values, step by step."""
    steps = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with (folder / "steps.csv").open() as file:
        for row in csv.DictReader(file):
            steps[row["objective"]][row["engine"]][row["metric"]].append(float(row["value"]))
    return steps


def seconds(values):
    shown = f"{statistics.median(values):.1f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.1f} to {max(values):.1f})"


def time_table(runs):
    lines = [
        "| objective | program | whole command, s | times mmpo-fast's | steps alone, s | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for objective, engines in runs.items():
        ours = engines[OURS].median
        fastest = min((run.median, engine) for engine, run in engines.items() if engine != OURS)[1]
        for engine, run in engines.items():
            name = f"**{engine}**" if engine in (OURS, fastest) else engine
            lines.append(
                f"| {TITLES[objective]} | {name} | {seconds(run.wall)} | {run.median / ours:.2f} | {seconds(run.steps)} "
                f"| {run.peak / MIB:.0f} |"
            )
    return lines


def step_table(engines):
    """Ours and TRL's first setting, a row a step."""
    ours, other = engines[OURS], next(engine for engine in engines if engine != OURS)
    theirs = engines[other]
    lines = ["| step | " + " | ".join(f"{metric} | TRL | differs by" for metric in ours) + " |"]
    lines.append("|---|" + "---|" * (3 * len(ours)))
    for step in range(len(next(iter(ours.values())))):
        cells = []
        for metric, values in ours.items():
            a, b = values[step], theirs[metric][step]
            cells.append(f"{a:.6g} | {b:.6g} | {difference(metric, a, b):.0e}")
        lines.append(f"| {step + 1} | " + " | ".join(cells) + " |")
    return lines


def largest(first, second):
    """The largest difference over all steps, a metric."""
    return {
        metric: max(difference(metric, a, b) for a, b in zip(values, second[metric], strict=True))
        for metric, values in first.items()
    }


def difference_table(engines):
    """The largest difference of each engine from TRL's first setting: the other settings of TRL show what rounding alone does."""
    base = next(engine for engine in engines if engine != OURS)
    metrics = list(engines[OURS])
    lines = [f"| beside \"{base}\" | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for engine, values in engines.items():
        if engine != base:
            found = largest(values, engines[base])
            lines.append(f"| {engine} | " + " | ".join(f"{found[metric]:.1e}" for metric in metrics) + " |")
    return lines


def bars(runs):
    """Wall time of whole commands; the memory in words."""
    row, left, width, top = 24, 330, 900, 44
    entries = [(objective, engine, run) for objective, engines in runs.items() for engine, run in engines.items()]
    most = max(run.median for *_, run in entries)
    height = top + row * len(entries) + 14 * len(runs) + 10
    parts = [text(8, 20, "The whole command: seconds, and peak memory (less is better)", 'font-weight="bold"')]
    y, before = top, None
    for objective, engine, run in entries:
        y += 14 if before not in (None, objective) else 0
        before = objective
        ours = engine == OURS
        length = run.median / most * (width - left - 190)
        parts.append(text(8, y + 14, f"{TITLES[objective]}: {engine}", 'font-weight="bold"' if ours else ""))
        color = COLORS[0] if ours else COLORS[2]
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 6}" fill="{color}"/>')
        parts.append(text(left + length + 6, y + 14, f"{run.median:.1f} s, {run.peak / MIB / 1024:.2f} GiB"))
        y += row
    return svg(width, height, parts)


def curves(steps):
    """Ours (line) over TRL's (circles), a panel for each of an objective's loss and gradient norm."""
    width, height, panel = 900, 0, 190
    parts = []
    for row, (objective, engines) in enumerate(steps.items()):
        other = next(engine for engine in engines if engine != OURS)
        metrics = [metric for metric in ("loss", "grad_norm", "rewards/margins") if metric in engines[OURS]]
        for column, metric in enumerate(metrics):
            left, top = 60 + 290 * column, 40 + panel * row
            parts += curve(left, top, 220, panel - 70, f"{TITLES[objective]}: {metric}", engines[OURS][metric], engines[other][metric])
        height = 40 + panel * (row + 1)
    parts.append(text(60, height - 8, "line: mmpo-fast; circles: TRL; across: steps"))
    return svg(width, height, parts)


def curve(left, top, width, height, title, ours, theirs):
    low, high = min(ours + theirs), max(ours + theirs)
    span = (high - low) or 1.0
    x_of = lambda step: left + width * step / max(len(ours) - 1, 1)
    y_of = lambda value: top + height * (1 - (value - low) / span)
    parts = [text(left, top - 8, title), line(left, top, left, top + height), line(left, top + height, left + width, top + height)]
    parts += [*(text(left - 6, y, f"{value:.3g}", 'text-anchor="end"') for y, value in ((top + 8, high), (top + height, low)))]
    points = " ".join(f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in enumerate(ours))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[0]}" stroke-width="2"/>')
    for step, value in enumerate(theirs):
        parts.append(f'<circle cx="{x_of(step):.1f}" cy="{y_of(value):.1f}" r="4" fill="none" stroke="{COLORS[1]}" stroke-width="1.5"/>')
    return parts


def write(folder):
    """Writes README.md and the charts of `folder`; returns the README's text."""
    runs, steps = read_runs(folder), read_steps(folder)
    (folder / "time-and-memory.svg").write_text(bars(runs))
    (folder / "curves.svg").write_text(curves(steps))
    lines = ["# Training beside TRL, on a real model and real pairs", ""]
    lines += [f"- {entry}" for entry in (folder / "about.txt").read_text().splitlines()]
    lines += [
        "",
        "Both programs start from the same weights, take the same pairs in the same order, and compute in f32. A command is all of",
        "it: start, load, tokenise, references, steps, the saved model (mmpo-fast writes bf16 and its report, TRL f32). Peak memory is the",
        "process's resident set, as wait4 tells it. In bold: mmpo-fast, and the setting of TRL that was fastest.",
        "",
        *time_table(runs),
        "",
        "![Seconds and memory of each command](time-and-memory.svg)",
        "",
        "TRL's `padding_free` was not tried: TRL says that DPO falls back to padding with it, and it needs FlashAttention. bf16 would",
        "be other numbers.",
        "",
        "## Step by step",
        "",
        "![Loss, gradient norm and margin of both](curves.svg)",
    ]
    for objective, engines in steps.items():
        lines += ["", f"### {TITLES[objective]}: {TRAINERS[objective]}", "", *step_table(engines), "", *difference_table(engines)]
    lines += [
        "",
        "Differences are relative; those of rewards are absolute where the reward is below 1. The rows of TRL's other settings show",
        "how far TRL is from itself when only the order of its sums changes. The gradient norm differs most because PyTorch adds up the",
        "squares of 28 million gradients in f32; the short test (`tests/reference/check_real_model.sh`) takes the norm of TRL's gradients in",
        "f64, and ours agrees to five digits.",
        "",
        "## Commands",
        "",
        *(f"    {run.command}" for engines in runs.values() for run in engines.values()),
    ]
    readme = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(readme)
    return readme
