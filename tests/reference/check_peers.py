"""Runs the benchmark's peers, mmpo-fast's own and the summary on the smallest shapes: each peer must compute what f64 says, all
steps must come to one loss, the rows must have one set of columns, and the summary must set them side by side. Times are not looked at.

    check_peers.py PROGRAM      the path of mmpo-fast
"""

import argparse
import contextlib
import csv
import io
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "benches" / "peers")]

import attention
import common
import generate
import head
import optimizer
import sizes
import step
import summary
import torch
from common import HEADER

WANTED = {
    ("attention_forward", "sdpa"),
    ("attention_forward", "flex"),
    ("attention_backward", "sdpa"),
    ("logp_head forward and backward", "chunked"),
    ("logp_head forward and backward", "three products"),
    ("adamw", "fused f32"),
    ("step", "pytorch padded"),
    ("step", "pytorch packed"),
}


def run_peers(raw):
    """The first loss of each variant of the step."""
    common = ["--device", "cpu", "--tiny", "--csv", str(raw)]
    for peer in (attention, head, optimizer):
        peer.main(common)
    return {variant: step.main([*common, "--json", "--variant", variant])["losses"][0] for variant in step.VARIANTS}


def check_generate(program, folder):
    """All engines but candle, which is not built here: in f32 they write the same text."""
    engines = [engine for engine in generate.ENGINES if engine != "candle"]
    options = [word for engine in engines for word in ("--engine", engine)]
    options += ["--shape", "tiny", "--rounds", "1", "--tokens", "12", "--few", "4", "--program", program]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = generate.main([*options, "--output", str(folder / "generate")])
    assert [row["engine"] for row in rows] == engines, rows
    texts = {row["engine"]: row["text"] for row in rows}
    assert texts["mmpo-fast-f32"] == texts["pytorch-f32"] != "", texts
    assert "| mmpo-fast-bf16 |" in printed.getvalue() and (folder / "generate" / "raw.csv").exists()


def check_sizes(program, folder):
    """A row a point and precision, and a chart with a mark for each, twice: time and memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        sizes.main([str(folder / "sizes"), "--tiny", "--calls", "1", "--program", program])
    rows = list(csv.DictReader((folder / "sizes" / "raw.csv").open()))
    assert len(rows) == len(sizes.PRECISIONS) * sum(len(points) for points in sizes.TINY.values()), rows
    assert all(float(row["seconds_median"]) > 0 and int(row["peak_rss_bytes"]) > 0 for row in rows), rows
    drawing = xml.etree.ElementTree.parse(folder / "sizes" / "sizes.svg").getroot()
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}circle")) == 2 * len(rows)


def check_left_out():
    """A peer that is missing ends nothing; one that computes wrong makes the end an error."""
    arguments = argparse.Namespace()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with common.left_out(arguments, "one"):
            raise ImportError("no such package")
        common.finish(arguments)
        with common.left_out(arguments, "another"):
            common.check("it", torch.ones(3), torch.zeros(3), torch.float32)
    assert "one: not on this machine: ImportError" in printed.getvalue() and "another: left out: it:" in printed.getvalue()
    try:
        common.finish(arguments)
    except SystemExit as end:
        assert end.code == 1
    else:
        raise AssertionError("a wrong peer is an error")


def check_rows(raw):
    rows = list(csv.DictReader(raw.open()))
    assert tuple(rows[0]) == HEADER, rows[0]
    found = {(row["op"], row["peer"]) for row in rows}
    ours = {(op, summary.OURS) for op, _ in WANTED}
    assert WANTED | ours <= found, (WANTED | ours) - found
    for row in rows:
        assert row["shape"] in ("tiny tiny x2", "machine"), row
        low, median, high = (float(row[column]) for column in ("min_us", "median_us", "max_us"))
        assert 0 < low <= median <= high, row
    return rows


def check_summary(folder):
    (folder / "about.txt").write_text("command: check_peers.py\n")
    readme = summary.write(folder)
    for text in ("- command: check_peers.py", "| adamw | tiny tiny x2 | fused f32 |", "Ceilings, measured in this run", "rms_norm"):
        assert text in readme, f"{text} is not in\n{readme}"
    for peer, ratio in (("mmpo-fast", "1.00 |"),):
        lines = [line for line in readme.splitlines() if line.startswith("| step |") and f"| {peer} |" in line]
        assert lines and all(line.endswith(ratio) for line in lines[:1]), lines
    for chart, mark in (("roofline.svg", "circle"), ("ratios.svg", "rect")):
        drawing = xml.etree.ElementTree.parse(folder / chart).getroot()
        marks = drawing.findall(f".//{{http://www.w3.org/2000/svg}}{mark}")
        assert len(marks) > 5, f"{chart} has {len(marks)} of {mark}"
        for place in (float(shape.get(name)) for shape in marks for name in ("cx", "cy", "x", "y", "width") if shape.get(name)):
            assert 0 <= place <= 2000, f"{chart}: {place}"


def main():
    check_left_out()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        raw = folder / "raw.csv"
        ours = ["--quiet", "bench", "--device", "cpu", "--shape", "tiny", "--profile", "tiny", "--pairs", "2", "--calls", "2"]
        subprocess.run([sys.argv[1], *ours, "--csv", str(raw)], check=True, stdout=subprocess.DEVNULL)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            losses = run_peers(raw)
        assert max(losses.values()) - min(losses.values()) <= 1e-4, losses
        rows = check_rows(raw)
        check_summary(folder)
        check_generate(sys.argv[1], folder)
        check_sizes(sys.argv[1], folder)
    print(f"peers  {len(rows)} rows, first loss {losses['padded']:.6f} in all of {', '.join(losses)}")


if __name__ == "__main__":
    main()
