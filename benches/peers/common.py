"""What the peers share: shapes, arguments, made-up inputs, timing and rows of results. README.md is the specification.

A call is timed alone, by CUDA events on a GPU and by the clock on a CPU, behind a read of other memory that empties the caches.
Variants take turns call by call (A B A B), so that a machine that slows down slows them all.
"""

import argparse
import csv
import datetime
import json
import math
import platform
import re
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

HEADER = ("date", "machine", "peer", "op", "shape", "median_us", "min_us", "max_us", "flops", "bytes", "workspace")
TOKEN_STREAM = 1 << 20
OPERAND_STREAM = 1 << 21
# About 1.5 ms: longer than PyTorch takes to queue what is timed.
SLEEP_CYCLES = 3_000_000
# As `bench::measure::Method` in Rust: seconds of the device after which a long operation has warmed up.
ENOUGH = 0.04
# Importing PyTorch takes a good part of a short time.
STARTED = time.monotonic()


def find_shapes():
    """Beside this folder in the repository, inside it in a bundle."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "shapes.json", here.parent / "shapes.json") if path.exists())


SHAPES = json.loads(find_shapes().read_text())


class Shape:
    """As `bench::shapes::Shape` in Rust: a model, the lengths of its pairs, and how many pairs there are."""

    def __init__(self, arguments, case=None):
        """`case`: `MODEL:PROFILE` or `MODEL:PROFILE:PAIRS` instead of the arguments' own."""
        self.model, self.profile, *pairs = case.split(":") if case else (arguments.shape, arguments.profile)
        self.config = dict(SHAPES["common"], **SHAPES["models"][self.model])
        if arguments.layers:
            self.config["num_hidden_layers"] = arguments.layers
            self.model += f"[{arguments.layers}]"
        if self.profile in SHAPES["profiles"]:
            lengths = SHAPES["profiles"][self.profile]
            self.prompt, self.chosen, self.rejected = lengths["prompt"], lengths["chosen"], lengths["rejected"]
        else:
            self.prompt, self.chosen, self.rejected = (int(part) for part in self.profile.split("/"))
        self.pair_tokens = self.prompt + self.chosen + self.rejected
        self.pairs = int(pairs[0]) if pairs else arguments.pairs or max(1, arguments.tokens // self.pair_tokens)
        self.hidden = self.config["hidden_size"]
        self.mlp = self.config["intermediate_size"]
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_size = self.config["head_dim"]
        self.vocabulary = self.config["vocab_size"]

    @property
    def name(self):
        return f"{self.model} {self.profile} x{self.pairs}"

    @property
    def tokens(self):
        return self.pairs * self.pair_tokens

    @property
    def scored(self):
        return self.pairs * (self.chosen + self.rejected)

    @property
    def plain(self):
        """Causal sequences without responses."""
        return self.scored == 0

    @property
    def visible(self):
        """Query-key pairs that the shared-prefix mask lets through."""
        triangle = lambda rows: rows * (rows + 1) // 2
        responses = sum(rows * self.prompt + triangle(rows) for rows in (self.chosen, self.rejected))
        return self.pairs * (triangle(self.prompt) + responses)


def arguments_of(description, argv=None, extra=lambda parser: None):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES["models"], default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="layers of the model, where all are too many")
    parser.add_argument("--profile", default="ultrafeedback", help="a name in shapes.json, or P/C/R; P/0/0 are causal sequences")
    parser.add_argument("--case", action="append", help="MODEL:PROFILE[:PAIRS], instead of these; may be repeated")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch, prompts once")
    parser.add_argument("--pairs", type=int, help="pairs of a batch, instead of tokens")
    parser.add_argument("--warmups", type=int, help="calls before the timed ones, however long each is")
    parser.add_argument("--calls", type=int, help="timed calls, however long each is")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more when these are over")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--only", action="append", default=[], help="variants whose names contain this")
    parser.add_argument("--csv", type=Path, help="add a row a result to this file")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes, to see that everything runs")
    extra(parser)
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device == "cuda"
    if arguments.tiny:
        arguments.shape, arguments.profile, arguments.pairs = "tiny", "tiny", 2
        arguments.warmups, arguments.calls = arguments.warmups or 0, arguments.calls or 1
    asked = arguments.warmups is not None or arguments.calls is not None
    arguments.warmups = arguments.warmups if arguments.warmups is not None else (50 if on_gpu else 2)
    arguments.calls = arguments.calls or (50 if on_gpu else 7)
    arguments.enough = ENOUGH if on_gpu and not asked else float("inf")
    arguments.end = STARTED + arguments.seconds
    torch.set_num_threads(arguments.threads)
    return arguments


def has_time(arguments, what):
    """Whether something more may begin; says what is left out otherwise."""
    if time.monotonic() < arguments.end:
        return True
    print(f"{what}: left out, the time of --seconds is over", flush=True)
    return False


def shapes_of(arguments):
    """What is measured in one process: the cases, or the one shape, as far as time goes."""
    for case in arguments.case or [None]:
        shape = Shape(arguments, case)
        if has_time(arguments, shape.name):
            yield shape


def dtype_of(arguments):
    return torch.bfloat16 if arguments.device == "cuda" else torch.float32


def scramble(stream, elements):
    """SplitMix64's finaliser over a counter, as `bench::inputs::scramble` in Rust."""
    z = (np.uint64(stream << 40) + elements + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(seed, *shape, device, dtype, scale=1.0):
    """Never zeros, which a GPU multiplies faster than other numbers."""
    generator = torch.Generator(device=device).manual_seed(OPERAND_STREAM + seed)
    return (torch.randn(*shape, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)


def pair_tokens(shape):
    """`[pairs, P + C + R]`, the tokens of `bench::inputs::pairs`."""
    count = shape.pairs * shape.pair_tokens
    tokens = scramble(TOKEN_STREAM, np.arange(count, dtype=np.uint64)) % np.uint64(shape.vocabulary)
    return torch.from_numpy(tokens.astype(np.int64)).view(shape.pairs, shape.pair_tokens)


def relative_error(got, wanted):
    """`|got - wanted| / |wanted|` in f64; a NaN stays one."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return ((got - wanted).norm() / wanted.norm()).item()


class Wrong(Exception):
    """A peer's results are not what f64 says."""


def check(what, got, wanted, dtype):
    """Nothing is timed that computes wrong."""
    error, allowed = relative_error(got, wanted), 2e-2 if dtype == torch.bfloat16 else 1e-4
    if not error <= allowed:
        raise Wrong(f"{what}: its results differ by {error:.2e} from those in f64, {allowed:.0e} is allowed")
    print(f"{what}: checked, {error:.1e} from f64", flush=True)


class Stopwatch:
    def __init__(self, arguments):
        self.on_gpu = arguments.device == "cuda"
        self.warmups, self.calls, self.enough = arguments.warmups, arguments.calls, arguments.enough
        size = 0 if arguments.tiny else (256 << 20 if self.on_gpu else 128 << 20)
        self.flush = torch.ones(size // 4, device=arguments.device)

    def measure(self, variants):
        """`variants`: name -> (run, prepare or None). Returns name -> seconds of the timed calls; variants take turns."""
        warmed = [self.warm_up(*variant) for variant in variants.values()]
        # The slowest decides: variants take turns.
        calls = self.calls_of(max(warmed, default=0.0))[1]
        seconds = {name: [] for name in variants}
        for _ in range(calls):
            for name, (run, prepare) in variants.items():
                if prepare:
                    prepare()
                seconds[name].append(self.time(run))
        return seconds

    def calls_of(self, seconds):
        """Warm-up calls and timed calls of an operation that takes so long: the numbers that were asked for, fewer of long ones."""

        def within(enough, least, most):
            return min(most, max(least, math.ceil(min(enough / max(seconds, 1e-9), most))))

        return within(self.enough, 3, self.warmups), within(2 * self.enough, 7, self.calls)

    def warm_up(self, run, prepare):
        """Seconds of a call that is warm, or 0 where no warm-up was asked for."""
        done, wanted, seconds = 0, self.warmups, 0.0
        while done < wanted:
            if prepare:
                prepare()
            if done < 2:
                # The first call also compiles or loads.
                seconds = self.time(run)
                wanted = self.calls_of(seconds)[0]
            else:
                run()
            done += 1
        return seconds

    def time(self, run):
        if self.on_gpu:
            # The GPU waits while the host queues, so that the time between the events is the GPU's and not Python's.
            torch.cuda._sleep(SLEEP_CYCLES)
        self.flush.sum()
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def machine(arguments):
    if arguments.device == "cuda":
        return f"cuda:0 ({torch.cuda.get_device_name()})"
    try:
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        name = platform.machine()
    return f"cpu ({name}; {arguments.threads} threads)"


def workspace(arguments, run):
    """Most bytes that a run takes on a GPU at once, beside what was there before and what it returns."""
    if arguments.device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    kept = sum(result.numel() * result.element_size() for result in results)
    return torch.cuda.max_memory_allocated() - before - kept


def report(arguments, shape, op, seconds, flops=0, bytes_=0, workspaces=None):
    """Prints a line a variant, and adds a row to the file of `--csv`. `workspaces`: bytes by variant."""
    rows = []
    for peer, samples in seconds.items():
        low, median, high = (1e6 * value for value in (min(samples), statistics.median(samples), max(samples)))
        rate = f", {flops / median / 1e6:.2f} TFLOP/s" if flops else f", {bytes_ / median / 1e3:.0f} GB/s"
        pairs = f", {shape.pairs / median * 1e6:.0f} pairs/s"
        held = (workspaces or {}).get(peer, 0)
        memory = f", workspace {held / 2**20:.0f} MiB" if held else ""
        print(f"{op:24} {peer:40} {median:12.1f} us ({low:.1f} to {high:.1f}){rate}{pairs}{memory}", flush=True)
        columns = (datetime.date.today(), machine(arguments), peer, op, shape.name)
        rows.append((*columns, *(f"{value:.3f}" for value in (median, low, high)), flops, bytes_, held))
    if arguments.csv:
        new = not arguments.csv.exists() or arguments.csv.stat().st_size == 0
        with arguments.csv.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([HEADER, *rows] if new else rows)


@contextmanager
def left_out(arguments, name):
    """A peer that this machine lacks, or that computes wrong, is named and left out; the others are measured all the same."""
    try:
        yield
    except Wrong as error:
        print(f"{name}: left out: {error}", flush=True)
        arguments.wrong = True
    except Exception as error:
        print(f"{name}: not on this machine: {type(error).__name__}: {error}", flush=True)


def finish(arguments):
    """Ends the program with an error if a peer computed wrong."""
    if getattr(arguments, "wrong", False):
        raise SystemExit(1)


def wanted(arguments, variants):
    """Those that `--only` lets through."""
    return {name: v for name, v in variants.items() if not arguments.only or any(o in name for o in arguments.only)}
