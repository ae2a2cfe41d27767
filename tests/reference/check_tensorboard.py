"""Event files of two runs, one of them cut in two by --resume, read back by TensorBoard's own reader.

    python tests/reference/check_tensorboard.py PROGRAM

Every number of metrics.jsonl must be there under its name and at its step, as f32, and nothing else. A step that was done
twice must be there once: TensorBoard forgets what a resumed run says anew.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing import event_accumulator

TRAIN = [
    "--model", "tests/goldens/base/model", "--data", "tests/goldens/pairs.jsonl", "--eval-data", "tests/goldens/pairs.jsonl",
    "--max-length", "160", "--max-prompt-length", "64", "--pairs-per-step", "4", "--epochs", "2", "--learning-rate", "1e-3",
    "--device", "cpu", "--eval-steps", "2", "--save-steps", "2", "--keep-checkpoints", "9",
]  # fmt: skip


def train(program: str, output: Path, *more: str) -> None:
    command = [program, "--quiet", "train", *TRAIN, "--output", output, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: values by tag and step; a step that comes twice is a failure."""
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        found[tag] = dict(points)
        assert len(found[tag]) == len(points), f"{run}: {tag} has a step twice: {points}"
    return found


def metrics(run: Path) -> dict[str, dict[int, float]]:
    """The same from metrics.jsonl; of the two lines of a step with an evaluation, `epoch` is the step's own."""
    found: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        if "loss" not in row:
            del row["epoch"]
        for tag, value in row.items():
            found.setdefault(tag, {})[step] = value
    return found


def compare(run: Path) -> int:
    shown, written = scalars(run), metrics(run)
    assert shown.keys() == written.keys(), f"{run}: {shown.keys() ^ written.keys()}"
    for tag, values in written.items():
        assert shown[tag].keys() == values.keys(), f"{run}: {tag}: {shown[tag].keys()} for {values.keys()}"
        for step, value in values.items():
            assert shown[tag][step] == np.float32(value), f"{run}: {tag} at {step}: {shown[tag][step]} for {value}"
    return sum(map(len, written.values()))


def main() -> None:
    program = sys.argv[1]
    with tempfile.TemporaryDirectory() as work:
        whole, resumed = Path(work) / "whole", Path(work) / "resumed"
        train(program, whole)
        train(program, resumed)
        # As if the run had been killed: its newest checkpoints are lost, and their steps are done again.
        checkpoints = sorted((resumed / "checkpoints").iterdir())
        assert len(checkpoints) > 1, checkpoints
        for path in checkpoints[1:]:
            shutil.rmtree(path)
        train(program, resumed, "--resume")
        files = list((resumed / "tensorboard").iterdir())
        assert len(files) == 2, files
        count = compare(whole) + compare(resumed)
    print(f"tensorboard: {count} scalars of a whole and of a resumed run as written")


if __name__ == "__main__":
    main()
