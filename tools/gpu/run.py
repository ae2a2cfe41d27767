"""The parts of run.sh, which README.md describes. Every part has a share of its call's time and stops with what it has; after each,
the summary is written again, so that a machine that is taken away costs what was not yet done and nothing else."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

import card
import kernel_tests
import processes

BUNDLE = Path(__file__).resolve().parent
# Seconds of each call, and its parts by worth with their shares of them.
CALLS = {
    "first": (200, {"machine": 4, "layouts": 22, "kernels": 90, "goldens": 24, "collectives": 10, "train": 48}),
    "second": (200, {"attention": 70, "head": 45, "products": 35, "step": 45}),
    "third": (150, {"sanitize": 40, "profile": 22, "memory": 20, "shapes": 34, "steps": 28, "load": 8}),
    # For a machine with several GPUs.
    "scaling": (300, {"collectives": 30, "scaling": 270}),
}
# What is kept for unpacking, the last summary and packing.
RESERVE = 5
# One test of the kernels, alone and under a memory checker.
TEST_SECONDS, CHECKED_TEST_SECONDS = 20, 30
# Characters of the report: whoever sees only the end of the output sees all of it.
MOST_PRINTED = 11_000
MOST_CACHE = 15 << 20

# The few shapes that stand for the rest.
CAUSAL = ["llama-3.2-1b:8192/0/0:1", "llama-3-8b:8192/0/0:1"]
PAIRS = ["llama-3.2-1b:ultrafeedback", "llama-3-8b:ultrafeedback", "llama-3.2-1b:long", "llama-3-8b:long"]
HEADS = ["llama-3.2-1b:256/256/256:8", "smollm2-135m:256/256/256:8"]
# The others.
MORE_ATTENTION = [f"{model}:{tokens}/0/0:1" for tokens in (4096, 16384, 32768) for model in ("llama-3.2-1b", "llama-3-8b")]
MORE_ATTENTION += ["llama-3.2-1b:hh-rlhf", "llama-3-8b:hh-rlhf"]
MORE_HEADS = ["llama-3-8b:256/256/256:8", "llama-3.2-1b:256/256/256:16", "smollm2-135m:256/256/256:16"]
# Whose step is timed, and of whose time the order of dQ takes a share.
STEP = "smollm2-135m", "ultrafeedback"
# Threads of the CPU, which only queues work.
PEER_THREADS = "8"
# As many as ours.
STEPS = ["--warmups", "10", "--calls", "20"]
ATTENTION = ["--only", "attention_forward", "--only", "attention_backward"]
HEAD = ["--only", "logp_head forward and backward"]
HEAD_PEERS = ["--only", "compile", "--only", "liger", "--only", "products"]
COUNTED = "attention|gemm|logp_head|rms_norm|swiglu|adamw"
METRICS = (
    "gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "dram__bytes.sum,lts__t_sector_hit_rate.pct,sm__inst_executed_pipe_tensor.sum,l1tex__data_bank_conflicts_pipe_lsu.sum,"
    "launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active"
)
# The script's own test runs everything on the emulated device, at these.
TINY = os.environ.get("MMPO_FAST_DRY_RUN") is not None
if TINY:
    CAUSAL, PAIRS, HEADS = ["tiny:40/0/0:2"], ["tiny:tiny:2"], ["tiny:tiny:2"]
    MORE_ATTENTION, MORE_HEADS, STEP = ["tiny-128:tiny:1"], ["tiny-128:tiny:1"], ("tiny", "tiny")
    STEPS, PEER_THREADS = ["--warmups", "1", "--calls", "2"], "1"
    TEST_SECONDS = CHECKED_TEST_SECONDS = 6


class Failed(Exception):
    """A part that did not do what it should; its texts are what is printed first."""


class Run:
    """One call: where things are, and what came out so far."""

    def __init__(self, results, scratch, command):
        self.results, self.scratch, self.command = results, scratch, command
        self.raw = results / "raw.csv"
        self.bin = scratch / "bin"
        self.failures, self.outcomes = [], []
        self.model = None

    def prepare(self):
        """Unpacks what came compressed, and makes the random model beside all else."""
        with tarfile.open(BUNDLE / "bin.tar.gz") as programs:
            programs.extractall(self.scratch, filter="data")
        site = self.scratch / "site"
        for wheel in sorted((BUNDLE / "wheels").glob("*.whl")):
            subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
        caches = Path(os.environ.get("MMPO_FAST_PEER_CACHE", Path(tempfile.gettempdir()) / "mmpo-fast-peer-cache"))
        for packed in (self.results / "peer-cache.tar.gz", BUNDLE / "peer-cache.tar.gz"):
            if packed.exists() and not caches.exists():
                with tarfile.open(packed) as archive:
                    archive.extractall(caches, filter="data")
        caches.mkdir(parents=True, exist_ok=True)
        self.caches = caches
        environment = {
            "MMPO_FAST_GOLDENS": BUNDLE / "goldens",
            "MMPO_FAST_CACHE": self.scratch / "cache",
            "MMPO_FAST_REQUIRE_GPU": 1,
            "PYTHONUNBUFFERED": 1,
            "RUST_BACKTRACE": 0,
            "TORCHINDUCTOR_CACHE_DIR": caches / "inductor",
            "TRITON_CACHE_DIR": caches / "triton",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [*nvidia_libraries(), os.environ.get("LD_LIBRARY_PATH")])),
        }
        os.environ.update({name: str(value) for name, value in environment.items()})

    def about(self):
        version = subprocess.run([self.bin / "mmpo-fast", "--version", "--verbose"], capture_output=True, text=True).stdout
        lines = [
            f"command: {self.command}",
            f"date: {time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime())}",
            f"commit: {(BUNDLE / 'commit').read_text().strip()}",
            f"card: {card.describe(os.environ.get('MMPO_FAST_LIBCUDA', 'libcuda.so.1'))}",
            f"mmpo-fast: {'; '.join(version.split(chr(10))).strip('; ')}",
            f"state: {card.clocks()}",
        ]
        with (self.results / "about.txt").open("a") as about:
            about.write("\n".join(lines) + "\n")

    def part(self, name, seconds):
        """Runs one part, and writes down what came out."""
        started = time.monotonic()
        with (self.results / f"{name}.txt").open("w") as log:
            try:
                if seconds < 1:
                    raise Failed(f"NOT RUN: part {name}, for lack of time")
                outcome = PARTS[name](self, processes.Clock(seconds), log) or "done"
            except Failed as failed:
                outcome = "failed"
                self.failures += failed.args
            # A mistake in a part must not cost the others.
            except Exception:
                outcome = "ended by a mistake of this script"
                self.failures.append(f"part {name}: {traceback.format_exc(limit=-3)}")
        took = f"{time.monotonic() - started:.0f} s of {seconds:.0f}"
        self.outcomes.append((name, outcome, took))
        print(f"{name}: {outcome} ({took})", flush=True)
        self.summarise()

    def summarise(self):
        """Everything that is known, into the folder of results."""
        path = self.results / "parts.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known |= {name: {"outcome": outcome, "took": took} for name, outcome, took in self.outcomes}
        path.write_text(json.dumps(known, indent=1) + "\n")
        (self.results / "report.txt").write_text(self.report())
        log = self.results / "summary.txt"
        with log.open("w") as file:
            wrong = processes.run([sys.executable, BUNDLE / "summary.py", self.results], file, 20)
        if wrong:
            self.failures.append(f"the summary: {wrong}\n{log.read_text()[-800:]}")

    def report(self):
        lines = [f"{len(self.failures)} FAILURES" if self.failures else "no failures", *self.failures, ""]
        lines += [f"{name}: {outcome} ({took})" for name, outcome, took in self.outcomes]
        return "\n".join(lines) + "\n"

    def ours(self, clock, log, share, *arguments):
        """`mmpo-fast bench` for a share of the time that is left; a text if it fails."""
        seconds = clock.left() * share
        command = [self.bin / "mmpo-fast", "bench", *arguments, "--device", "cuda", "--csv", self.raw]
        return self.program(f"bench {' '.join(arguments)}", [*command, "--seconds", f"{0.8 * seconds:.1f}"], log, seconds)

    def peer(self, clock, log, share, script, *arguments):
        seconds = clock.left() * share
        command = [sys.executable, BUNDLE / "peers" / script, "--threads", PEER_THREADS, "--csv", self.raw, *arguments]
        command += ["--seconds", f"{0.8 * seconds:.1f}", *(["--tiny"] if TINY else [])]
        return self.program(f"{script} {' '.join(arguments)}", command, log, seconds)

    def program(self, name, command, log, seconds, **options):
        log.write(f"== {name}, at most {seconds:.0f} s\n")
        log.flush()
        at = log.tell() if log.seekable() else 0
        wrong = processes.run(command, log, seconds, **options) if seconds >= 0.5 else "no time was left"
        if not wrong:
            return None
        written = Path(log.name).read_bytes()[at:].decode(errors="replace").strip().splitlines()[-6:]
        return "\n".join([f"FAILED {name}: {wrong}", *(f"    {line[:400]}" for line in written)])


def nvidia_libraries():
    """cuBLASLt where it comes with PyTorch."""
    spec = importlib.util.find_spec("nvidia")
    return [str(path) for root in (spec.submodule_search_locations if spec else []) for path in Path(root).glob("*/lib")]


def must(*results):
    """Raises what is not None of the results of programs."""
    wrong = [result for result in results if result]
    if wrong:
        raise Failed(*wrong)


def cases_of(names):
    return [argument for name in names for argument in ("--case", name)]


def machine(run, clock, log):
    # Only for people: nothing here can fail.
    for command in (["nvidia-smi"], ["nvcc", "--version"], [sys.executable, "-m", "pip", "list", "--format", "freeze"]):
        print(f"{command[0]}: {processes.run(command, log, clock.left() / 2) or 'done'}", file=log, flush=True)


def layouts(run, clock, log):
    wrong = run.program("layouts", [run.bin / "layouts"], log, clock.left())
    text = Path(log.name).read_text()
    failures = [line for line in text.splitlines() if line.startswith("FAILED") and line.split()[1] != "layouts:"]
    must(*failures, None if failures else wrong)
    return text.strip().splitlines()[-1]


def kernels(run, clock, log):
    # Beside the tests, which leave the CPU enough of its time.
    make_model(run)
    at_once = os.cpu_count() or 1
    summary, failures = kernel_tests.run_all(run.bin / "kernels", "gpu", clock, log, TEST_SECONDS, at_once)
    must(*failures)
    return summary


def tests(run, clock, log, name, program, pattern):
    """The tests of a program whose names have the pattern, one after the other."""
    command = [run.bin / program, pattern, "--test-threads=1", "--nocapture"]
    if wrong := run.program(name, command, log, clock.left()):
        text = "\n".join(f"    {line}" for line in kernel_tests.explain(Path(log.name).read_text()))
        raise Failed(f"{wrong.splitlines()[0]}\n{text}")


def goldens(run, clock, log):
    warm_caches(run)
    tests(run, clock, log, "goldens", "cuda_training", "a_real_gpu")


def gpus():
    return card.gpus(os.environ.get("MMPO_FAST_LIBCUDA", "libcuda.so.1"))


def collectives(run, clock, log):
    """NVIDIA's NCCL, where other tests have a library of ours: groups of one rank, and of as many as there are GPUs, up to four."""
    tests(run, clock, log, "collectives", "nccl", "gpu")
    left_out = [line for line in Path(log.name).read_text().splitlines() if line.endswith("not tested")]
    return left_out[0] if left_out else f"NCCL on {min(gpus(), 4)} of {gpus()} GPUs"


def make_model(run):
    """SmolLM2-135M's shapes with random weights, made in the background."""
    if run.model is None:
        folder = run.scratch / "model"
        subprocess.run(["cp", "-r", BUNDLE / "model", folder], check=True)
        run.model = processes.start([run.bin / "random_model", folder], subprocess.DEVNULL)


def finish_model(run, clock):
    make_model(run)
    must((wrong := processes.finish(run.model, clock.left() / 2)) and f"FAILED random_model: {wrong}")


def train(run, clock, log):
    """Ordinary training, twice side by side, so that blocks of the two get into each other's way: the same bits."""
    finish_model(run, clock)
    steps = ["--max-steps", "3", "--pairs-per-step", "2"] if TINY else ["--max-steps", "20", "--pairs-per-step", "128"]
    running, outputs = [], [run.scratch / "once", run.scratch / "again"]
    for output in outputs:
        command = [run.bin / "mmpo-fast", "train", "--model", run.scratch / "model", "--data", BUNDLE / "pairs.jsonl"]
        command += ["--eval-data", BUNDLE / "eval_pairs.jsonl", "--output", output, *steps]
        command += ["--tokens-per-micro-batch", "8192", "--device", "cuda"]
        environment = os.environ | {"MMPO_FAST_CACHE": str(output) + "-cache"}
        own_log = (run.results / f"train-{output.name}.txt").open("w")
        running.append((processes.start(command, own_log, env=environment), own_log))
    for process, own_log in running:
        if wrong := processes.finish(process, clock.left()):
            text = Path(own_log.name).read_text().strip().splitlines()[-8:]
            must("\n".join([f"FAILED train: {wrong}", *(f"    {line[:400]}" for line in text)]))
    (run.results / "train-metrics.jsonl").write_bytes((outputs[0] / "metrics.jsonl").read_bytes())
    once, again = ((output / "model" / "model.safetensors").read_bytes() for output in outputs)
    if once != again:
        first = next(index for index, (a, b) in enumerate(zip(once, again)) if a != b)
        count = sum(a != b for a, b in zip(once[first : first + 10**6], again[first : first + 10**6]))
        raise Failed(f"FAILED train: two runs differ, first at byte {first} of {len(once)}; {count} of the next million bytes do")
    return "twice the same bits"


def warm_caches(run):
    """Compiles the peers' kernels of the second call, with what the first leaves of the CPU. What comes out serves machines with the same GPU,
    PyTorch and Triton."""
    for script, cases, more in (("attention.py", CAUSAL + PAIRS, []), ("head.py", HEADS, HEAD_PEERS)):
        command = ["nice", "-n", "15", sys.executable, BUNDLE / "peers" / script, "--compile-only", *cases_of(cases), *more]
        command += ["--tiny"] if TINY else []
        log = (run.results / f"compile-{script}.txt").open("w")
        run.background = getattr(run, "background", []) + [processes.start(command, log)]


def end_background(run):
    """Ends what still compiles, and packs the caches where they are small enough to travel."""
    if not hasattr(run, "background"):
        return
    for process in run.background:
        processes.finish(process, 0.1)
    packed = run.results / "peer-cache.tar.gz"
    with tarfile.open(packed, "w:gz", compresslevel=1) as archive:
        archive.add(run.caches, ".")
    if packed.stat().st_size > MOST_CACHE:
        packed.unlink()


def beside(run, clock, log, ours, script, peers):
    """Ours, the peers, ours again over the same cases."""
    must(
        run.ours(clock, log, 0.2, "kernels", *ours),
        run.peer(clock, log, 0.75, script, *peers),
        run.ours(clock, log, 1.0, "kernels", *ours),
    )


def attention(run, clock, log):
    cases = cases_of(CAUSAL + PAIRS)
    # Its step is timed too: the share that the order of dQ takes of it.
    beside(run, clock, log, [*cases, *cases_of([":".join(STEP)]), *ATTENTION], "attention.py", cases)


def head(run, clock, log):
    cases = cases_of(HEADS)
    beside(run, clock, log, [*cases, *HEAD], "head.py", [*cases, *HEAD_PEERS])


def products(run, clock, log):
    must(run.ours(clock, log, 1.0, "products"))


def step(run, clock, log):
    shape = ["--shape", STEP[0], "--profile", STEP[1], *([] if TINY else ["--tokens", "8192"])]
    must(
        run.ours(clock, log, 0.25, "step", *shape),
        run.peer(clock, log, 0.75, "step.py", *shape, *STEPS, "--variant", "packed", "--variant", "sliced"),
        run.ours(clock, log, 1.0, "step", *shape),
    )


def sanitize(run, clock, log):
    """Memory errors first, then races, over the small shapes of the tests."""
    failures, summaries = [], []
    for tool, share in (("memcheck", 0.65), ("racecheck", 1.0)):
        print(f"== {tool}", file=log, flush=True)
        before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        part = processes.Clock(clock.left() * share)
        options = {"before": before, "slow_is_wrong": False}
        program = run.bin / "kernels"
        summary, found = kernel_tests.run_all(program, "::gpu(_our_products|_any_order)?$", part, log, CHECKED_TEST_SECONDS, 8, **options)
        failures += [f"{tool}: {failure}" for failure in found]
        summaries.append(f"{tool}: {summary}")
    must(*failures)
    return "; ".join(summaries)


def profile(run, clock, log):
    """Counters of the kernels that matter, at a size that fills the GPU. Each case launches at a small shape first, where it is checked."""
    shape = "tiny:tiny:2" if TINY else "llama-3.2-1b:ultrafeedback"
    command = ["ncu", "--clock-control", "none", "--csv", "--metrics", METRICS, "--launch-count", "300"]
    command += ["--kernel-name", f"regex:{COUNTED}", "--log-file", run.results / "profile.csv", run.bin / "mmpo-fast"]
    command += ["bench", "kernels", "--device", "cuda", "--case", shape, "--warmups", "0", "--calls", "1"]
    command += ["--seconds", f"{0.6 * clock.left():.1f}"]
    for name in ("attention_forward", "attention_backward", "logp_head forward", "linear_forward gate_up", "linear_backward_weight gate_up"):
        command += ["--only", name]
    must(run.program("ncu", [*command, "--only", "rms_norm", "--only", "adamw"], log, clock.left()))


def memory(run, clock, log):
    """Every kernel beside the copy of the same run, and AdamW beside its peers."""
    cases = cases_of([":".join(STEP), PAIRS[0]])
    must(run.ours(clock, log, 0.5, "kernels", *cases), run.peer(clock, log, 1.0, "optimizer.py", *cases))


def shapes(run, clock, log):
    """The other shapes of attention and of the head."""
    attention, heads = cases_of(MORE_ATTENTION), cases_of(MORE_HEADS)
    must(
        run.ours(clock, log, 0.2, "kernels", *attention, *ATTENTION),
        run.ours(clock, log, 0.2, "kernels", *heads, *HEAD),
        run.peer(clock, log, 0.6, "attention.py", *attention),
        run.peer(clock, log, 1.0, "head.py", *heads, *HEAD_PEERS),
    )


def steps(run, clock, log):
    """The other steps: a larger model, the peers' other variants, and candle where it is in the bundle. Adapters bring an 8B step here."""
    shape = ["--shape", STEP[0], "--profile", STEP[1], *([] if TINY else ["--tokens", "8192"])]
    wrong = [run.ours(clock, log, 0.3, "step", "--shape", "llama-3.2-1b", *shape[2:])] if not TINY else []
    wrong.append(run.peer(clock, log, 0.8, "step.py", *shape, *STEPS, "--variant", "padded", "--variant", "compile"))
    candle = run.bin / "candle-peer"
    if candle.exists():
        command = [candle, "step", "--device", "cuda", *shape[:4], "--pairs", "10", "--warmups", "3", "--calls", "10", "--csv", run.raw]
        wrong.append(run.program("candle", command, log, clock.left()))
    must(*wrong)


def load(run, clock, log):
    """The random model's weights from the disk and from the system's cache onto the GPU, beside what disk and bus give."""
    finish_model(run, clock)
    command = [run.bin / "mmpo-fast", "bench", "load", "--model", run.scratch / "model", "--device", "cuda"]
    must(run.program("bench load", command, log, clock.left()))


def scaling(run, clock, log):
    """Training steps on 1, 2, 4 .. GPUs of this machine, for each way to shard: the batch of one GPU, and one that grows with them."""
    if gpus() < 2:
        return "fewer than two GPUs: nothing to compare"
    finish_model(run, clock)
    command = [sys.executable, BUNDLE / "scaling.py", "--program", run.bin / "mmpo-fast", "--csv", run.results / "scaling.csv"]
    command += ["--model", run.scratch / "model", "--data", BUNDLE / "pairs.jsonl"]
    command += ["--ranks", "1", "2", "--shard", "states", "--pairs", "2", "--steps", "3"] if TINY else []
    must(run.program("scaling", command, log, clock.left()))
    return f"on up to {gpus()} GPUs"


ALL = (machine, layouts, kernels, goldens, collectives, train, attention, head, products, step, sanitize, profile, memory, shapes, steps, load, scaling)
PARTS = {part.__name__: part for part in ALL}


def planned(words):
    """Parts with their shares, and the seconds of them all."""
    parts, seconds = {}, 0
    for word in words:
        calls = [call for call in CALLS if word in (call, *CALLS[call][1])]
        if not calls:
            sys.exit(f"run.sh: no part is called {word}; there are {', '.join([*CALLS, *PARTS])}")
        limit, shares = CALLS[calls[0]]
        parts |= shares if word == calls[0] else {word: shares[word]}
        seconds += limit if word == calls[0] else limit * shares[word] / sum(shares.values()) + RESERVE
    return parts, float(os.environ.get("MMPO_FAST_LIMIT", seconds))


def show(run):
    """The report and what was asked for, failures first; as much of it as is surely seen."""
    text = run.report()
    readme = run.results / "README.md"
    if readme.exists():
        found = re.search(r"## What was (asked|predicted).*?(?=\n## Beside)", readme.read_text(), re.DOTALL)
        text += "\n" + (found.group(0) if found else "")
    if len(text) > MOST_PRINTED:
        text = text[:MOST_PRINTED] + f"\n... the rest is in report.txt and README.md of {run.results}"
    print(text, flush=True)


def main(arguments):
    if not arguments:
        sys.exit("usage: run.sh RESULTS first|second|third|PART ...")
    parts, seconds = planned(arguments[1:] or ["first"])
    budget = processes.Budget(seconds - RESERVE, parts.values())
    results = Path(arguments[0]).resolve()
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = Run(results, Path(scratch), f"run.sh {' '.join(arguments)}")
        run.prepare()
        run.about()
        for name in parts:
            run.part(name, budget.next())
        end_background(run)
        with (results / "about.txt").open("a") as about:
            about.write(f"afterwards: {card.clocks()}\n")
            about.writelines(f"part {name}: {outcome} ({took})\n" for name, outcome, took in run.outcomes)
        run.summarise()
    show(run)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
