"""The kernels' tests on a GPU: each in a process of its own, as many at once as there are cores, what matters most first."""

import concurrent.futures
import re
import subprocess
import tempfile
from pathlib import Path

import processes

# Modules of the test program in the order of what would be lost with them; others follow.
WORTH = ("attention_backward", "attention_forward", "logp_head", "linear", "attention", "same_bits", "rms_norm", "embedding", "adamw")
# The GPU's own path first, then its products alone, then what older GPUs run, then what only measurements ask for.
DEVICES = ("gpu", "gpu_our_products", "gpu_portable", "gpu_any_order")
NOISE = re.compile(r"^(\s*$|running \d|test |test result|failures:|note: |error: test failed|stack backtrace)")


def worth(name):
    first, last = name.split("::")[0], name.split("::")[-1]
    module = WORTH.index(first) if first in WORTH else len(WORTH)
    device = DEVICES.index(last) if last in DEVICES else 0
    return device, module, name


def names_of(program, pattern):
    """Names of the tests that match, by worth."""
    listed = subprocess.run([program, "gpu", "--list", "--format", "terse"], capture_output=True, text=True, timeout=20, check=True)
    names = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]
    return sorted((name for name in names if re.search(pattern, name)), key=worth)


def explain(text, most=8):
    """What a fix needs of a failed test's output: the panic with the first wrong value, its index and the shape; the report of a
    memory checker, where there is one; else the last lines."""
    lines = [line for line in text.splitlines() if not NOISE.match(line)]
    checker = [line for line in lines if line.startswith("=========") and line.strip("= ")]
    found = checker[1:]
    if not found:
        panics = [index for index, line in enumerate(lines) if "panicked at" in line]
        found = lines[panics[0] :] if panics else lines[-most:]
    return [line[:400] for line in found[:most]]


def run_one(program, name, seconds, before=()):
    """None if the test passes, otherwise what was wrong and the lines that explain it."""
    with tempfile.TemporaryFile("w+") as log:
        wrong = processes.run([*before, program, "--exact", name, "--nocapture"], log, seconds)
        if wrong is None:
            return None
        log.seek(0)
        return wrong, explain(log.read())


def run_all(program, pattern, clock, log, limit, at_once, before=(), slow_is_wrong=True):
    """Runs all tests whose names match, until the clock stops. Returns how many passed, of how many, and a text for each failure.
    `slow_is_wrong`: whether a test that passes its `limit` of seconds has failed."""
    names = names_of(program, pattern)
    counts = {"passed": 0, "late": 0, "left out": 0}
    failures = []

    def one(name):
        seconds = min(limit, clock.left())
        if seconds < 0.5:
            return name, "left out"
        return name, run_one(program, name, seconds, before)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for finished in concurrent.futures.as_completed([pool.submit(one, name) for name in names]):
            name, wrong = finished.result()
            if wrong is None:
                counts["passed"] += 1
                print(f"ok {name}", file=log, flush=True)
            elif wrong == "left out":
                counts["left out"] += 1
            elif wrong[0] == processes.OVER and not slow_is_wrong:
                counts["late"] += 1
                print(f"too slow {name}", file=log, flush=True)
            else:
                failures.append("\n".join([f"FAILED {name}: {wrong[0]}", *(f"    {line}" for line in wrong[1])]))
                print(failures[-1], file=log, flush=True)
    rest = ", ".join(f"{count} {what}" for what, count in counts.items() if count and what != "passed")
    summary = f"{counts['passed']} of {len(names)} tests pass" + (f"; {rest}" if rest else "")
    print(summary, file=log, flush=True)
    if not names:
        failures.append(f"FAILED: {Path(program).name} lists no tests")
    elif counts["left out"] and slow_is_wrong:
        failures.append(f"NOT RUN: {counts['left out']} tests, for lack of time")
    return summary, failures
