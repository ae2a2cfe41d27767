"""Tokenising pairs beside `datasets.map` with the same tokenizer, on the same file, in one run.

    python beside_datasets.py PROGRAM MODEL PAIRS.jsonl [--processes 2] [--rounds 3] [--work FOLDER]

PROGRAM is mmpo-fast; MODEL is a folder with tokenizer and chat template (and a config.json, which `check` reads); PAIRS has
conversations in TRL's columns `prompt`, `chosen` and `rejected`. The rounds alternate between:

- `datasets.map` with `batched=True` and as many processes as there are cores: the chat template for the prompt alone and with
  each response, one call of the fast tokenizer for all texts of a batch, and the responses cut off after the prompt, as TRL's
  `DPOTrainer` does it row by row. The file is already loaded as a data set; what map writes is removed before each round.
- `mmpo-fast check` without its cache, with an empty one, and with what that left there (`--plain`: as it is, for a program
  that has no such cache). It reads the file, tokenises, and makes its account of every record.

Both count their tokens; a difference is an error. Wall seconds, and CPU seconds of all processes.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work):
    wall, cpu = time.monotonic(), cpu_seconds()
    result = work()
    return result, time.monotonic() - wall, cpu_seconds() - cpu


def tokenise(batch, tokenizer):
    def texts(column):
        whole = [prompt + response for prompt, response in zip(batch["prompt"], batch[column])]
        return tokenizer.apply_chat_template(whole, tokenize=False)

    prompts = tokenizer.apply_chat_template(batch["prompt"], tokenize=False, add_generation_prompt=True)
    rows = len(prompts)
    ids = tokenizer(prompts + texts("chosen") + texts("rejected"), add_special_tokens=False)["input_ids"]
    prompt = ids[:rows]
    return {
        "prompt_ids": prompt,
        "chosen_ids": [whole[len(start):] for start, whole in zip(prompt, ids[rows:2 * rows])],
        "rejected_ids": [whole[len(start):] for start, whole in zip(prompt, ids[2 * rows:])],
    }


def map_once(dataset, tokenizer, processes):
    mapped, wall, cpu = timed(lambda: dataset.map(
        tokenise, batched=True, batch_size=1000, num_proc=processes, fn_kwargs={"tokenizer": tokenizer},
        remove_columns=dataset.column_names, load_from_cache_file=False))
    table = mapped.with_format("arrow")[:]
    tokens = sum(len(column.combine_chunks().flatten()) for column in table.columns)
    return tokens, wall, cpu


def check_once(program, model, pairs, cache):
    command = [program, "check", "--model", model, "--data", pairs, "--json", "--show", "0",
               "--max-length", "1000000", "--max-prompt-length", "999999"]
    command += ["--data-cache", cache] if cache else []
    result, wall, cpu = timed(lambda: subprocess.run(map(str, command), capture_output=True, text=True))
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout), wall, cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("program", "model", "pairs"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work))
    os.environ["HF_HOME"] = str(work / "huggingface")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    dataset = datasets.load_dataset("json", data_files=str(options.pairs), split="train")
    print(f"{len(dataset)} pairs, {options.pairs.stat().st_size / 2**20:.0f} MiB; datasets {datasets.__version__}, "
          f"transformers {transformers.__version__}, {options.processes} processes", flush=True)
    found = {}
    for round_ in range(options.rounds):
        cache = work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        ours = lambda cache: check_once(options.program, options.model, options.pairs, cache)
        mapped = ("datasets.map", lambda: map_once(dataset, tokenizer, options.processes))
        checks = [
            ("check, no cache", lambda: ours("off")),
            ("check, empty cache", lambda: ours(cache)),
            ("check, from the cache", lambda: ours(cache)),
        ]
        for name, run in [mapped, *([("check", lambda: ours(None))] if options.plain else checks)]:
            result, wall, cpu = run()
            found.setdefault(name, []).append((wall, cpu, result))
            print(f"round {round_ + 1}: {name:22} {wall:7.2f} s, {cpu:7.2f} s of CPU", flush=True)
        dataset.cleanup_cache_files()
    accounts = [result for name in found if name != "datasets.map" for _, _, result in found[name]]
    if any(account != accounts[0] for account in accounts):
        sys.exit("the accounts differ")
    pair = next(row for row in accounts[0]["lengths"]["rows"] if row["part"] == "whole pair")
    theirs, our = found["datasets.map"][0][2], round(pair["mean"] * accounts[0]["records"])
    print(f"tokens: {theirs} by datasets.map, {our} by check")
    base = statistics.median(wall for wall, _, _ in found["datasets.map"])
    base_cpu = statistics.median(cpu for _, cpu, _ in found["datasets.map"])
    for name, rounds in found.items():
        wall, cpu = (statistics.median(value[part] for value in rounds) for part in (0, 1))
        print(f"{name:22} median {wall:7.2f} s ({base / wall:5.1f} times as fast), {cpu:7.2f} s of CPU ({base_cpu / cpu:5.1f})")
    shutil.rmtree(work)
    if theirs != our:
        sys.exit("the numbers of tokens differ")


if __name__ == "__main__":
    main()
