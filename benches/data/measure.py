"""Time and memory of reading and tokenising pairs, with `examples/token_ids --count`.

    python measure.py pairs PAIRS.json OUT.jsonl [--count 200000] [--seed 1]
    python measure.py time PROGRAM MODEL PAIRS.jsonl
    python measure.py memory PROGRAM MODEL [--mib 3]

`pairs` makes a file of many pairs from a few: conversations with words exchanged between records, so that hardly two texts are
equal. `time` reads a file with one and with two threads: wall time, CPU time, peak memory. `memory` reads one record of which
the chosen response is one long text, of several kinds, and gives the peak beyond that of a short record, in bytes for a byte of
text.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(program, *arguments, threads=None):
    """Wall seconds, CPU seconds, peak bytes and standard output of a command."""
    environment = os.environ | ({"RAYON_NUM_THREADS": str(threads)} if threads else {})
    started = time.monotonic()
    process = subprocess.Popen([program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    out, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{program} ended with {status}: {errors.decode()[-2000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.decode().strip()


def exchanged(text, words, generator):
    """The text with every eighth word or so replaced by another of the file."""
    parts = text.split(" ")
    for _ in range(len(parts) // 8 + 1):
        parts[int(generator.random() * len(parts))] = words[int(generator.random() * len(words))]
    return " ".join(parts)


def make_pairs(source, target, count, seed):
    generator = random.Random(seed)
    records = json.loads(Path(source).read_text())
    texts = [turn["value"] for record in records for turn in [*record["conversations"], record["chosen"], record["rejected"]]]
    words = [word for text in texts for word in text.split(" ") if word.isalpha()]
    with open(target, "w") as out:
        for number in range(count):
            record = json.loads(json.dumps(records[number % len(records)]))
            for turn in [*record["conversations"], record["chosen"], record["rejected"]]:
                turn["value"] = exchanged(turn["value"], words, generator)
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def measure_time(program, model, pairs):
    for threads in (1, 2):
        wall, cpu, peak, out = run(program, "--count", model, pairs, threads=threads)
        print(f"{threads} threads: {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak / 2**20:.0f} MiB; {out}", flush=True)


KINDS = {
    "words": lambda size: "The quick brown fox jumps over the lazy dog, and 42 others. " * (size // 60),
    "one letter": lambda size: "a" * size,
    "one word": lambda size: "acgtgatc" * (size // 8),
    "spaces": lambda size: " " * size + "x",
    "marks": lambda size: "=-" * (size // 2),
    "digits": lambda size: "31415926" * (size // 8),
    "ideographs": lambda size: "月は大きい天気" * (size // 21),
    "letters with marks": lambda size: "é" * (size // 2),
    "combining marks": lambda size: "e\u0301" * (size // 3),
    "line ends": lambda size: "ab\n\n" * (size // 4),
    "emoji": lambda size: "🌕🔬" * (size // 8),
}


def measure_memory(program, model, mib):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"

        def peak(text):
            turns = [{"from": "human", "value": "Say it."}]
            record = {"conversations": turns, "chosen": {"from": "gpt", "value": text}, "rejected": {"from": "gpt", "value": "No."}}
            data.write_text(json.dumps(record, ensure_ascii=False) + "\n")
            return run(program, "--count", model, data)

        _, _, base, _ = peak("Yes.")
        print(f"a short record: peak {base / 2**20:.0f} MiB")
        for kind, make in KINDS.items():
            text = make(int(mib * 2**20))
            _, cpu, bytes_, out = peak(text)
            size = len(text.encode())
            print(f"{kind:20} {(bytes_ - base) / size:6.1f} bytes a byte, {cpu:6.2f} s of CPU; {out}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs")
    pairs.add_argument("source")
    pairs.add_argument("target")
    pairs.add_argument("--count", type=int, default=200_000)
    pairs.add_argument("--seed", type=int, default=1)
    timed = commands.add_parser("time")
    memory = commands.add_parser("memory")
    for command in (timed, memory):
        command.add_argument("program")
        command.add_argument("model")
    timed.add_argument("pairs")
    memory.add_argument("--mib", type=float, default=3)
    options = parser.parse_args()
    if options.command == "pairs":
        make_pairs(options.source, options.target, options.count, options.seed)
    elif options.command == "time":
        measure_time(options.program, options.model, options.pairs)
    else:
        measure_memory(options.program, options.model, options.mib)


if __name__ == "__main__":
    main()
