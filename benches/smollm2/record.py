#!/usr/bin/env python3
"""Trains the real SmolLM2-135M-Instruct with MMPO, DPO, SimPO and SFT on real pairs, and looks at pairs that were held out.

    python3 benches/smollm2/record.py RESULTS             everything; benches/smollm2/run.sh calls it so
    python3 benches/smollm2/record.py RESULTS --report    README.md alone, from what is there

Every fifth of the 300 pairs is held out: 240 are trained on, 60 are scored by the model before and by each model after. RESULTS gets,
for each objective, metrics-NAME.jsonl and resolved-NAME.toml of its run; scores.csv, a row a model and held-out pair;
answers.json, to held-out prompts; about.txt and README.md. The runs themselves (models and report.html) stay in --work.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BEFORE = "before"
HELD_OUT_EVERY = 5
# Without length normalisation most of MMPO's weights are 0 or 1 on pairs of this length: see docs/objectives.md.
OBJECTIVES = {
    "mmpo": ["--learning-rate", "2e-5", "--length-normalize"],
    "dpo": ["--learning-rate", "1e-5", "--beta", "0.1"],
    "simpo": ["--learning-rate", "1e-5"],
    "sft": ["--learning-rate", "2e-5"],
}
# Names for people, and what to expect of the held-out pairs.
SHOWN = {
    "mmpo": ("MMPO", "MMPO raises both responses of a pair, each by its weight."),
    "dpo": ("DPO", "DPO moves the two responses apart."),
    "simpo": ("SimPO", "SimPO moves them apart by the token."),
    "sft": ("SFT", "SFT learns the chosen responses alone."),
}
LENGTHS = ["--max-length", "384", "--max-prompt-length", "192"]
SHARED = ["--pairs-per-step", "4", "--epochs", "1", "--seed", "42"]
PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 4, 160, 96


def call(*command):
    print("$", shlex.join(map(str, command)), file=sys.stderr)
    return subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def split(path, work, limit):
    """Files of the pairs to train on and of those held out, and the latter's records."""
    records = json.loads(path.read_text())
    train = [record for at, record in enumerate(records) if at % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    held_out = records[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if limit:
        train, held_out = train[:limit], held_out[: max(1, limit // 4)]
    for name, part in (("train", train), ("held-out", held_out)):
        (work / f"{name}.json").write_text(json.dumps(part, ensure_ascii=False))
    return work / "train.json", work / "held-out.json", held_out


def machine(options):
    return ["--device", "cpu", "--threads", str(options.threads)]


def train(objective, options, pairs, held_out):
    output = options.work / objective
    shutil.rmtree(output, ignore_errors=True)
    command = [options.program, "train", "--model", options.model, "--data", pairs, "--eval-data", held_out, "--output", output]
    command += ["--objective", objective, *OBJECTIVES[objective], *LENGTHS, *SHARED, *machine(options)]
    if options.steps:
        at = command.index("--epochs")
        command[at : at + 2] = ["--max-steps", options.steps]
    started = time.monotonic()
    printed = call(*command)
    words = shlex.join(map(str, command)).replace(str(ROOT) + "/", "")
    (options.results / f"metrics-{objective}.jsonl").write_text((output / "metrics.jsonl").read_text())
    # Paths from the root of the tree, as in the command.
    resolved = (output / "resolved.toml").read_text().replace(f"{ROOT}/", "")
    (options.results / f"resolved-{objective}.toml").write_text(resolved)
    return {"objective": objective, "seconds": round(time.monotonic() - started, 1), "command": words, "printed": printed}


def score(name, model, held_out, options):
    """Rows of scores.csv: the log-probs of the held-out pairs under one model."""
    output = options.work / f"scores-{name}.jsonl"
    call(options.program, "--quiet", "score", "--model", model, "--data", held_out, "--output", output, *LENGTHS, *machine(options))
    return [{"model": name, **json.loads(line)} for line in output.read_text().splitlines()]


def prompts(held_out):
    """Held-out prompts of one short message."""
    asked = [record["conversations"] for record in held_out if len(record["conversations"]) == 1]
    return [turns[0]["value"] for turns in asked if len(turns[0]["value"]) <= PROMPT_CHARACTERS][:PROMPTS]


def answer(model, prompt, options):
    command = [options.program, "--quiet", "generate", "--model", model, "--prompt", prompt, "--max-new-tokens", NEW_TOKENS]
    return call(*command, *machine(options)).strip()


def record(options):
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print("record.py: something else runs on this machine: times will be off", file=sys.stderr)
    (options.results / "about.txt").write_text("\n".join(about(options)) + "\n")
    pairs, held_out, records = split(options.pairs, options.work, options.limit)
    runs, scores, answers = [], [], [{"prompt": prompt} for prompt in prompts(records)]
    for objective in (BEFORE, *(options.objective or OBJECTIVES)):
        model = options.model
        if objective != BEFORE:
            runs.append(train(objective, options, pairs, held_out))
            model = options.work / objective / "model"
        scores += score(objective, model, held_out, options)
        for entry in answers:
            entry[objective] = answer(model, entry["prompt"], options)
        # After each model: what was measured before one fails is kept.
        write(options.results, runs, scores, answers)


def write(results, runs, scores, answers):
    (results / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    (results / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    with (results / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, scores[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(scores)


def text_of(*command):
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def about(options):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    dirty = " with uncommitted changes" if text_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    return [
        f"date: {datetime.date.today()}",
        f"command: {shlex.join(['python3', 'benches/smollm2/record.py', *sys.argv[1:]])}",
        f"commit: {text_of('git', 'rev-parse', 'HEAD')}{dirty}",
        f"processor: {processor}, {os.cpu_count()} CPUs, {options.threads} threads used; load average at the start "
        f"{os.getloadavg()[0]:.2f}",
        "model: SmolLM2-135M-Instruct (tools/real_model.sh), f32",
        "pairs: dpo_en_demo.json of LLaMA-Factory (tools/real_pairs.sh), 240 trained on, every fifth of the 300 held out",
    ]


def per_token(rows, side):
    """Mean log-prob of a token, over all tokens of all responses."""
    return sum(float(row[f"logp_{side}"]) for row in rows) / sum(int(row[f"tokens_{side}"]) for row in rows)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def margin(row):
    """By how much a token of the chosen response is the likelier one, in nats."""
    return float(row["logp_chosen"]) / int(row["tokens_chosen"]) - float(row["logp_rejected"]) / int(row["tokens_rejected"])


def gained(row, before):
    """How much the chosen response gained on the rejected one, in nats: DPO's margin over beta."""
    gain = {side: float(row[f"logp_{side}"]) - float(before[f"logp_{side}"]) for side in ("chosen", "rejected")}
    return gain["chosen"] - gain["rejected"]


def score_table(scores):
    lines = [
        "| model | log-prob of a chosen token | of a rejected token | chosen likelier, by the token | margin by the token "
        "| gained by the chosen, nats | pairs where the chosen gained more |",
        "|---|---|---|---|---|---|---|",
    ]
    before = scores[BEFORE]
    for name, rows in scores.items():
        moved = [gained(row, base) for row, base in zip(rows, before, strict=True)]
        beside = "- | -" if name == BEFORE else f"{mean(moved):+.2f} | {100 * mean(value > 0 for value in moved):.0f} %"
        lines.append(
            f"| {name} | {per_token(rows, 'chosen'):.4f} | {per_token(rows, 'rejected'):.4f} "
            f"| {100 * mean(margin(row) > 0 for row in rows):.0f} % | {mean(map(margin, rows)):+.4f} | {beside} |"
        )
    return lines


def quoted(answer):
    return answer.replace("\r", "").replace("|", "\\|").replace("\n", "<br>") or "(nothing)"


def answer_section(entry):
    lines = ["", "> " + entry["prompt"].replace("\n", "\n> "), "", "| model | answer |", "|---|---|"]
    return lines + [f"| {name} | {quoted(answer)} |" for name, answer in entry.items() if name != "prompt"]


def run_section(run):
    return ["", f"### {run['objective']}", "", f"    {run['command']}", "", *("    " + line for line in run["printed"].splitlines())]


def report(results):
    scores = defaultdict(list)
    with (results / "scores.csv").open() as file:
        for row in csv.DictReader(file):
            scores[row["model"]].append(row)
    runs = json.loads((results / "runs.json").read_text())
    pictures = sorted(results.glob("report-*.png"))
    names = ", ".join(SHOWN[run["objective"]][0] for run in runs)
    lines = [f"# A real model and real pairs, with pairs held out: {names}", ""]
    lines += [f"- {entry}" for entry in (results / "about.txt").read_text().splitlines()]
    minutes = ", ".join(f"{run['objective']} {run['seconds'] / 60:.1f} min" for run in runs)
    lines += [f"- time of the whole commands, references and evaluations included: {minutes}"]
    lines += [
        "",
        "## Held-out pairs, before and after",
        "",
        f"{len(scores[BEFORE])} pairs that no run trained on, scored by `mmpo-fast score`, greatest lengths as in training. A run has",
        "240 pairs and one epoch: this shows that training carries over to pairs it has not seen, not how good a model can get.",
        "",
        *score_table(scores),
        "",
        " ".join(SHOWN[run["objective"]][1] for run in runs),
        "",
        *(f"![The report of the {path.stem.removeprefix('report-')} run]({path.name})" for path in pictures),
        "",
        "## Answers to held-out prompts",
        "",
        f"Greedy, {NEW_TOKENS} tokens at most.",
    ]
    for entry in json.loads((results / "answers.json").read_text()):
        lines += answer_section(entry)
    lines += ["", "## The runs, and what each printed of the held-out pairs"]
    for run in runs:
        lines += run_section(run)
    lines += ["", "metrics-*.jsonl and resolved-*.toml are the runs' own; scores.csv has every held-out pair under every model."]
    text = "\n".join(lines) + "\n"
    (results / "README.md").write_text(text)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--report", action="store_true", help="only write README.md, from what is there")
    parser.add_argument("--program", type=Path, default=Path(os.environ.get("CARGO_TARGET_DIR", "target")) / "release/mmpo-fast")
    parser.add_argument("--model", type=Path, default=Path("target/real/SmolLM2-135M-Instruct"))
    parser.add_argument("--pairs", type=Path, default=Path("target/real/dpo_en_demo.json"))
    parser.add_argument("--work", type=Path, default=Path("target/smollm2"))
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="for trying out: so many pairs to train on, a quarter of that held out")
    parser.add_argument("--steps", type=int, help="for trying out: so many steps")
    options = parser.parse_args()
    if not options.report:
        record(options)
    print(report(options.results))


if __name__ == "__main__":
    main()
