#!/usr/bin/env python3
"""Turns a folder of raw results into its README.md, roofline.svg and ratios.svg. Needs Python alone.

    python3 benches/summary.py RESULTS
    python3 benches/summary.py --questions      what waits for a GPU, for benches/results/README.md

RESULTS holds raw.csv, rows of mmpo-fast and its peers in the columns of `common.HEADER`, and about.txt, lines of `name: value`: the
command, the commit, versions, clocks and watts before and after. A peer that was measured several times (A B A) has several rows of
one operation and shape; its median is the median of theirs, its range all of them. A GPU's results may also hold parts.json, the outcome of
each part of tools/gpu/run.py, and profile.csv, counters of ncu. predictions.json says what was expected before anything was measured.
"""

import csv
import html
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

OURS = "mmpo-fast"
COLORS = ("#1f6f8b", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#7a7a7a", "#b5651d", "#2e4057")
FONT = 'font-family="sans-serif" font-size="12"'


class Result:
    """All rows of one peer, operation and shape."""

    def __init__(self, rows):
        numbers = lambda column: [float(row[column]) for row in rows]
        self.median = statistics.median(numbers("median_us"))
        self.low, self.high = min(numbers("min_us")), max(numbers("max_us"))
        self.flops, self.bytes = max(numbers("flops")), max(numbers("bytes"))
        self.on_gpu = rows[0]["machine"].startswith("cuda")
        # Older results lack the column.
        self.workspace = max(float(row.get("workspace") or 0) for row in rows)


def read(path):
    """(operation, shape) -> peer -> Result, in the order of the file."""
    rows = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            if row["op"] != "op":
                rows[row["op"], row["shape"]][row["peer"]].append(row)
    return {key: {peer: Result(found) for peer, found in peers.items()} for key, peers in rows.items()}


def figures(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ceilings(results):
    """Bytes/s of the copy and FLOP/s of the large product, measured in the same run; None where they were not."""
    found = {op: peers[OURS] for (op, _), peers in results.items() if op.startswith("ceiling ") and OURS in peers}
    copy, product = found.get("ceiling copy"), found.get("ceiling product")
    return copy and copy.bytes / copy.median * 1e6, product and product.flops / product.median * 1e6


def least_seconds(result, bandwidth, rate):
    """What the ceilings allow at best."""
    by_bytes = result.bytes / bandwidth if bandwidth else 0.0
    return max(by_bytes, result.flops / rate if rate else 0.0)


def comparison(results):
    """Markdown table of what was measured with its peers in the same run."""
    lines = [
        "| operation | shape | engine | median, us | range, us | TFLOP/s | workspace, MiB | time, mmpo-fast = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (op, shape), peers in results.items():
        if OURS not in peers or len(peers) == 1:
            continue
        ours = peers[OURS]
        for peer, result in peers.items():
            # The same work for all: what the packed pairs need.
            rate = figures(ours.flops / result.median / 1e6) if ours.flops else "-"
            spread = f"{figures(result.low)} to {figures(result.high)}"
            held = figures(result.workspace / 2**20) if result.workspace else "-"
            ratio = f"{result.median / ours.median:.2f}"
            lines.append(f"| {op} | {shape} | {peer} | {figures(result.median)} | {spread} | {rate} | {held} | {ratio} |")
    return lines if len(lines) > 2 else ["No peer was measured in this run."]


class Asked:
    """A ratio that the project asks for: a peer's time over ours, or ours over a peer's."""

    def __init__(self, op, engines, least=None, most=None, only=lambda shape: True):
        self.op, self.engines, self.least, self.most, self.only = op, engines, least, most, only

    def lines(self, results):
        for (op, shape), peers in results.items():
            if op == self.op and self.only(shape) and OURS in peers:
                found = {peer: result.median for peer, result in peers.items() if any(peer.startswith(e) for e in self.engines)}
                peer = min(found, key=found.get) if found else None
                yield self.line(shape, peer, found.get(peer), peers[OURS].median)

    def line(self, shape, peer, theirs, ours):
        what = f"{self.op}, {shape}"
        if self.most is not None:
            asked, value, holds = f"at most {self.most} of", theirs and ours / theirs, lambda value: value <= self.most
        else:
            asked, value, holds = f"at least {self.least} x", theirs and theirs / ours, lambda value: value >= self.least
        asked += f" {peer or ' or '.join(self.engines)}"
        return f"| {what} | {asked} | {verdict(value, holds)} |"


def verdict(value, holds):
    return "not measured | -" if value is None else f"{value:.3f} | {'yes' if holds(value) else '**no**'}"


plain = lambda shape: "/0/0 " in shape
HEAD = "logp_head forward and backward"
ASKED = (
    Asked("attention_forward", ("sdpa cudnn", "sdpa flash"), least=1.0, only=plain),
    Asked("attention_backward", ("sdpa cudnn",), least=1.15, only=lambda shape: not plain(shape)),
    Asked("attention_backward", ("flex",), least=2.0, only=lambda shape: not plain(shape)),
    Asked(HEAD, ("liger",), least=1.05),
    Asked(HEAD, ("liger triton",), least=3.0),
    Asked(HEAD, ("compile",), least=1.5),
    Asked(HEAD, ("three products",), most=1.1),
)
PRODUCTS = ("linear_forward ", "linear_backward_input ", "linear_backward_weight ")
LEAST_OF_PRODUCTS = 0.98
MOST_OF_STEP = 0.05


def products(results):
    """Geometric means of cuBLASLt's time over ours, by model and of all."""
    logs = defaultdict(list)
    for (op, shape), peers in results.items():
        if op.startswith(PRODUCTS) and OURS in peers and "cuBLASLt" in peers:
            logs[shape.split()[0]].append(math.log(peers["cuBLASLt"].median / peers[OURS].median))
    if len(logs) > 1:
        logs["all models"] = [value for values in logs.values() for value in values]
    for model, values in logs.items():
        mean = math.exp(statistics.fmean(values))
        asked = f"at least {LEAST_OF_PRODUCTS} x cuBLASLt"
        what = f"geometric mean of {len(values)} plain products, {model}"
        yield f"| {what} | {asked} | {verdict(mean, lambda value: value >= LEAST_OF_PRODUCTS)} |"


def order(results):
    """What the fixed order of dQ's sums costs a step: what one call of attention's backward loses by it beside the same call that
    adds in any order, in all the time that a step of the same model and pairs spends there."""
    for (op, shape), peers in results.items():
        if op != "step" or OURS not in peers:
            continue
        names = ("step: attention backward", "attention_backward", "attention_backward any order")
        found = [results.get((name, shape), {}).get(OURS) for name in names]
        share = None
        if all(found):
            part, fixed, free = (result.median for result in found)
            share = (fixed - free) / fixed * part / peers[OURS].median
        what = f"dQ's fixed order, of a step, {shape}"
        yield f"| {what} | at most {MOST_OF_STEP} | {verdict(share, lambda value: value <= MOST_OF_STEP)} |"


def asked(results):
    """Markdown table of the ratios that are asked for, measured or not; they are a GPU's."""
    results = {key: peers for key, peers in results.items() if OURS in peers and peers[OURS].on_gpu}
    lines = [line for ratio in ASKED for line in ratio.lines(results)]
    lines += [*products(results), *order(results)]
    return ["| what | asked | measured | holds |", "|---|---|---|---|", *lines] if lines else []


def predictions():
    """Beside this script, in the repository and in a bundle."""
    return json.loads((Path(__file__).resolve().parent / "predictions.json").read_text())


def questions():
    """Markdown table of what waits for a GPU."""
    lines = ["| question | prediction | answered by |", "|---|---|---|"]
    return lines + [f"| {entry['question']} | {entry['prediction']} | `{entry['part']}` |" for entry in predictions()]


def measured(entry, results, bandwidth, rate):
    """The figure of a prediction, None where it was not measured."""
    for (op, shape), peers in results.items():
        if op != entry["op"] or not shape.startswith(entry["shape"]) or OURS not in peers:
            continue
        ours, figure = peers[OURS], entry["figure"]
        if figure == "of product":
            return ours.flops / ours.median * 1e6 / rate if rate else None
        if figure == "of copy":
            return ours.bytes / ours.median * 1e6 / bandwidth if bandwidth else None
        if figure == "over any order":
            other, over = results.get((op + " any order", shape), {}).get(OURS), ours
        elif figure == "of the step":
            other, over = results.get(("step", shape), {}).get(OURS), ours
        else:
            first, second = figure.split(" over ")
            name = first if second == "ours" else second
            other = next((result for peer, result in peers.items() if peer.startswith(name)), None)
            over, other = (other, ours) if second == "ours" else (ours, other)
        return over.median / other.median if over and other else None
    return None


def predicted(results, parts, bandwidth, rate):
    """Markdown table of what was predicted and what came out."""
    lines = ["| question | predicted | measured | as predicted |", "|---|---|---|---|"]
    for entry in predictions():
        part = entry["part"].split()[1]
        if part not in parts:
            continue
        if "figure" not in entry:
            found = parts[part]["outcome"] + " | -"
        else:
            value = measured(entry, results, bandwidth, rate)
            found = verdict(value, lambda value: entry["low"] <= value <= entry["high"])
        lines.append(f"| {entry['question']} | {entry['prediction']} | {found} |")
    return lines


def counters(path):
    """Markdown table of ncu's counters: of each kernel its longest launch."""
    launches = defaultdict(dict)
    with path.open() as file:
        rows = csv.DictReader(line for line in file if line.startswith('"'))
        for row in rows:
            launches[row["ID"], row["Kernel Name"]][row["Metric Name"]] = row["Metric Value"]
    number = lambda text: float(text.replace(",", "")) if text else 0.0
    longest = {}
    for (_, kernel), values in launches.items():
        kernel = kernel.split("(")[0][:60]
        if number(values.get("gpu__time_duration.sum")) >= number(longest.get(kernel, {}).get("gpu__time_duration.sum")):
            longest[kernel] = values
    names = list(dict.fromkeys(name for values in longest.values() for name in values))
    lines = ["| kernel | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kernel, values in longest.items():
        lines.append(f"| {kernel} | " + " | ".join(values.get(name, "-") for name in names) + " |")
    return lines


def alone(results, bandwidth, rate):
    """Markdown table of our kernels beside the ceilings."""
    lines = [
        "| operation | shape | median, us | range, us | TFLOP/s | GB/s | of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for (op, shape), peers in results.items():
        if OURS not in peers or op.startswith("ceiling "):
            continue
        ours = peers[OURS]
        flops = figures(ours.flops / ours.median / 1e6) if ours.flops else "-"
        traffic = figures(ours.bytes / ours.median / 1e3) if ours.bytes else "-"
        share = f"{100e6 * least_seconds(ours, bandwidth, rate) / ours.median:.0f} %" if bandwidth else "-"
        lines.append(
            f"| {op} | {shape} | {figures(ours.median)} | {figures(ours.low)} to {figures(ours.high)} | {flops} | {traffic} | {share} |"
        )
    return lines


def svg(width, height, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>"]) + "\n"


def text(x, y, words, extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {FONT} {extra}>{html.escape(words)}</text>'


def line(x1, y1, x2, y2, color="#cccccc", extra=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" {extra}/>'


def roofline(results, bandwidth, rate):
    """Operations a second over operations a byte, both logarithmic; None without ceilings or products."""
    points = []
    for (op, shape), peers in results.items():
        ours = peers.get(OURS)
        if ours is None or not ours.flops or not ours.bytes or op.startswith("ceiling "):
            continue
        for peer, result in peers.items():
            points.append((ours.flops / ours.bytes, ours.flops / result.median * 1e6, peer, f"{op}, {shape}"))
    if not points or not bandwidth or not rate:
        return None
    width, height, left, bottom, top, right = 900, 520, 70, 470, 30, 690
    peers = list(dict.fromkeys(point[2] for point in points))
    low_x = math.floor(math.log10(min(min(point[0] for point in points), rate / bandwidth / 4)))
    high_x = math.ceil(math.log10(max(max(point[0] for point in points), rate / bandwidth * 4)))
    high_y = math.ceil(math.log10(rate * 1.2))
    low_y = min(math.floor(math.log10(min(point[1] for point in points))), high_y - 2)
    x_of = lambda value: left + (math.log10(value) - low_x) / (high_x - low_x) * (right - left)
    y_of = lambda value: bottom - (math.log10(value) - low_y) / (high_y - low_y) * (bottom - top)
    parts = []
    for power in range(low_x, high_x + 1):
        parts += [line(x_of(10**power), top, x_of(10**power), bottom), text(x_of(10**power) - 8, bottom + 18, f"{10.0**power:g}")]
    for power in range(low_y, high_y + 1):
        parts += [line(left, y_of(10**power), right, y_of(10**power)), text(8, y_of(10**power) + 4, f"{10.0**(power - 12):g}")]
    knee = rate / bandwidth
    start = max(10**low_x, 10**low_y / bandwidth)
    parts.append(line(x_of(start), y_of(start * bandwidth), x_of(knee), y_of(rate), "#333333", 'stroke-width="2"'))
    parts.append(line(x_of(knee), y_of(rate), right, y_of(rate), "#333333", 'stroke-width="2"'))
    parts.append(text(x_of(knee) + 6, y_of(rate) - 6, f"{rate / 1e12:.3g} TFLOP/s product, {bandwidth / 1e9:.4g} GB/s copy"))
    for intensity, speed, peer, name in points:
        color = COLORS[peers.index(peer) % len(COLORS)]
        title = f"<title>{html.escape(f'{peer}: {name}: {speed / 1e12:.3g} TFLOP/s')}</title>"
        parts.append(f'<circle cx="{x_of(intensity):.1f}" cy="{y_of(speed):.1f}" r="4" fill="{color}" opacity="0.8">{title}</circle>')
    for index, peer in enumerate(peers):
        y = top + 10 + 20 * index
        parts.append(f'<circle cx="{right + 20}" cy="{y}" r="5" fill="{COLORS[index % len(COLORS)]}"/>')
        parts.append(text(right + 32, y + 4, peer))
    parts.append(text(left, height - 12, "operations a byte, at least; up: TFLOP/s; lines: this machine's ceilings in the same run"))
    return svg(width, height, parts)


def ratios(results):
    """A bar a peer: its time over mmpo-fast's, logarithmic; None without peers."""
    bars = []
    for (op, shape), peers in results.items():
        if OURS in peers:
            bars += [(op, shape, peer, result.median / peers[OURS].median) for peer, result in peers.items() if peer != OURS]
    if not bars:
        return None
    row, left, width, top = 20, 520, 1000, 40
    low, high = min(0.5, min(bar[3] for bar in bars)), max(2.0, max(bar[3] for bar in bars))
    x_of = lambda value: left + math.log(value / low) / math.log(high / low) * (width - left - 60)
    height = top + row * len(bars) + 30
    parts = [text(8, 20, "time over mmpo-fast's (logarithmic): right of the line, mmpo-fast is faster")]
    peers = list(dict.fromkeys(bar[2] for bar in bars))
    for index, (op, shape, peer, ratio) in enumerate(bars):
        y = top + row * index
        x, one = x_of(ratio), x_of(1.0)
        color = COLORS[1 + peers.index(peer) % (len(COLORS) - 1)]
        parts.append(text(8, y + 13, f"{op}, {shape}: {peer}"))
        bar = f'x="{min(x, one):.1f}" y="{y + 2}" width="{abs(x - one):.1f}" height="{row - 6}" fill="{color}"'
        parts.append(f"<rect {bar}/>")
        parts.append(text(max(x, one) + 5, y + 13, f"{ratio:.2f}"))
    parts.append(line(x_of(1.0), top - 8, x_of(1.0), height - 20, "#333333"))
    return svg(width, height, parts)


def write(folder):
    """README.md and the charts of `folder`; returns the README's text."""
    raw = folder / "raw.csv"
    results = read(raw) if raw.exists() else {}
    about = (folder / "about.txt").read_text().splitlines()
    bandwidth, rate = ceilings(results)
    charts = {"roofline.svg": roofline(results, bandwidth, rate), "ratios.svg": ratios(results)}
    lines = [f"# {folder.resolve().name}", "", *(f"- {entry}" for entry in about), ""]
    if bandwidth and rate:
        lines += [f"Ceilings, measured in this run: copy {bandwidth / 1e9:.4g} GB/s, large product {rate / 1e12:.3g} TFLOP/s.", ""]
    wanted, parts = asked(results), folder / "parts.json"
    if wanted:
        lines += ["## What was asked for", "", *wanted, ""]
    if parts.exists():
        lines += ["## What was predicted", "", *predicted(results, json.loads(parts.read_text()), bandwidth, rate), ""]
    lines += [
        "## Beside the peers",
        "",
        "Rates are of the operations that the packed pairs need, whatever an engine computes: they compare times.",
        "",
        *comparison(results),
        "",
        "## mmpo-fast beside the ceilings",
        "",
        *alone(results, bandwidth, rate),
        "",
        *(["## Counters", "", *counters(folder / "profile.csv"), ""] if (folder / "profile.csv").exists() else []),
        "Raw rows are in raw.csv; `benches/README.md` says how they were measured.",
    ]
    for name, chart in charts.items():
        if chart is not None:
            (folder / name).write_text(chart)
            lines += ["", f"![{name.split('.')[0]}]({name})"]
    readme = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(readme)
    return readme


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--questions":
        print("\n".join(questions()))
    else:
        print(write(Path(sys.argv[1])))
