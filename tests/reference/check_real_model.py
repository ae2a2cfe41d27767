"""mmpo-fast beside transformers and TRL, on the real SmolLM2-135M-Instruct and real pairs.

Usage: python check_real_model.py MMPO_FAST MODEL WORK

MMPO_FAST is the program, MODEL the folder of tools/real_model.sh, WORK an empty folder. Greedy answers to chat prompts must be
transformers', word for word; log-probs of responses within 1e-5 of transformers'; two steps of DPO and of SFT must come to TRL's
loss, gradient norm, rewards and log-probs, to five digits. Everything is f32. Packages: requirements.txt.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches" / "trl"))

from compare import METRICS, our_command, read_steps  # noqa: E402
from report import difference  # noqa: E402
from train_trl import messages, train  # noqa: E402  (sets what transformers reads from the environment)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colours.",
    "Q: When was one of the members of the band born?\nA:",
)
NEW_TOKENS = 24
# Error of the sum of a response's log-probs, relative to that sum, or to 1 where the sum is smaller.
LOGP_TOLERANCE = 1e-5
# Before and after an optimiser step: five digits of each number, and five places of a reward, which is a small difference of
# large numbers. TRL's gradient norm is taken in f64: see `clip_in_f64`.
TOLERANCE = 1e-5
STEPS, PAIRS_PER_STEP, THREADS = 2, 3, 2


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def check_text(program, folder, model, tokenizer):
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            answer = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        theirs = tokenizer.decode(answer, skip_special_tokens=True).strip()
        ours = run(program, "--quiet", "generate", "--model", folder, "--prompt", prompt, "--max-new-tokens", NEW_TOKENS,
                   "--device", "cpu", "--threads", THREADS).strip()
        if ours != theirs:
            sys.exit(f"greedy answer to {prompt!r}:\nmmpo-fast     {ours!r}\ntransformers  {theirs!r}")
    print(f"greedy answers to {len(PROMPTS)} prompts are transformers', word for word")


def response_logp(model, tokenizer, record, side):
    """Sum of the response's log-probs given the prompt, in nats, and its tokens.

    The softmax over f32 logits is taken in f64: PyTorch's own in f32 adds up 49152 terms and is 1e-5 nats too high a token.
    """
    prompt = messages(record["conversations"])
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + messages([record[side]]), return_dict=False)
    assert whole[: len(before)] == before, record
    ids = torch.tensor([whole])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logps[len(before) - 1 :].sum().item(), len(whole) - len(before)


def check_scores(program, folder, model, tokenizer, records, pairs, work):
    run(program, "--quiet", "score", "--model", folder, "--data", pairs, "--output", work / "scores.jsonl", "--device", "cpu",
        "--threads", THREADS)
    lines = [json.loads(line) for line in (work / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == len(records), lines
    worst = 0.0
    for line, record in zip(lines, records):
        for side in ("chosen", "rejected"):
            theirs, tokens = response_logp(model, tokenizer, record, side)
            if line[f"tokens_{side}"] != tokens:
                sys.exit(f"record {line['record']}, {side}: {line[f'tokens_{side}']} tokens, transformers has {tokens}")
            error = abs(line[f"logp_{side}"] - theirs) / max(1.0, abs(theirs))
            if not error <= LOGP_TOLERANCE:
                sys.exit(f"record {line['record']}, {side}: log-prob {line[f'logp_{side}']}, transformers' {theirs}: {error:.1e}")
            worst = max(worst, error)
    print(f"log-probs of {2 * len(records)} responses agree with transformers'; largest relative error {worst:.1e}")


def check_training(objective, program, folder, records, pairs, work):
    options = SimpleNamespace(pairs_per_step=PAIRS_PER_STEP, threads=THREADS, steps=STEPS)
    command = our_command(program, objective, folder, pairs, work / objective, options)
    run(*command)
    ours = read_steps(work / objective / "metrics.jsonl", METRICS[objective])
    rate = float(command[command.index("--learning-rate") + 1])
    _, lines, _ = train(objective, folder, records, work / f"trl-{objective}", pairs_per_step=PAIRS_PER_STEP, learning_rate=rate,
                        steps=STEPS, exact_norm=True)
    assert sorted(ours) == [line["step"] for line in lines] == list(range(1, STEPS + 1)), (sorted(ours), lines)
    failures, worst = [], {}
    for theirs in lines:
        for metric, value in ours[theirs["step"]].items():
            error = difference(metric, value, theirs[metric])
            worst[metric] = max(worst.get(metric, 0.0), error)
            if not error <= TOLERANCE:
                failures.append(f"step {theirs['step']}, {metric}: {value!r}, TRL's {theirs[metric]!r}, differs by {error:.1e}")
    if failures:
        sys.exit(f"{objective}:\n" + "\n".join(failures))
    found = ", ".join(f"{metric} {error:.0e}" for metric, error in worst.items())
    print(f"{STEPS} steps of {objective} are TRL's; largest differences: {found}")


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    program, folder, work = (Path(word).resolve() for word in sys.argv[1:])
    torch.set_num_threads(THREADS)
    every = json.loads((Path(__file__).resolve().parents[2] / "benches" / "trl" / "pairs.json").read_text())
    # The shortest ones: two cores have other things to do.
    records = sorted(every, key=lambda record: len(json.dumps(record)))[: STEPS * PAIRS_PER_STEP]
    pairs = work / "pairs.json"
    pairs.write_text(json.dumps(records))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_text(program, folder, model, tokenizer)
    check_scores(program, folder, model, tokenizer, records, pairs, work)
    del model
    for objective in ("dpo", "sft"):
        check_training(objective, program, folder, records, pairs, work)


if __name__ == "__main__":
    main()
