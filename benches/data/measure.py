"""Time and memory of reading and tokenising pairs, with `examples/token_ids --count`.

    python measure.py pairs PAIRS.json OUT.jsonl [--count 200000] [--seed 1] [--layout trl]
    python measure.py short PAIRS.json OUT.jsonl [--count 1000000] [--words 40]
    python measure.py cached PROGRAM MODEL PAIRS.jsonl FOLDER
    python measure.py time PROGRAM MODEL PAIRS.jsonl
    python measure.py memory PROGRAM MODEL [--mib 3]

`pairs` makes a file of many pairs from a few: conversations with words exchanged between records, so that hardly two texts are
equal, in LLaMA-Factory's columns or TRL's. `short` makes many pairs of few words in the columns of UltraFeedback-binarized.
`cached` runs `mmpo-fast check` without its cache of tokenised pairs, with an empty one and from it. `time` reads a file with one and with two threads: wall time, CPU time, peak memory. `memory` reads one record of which
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


def trl(record):
    turn = lambda message: {"role": {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"]),
                            "content": message["value"]}
    prompt = [turn(message) for message in record["conversations"]]
    return {"prompt": prompt, "chosen": [turn(record["chosen"])], "rejected": [turn(record["rejected"])]}


def make_short(source, target, count, seed, words):
    generator = random.Random(seed)
    records = json.loads(Path(source).read_text())
    texts = [turn["value"] for record in records for turn in [*record["conversations"], record["chosen"], record["rejected"]]]
    pool = " ".join(texts).split(" ")

    def text(length):
        start = int(generator.random() * (len(pool) - length))
        return " ".join(pool[start:start + length])

    with open(target, "w") as out:
        for number in range(count):
            prompt, chosen, rejected = f"{number} {text(words // 2)}", text(words), text(words)
            asked = {"role": "user", "content": prompt}
            sides = [[asked, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
            out.write(json.dumps({"prompt": prompt, "prompt_id": f"{number:032x}", "chosen": sides[0], "rejected": sides[1],
                                  "messages": sides[0], "score_chosen": 8.0, "score_rejected": 6.5}) + "\n")


def measure_cached(program, model, pairs, folder):
    arguments = ["check", "--model", model, "--data", pairs, "--json", "--show", "0"]
    accounts = []
    for name, cache in [("no cache", "off"), ("empty cache", folder), ("from the cache", folder)]:
        wall, cpu, peak, out = run(program, *arguments, "--data-cache", cache)
        accounts.append(json.loads(out))
        print(f"{name:16} {wall:7.1f} s, {cpu:7.1f} s of CPU, peak {peak / 2**20:6.0f} MiB", flush=True)
    files = list(Path(folder).iterdir())
    print(f"{accounts[0]['kept']} pairs kept, files of {sum(file.stat().st_size for file in files) / 2**20:.0f} MiB")
    if any(account != accounts[0] for account in accounts):
        sys.exit("the accounts differ")


def make_pairs(source, target, count, seed, layout):
    generator = random.Random(seed)
    records = json.loads(Path(source).read_text())
    texts = [turn["value"] for record in records for turn in [*record["conversations"], record["chosen"], record["rejected"]]]
    words = [word for text in texts for word in text.split(" ") if word.isalpha()]
    with open(target, "w") as out:
        for number in range(count):
            record = json.loads(json.dumps(records[number % len(records)]))
            for turn in [*record["conversations"], record["chosen"], record["rejected"]]:
                turn["value"] = exchanged(turn["value"], words, generator)
            record = trl(record) if layout == "trl" else record
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
    pairs.add_argument("--layout", choices=["llama-factory", "trl"], default="llama-factory")
    short = commands.add_parser("short")
    short.add_argument("source")
    short.add_argument("target")
    short.add_argument("--count", type=int, default=1_000_000)
    short.add_argument("--seed", type=int, default=1)
    short.add_argument("--words", type=int, default=40)
    cached = commands.add_parser("cached")
    for name in ("program", "model", "pairs", "folder"):
        cached.add_argument(name)
    timed = commands.add_parser("time")
    memory = commands.add_parser("memory")
    for command in (timed, memory):
        command.add_argument("program")
        command.add_argument("model")
    timed.add_argument("pairs")
    memory.add_argument("--mib", type=float, default=3)
    options = parser.parse_args()
    if options.command == "pairs":
        make_pairs(options.source, options.target, options.count, options.seed, options.layout)
    elif options.command == "short":
        make_short(options.source, options.target, options.count, options.seed, options.words)
    elif options.command == "cached":
        measure_cached(options.program, options.model, options.pairs, options.folder)
    elif options.command == "time":
        measure_time(options.program, options.model, options.pairs)
    else:
        measure_memory(options.program, options.model, options.mib)


if __name__ == "__main__":
    main()
