#!/usr/bin/env python3
"""Time and memory of a training step against size: models of 5 M to 1 B weights, pairs of up to 8192 tokens, batches of up to 64 pairs.

    python3 benches/sizes.py benches/results/<date>-cpu-sizes            all points; about 40 minutes on two idle cores
    python3 benches/sizes.py RESULTS --chart tokens --precision bf16     a part of them
    python3 benches/sizes.py RESULTS --report                            the charts again, from the raw.csv that is there
    python3 benches/sizes.py RESULTS --tiny                              the smallest shapes, to see that it runs

Each point is a process of its own, `mmpo-fast bench step`, so that its peak memory is its own: after each, RESULTS/raw.csv has one
more row, and what was measured before a point fails is kept. At the end README.md and sizes.svg are written. Keep the machine idle.
"""

import argparse
import csv
import datetime
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "benches" / "peers")]

import run_cpu  # noqa: E402
from summary import COLORS, line, svg, text  # noqa: E402

HEADER = ("chart", "precision", "shape", "profile", "pairs", "micro_batch_tokens", "parameters", "tokens", "steps")
HEADER += ("seconds_median", "seconds_min", "seconds_max", "peak_rss_bytes", "first_loss")
PRECISIONS = ("f32", "bf16")
# Chart -> what is across, and its points: shape, lengths of a pair, pairs.
CHARTS = {
    "models": (
        "weights of the model; one pair of UltraFeedback's lengths",
        "parameters",
        [(shape, "ultrafeedback", 1) for shape in ("tiny-5m", "smollm2-135m", "smollm2-360m", "llama-3.2-1b")],
    ),
    "tokens": (
        "tokens of a pair, half of them its prompt; SmolLM2-135M, one pair",
        "tokens",
        [("smollm2-135m", f"{tokens // 2}/{tokens // 4}/{tokens // 4}", 1) for tokens in (256, 512, 1024, 2048, 4096, 8192)],
    ),
    "pairs": (
        "pairs of a step; SmolLM2-135M, lengths of HH-RLHF, micro-batches of --tokens tokens",
        "pairs",
        [("smollm2-135m", "hh-rlhf", pairs) for pairs in (1, 2, 4, 8, 16, 32, 64)],
    ),
}
TINY = {
    "models": [("tiny", "tiny", 1), ("tiny-5m", "tiny", 1)],
    "tokens": [("tiny", "16/8/8", 1), ("tiny", "32/16/16", 1)],
    "pairs": [("tiny", "tiny", 1), ("tiny", "tiny", 2)],
}
GIB = 1 << 30


def points(chart, arguments):
    return TINY[chart] if arguments.tiny else CHARTS[chart][2]


def measure(chart, precision, point, arguments):
    """A row of raw.csv."""
    shape, profile, pairs = point
    command = [arguments.program, "--quiet", "bench", "step", "--device", "cpu", "--precision", precision, "--shape", shape]
    command += ["--profile", profile, "--pairs", str(pairs), "--threads", str(arguments.threads), "--json"]
    command += ["--tokens", str(arguments.tokens), "--warmups", "1", "--calls", str(arguments.calls)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(run.stdout.splitlines()[-1])
    found = (chart, precision, shape, profile, pairs, arguments.tokens, report["parameters"], report["pair_tokens"], report["steps"])
    found += tuple(report[name] for name in ("seconds_median", "seconds_min", "seconds_max", "peak_rss_bytes"))
    return dict(zip(HEADER, (*found, report["losses"][0]), strict=True))


def leave_out(folder, what):
    print(f"left out: {what}", file=sys.stderr)
    with (folder / "about.txt").open("a") as file:
        file.write(f"left out: {what}\n")


def record(folder, arguments):
    folder.mkdir(parents=True, exist_ok=True)
    arguments.program = arguments.program or run_cpu.build("build", "--release", "--bin", "mmpo-fast")
    if os.getloadavg()[0] > 0.5:
        print("sizes.py: something else runs on this machine: times will be off", file=sys.stderr)
    dirty = " with uncommitted changes" if run_cpu.text_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    about = [
        f"date: {datetime.date.today()}",
        f"command: python3 benches/sizes.py {' '.join(sys.argv[1:])}",
        f"commit: {run_cpu.text_of('git', 'rev-parse', 'HEAD')}{dirty}",
        f"processor: {run_cpu.processor()}, {os.cpu_count()} CPUs, {arguments.threads} threads used; load average at the start "
        f"{os.getloadavg()[0]:.2f}",
        f"program: {run_cpu.text_of(arguments.program, '--version')}",
    ]
    (folder / "about.txt").write_text("\n".join(about) + "\n")
    with (folder / "raw.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        for chart in arguments.chart or CHARTS:
            for point in points(chart, arguments):
                for precision in arguments.precision or PRECISIONS:
                    try:
                        row = measure(chart, precision, point, arguments)
                    except subprocess.CalledProcessError as error:
                        # A machine may have too little memory for the largest points; the others count all the same.
                        leave_out(folder, f"{chart}: {' '.join(map(str, point))}, {precision}: exit code {error.returncode}")
                        continue
                    writer.writerow(row)
                    file.flush()
                    print(f"{chart}: {point}, {precision}: {row['seconds_median']:.3f} s", file=sys.stderr)


def read(folder):
    """chart -> precision -> rows, in the order of the file."""
    found = {}
    with (folder / "raw.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["chart"], {}).setdefault(row["precision"], []).append(row)
    return found


def short(value):
    """`135M`, `361k`, `8192`, `0.25`."""
    for unit, letter in ((1e9, "G"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value / 1e3:.0f}k" if value >= 1e5 else f"{value:.4g}"


def ticks(low, high):
    """Powers of ten and their halves that lie inside, and both ends where too few do."""
    first = math.floor(math.log10(low))
    found = [factor * 10.0**power for power in range(first, math.ceil(math.log10(high)) + 1) for factor in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return found if len(found) >= 2 else [low, high]


def panel(left, top, width, height, title, by_precision, across, value):
    """Both axes logarithmic, a line a precision. `value` gives a row's number."""
    rows = [row for found in by_precision.values() for row in found]
    xs, ys = sorted({float(row[across]) for row in rows}), [value(row) for row in rows]
    x_low, x_high, y_low, y_high = xs[0], max(xs[-1], xs[0] * 1.01), min(ys) / 1.1, max(ys) * 1.1
    place = lambda number, low, high: math.log(number / low) / math.log(high / low)
    x_of = lambda number: left + width * place(number, x_low, x_high)
    y_of = lambda number: top + height * (1 - place(number, y_low, y_high))
    parts = [text(left, top - 10, title, 'font-weight="bold"')]
    for number in xs:
        parts.append(line(x_of(number), top, x_of(number), top + height, "#eeeeee"))
        parts.append(text(x_of(number), top + height + 16, short(number), 'text-anchor="middle"'))
    for number in ticks(y_low, y_high):
        parts.append(line(left, y_of(number), left + width, y_of(number), "#eeeeee"))
        parts.append(text(left - 6, y_of(number) + 4, short(number), 'text-anchor="end"'))
    parts += [line(left, top, left, top + height), line(left, top + height, left + width, top + height)]
    for color, (precision, found) in zip(COLORS, sorted(by_precision.items(), reverse=True)):
        drawn = [(x_of(float(row[across])), y_of(value(row))) for row in found]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in drawn]
        parts.append(text(drawn[-1][0] + 6, drawn[-1][1] + 4, precision, f'fill="{color}"'))
    return parts


def chart(found):
    width, height, row = 340, 180, 270
    parts = []
    for number, (name, by_precision) in enumerate(found.items()):
        title, across, _ = CHARTS[name]
        top = 60 + row * number
        parts.append(text(20, top - 32, f"Across: {title}"))
        seconds = lambda row: float(row["seconds_median"])
        memory = lambda row: float(row["peak_rss_bytes"]) / GIB
        parts += panel(70, top, width, height, "seconds of a step", by_precision, across, seconds)
        parts += panel(540, top, width, height, "peak memory, GiB", by_precision, across, memory)
    return svg(960, 60 + row * len(found), parts)


def table(by_precision):
    lines = ["| precision | model | pair | pairs | tokens | s/step, median | range | tokens/s | peak GiB |", "|---|---|---|---|---|---|---|---|---|"]
    for precision, rows in by_precision.items():
        for row in rows:
            median, low, high = (float(row[f"seconds_{name}"]) for name in ("median", "min", "max"))
            lines.append(
                f"| {precision} | {row['shape']} | {row['profile']} | {row['pairs']} | {row['tokens']} | {median:.3f} | {low:.3f} to {high:.3f} "
                f"| {int(row['tokens']) / median:.0f} | {int(row['peak_rss_bytes']) / GIB:.2f} |"
            )
    return lines


def write(folder):
    """Writes README.md and sizes.svg of `folder`; returns the README's text."""
    found = read(folder)
    lines = ["# Time and memory of a training step against size", ""]
    lines += [f"- {entry}" for entry in (folder / "about.txt").read_text().splitlines()]
    lines += [
        "",
        "A step is that of `benches/peers/README.md`: forward, MMPO loss, backward and AdamW of all weights. Each point is a process of its",
        "own; its memory is the largest resident set. Both axes of a chart are logarithmic.",
        "",
        "![Seconds and memory against size](sizes.svg)",
    ]
    for name, by_precision in found.items():
        lines += ["", f"## {CHARTS[name][0]}", "", *table(by_precision)]
    readme = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(readme)
    (folder / "sizes.svg").write_text(chart(found))
    return readme


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--report", action="store_true", help="only write README.md and the chart, from raw.csv and about.txt")
    parser.add_argument("--chart", action="append", choices=CHARTS, help="may be repeated [default: all]")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="may be repeated [default: both]")
    parser.add_argument("--program", help="the mmpo-fast to measure, instead of building one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=3, help="timed steps of a point, after one to warm up")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch, at most")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, to see that everything runs")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        record(arguments.results, arguments)
    print(write(arguments.results))


if __name__ == "__main__":
    main()
