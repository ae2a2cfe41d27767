#!/usr/bin/env python3
"""Tokens a second of greedy text, one sequence on a CPU: mmpo-fast, transformers and candle in turn, round after round.

    .venv/bin/python benches/peers/generate.py                                    the real SmolLM2-135M (tools/real_model.sh)
    .venv/bin/python benches/peers/generate.py --shape llama-3.2-1b --engine mmpo-fast-bf16     random weights of a shape
    .venv/bin/python benches/peers/generate.py --output benches/results/DATE-cpu-generate       also raw.csv and README.md

All engines continue the same prompt as it stands, from the same bf16 file. The folder is a copy without end tokens, so that each
run gives all tokens that are asked for. The time of a token is the difference of two runs, one of --few and one of --tokens new
tokens, over the difference of their numbers: start, loading and the prompt cancel out. mmpo-fast's runs are whole commands; the
others' are timed inside their process, after loading. candle is its ready-made Llama (candle-transformers) in f32: its CPU
products have no bf16.

Every new token reads every weight once, so the table also says how many bytes of weights that is a second, and which share of a
copy's bandwidth (bytes read plus written), measured in the same run by `mmpo-fast bench`. Keep the machine idle.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

import run_cpu  # noqa: E402

SHAPES = json.loads((ROOT / "benches" / "shapes.json").read_text())
ENGINES = ("mmpo-fast-f32", "mmpo-fast-bf16", "pytorch-f32", "pytorch-bf16", "candle")
REFERENCE = "pytorch-f32"
PROMPT = (
    "The river rises in the hills north of the town, where the winters are long and the villages are small. "
    "For two hundred years the people there have kept a record of its floods, and the oldest pages say that"
)
HEADER = ("engine", "round", "tokens", "seconds_few", "seconds_all", "tokens_per_second", "text")


def adjusted(config):
    """`config` without end tokens, and with the base of the positions also where candle reads it: where transformers had it before 5."""
    base = config.get("rope_parameters", config).get("rope_theta", 10000.0)
    return config | {"eos_token_id": None, "rope_theta": base}


def linked(model, folder):
    """`folder` becomes `model` with its configuration adjusted; weights and tokenizer are linked."""
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(adjusted(config)))
    for file in model.iterdir():
        if file.name not in ("config.json", "generation_config.json") and file.is_file():
            (folder / file.name).symlink_to(file.resolve())


def random_model(shape, folder):
    """bf16 weights of the formula of README.md, and a tokenizer that knows one word a token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    import step

    sizes = SHAPES["common"] | SHAPES["models"][shape]
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    step.fill(model.model.embed_tokens.weight, 0)
    for index, layer in enumerate(model.model.layers):
        for projection, name in enumerate(step.PROJECTIONS):
            step.fill(layer.get_submodule(name).weight, 1 + len(step.PROJECTIONS) * index + projection)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(adjusted(written)))
    words = {word: number for number, word in enumerate(dict.fromkeys(PROMPT.replace(",", "").replace(".", "").split()))}
    words |= {f"w{number}": number for number in range(len(words), sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w" + str(sizes["vocab_size"] - 1)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1 << 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def weight_bytes(folder, element):
    """Bytes that one token reads: every matrix, but of an untied embedding only a row."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)
        for name, tensor in header.items():
            if name == "__metadata__" or ("embed_tokens" in name and not tied) or ("lm_head" in name and tied):
                continue
            values = 1
            for size in tensor["shape"]:
                values *= size
            total += values * element
    return total


def prompt_tokens(folder):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids


def ours(program, precision, folder, tokens, arguments):
    """Seconds of the whole command, and its text."""
    command = [program, "--quiet", "generate", "--device", "cpu", "--precision", precision, "--threads", str(arguments.threads)]
    command += ["--model", str(folder), "--raw", "--prompt", PROMPT, "--max-new-tokens", str(tokens)]
    started = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, run.stdout.removesuffix("\n")


def pytorch_process(precision, folder, arguments):
    """Both lengths, in a process of its own; prints JSON. Called with --inside."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    dtype = torch.float32 if precision == "f32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.tensor([prompt_tokens(folder)])
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    def seconds(count):
        started = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(ids, max_new_tokens=count, **options)
        assert found.shape[1] == ids.shape[1] + count, found.shape
        return time.perf_counter() - started, found[0, ids.shape[1] :].tolist()

    seconds(arguments.few)
    few, (every, new) = seconds(arguments.few)[0], seconds(arguments.tokens)
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(new)
    print(json.dumps({"few": few, "all": every, "text": text, "version": torch.__version__}))


def last_json(command):
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(run.stdout.splitlines()[-1])


def measure(engine, programs, folder, arguments):
    """Seconds with few tokens and with all, and the text of all."""
    precision = engine.rpartition("-")[2]
    if engine.startswith("mmpo-fast"):
        few, _ = ours(programs["mmpo-fast"], precision, folder, arguments.few, arguments)
        every, text = ours(programs["mmpo-fast"], precision, folder, arguments.tokens, arguments)
        return few, every, text
    counts = ["--few", str(arguments.few), "--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
    if engine == "candle":
        from tokenizers import Tokenizer

        ids = ",".join(str(token) for token in prompt_tokens(folder))
        command = [programs["candle"], "generate", "--model", str(folder), "--prompt-tokens", ids]
        found = last_json([*command, "--few", str(arguments.few), "--new-tokens", str(arguments.tokens), *counts[-2:]])
        text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(found["tokens"])
        return found["few"], found["all"], text
    found = last_json([sys.executable, __file__, "--inside", precision, "--model", str(folder), *counts])
    return found["few"], found["all"], found["text"]


def copy_bandwidth(program, threads):
    """Bytes a second of a large copy, as `mmpo-fast bench` measures it."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.csv"
        shape = ["--shape", "tiny", "--profile", "tiny", "--pairs", "2", "--only", "rms_norm_forward"]
        command = [program, "--quiet", "bench", "kernels", "--device", "cpu", *shape, "--threads", str(threads), "--csv", str(rows)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with rows.open(newline="") as file:
            found = [row for row in csv.DictReader(file) if row["op"] == "ceiling copy"]
    return max(float(row["bytes"]) / float(row["median_us"]) * 1e6 for row in found)


def agreement(text, reference):
    """The share of the reference's text up to the first difference."""
    same = next((at for at, (a, b) in enumerate(zip(text, reference)) if a != b), min(len(text), len(reference)))
    return same / max(len(reference), 1)


def table(rows, folder, bandwidth):
    """Markdown lines; `rows` are those of raw.csv."""
    by_engine = {engine: [row for row in rows if row["engine"] == engine] for engine in dict.fromkeys(row["engine"] for row in rows)}
    reference = next((found[0]["text"] for engine, found in by_engine.items() if engine == REFERENCE), None)
    reference = rows[0]["text"] if reference is None else reference
    lines = [
        "| engine | tokens/s, median | range | weights GB/s | of a copy | same text, share |",
        "|---|---|---|---|---|---|",
    ]
    for engine, found in by_engine.items():
        speeds = [row["tokens_per_second"] for row in found]
        median = statistics.median(speeds)
        read = median * weight_bytes(folder, 2 if engine.endswith("bf16") else 4)
        lines.append(
            f"| {engine} | {median:.2f} | {min(speeds):.2f} to {max(speeds):.2f} | {read / 1e9:.1f} | {read / bandwidth:.2f} "
            f"| {agreement(found[0]['text'], reference):.2f} |"
        )
    return lines


def about(name, arguments, bandwidth, prompt):
    import torch
    import transformers

    commit = run_cpu.text_of("git", "rev-parse", "HEAD")
    return [
        "# Greedy text on the CPU beside transformers and candle",
        "",
        f"- date: {datetime.date.today()}",
        f"- command: `{' '.join(['.venv/bin/python', 'benches/peers/generate.py', *sys.argv[1:]])}`",
        f"- commit: {commit}",
        f"- processor: {run_cpu.processor()}, {os.cpu_count()} CPUs, {arguments.threads} threads used; load average at the end {os.getloadavg()[0]:.2f}",
        f"- {platform.system()} {platform.release()}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}, candle 0.11.1",
        f"- model: {name}, a prompt of {prompt} tokens, one sequence, {arguments.tokens} new tokens less {arguments.few}, {arguments.rounds} rounds in turn",
        f"- a copy moves {bandwidth / 1e9:.1f} GB/s, read plus written (`mmpo-fast bench kernels`)",
        "",
        "A token's time is the difference of a run with all new tokens and one with few, over the difference of their numbers. The last",
        f"column is the share of {REFERENCE}'s text up to the first character that differs: in bf16 a near tie falls the other way now and then.",
        "",
    ]


def record(arguments, folder, name):
    engines = arguments.engine or ENGINES
    programs = {"mmpo-fast": arguments.program or str(ROOT / run_cpu.build("build", "--release", "--bin", "mmpo-fast"))}
    if "candle" in engines:
        built = arguments.candle or ROOT / run_cpu.build("build", "--release", "--package", "candle-peer")
        programs["candle"] = str(built)
    if os.getloadavg()[0] > 0.5:
        print("generate.py: something else runs on this machine: figures will be off", file=sys.stderr)
    rows = []
    for number in range(arguments.rounds):
        for engine in engines:
            few, every, text = measure(engine, programs, folder, arguments)
            # Noise is longer than the tokens of a tiny model.
            speed = (arguments.tokens - arguments.few) / (every - few) if every > few else float("nan")
            rows.append(dict(zip(HEADER, (engine, number, arguments.tokens, few, every, speed, text))))
            print(f"round {number}, {engine}: {speed:.2f} tokens/s", file=sys.stderr)
    bandwidth = copy_bandwidth(programs["mmpo-fast"], arguments.threads)
    lines = [*about(name, arguments, bandwidth, len(prompt_tokens(folder))), *table(rows, folder, bandwidth)]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "README.md").write_text("\n".join(lines) + "\n")
        with (arguments.output / "raw.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, HEADER, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "target/real/SmolLM2-135M-Instruct", help="a model's folder")
    parser.add_argument("--shape", choices=SHAPES["models"], help="random weights of this shape, instead of --model")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--tokens", type=int, default=136, help="new tokens of the long run")
    parser.add_argument("--few", type=int, default=8, help="new tokens of the short run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", help="the mmpo-fast to measure, instead of building one")
    parser.add_argument("--candle", help="the candle-peer to measure, instead of building one")
    parser.add_argument("--output", type=Path, help="a results folder")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.inside:
        return pytorch_process(arguments.inside, arguments.model, arguments)
    if not arguments.few < arguments.tokens:
        parser.error(f"--tokens {arguments.tokens} must be more than --few {arguments.few}")
    if not arguments.shape and not (arguments.model / "config.json").exists():
        parser.error(f"--model {arguments.model} has no config.json: run tools/real_model.sh, or give --shape")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        source = arguments.model
        if arguments.shape:
            source = scratch / "random"
            source.mkdir()
            random_model(arguments.shape, source)
        folder = scratch / "model"
        folder.mkdir()
        linked(source, folder)
        return record(arguments, folder, arguments.shape or source.name)


if __name__ == "__main__":
    main()
