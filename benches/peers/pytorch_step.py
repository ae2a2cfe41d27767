"""A training step in PyTorch on the CPU: transformers' Llama, MMPO loss, backward, AdamW; to be compared with
benches/step.rs. Same arguments, model, pairs and JSON as every engine here: see README.md.

Variants:
    eager      what TRL does: chosen and rejected rows in one batch, all logits, selective log-softmax
    sliced     the same with logits of the scored rows only (`logits_to_keep`), which all rows being of one shape allows
    compile    `sliced` with the model under torch.compile
All with sdpa attention and PyTorch's fused AdamW, which are the fastest here.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

BETA, EPSILON, OFFSET = 0.05, 0.9, 1e-6
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
TOKEN_STREAM = 1 << 20
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SHAPES = {
    "smollm2-135m": dict(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "tiny-5m": dict(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=4096,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def scramble(stream, elements):
    """SplitMix64's finaliser over a counter, as `scramble` in step_bench.rs."""
    z = (np.uint64(stream << 40) + elements + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@torch.no_grad()
def fill(weight, stream, chunk=1 << 20):
    """Uniform values of standard deviation 0.02; in chunks, so that peak memory stays the training's."""
    flat = weight.view(-1).numpy()
    width = np.float32(0.02) * np.sqrt(np.float32(3.0))
    for start in range(0, flat.size, chunk):
        end = min(start + chunk, flat.size)
        unit = (scramble(stream, np.arange(start, end, dtype=np.uint64)) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        flat[start:end] = (np.float32(2.0) * unit - np.float32(1.0)) * width


def make_model(shape):
    config = LlamaConfig(**SHAPES[shape], rms_norm_eps=1e-5, max_position_embeddings=2048, use_cache=False)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).float().train()
    fill(model.model.embed_tokens.weight, 0)
    for index, layer in enumerate(model.model.layers):
        for projection, name in enumerate(PROJECTIONS):
            fill(layer.get_submodule(name).weight, 1 + 7 * index + projection)
    if not config.tie_word_embeddings:
        fill(model.lm_head.weight, 1 + 7 * config.num_hidden_layers)
    return model


def make_rows(arguments, vocabulary):
    """`[2 * pairs, prompt + response]`, all chosen rows, then all rejected ones."""
    length = arguments.prompt + 2 * arguments.response
    tokens = scramble(TOKEN_STREAM, np.arange(arguments.pairs * length, dtype=np.uint64)) % np.uint64(vocabulary)
    tokens = torch.from_numpy(tokens.astype(np.int64)).view(arguments.pairs, length)
    prompt, chosen, rejected = tokens.split([arguments.prompt, arguments.response, arguments.response], dim=1)
    return torch.cat([torch.cat([prompt, chosen], dim=1), torch.cat([prompt, rejected], dim=1)])


def selective_log_softmax(logits, targets):
    """TRL's: no log_softmax tensor, one logsumexp a row."""
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([row.logsumexp(dim=-1) for row in logits])


def mean_logps(model, rows, response, keep):
    options = {"logits_to_keep": response + 1} if keep else {}
    logits = model(input_ids=rows, use_cache=False, **options).logits
    logits = logits[:, :-1] if keep else logits[:, -response - 1 : -1]
    return selective_log_softmax(logits, rows[:, -response:]).mean(dim=1)


def make_rewards(reference):
    pairs = len(reference) // 2
    rewards = BETA * reference + torch.tensor([EPSILON] * pairs + [1 - EPSILON] * pairs)
    return (rewards + OFFSET - rewards.min()) / (rewards.max() - rewards.min() + OFFSET)


def memory(field):
    """Bytes, from a line of Linux's account of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny-5m")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--variant", choices=("eager", "sliced", "compile"), default="eager")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    baseline = memory("VmRSS:")
    model = make_model(arguments.shape)
    parameters = sum(weight.numel() for weight in model.parameters())
    rows = make_rows(arguments, model.config.vocab_size)
    keep = arguments.variant != "eager"
    forward = torch.compile(model) if arguments.variant == "compile" else model
    with torch.no_grad():
        rewards = make_rewards(mean_logps(model, rows, arguments.response, keep))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    seconds, losses = [], []
    for index in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        scores = mean_logps(forward, rows, arguments.response, keep) + rewards
        loss = -scores.view(2, -1).logsumexp(dim=0).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if index >= arguments.warmup:
            seconds.append(time.perf_counter() - start)

    median = statistics.median(seconds)
    pair_tokens = arguments.pairs * (arguments.prompt + 2 * arguments.response)
    report = {
        "engine": "pytorch",
        "version": f"{torch.__version__}, transformers {transformers.__version__}",
        "variant": arguments.variant,
        "shape": arguments.shape,
        "pairs": arguments.pairs,
        "prompt": arguments.prompt,
        "response": arguments.response,
        "threads": torch.get_num_threads(),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "parameters": parameters,
        "seconds": seconds,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "pair_tokens": pair_tokens,
        "computed_tokens": rows.numel(),
        "pair_tokens_per_second": pair_tokens / median,
        "computed_tokens_per_second": rows.numel() / median,
        "peak_rss_bytes": memory("VmHWM:"),
        "baseline_rss_bytes": baseline,
        "losses": losses,
    }
    if arguments.json:
        print(json.dumps(report))
    else:
        print(
            f"pytorch {report['version']} ({arguments.variant}), {arguments.shape}: {median:.4f} s a step "
            f"({min(seconds):.4f} to {max(seconds):.4f}), {report['pair_tokens_per_second']:.0f} pair tokens/s, "
            f"peak {report['peak_rss_bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
