"""Loads a folder that mmpo-fast saved with transformers and checks its chat template and its end tokens.

Usage: python check_saved_template.py FOLDER TEMPLATE RENDER_TEMPLATES --base BASE [--end TOKEN]

TEMPLATE is the file of the template that the model was trained with: transformers must find that text in FOLDER, and
render with it what our example RENDER_TEMPLATES renders. Generation must stop at all end tokens of the folder BASE that
training began with, and at TOKEN if it is given. Exits with 1 and says what differs. Packages: requirements.txt.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

CONVERSATION = [
    {"role": "user", "content": "Name three colours."},
    {"role": "assistant", "content": "Red, green and blue."},
    {"role": "user", "content": "Ünï 🌍"},
]


def end_tokens(folder):
    ids = LlamaForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("template", type=Path)
    parser.add_argument("program")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--end")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    source = arguments.template.read_text()
    if tokenizer.chat_template != source:
        sys.exit(f"{arguments.folder}: its template is {tokenizer.chat_template!r}, not {source!r}")
    theirs = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    job = {
        "template": source,
        "special_tokens": tokenizer.special_tokens_map,
        "now": 0,
        "cases": [{"messages": CONVERSATION, "add_generation_prompt": True}],
    }
    answer = subprocess.run([arguments.program], input=json.dumps(job), capture_output=True, text=True, check=True)
    ours = json.loads(answer.stdout)["results"][0]["text"]
    if ours != theirs:
        sys.exit(f"transformers renders {theirs!r}, ours {ours!r}")
    wanted = end_tokens(arguments.base) | {tokenizer.eos_token_id}
    if arguments.end:
        wanted.add(tokenizer.convert_tokens_to_ids(arguments.end))
    found = end_tokens(arguments.folder)
    if found != wanted:
        sys.exit(f"{arguments.folder}: generation stops at {sorted(found)}, not at {sorted(wanted)}")
    print(f"{arguments.folder.name}: the template trained with, and end tokens {sorted(found)}")


if __name__ == "__main__":
    main()
