"""Renders real chat templates with transformers' Jinja environment and with ours, and compares the texts.

Usage: python check_templates.py PROGRAM FILE_OR_FOLDER...

PROGRAM is the example `render_templates`. Templates are `*.jinja` files, and `chat_template` of every
`tokenizer_config.json`, below the folders given. None is committed: they come from packages (check_templates.sh).

For each template and each conversation, with and without the generation prompt: where Jinja gives a text, ours must
be the same text; where the template raises, ours must raise the same message; where Jinja fails otherwise, ours must
not give a text other than ... any: what fails there was never trained with, so it is only counted. `EXPLAINED` lists
differences that stay, with the reason. Exits with 1 and shows each other difference. Packages: requirements.txt.
"""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from unittest import mock

import jinja2
from template_features import CONTEXT, FEATURES
from transformers.utils import chat_template_utils

NOW = 1_750_000_000
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
EXPLAINED = {}


class FixedTime(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.fromtimestamp(NOW, tz)


def turn(role, content, **other):
    return {"role": role, "content": content, **other}


def call(name, arguments, **other):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **other}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.\nIn °C, \"exact\" & <fast>.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where", "enum": ["Zürich", "東京"]},
                "days": {"type": "integer", "description": "How many", "default": 1, "minimum": 0.5},
                "units": {"type": ["string", "null"], "nullable": True},
                "nested": {
                    "type": "object",
                    "properties": {"list": {"type": "array", "items": {"type": "number"}}},
                    "required": ["list"],
                },
            },
            "required": ["city"],
        },
        "return": {"type": "object", "description": "what"},
    },
}
BARE = {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}}
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
LONG = [turn(*pair) for index in range(40) for pair in (("user", f"q{index} " * 20), ("assistant", f"a{index} ünï " * 20))]

CONVERSATIONS = [
    {"messages": [turn("user", "Hi  there\n")]},
    {"messages": [turn("user", " What is 1 < 2 & \"3\"? "), turn("assistant", " It's 'True'.\n")]},
    {"messages": [turn("system", " Be brief. \n"), turn("user", "go"), turn("assistant", "<think>\nhm\n</think>\n\nOk")]},
    {
        "messages": [
            turn("system", "Ein Übersetzer\u2028🌍"),
            turn("user", "a"),
            turn("assistant", "b\nc"),
            turn("user", "Grüße, 世界 🌍 \x1f"),
            turn("assistant", "d "),
            turn("user", "x{{ y }}{% z %}"),
        ]
    },
    {"messages": [turn("user", "u"), turn("assistant", "a", reasoning_content="Let me\nthink.\n"), turn("user", "v"), turn("assistant", "b", reasoning_content="More")]},
    {"messages": [turn("assistant", "first"), turn("user", "second")]},
    {"messages": [turn("user", "x"), turn("system", "late"), turn("user", "y")]},
    {"messages": [turn("user", "x"), turn("user", "y"), turn("assistant", "")]},
    {"messages": [turn("developer", "Rules"), turn("user", "x"), turn("assistant", "ok", thinking="t")]},
    {
        "messages": [
            turn("user", "weather?"),
            turn("assistant", "", tool_calls=[call("weather", {"city": "Zürich", "days": 2, "x": [1.5, None, True]}, id="abcdefghi")]),
            turn("tool", "{\"sky\": \"clear\"}", name="weather", tool_call_id="abcdefghi"),
            turn("assistant", "Clear."),
        ],
        "variables": {"tools": [WEATHER, BARE]},
    },
    {
        "messages": [
            turn("system", "S"),
            turn("user", "weather?"),
            turn("assistant", "Looking.", reasoning_content="call it", tool_calls=[call("weather", {"city": "東京"}, id="a23456789"), call("now", {}, id="b23456789")]),
            turn("tool", "21", name="weather", tool_call_id="a23456789"),
            turn("tool", "noon", name="now", tool_call_id="b23456789"),
            turn("assistant", "Noon.", reasoning_content="done"),
            turn("user", "thanks"),
            turn("assistant", "welcome"),
        ],
        "variables": {"tools": [WEATHER]},
    },
    {
        "messages": [
            turn("user", "w"),
            {"role": "assistant", "tool_calls": [call("weather", "{\"city\": \"Bern\"}", id="c23456789")]},
            turn("tool", "ok", tool_call_id="c23456789"),
        ],
        "variables": {"tools": [BARE, WEATHER]},
    },
    {"messages": [turn("user", "x"), turn("assistant", "y")], "variables": {"tools": []}},
    {"messages": [turn("system", "S"), turn("user", "x"), turn("assistant", "y"), turn("user", "z")], "variables": {"tools": [WEATHER]}},
    {"messages": [turn("user", PARTS), turn("assistant", [{"type": "text", "text": "That."}])]},
    {"messages": [turn("system", [{"type": "text", "text": "S"}]), turn("user", [{"type": "image"}, *PARTS])]},
    {"messages": [turn("user", "x"), turn("assistant", "y", reasoning_content="r")], "variables": {"enable_thinking": False}},
    {"messages": [turn("user", "x"), turn("assistant", "y")], "variables": {"enable_thinking": True, "reasoning_effort": "high", "model_identity": "You are X.", "builtin_tools": ["browser", "python"]}},
    {"messages": [turn("system", "/no_think S"), turn("user", "x /no_think"), turn("assistant", "y")], "variables": {"date_string": "2 Jan 2025", "custom_instructions": "C", "xml_tools": ["<a>"], "python_tools": ["def f(): pass"]}},
    {"messages": [turn("user", "x")], "variables": {"documents": [{"title": "T", "text": "Body\n"}, {"title": "Ü", "text": "b2"}], "citation_mode": "fast"}},
    {"messages": LONG},
    {"messages": []},
]


def templates(paths):
    """Names and sources of all templates, each source once."""
    found = {}
    for path in map(Path, paths):
        for file in sorted([path] if path.is_file() else path.rglob("*")):
            if file.suffix in (".jinja", ".jinja2"):
                found.setdefault(file.read_text(), str(file.relative_to(path.parent)))
            elif file.name == "tokenizer_config.json":
                given = json.loads(file.read_text()).get("chat_template") or []
                named = [("", given)] if isinstance(given, str) else [(entry["name"], entry["template"]) for entry in given]
                for name, source in named:
                    found.setdefault(source, f"{file.relative_to(path.parent)} {name}".strip())
    return {name: source for source, name in found.items()}


def theirs(compiled, case):
    variables = {**SPECIAL_TOKENS, **case.get("variables", {})}
    tools, documents = variables.pop("tools", None), variables.pop("documents", None)
    messages = chat_template_utils._alias_reasoning_fields(json.loads(json.dumps(case["messages"])))
    try:
        text = compiled.render(messages=messages, tools=tools, documents=documents, add_generation_prompt=case["add_generation_prompt"], **variables)
        return {"text": text}
    except jinja2.exceptions.TemplateError as error:
        kind = "raises" if type(error) is jinja2.exceptions.TemplateError else "fails"
        return {kind: str(error)}
    except Exception as error:
        return {"fails": f"{type(error).__name__}: {error}"}


def for_ours(case):
    messages = chat_template_utils._alias_reasoning_fields(json.loads(json.dumps(case["messages"])))
    return {**case, "messages": messages}


def difference(expected, result):
    """What of ours is wrong, or None. Where Jinja fails, any failure of ours will do."""
    if "fails" in expected:
        return "Jinja fails, ours gives a text" if "text" in result else None
    if expected == result:
        return None
    if "text" in expected and "text" in result:
        ours, right = result["text"], expected["text"]
        at = next((i for i, (a, b) in enumerate(zip(ours, right)) if a != b), min(len(ours), len(right)))
        return f"at character {at}:\n    jinja {right[max(0, at - 30):at + 60]!r}\n    ours  {ours[max(0, at - 30):at + 60]!r}"
    return f"jinja {str(expected)[:300]}\n    ours  {str(result)[:300]}"


def main():
    program, *paths = sys.argv[1:]
    sources = templates(paths)
    cases = [{**case, "add_generation_prompt": open} for case in CONVERSATIONS for open in (False, True)]
    tried = {name: (source, cases) for name, source in sources.items()}
    tried |= {f"feature {source}": (source, [CONTEXT]) for source in FEATURES}
    jobs = [
        {"template": source, "special_tokens": SPECIAL_TOKENS, "now": NOW, "cases": list(map(for_ours, cases))}
        for source, cases in tried.values()
    ]
    finished = subprocess.run([program], input="\n".join(map(json.dumps, jobs)), capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{program}: {finished.stderr}")
    answers = list(map(json.loads, filter(None, finished.stdout.split("\n"))))
    assert len(answers) == len(tried), f"{len(answers)} answers"
    counts = {"text": 0, "raises": 0, "fails": 0}
    wrong, explained, seconds = 0, 0, 0.0
    with mock.patch.object(chat_template_utils, "datetime", FixedTime):
        for (name, (source, cases)), answer in zip(tried.items(), answers):
            try:
                compiled = chat_template_utils._compile_jinja_template(source)
            except Exception as error:
                if "error" not in answer:
                    print(f"{name}: Jinja does not compile it ({error}), ours does")
                continue
            if "error" in answer:
                print(f"{name}: {answer['error']}")
                wrong += 1
                continue
            seconds += answer["seconds"]
            for number, (case, result) in enumerate(zip(cases, answer["results"])):
                expected = theirs(compiled, case)
                counts[next(iter(expected))] += 1
                if name.startswith("feature") and "fails" in expected:
                    print(f"{name}: Jinja itself fails: {expected['fails']}")
                    wrong += 1
                what = difference(expected, result)
                if what is None:
                    continue
                if any(part in name for part in EXPLAINED) or "Jinja fails" in what:
                    explained += 1
                    continue
                wrong += 1
                print(f"{name}, conversation {number // 2}, open {case['add_generation_prompt']}: {what}")
    if not counts["text"]:
        sys.exit("nothing to compare")
    print(
        f"{len(sources)} templates and {len(FEATURES)} features: {counts['text']} texts and {counts['raises']} raised messages compared, "
        f"{counts['fails']} conversations fail in Jinja, {explained} differences explained, {wrong} wrong; "
        f"ours took {seconds:.2f} s"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
