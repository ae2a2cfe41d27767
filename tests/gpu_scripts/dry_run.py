"""The scripts that a GPU machine runs, tried without one: every part of tools/gpu/run.py with real programs on the emulated device at
the smallest shapes, peers on a pretended GPU, and faults of every kind. No line of run.py, its modules or summary.py may be left out,
so that no mistake in them costs minutes of a GPU.

    dry_run.py PROGRAM KERNELS RANDOM_MODEL      mmpo-fast, the test program `kernels`, the example random_model
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# How long it may take on two cores that have nothing else to do.
MOST_SECONDS = 90
COVERED = ("run.py", "processes.py", "kernel_tests.py", "card.py", "summary.py")


class Coverage:
    """The lines of some files that were executed in this process."""

    def __init__(self, folder):
        self.files = {str(folder / name): set() for name in COVERED}

    def trace(self, frame, event, _):
        lines = self.files.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)

        def line(frame, event, _):
            lines.add(frame.f_lineno)
            return line

        return line

    def __enter__(self):
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        threading.settrace(None)

    def missing(self):
        """Lines with code that never ran, as FILE:LINE: TEXT."""
        for file, seen in self.files.items():
            text = Path(file).read_text()
            for number in sorted(executable(compile(text, file, "exec")) - seen):
                # What a script does when it is called is tried by calling it.
                line = text.splitlines()[number - 1]
                if "__main__" not in line and number < first_of_main(text):
                    yield f"{Path(file).name}:{number}: {line.strip()}"


def executable(code):
    lines = {line for _, _, line in code.co_lines() if line}
    for constant in code.co_consts:
        if hasattr(constant, "co_lines"):
            lines |= executable(constant)
    return lines


def first_of_main(text):
    return next((number for number, line in enumerate(text.splitlines(), 1) if line.startswith("if __name__")), 10**9)


def make_bundle(folder, programs):
    """As tools/gpu/bundle.sh makes it, but with the stand-ins for programs, a model and pairs that the emulated device gets through."""
    environment = os.environ | {"MMPO_FAST_BUNDLE": str(folder), "MMPO_FAST_BUNDLE_PROGRAMS": str(programs)}
    subprocess.run(["bash", ROOT / "tools/gpu/bundle.sh"], env=environment, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((ROOT / "examples/demo/model/config.json").read_text())
    config |= {"num_hidden_layers": 1}
    (folder / "model/config.json").write_text(json.dumps(config))
    for name, count in (("pairs.jsonl", 6), ("eval_pairs.jsonl", 2)):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]))


def call(run, *arguments, faults=None, limit=None):
    """One call of run.sh in this process: its exit code and what it printed."""
    for name, value in (("MMPO_FAST_DRY_FAULTS", faults), ("MMPO_FAST_LIMIT", limit)):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = str(value)
    before = dict(os.environ)
    printed = io.StringIO()
    started = time.monotonic()
    with contextlib.redirect_stdout(printed):
        code = run.main([str(argument) for argument in arguments])
    os.environ.clear()
    os.environ.update(before)
    print(f"dry run: {' '.join(map(str, arguments[1:]))} in {time.monotonic() - started:.0f} s", flush=True)
    return code, printed.getvalue()


def wants(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is not in\n{text}"


def check_good_calls(run, results):
    for name in ("first", "second", "third"):
        # No time limit decides whether this test passes on a busy machine.
        code, printed = call(run, results, name, limit=1800)
        assert code == 0, printed
        wants(printed, "no failures", *(f"{part}: " for part in run.CALLS[name][1]))
    readme = (results / "README.md").read_text()
    wants(readme, "card: Pretended GPU; 4 multiprocessors", "2 of 2 tests pass", "twice the same bits")
    wants(readme, "| attention_forward | tiny tiny x2 | sdpa cudnn |", "| attention_backward | tiny tiny x2 | flex |", "## Counters")
    wants(readme, "| attention_backward | tiny 40/0/0 x2 | sdpa flash |", "liger triton", "liger cute", "| step | tiny tiny x2 | pytorch packed |")
    wants(readme, "| adamw 8-bit | tiny tiny x2 | 8-bit |", "pytorch compile", "three products", "| rms_norm | 2,000 | 9 |", "## What was predicted")
    assert (results / "peer-cache.tar.gz").exists() and (results / "train-metrics.jsonl").exists()
    # The second call finds what the first compiled.
    shutil.rmtree(os.environ["MMPO_FAST_PEER_CACHE"])
    code, printed = call(run, results, "machine")
    assert code == 0 and Path(os.environ["MMPO_FAST_PEER_CACHE"]).exists(), printed


def check_failures(run, folder, monkey):
    """Whatever goes wrong is told first, and costs nothing of the rest."""
    code, printed = call(run, folder / "tests", "first", faults="tests")
    assert code == 1
    wants(printed, "FAILED attention_backward::kinds_of_pairs::gpu: exit code 101", "7 of 96 values are wrong", "with (pairs, shape) = ([(5, 4, 7)]")
    wants(printed, "FAILED linear::forward::gpu_our_products: it did not come to an end", "FAILED logp_head::forward::gpu: ended by signal 11")
    wants(printed, "FAILED layouts/wgmma_d: row 3, column 5 is 2, wanted 7", "base: loss is 2, not 1", "no panic, but words", "train: twice the same bits")
    code, printed = call(run, folder / "sanitize", "sanitize", faults="tests", limit=12)
    wants(printed, "memcheck: FAILED swiglu::forward::gpu: exit code 9", "Invalid __global__ read of size 4 bytes")
    code, printed = call(run, folder / "none", "layouts", "kernels", "train", "profile", faults="no tests", limit=25)
    wants(printed, "FAILED layouts: exit code 1", "kernels lists no tests", "FAILED random_model", "NOT RUN: part" if "NOT RUN" in printed else "")
    code, printed = call(run, folder / "late", "machine", "kernels", limit=run.RESERVE + 1.4)
    assert code == 1
    wants(printed, "NOT RUN: part machine, for lack of time", "NOT RUN: 2 tests" if "NOT RUN: 2" in printed else "FAILED")
    for name, value in monkey(run):
        code, printed = call(run, folder / name, *value)
        assert code == 1, printed


def main():
    started = time.monotonic()
    program, kernels, random_model = (str(Path(argument).resolve()) for argument in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bundle = folder / "bundle"
        make_bundle(bundle, HERE / "programs")
        library = folder / "libcuda.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests/fake_driver/libcuda.c"], check=True)
        os.environ |= {
            "MMPO_FAST_DRY_RUN": "1",
            "MMPO_FAST_DRY_PROGRAM": program,
            "MMPO_FAST_DRY_KERNELS": kernels,
            "MMPO_FAST_DRY_RANDOM_MODEL": random_model,
            "MMPO_FAST_LIBCUDA": str(library),
            "MMPO_FAST_PEER_CACHE": str(folder / "peer-cache"),
            "PATH": f"{HERE / 'path'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HERE / "site"),
            # More threads spin while they wait for a core.
            "OMP_NUM_THREADS": "1",
        }
        sys.path.insert(0, str(bundle))
        with Coverage(bundle) as coverage:
            import run

            check_good_calls(run, folder / "good")
        print("\n".join(coverage.missing()))
    took = time.monotonic() - started
    print(f"dry run: {took:.0f} s")


if __name__ == "__main__":
    main()
