"""Makes tests/data/trl_rows.json: rows of preference sets, and how TRL's DPOTrainer splits each of them.

    tests/reference/setup.sh, then .venv/bin/python tests/reference/records_goldens.py

A row without a `prompt` goes through TRL's `extract_prompt`, as in `DPOTrainer._prepare_dataset`; any other is used as
it is. Members of a message that are None are dropped, as `apply_chat_template` of transformers drops them.
"""

import json
from pathlib import Path

from trl import extract_prompt

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "trl_rows.json"


def turn(role, content, **other):
    return {"role": role, "content": content, **other}


CALL = [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
ASKED = [turn("user", "What is the time?")]
CALLED = [*ASKED, turn("assistant", None, tool_calls=CALL), turn("tool", "14:05", tool_call_id="c1")]

ROWS = [
    # Texts.
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "", "chosen": "Blue is a color.", "rejected": "No."},
    {"prompt": "Say hi. ", "chosen": "Hi", "rejected": "Say hi. Ho"},
    # Texts with an implicit prompt.
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is brown."},
    {"chosen": "Q: 2 + 2?\nA: 4", "rejected": "Q: 2 + 2?\nA: five"},
    {"chosen": "天气晴朗", "rejected": "天气很好"},
    {"chosen": "one two", "rejected": "one two three"},
    {"chosen": "two  spaces", "rejected": "two  words"},
    # Conversations.
    {"prompt": ASKED, "chosen": [turn("assistant", "Noon.")], "rejected": [turn("assistant", "Late.")]},
    {
        "prompt": [turn("system", "Be brief."), *ASKED, turn("assistant", "Why?"), turn("user", "Just so.")],
        "chosen": [turn("assistant", "Noon."), turn("user", "Thanks."), turn("assistant", "Bye.")],
        "rejected": [turn("assistant", "Late.")],
    },
    {"prompt": CALLED, "chosen": [turn("assistant", "14:05.")], "rejected": [turn("assistant", "Unknown.")]},
    {
        "prompt": ASKED,
        "chosen": [turn("assistant", None, tool_calls=CALL)],
        "rejected": [turn("assistant", "Unknown.", tool_calls=None)],
    },
    # Conversations with an implicit prompt.
    {"chosen": [*ASKED, turn("assistant", "Noon.")], "rejected": [*ASKED, turn("assistant", "Late.")]},
    {"chosen": [*CALLED, turn("assistant", "14:05.")], "rejected": [*CALLED, turn("assistant", "Unknown.")]},
    {
        "chosen": [turn("system", "Be brief."), *ASKED, turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")],
        "rejected": [turn("system", "Be brief."), *ASKED, turn("assistant", "d"), turn("user", "b"), turn("assistant", "c")],
    },
    {"chosen": [*ASKED, turn("assistant", "Noon.")], "rejected": [*ASKED, turn("assistant", "Noon.")]},
]


def without_none(value):
    """The messages of a split as templates see them."""
    if isinstance(value, str):
        return value
    return [{key: member for key, member in message.items() if member is not None} for message in value]


def main():
    goldens = []
    for row in ROWS:
        split = row if "prompt" in row else extract_prompt(row)
        goldens.append({"row": row, **{part: without_none(split[part]) for part in ("prompt", "chosen", "rejected")}})
    OUTPUT.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
