"""Runs the benchmark's peers and its summary on the smallest shapes: each must compute what f64 says, all steps must come to one
loss, and their rows must have the columns that mmpo-fast writes. Times are not looked at."""

import csv
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benches" / "peers"))

import attention
import head
import optimizer
import step
from common import HEADER


def main():
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.csv"
        common = ["--device", "cpu", "--tiny", "--csv", str(raw)]
        for peer in (attention, head, optimizer):
            peer.main(common)
        losses = {variant: step.main([*common, "--json", "--variant", variant])["losses"] for variant in step.VARIANTS}
        first = losses["padded"][0]
        spread = max(abs(loss[0] - first) for loss in losses.values())
        assert spread <= 1e-5 * first, losses
        rows = list(csv.DictReader(raw.open()))
        assert tuple(rows[0]) == HEADER, rows[0]
        found = {(row["op"], row["peer"]) for row in rows}
        wanted = {
            ("attention_forward", "sdpa"),
            ("attention_forward", "flex"),
            ("attention_backward", "sdpa"),
            ("logp_head forward and backward", "chunked"),
            ("adamw", "fused f32"),
            ("step", "pytorch padded"),
            ("step", "pytorch packed"),
        }
        assert wanted <= found, wanted - found
        for row in rows:
            assert row["shape"] == "tiny tiny x2", row
            low, median, high = (float(row[column]) for column in ("min_us", "median_us", "max_us"))
            assert 0 < low <= median <= high, row
    print(f"peers: {len(rows)} rows, first loss {first:.6f}")


if __name__ == "__main__":
    main()
