"""Makes tests/data: small tokenizers, pairs in every format, and what Hugging Face makes of them.

    bash tests/reference/setup.sh
    .venv/bin/python tests/reference/data_goldens.py

Everything under tests/data but templates/*.jinja and this script's own words is written by it.
"""

import copy
import datetime
import gzip
import json
import os
import time
from pathlib import Path

os.environ["TZ"] = "UTC"
time.tzset()

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl.data_utils import common_prefix_length

DATA = Path(__file__).resolve().parent.parent / "data"
TEMPLATES = DATA / "templates"
PAIRS = DATA / "pairs"
LIMITS = {"max_length": 96, "max_prompt_length": 48}
NOW = 1_700_049_600  # noon UTC of Wednesday 15 Nov 2023: the same day in all but the last time zones


def turn(role, content, **other):
    return {"role": role, "content": content, **other}


CONVERSATIONS = [
    {
        "prompt": [turn("user", "What color is the sky?")],
        "chosen": [turn("assistant", "It is blue, because air scatters blue light most.")],
        "rejected": [turn("assistant", "It is green.")],
    },
    {
        "prompt": [turn("system", "You answer in one word.  "), turn("user", "Größe des Mondes?\nBitte kurz.")],
        "chosen": [turn("assistant", "Klein.")],
        "rejected": [turn("assistant", "Riesig 🌕🌖, glaube ich — 月は大きい。")],
    },
    {
        "prompt": [
            turn("user", "Name a prime number."),
            turn("assistant", "Seven."),
            turn("user", "Another one, please!"),
        ],
        "chosen": [turn("assistant", "Eleven.")],
        "rejected": [turn("assistant", "Nine.\n\n```python\nprint(9)\n```")],
    },
    {
        "prompt": [turn("user", "Repeat after me: " + "the quick brown fox jumps over the lazy dog, " * 4)],
        "chosen": [turn("assistant", "the quick brown fox jumps over the lazy dog, " * 6)],
        "rejected": [turn("assistant", "No.")],
    },
    {
        "prompt": [turn("user", "Say yes.")],
        "chosen": [turn("assistant", "Yes.")],
        "rejected": [turn("assistant", "Yes.")],
    },
]

TEXTS = [
    {"prompt": "The sky is", "chosen": " blue on a clear day.", "rejected": " green."},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five, or so they say in some books"},
    {"prompt": "word " * 60, "chosen": "end", "rejected": "the quick brown fox jumps over the lazy dog, " * 5},
]

TEMPLATE_CASES = [
    {"messages": [turn("user", "Hi  there\n")]},
    {"messages": [turn("user", " What is 1 < 2 & \"3\"? "), turn("assistant", "True.")]},
    {"messages": [turn("system", " Be brief. "), turn("user", "skip"), turn("assistant", "<think>\nhm</think>\n\nOk")]},
    {
        "messages": [
            turn("user", "a"),
            turn("assistant", "b\nc"),
            turn("user", "Grüße, 世界 🌍"),
            turn("assistant", "d "),
            turn("user", "please stop"),
            turn("assistant", "never shown by all"),
        ]
    },
    {"messages": [turn("assistant", "first"), turn("user", "second")]},
    {"messages": [turn("user", "x"), turn("system", "late")]},
    {
        "messages": [
            turn("user", "weather?"),
            turn(
                "assistant",
                "",
                reasoning_content="call it",
                tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}],
            ),
            turn("tool", "{\"sky\": \"clear\"}"),
            turn("assistant", "Clear.", thinking="easy"),
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"z": 1.5, "a": ["x"]}}}],
    },
]

TOKENIZERS = {
    # No BOS is prepended, as SmolLM2 has it.
    "chatml": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "prepends": False,
    },
    # The post-processor prepends BOS and the template writes it, as Llama 3 has it.
    "llama3": {
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "prepends": True,
    },
}


def texts_of(conversations):
    for pair in conversations:
        for part in pair.values():
            yield from (part if isinstance(part, str) else [m["content"] for m in part])


def make_tokenizer(name, spec):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in spec["special"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts_of(CONVERSATIONS), *texts_of(TEXTS), "user assistant system"], trainer)
    if spec["prepends"]:
        bos_id = tokenizer.token_to_id(spec["bos"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec['bos']} $A", pair=f"{spec['bos']} $A $B", special_tokens=[(spec["bos"], bos_id)]
        )
    # Left in files by people who saved in the middle of a run; loading must not obey them.
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9, pad_token=spec["eos"], pad_id=tokenizer.token_to_id(spec["eos"]))
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    # Compact: white space would double the file.
    (folder / "tokenizer.json").write_text(
        json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    )
    config = {"bos_token": spec["bos"], "eos_token": {"content": spec["eos"], "special": True}, "pad_token": spec["eos"]}
    template = (TEMPLATES / f"{name}.jinja").read_text()
    if name == "llama3":
        config["chat_template"] = [{"name": "other", "template": "{{ x }}"}, {"name": "default", "template": template}]
    else:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=spec["bos"],
        eos_token=spec["eos"],
        pad_token=spec["eos"],
        chat_template=template,
    )


def cut(pair, bos):
    """Prompt from the left (a prepended BOS stays), responses from the right."""
    prompt = pair["prompt"]
    if len(prompt) > LIMITS["max_prompt_length"]:
        prompt = prompt[-LIMITS["max_prompt_length"] :]
        if bos is not None:
            prompt = [bos] + prompt[1:]
    room = LIMITS["max_length"] - len(prompt)
    return {"prompt": prompt, "chosen": pair["chosen"][:room], "rejected": pair["rejected"][:room]}


def split(prompt, chosen, rejected):
    """As TRL 1.16's DPOTrainer has it: the prompt is what its own tokens share with both wholes."""
    length = min(common_prefix_length(prompt, whole) for whole in (chosen, rejected))
    return {"prompt": prompt[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def encode_conversation(tokenizer, pair, bos):
    def render(messages, opened):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=opened, return_dict=True)["input_ids"]

    wholes = [render(pair["prompt"] + pair[side], False) for side in ("chosen", "rejected")]
    return cut(split(render(pair["prompt"], True), *wholes), bos)


def encode_text(tokenizer, pair, bos):
    def whole(response):
        return tokenizer(text=pair["prompt"] + response + tokenizer.eos_token)["input_ids"]

    prompt = tokenizer(text=pair["prompt"])["input_ids"]
    return cut(split(prompt, whole(pair["chosen"]), whole(pair["rejected"])), bos)


def write_lines(name, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if name.endswith(".gz"):
        (PAIRS / name).write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        (PAIRS / name).write_text(text)


def share_gpt(message):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"from": names[message["role"]], "value": message["content"]}


def write_pairs():
    PAIRS.mkdir(parents=True, exist_ok=True)
    extra = {"source": "demo", "score_chosen": 9.5, "messages": None}
    conversational = [{**pair, **extra} for pair in CONVERSATIONS]
    write_lines("conversational.jsonl", conversational)
    write_lines("conversational.jsonl.gz", conversational)
    write_lines("lines_named.json", conversational)
    (PAIRS / "array.json").write_text(json.dumps(conversational, indent=1, ensure_ascii=False))
    columns = {key: [pair[key] for pair in CONVERSATIONS] for key in CONVERSATIONS[0]}
    (PAIRS / "columns.json").write_text(json.dumps(columns, indent=1))
    (PAIRS / "rows_in_object.json").write_text(json.dumps({"version": "1", "data": conversational}, indent=1))
    (PAIRS / "one_record.json").write_text(json.dumps(conversational[0], indent=1))
    implicit = [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in CONVERSATIONS]
    write_lines("implicit.jsonl", implicit)
    ultrafeedback = [
        {"prompt": next(m["content"] for m in pair["prompt"] if m["role"] == "user"), **whole}
        for pair, whole in zip(CONVERSATIONS, implicit)
    ]
    write_lines("ultrafeedback.jsonl", ultrafeedback)
    write_lines("prompt_repeated.jsonl", [{"prompt": p["prompt"], **whole} for p, whole in zip(CONVERSATIONS, implicit)])
    responses = [{side: pair[side][0]["content"] for side in ("chosen", "rejected")} for pair in CONVERSATIONS]
    write_lines("text_responses.jsonl", [{"prompt": p["prompt"], **r} for p, r in zip(CONVERSATIONS, responses)])
    sharegpt = [
        {
            "conversations": [share_gpt(m) for m in pair["prompt"]],
            "chosen": share_gpt(pair["chosen"][0]),
            "rejected": share_gpt(pair["rejected"][0]),
        }
        for pair in CONVERSATIONS
    ]
    (PAIRS / "sharegpt.json").write_text(json.dumps(sharegpt, indent=2, ensure_ascii=False))
    with_system = copy.deepcopy(sharegpt)
    for record in with_system:
        first = record["conversations"][0]
        record["system"] = record["conversations"].pop(0)["value"] if first["from"] == "system" else None
    write_lines("sharegpt_system.jsonl", with_system)
    # One user turn each: the others cannot be said in these columns.
    orca = [(p, r) for p, r in zip(CONVERSATIONS, responses) if len([m for m in p["prompt"] if m["role"] != "system"]) == 1]
    system = lambda p: p["prompt"][0]["content"] if p["prompt"][0]["role"] == "system" else ""
    write_lines("orca.jsonl", [{"system": system(p), "question": p["prompt"][-1]["content"], **r} for p, r in orca])
    write_lines("system_prompt.jsonl", [{"system": system(p), "prompt": p["prompt"][-1]["content"], **r} for p, r in orca])
    write_lines("text.jsonl", TEXTS)
    write_lines("text_implicit.jsonl", [{s: p["prompt"] + p[s] for s in ("chosen", "rejected")} for p in TEXTS[:2]])
    hh = "\n\nHuman: Pick a color.\n\nAssistant: Why?\n\nHuman: Just do.\n\nAssistant:"
    write_lines("hh.jsonl", [{"chosen": hh + " I pick blue.", "rejected": hh + " I pick nothing."}])


def template_goldens():
    """The text of every template over every case, or what it raises."""

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(NOW, tz)

    chat_template_utils.datetime = Frozen
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    goldens = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        for case, conversation in enumerate(TEMPLATE_CASES):
            for opened in (False, True):
                golden = {"template": path.name, "case": case, "add_generation_prompt": opened}
                try:
                    rendered, _ = chat_template_utils.render_jinja_template(
                        [copy.deepcopy(conversation["messages"])],
                        tools=conversation.get("tools"),
                        chat_template=path.read_text(),
                        add_generation_prompt=opened,
                        **special,
                    )
                    golden["text"] = rendered[0]
                except jinja2.exceptions.TemplateError as error:
                    golden["raises"] = str(error)
                goldens.append(golden)
    return {"now": NOW, "special_tokens": special, "cases": TEMPLATE_CASES, "goldens": goldens}


def main():
    write_pairs()
    goldens = {"limits": LIMITS}
    for name, spec in TOKENIZERS.items():
        tokenizer = make_tokenizer(name, spec)
        bos = tokenizer.bos_token_id if spec["prepends"] else None
        goldens[name] = {
            "conversations": [encode_conversation(tokenizer, pair, bos) for pair in CONVERSATIONS],
            "texts": [encode_text(tokenizer, pair, bos) for pair in TEXTS],
        }
    (DATA / "goldens.json").write_text(json.dumps(goldens) + "\n")
    (TEMPLATES / "goldens.json").write_text(json.dumps(template_goldens(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
