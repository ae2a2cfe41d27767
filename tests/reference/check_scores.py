"""Log-probs with Llama 2's tokenizer: `mmpo-fast score` beside transformers, on the token ids that TRL's DPOTrainer makes.

    python check_scores.py PROGRAM [--work DIR]

The weights are random and small; the tokenizer is the real one, with its own reading of spaces at the border of prompt and
response. WORK is that of check_tokens.py, which fetches the tokenizer. Where it cannot be had, the output says so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import check_tokens as tokens
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# Error of the sum of a response's log-probs, relative to that sum.
TOLERANCE = 1e-5
TEMPLATES = ("own/vicuna", "own/inst", "own/zephyr", "own/space at the end")


def random_model(folder, vocabulary):
    """Saves a small Llama beside the tokenizer; its log-probs differ much from token to token."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def response_logp(model, prompt, response):
    """Sum of the response's log-probs in nats, with the softmax in f64."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum().item()


def compare(program, folder, model, tokenizer, examples, template, work):
    """Responses compared and the largest relative error."""
    data, scores = work / "pairs.jsonl", work / "scores.jsonl"
    data.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples))
    command = [program, "--quiet", "score", "--model", folder, "--data", data, "--output", scores, "--device", "cpu",
               "--max-length", 512, "--max-prompt-length", 256]
    if template is not None:
        (work / "t.jinja").write_text(template)
        command += ["--chat-template", work / "t.jinja"]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    if run.returncode:
        sys.exit(f"score failed:\n{run.stderr}")
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(lines) == len(examples), (len(lines), len(examples))
    tokenizer.chat_template = template
    worst = 0.0
    for line, example in zip(lines, examples):
        want = tokens.expected(tokenizer, example)
        for side in ("chosen", "rejected"):
            theirs = response_logp(model, want["prompt"], want[side])
            error = abs(line[f"logp_{side}"] - theirs) / abs(theirs)
            if line[f"tokens_{side}"] != len(want[side]) or not error <= TOLERANCE:
                sys.exit(f"{example}\n{side}: {line[f'logp_{side}']} of {line[f'tokens_{side}']} tokens, "
                         f"transformers' {theirs} of {len(want[side])}")
            worst = max(worst, error)
    return 2 * len(examples), worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--work", type=Path, default=tokens.ROOT / "target" / "tokens")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = tokens.fetch_packages(options.work).get("llama2")
    if source is None:
        print("SKIPPED: Llama 2's tokenizer cannot be had: no log-probs were compared with it")
        return
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        scratch = Path(scratch)
        folder = tokens.folder_with(source, scratch, {})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = random_model(folder, len(tokenizer))
        jobs = [(tokens.TEXTS, None)] + [(tokens.CONVERSATIONS, tokens.OWN_TEMPLATES[name]) for name in TEMPLATES]
        results = [compare(options.program, folder, model, tokenizer, *job, scratch) for job in jobs]
    count, worst = sum(count for count, _ in results), max(worst for _, worst in results)
    print(f"log-probs with Llama 2's tokenizer: {count} responses, plain and in {len(TEMPLATES)} templates; largest relative error "
          f"against transformers {worst:.1e}")


if __name__ == "__main__":
    main()
