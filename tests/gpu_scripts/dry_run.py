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
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADER = "date,machine,peer,op,shape,median_us,min_us,max_us,flops,bytes,workspace"
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
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels/some_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package.py", "")
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
        if name == "first":
            wants(printed, "collectives: NCCL on 1 of 1 GPUs")
    code, printed = call(run, results, "scaling", limit=60)
    assert code == 0, printed
    wants(printed, "scaling: fewer than two GPUs: nothing to compare")
    # The programs compute on one emulated GPU each, and find the library that stands in for NCCL.
    os.environ["FAKE_CUDA_GPUS"] = "2"
    code, printed = call(run, results, "scaling", limit=1800)
    del os.environ["FAKE_CUDA_GPUS"]
    assert code == 0, printed
    wants(printed, "collectives: NCCL on 2 of 2 GPUs", "scaling: on up to 2 GPUs")
    rows = (results / "scaling.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["strong", "states", "1"], ["strong", "states", "2"], ["weak", "states", "2"]], rows
    readme = (results / "README.md").read_text()
    wants(readme, "card: Pretended GPU; 4 multiprocessors", "2 of 2 tests pass", "twice the same bits")
    wants(readme, "| attention_forward | tiny tiny x2 | sdpa cudnn |", "| attention_backward | tiny tiny x2 | flex |", "## Counters")
    wants(readme, "| attention_backward | tiny 40/0/0 x2 | sdpa flash |", "liger triton", "liger cute", "| step | tiny tiny x2 | pytorch packed |")
    wants((results / "raw.csv").read_text(), ",8-bit,adamw 8-bit,tiny tiny x2,")
    wants(readme, "pytorch compile", "three products", "| rms_norm | 2,000 | 9 |", "## What was predicted")
    assert (results / "peer-cache.tar.gz").exists() and (results / "train-metrics.jsonl").exists()
    # The second call finds what the first compiled.
    shutil.rmtree(os.environ["MMPO_FAST_PEER_CACHE"])
    code, printed = call(run, results, "machine")
    assert code == 0 and Path(os.environ["MMPO_FAST_PEER_CACHE"]).exists(), printed


def check_failures(run, folder):
    """Whatever goes wrong is told first, and costs nothing of the rest."""
    code, printed = call(run, folder / "tests", "first", faults="tests", limit=300)
    assert code == 1
    wants(printed, "FAILED attention_backward::kinds_of_pairs::gpu: exit code 101", "7 of 96 values are wrong", "with (pairs, shape) = ([(5, 4, 7)]")
    wants(printed, "FAILED linear::forward::gpu_our_products: it did not come to an end", "FAILED logp_head::forward::gpu: ended by signal 11")
    wants(printed, "FAILED layouts/wgmma_d: row 3, column 5 is 2, wanted 7", "base: loss is 2, not 1", "value 3 is 2, wanted 7", "no panic, but words", "train: twice the same bits")
    assert printed.index(" FAILURES") < printed.index("FAILED layouts"), printed
    code, printed = call(run, folder / "sanitize", "sanitize", faults="tests", limit=60)
    wants(printed, "memcheck: FAILED swiglu::forward::gpu: exit code 9", "Invalid __global__ read of size 4 bytes", "racecheck: FAILED")
    assert "linear::forward" not in printed, "a test that is slow under a checker has not failed"
    _, printed = call(run, folder / "none", "layouts", "kernels", "collectives", "train", faults="no tests", limit=60)
    wants(printed, "FAILED layouts: exit code 1", "kernels lists no tests", "FAILED random_model", "no NCCL: collectives of GPUs are not tested")
    _, printed = call(run, folder / "train", "train", faults="train", limit=60)
    wants(printed, "FAILED train: exit code 1", "CUDA_ERROR_ILLEGAL_ADDRESS")
    _, printed = call(run, folder / "bits", "train", faults="bits", limit=120)
    wants(printed, "FAILED train: two runs differ, first at byte", "; 1 of the next million bytes do")


def check_no_time(run, folder):
    code, printed = call(run, folder / "late", "machine", "kernels", limit=run.RESERVE + 0.5)
    assert code == 1
    wants(printed, "NOT RUN: part machine, for lack of time")
    with (folder / "log").open("w") as log:
        found = run.kernel_tests.run_all(HERE / "programs/kernels", "gpu", run.processes.Clock(0.1), log, 5, 2)
        assert found == ("0 of 2 tests pass; 2 left out", ["NOT RUN: 2 tests, for lack of time"]), found
        clock = run.processes.Clock(0)
        assert run.Run(folder, folder, "").program("it", ["true"], log, clock.left()) == "FAILED it: no time was left"


def check_mistakes(run, folder):
    """Of whoever calls, of the scripts themselves, and of the machine."""
    for arguments, said in (((), "usage: run.sh"), ((folder / "x", "kernles"), "no part is called kernles")):
        try:
            call(run, *arguments)
        except SystemExit as end:
            wants(str(end), said)
        else:
            raise AssertionError(said)
    parts, run.PARTS["machine"] = run.PARTS["machine"], lambda *_: 1 / 0
    most, run.MOST_PRINTED = run.MOST_PRINTED, 40
    _, printed = call(run, folder / "mistake", "machine")
    wants(printed, "machine: ended by a mistake of this script", "... the rest is in report.txt")
    run.PARTS["machine"], run.MOST_PRINTED = parts, most
    wants((folder / "mistake/report.txt").read_text(), "ZeroDivisionError")
    (folder / "rows").mkdir()
    (folder / "rows/raw.csv").write_text("date,machine,peer,op,shape\n1,2,3,4,5\n")
    code, printed = call(run, folder / "rows", "machine")
    assert code == 1
    wants(printed, "the summary: exit code 1", "KeyError")
    with (folder / "log").open("w") as log:
        wants(run.processes.run(["no-such-program"], log, 1), "no-such-program")
        stubborn = ["bash", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
        assert run.processes.run(stubborn, log, 0.5) == run.processes.OVER
    wants(run.card.describe("no-such-library.so"), "no driver (")
    assert run.card.gpus("no-such-library.so") == 0
    os.environ["FAKE_CUDA_GPUS"] = "0"
    wants(run.card.describe(os.environ["MMPO_FAST_LIBCUDA"]), "the driver answers with error 101")
    path, os.environ["PATH"] = os.environ["PATH"], ""
    wants(run.card.clocks(), "nvidia-smi does not say")
    os.environ["PATH"] = path
    # Caches that are too large to travel stay where they are.
    most, run.MOST_CACHE = run.MOST_CACHE, 0
    there = run.Run(folder, folder, "")
    there.background, there.caches = [], folder / "late"
    run.end_background(there)
    assert not (folder / "peer-cache.tar.gz").exists()
    run.MOST_CACHE = most


# Operation, shape, microseconds by engine; and what the summary must say of it.
MADE_UP = (
    ("attention_forward", "m 4096/0/0 x1", {"mmpo-fast": 10, "sdpa cudnn": 11, "sdpa flash": 20}, "at least 1.0 x sdpa cudnn | 1.100 | yes |"),
    ("attention_forward", "m 8192/0/0 x1", {"mmpo-fast": 10}, "sdpa cudnn or sdpa flash | not measured | - |"),
    ("attention_backward", "m hh-rlhf x2", {"mmpo-fast": 10, "sdpa cudnn": 11, "flex": 30}, "at least 1.15 x sdpa cudnn | 1.100 | **no** |"),
    (
        "logp_head forward and backward",
        "m 1/1/1 x4",
        {"mmpo-fast": 10, "liger triton": 40, "liger whole": 12, "compile": 15, "three products": 8},
        "at most 1.1 of three products | 1.250 | **no** |",
    ),
    ("linear_forward qkv", "m 1/1/1 x1", {"mmpo-fast": 10, "cuBLASLt": 20}, "mean of 2 plain products, m | at least 0.98 x cuBLASLt | 1.000 |"),
    ("linear_backward_weight qkv", "m 1/1/1 x1", {"mmpo-fast": 10, "cuBLASLt": 5}, "yes |"),
    # Of ten microseconds the order takes four, of a step with 20 in attention's backward eight.
    ("attention_backward any order", "m hh-rlhf x2", {"mmpo-fast": 6}, "What was asked for"),
    ("step: attention backward", "m hh-rlhf x2", {"mmpo-fast": 20}, "What was asked for"),
    ("step", "m hh-rlhf x2", {"mmpo-fast": 100}, "dQ's fixed order, of a step, m hh-rlhf x2 | at most 0.05 | 0.080 | **no** |"),
    ("step", "m long x2", {"mmpo-fast": 100}, "dQ's fixed order, of a step, m long x2 | at most 0.05 | not measured | - |"),
)


def check_asked(summary, folder):
    """The ratios of a GPU's made-up results, with peers that are missing."""
    folder.mkdir()
    rows = [HEADER]
    for op, shape, engines, _ in MADE_UP:
        rows += [f"2026-01-01,cuda:0 (made up),{engine},{op},{shape},{us},{us},{us},0,0,0" for engine, us in engines.items()]
    (folder / "raw.csv").write_text("\n".join(rows) + "\n")
    (folder / "about.txt").write_text("command: none\n")
    readme = summary.write(folder)
    for *_, wanted in MADE_UP:
        assert wanted in readme, f"{wanted} is not in\n{readme}"
    for wanted in ("at least 1.05 x liger whole | 1.200 | yes", "at least 3.0 x liger triton | 4.000 | yes", "at least 2.0 x flex | 3.000 | yes"):
        assert wanted in readme, f"{wanted} is not in\n{readme}"



def check_summary(summary, folder):
    """Of results that have little, of a machine's, and as a program."""
    (folder / "empty").mkdir()
    (folder / "empty/about.txt").write_text("command: none\n")
    wants(summary.write(folder / "empty"), "No peer was measured in this run.")
    summary.write(folder / "good")
    table = "\n".join(summary.questions())
    wants((ROOT / "benches/results/README.md").read_text(), table)
    folder = folder / "figures"
    folder.mkdir()
    rows = [HEADER]
    for op, shape, engine, us, flops, moved in FIGURES:
        rows.append(f"2026-01-01,cuda:0 (made up),{engine},{op},{shape},{us},{us},{us},{flops},{moved},0")
    (folder / "raw.csv").write_text("\n".join(rows) + "\n")
    (folder / "about.txt").write_text("command: none\n")
    (folder / "parts.json").write_text(json.dumps({part: {"outcome": "done"} for part in ("attention", "head", "step", "memory", "kernels")}))
    readme = summary.write(folder)
    wants(readme, "| 70 to 80 % | 0.750 | yes |", "1.000 x in a model of multiprocessors) | 1.250 | **no** |", "(1000 launches) | 0.040 | yes |")
    wants(readme, "(row 'in one chunk') | 1.250 | **no** |", "at least 85 % | 0.900 | yes |", "at least 1.05 x | not measured | - |", "turns do not depend on time | done | - |")
    assert "compute-sanitizer" not in readme, "a part that did not run"


FIGURES = (
    ("ceiling copy", "machine", "mmpo-fast", 10, 0, 1000),
    ("ceiling product", "machine", "mmpo-fast", 10, 1000, 0),
    ("attention_forward", "llama-3-8b 8192/0/0 x1", "mmpo-fast", 10, 750, 1),
    ("attention_backward", "smollm2-135m ultrafeedback x10", "mmpo-fast", 10, 1, 1),
    ("attention_backward any order", "smollm2-135m ultrafeedback x10", "mmpo-fast", 8, 1, 1),
    ("logp_head forward and backward", "llama-3.2-1b 256/256/256 x8", "mmpo-fast", 10, 1, 1),
    ("logp_head forward and backward", "llama-3.2-1b 256/256/256 x8", "three products", 8, 1, 1),
    ("step", "smollm2-135m ultrafeedback x10", "mmpo-fast", 100, 1, 0),
    ("step: between operations", "smollm2-135m ultrafeedback x10", "mmpo-fast", 4, 0, 0),
    ("rms_norm_forward", "llama-3.2-1b ultrafeedback x10", "mmpo-fast", 10, 0, 900),
)


def main():
    started = time.monotonic()
    program, kernels, random_model = (str(Path(argument).resolve()) for argument in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        bundle = folder / "bundle"
        make_bundle(bundle, HERE / "programs")
        library = folder / "libcuda.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests/fake_driver/libcuda.c"], check=True)
        nccl = folder / "nccl"
        nccl.mkdir()
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-o", nccl / "libnccl.so.2"]
        subprocess.run(["c++", *flags, ROOT / "tests/nccl/library.cpp", "-lpthread"], check=True)
        os.environ |= {
            "MMPO_FAST_DRY_NCCL": str(nccl),
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
            import summary

            check_good_calls(run, folder / "good")
            check_failures(run, folder)
            check_no_time(run, folder)
            check_mistakes(run, folder)
            check_asked(summary, folder / "asked")
            check_summary(summary, folder)
        missing = list(coverage.missing())
        assert not missing, "lines that nothing has tried:\n" + "\n".join(missing)
    print(f"GPU scripts  every line of {', '.join(COVERED)} tried in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
