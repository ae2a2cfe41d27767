"""A training step in PyTorch: transformers' Llama, MMPO loss, backward, AdamW; to be compared with `mmpo-fast bench step`.
The same model and pairs as there: README.md.

Variants:
    padded      what TRL does: chosen and rejected rows in one batch, the prompt in each, padded; all logits, selective log-softmax
    sliced      the same with the logits of the scored rows only
    compile     `sliced` with the layers under torch.compile
    packed      nothing padded and each prompt once, under the shared-prefix mask (FlexAttention on a GPU, a dense mask on a CPU);
                the logits of the scored rows only
Attention of the others is sdpa. AdamW is PyTorch's fused one: on bf16 weights on a GPU (their fastest; mmpo-fast keeps f32 masters), on
f32 weights on a CPU. There `--precision bf16` runs the forward under bf16 autocast, as TRL's `bf16=True` does: weights, gradients and
AdamW stay f32. Reference log-probs are computed before the clock starts.
"""

import contextlib
import json
import statistics
import time

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import common

STEP = common.SHAPES["step"]
OFFSET = 1e-6
VARIANTS = ("padded", "sliced", "compile", "packed")
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@torch.no_grad()
def fill(weight, stream, chunk=1 << 20):
    """Uniform values of standard deviation 0.02; in chunks, so that peak memory stays the training's."""
    flat = weight.view(-1)
    width = np.float32(0.02) * np.sqrt(np.float32(3.0))
    for start in range(0, flat.numel(), chunk):
        elements = np.arange(start, min(start + chunk, flat.numel()), dtype=np.uint64)
        unit = (common.scramble(stream, elements) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        values = (np.float32(2.0) * unit - np.float32(1.0)) * width
        flat[start : start + len(values)] = torch.from_numpy(values).to(flat.device, flat.dtype)


def make_model(shape, arguments, attention):
    config = LlamaConfig(**shape.config, use_cache=False)
    config._attn_implementation = attention
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(common.dtype_of(arguments)).train()
    fill(model.model.embed_tokens.weight, 0)
    for index, layer in enumerate(model.model.layers):
        for projection, name in enumerate(PROJECTIONS):
            fill(layer.get_submodule(name).weight, 1 + len(PROJECTIONS) * index + projection)
    if not config.tie_word_embeddings:
        fill(model.lm_head.weight, 1 + len(PROJECTIONS) * config.num_hidden_layers)
    return model


class PaddedRows:
    """`[2 * pairs, longest]`, all chosen rows, then all rejected ones, as TRL concatenates them."""

    def __init__(self, shape, arguments, sliced):
        tokens = common.pair_tokens(shape)
        prompt, chosen, rejected = tokens.split([shape.prompt, shape.chosen, shape.rejected], dim=1)
        longest = shape.prompt + max(shape.chosen, shape.rejected)
        pad = lambda rows: torch.nn.functional.pad(rows, (0, longest - rows.shape[1]))
        rows = torch.cat([pad(torch.cat([prompt, response], dim=1)) for response in (chosen, rejected)])
        self.rows = rows.to(arguments.device)
        lengths = torch.tensor([shape.chosen] * shape.pairs + [shape.rejected] * shape.pairs)
        self.lengths = lengths.to(arguments.device)
        responses = torch.arange(longest - shape.prompt)
        self.mask = (responses[None] < lengths[:, None]).to(arguments.device)
        attended = torch.arange(longest)[None] < shape.prompt + lengths[:, None]
        self.attended = None if attended.all() else attended.long().to(arguments.device)
        self.prompt, self.sliced = shape.prompt, sliced

    @property
    def computed_tokens(self):
        return self.rows.numel()

    def mean_logps(self, model):
        """Of each row, `[2 * pairs]`."""
        kept = self.rows.shape[1] - self.prompt + 1
        options = {"logits_to_keep": kept} if self.sliced else {}
        logits = model(input_ids=self.rows, attention_mask=self.attended, use_cache=False, **options).logits
        logits = logits[:, -kept:-1]
        targets = self.rows[:, self.prompt :]
        # TRL's selective log-softmax: no tensor of log-probs, one logsumexp a row.
        chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        logps = chosen.float() - torch.stack([row.float().logsumexp(dim=-1) for row in logits])
        return (logps * self.mask).sum(dim=1) / self.lengths


class PackedPairs:
    """`[1, T]`, each pair `prompt | chosen | rejected`; positions of the rejected response restart behind the prompt."""

    def __init__(self, shape, arguments):
        self.ids = common.pair_tokens(shape).view(1, -1).to(arguments.device)
        inside = torch.arange(shape.pair_tokens)
        behind = inside >= shape.prompt + shape.chosen
        positions = inside - behind.long() * shape.chosen
        self.positions = positions.repeat(shape.pairs)[None].to(arguments.device)
        # The last prompt row predicts the first token of both responses.
        scored = torch.arange(shape.prompt, shape.pair_tokens)
        row = torch.where(scored == shape.prompt + shape.chosen, shape.prompt, scored) - 1
        starts = torch.arange(shape.pairs)[:, None] * shape.pair_tokens
        self.scored_rows = (starts + row).view(-1).to(arguments.device)
        self.targets = self.ids[0, (starts + scored).view(-1).to(arguments.device)]
        self.shape = shape
        if arguments.device == "cuda":
            from attention import pair_mask

            self.mask = pair_mask(shape, arguments.device)
        else:
            segment = (inside >= shape.prompt).int() + behind.int()
            sees = (inside[:, None] >= inside[None]) & ((segment[None] == 0) | (segment[None] == segment[:, None]))
            dense = torch.block_diag(*[sees.float()] * shape.pairs) > 0
            self.mask = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)[None, None]

    @property
    def computed_tokens(self):
        return self.ids.numel()

    def mean_logps(self, model):
        options = {"attention_mask": self.mask, "position_ids": self.positions, "use_cache": False}
        hidden = model.model(input_ids=self.ids, **options).last_hidden_state[0]
        logits = model.lm_head(hidden[self.scored_rows]).float()
        logps = logits.gather(-1, self.targets[:, None])[:, 0] - logits.logsumexp(dim=-1)
        responses = logps.view(self.shape.pairs, -1).split([self.shape.chosen, self.shape.rejected], dim=1)
        return torch.cat([response.mean(dim=1) for response in responses])


def make_rewards(reference):
    half = len(reference) // 2
    base = torch.tensor([STEP["epsilon"]] * half + [1 - STEP["epsilon"]] * half, device=reference.device)
    rewards = STEP["beta"] * reference + base
    return (rewards + OFFSET - rewards.min()) / (rewards.max() - rewards.min() + OFFSET)


def memory(field):
    """Bytes, from a line of Linux's account of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def autocast(arguments):
    """Around whatever computes log-probs."""
    if arguments.device == "cpu" and arguments.precision == "bf16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def make_step(variant, shape, arguments):
    """A function that trains one step and returns its loss, and what it trains."""
    on_gpu = arguments.device == "cuda"
    attention = "flex_attention" if variant == "packed" and on_gpu else "sdpa"
    model = make_model(shape, arguments, attention)
    batch = PackedPairs(shape, arguments) if variant == "packed" else PaddedRows(shape, arguments, variant != "padded")
    forward = torch.compile(model) if variant == "compile" and not arguments.tiny else model
    with torch.no_grad(), autocast(arguments):
        rewards = make_rewards(batch.mean_logps(model))
    settings = {"lr": STEP["learning_rate"], "betas": (STEP["beta1"], STEP["beta2"])}
    settings |= {"eps": STEP["adam_epsilon"], "weight_decay": STEP["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(arguments):
            scores = batch.mean_logps(forward) + rewards
        loss = -scores.view(2, -1).logsumexp(dim=0).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, model, batch


def measure(variant, shape, arguments):
    """The host's peak memory is that of all variants so far, so whoever compares it runs one a process."""
    baseline = memory("VmRSS:")
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, model, batch = make_step(variant, shape, arguments)
    seconds, losses = [], []
    for index in range(arguments.warmups + arguments.calls):
        # Time that is up ends the warm-up too: one step is timed in any case.
        last = time.monotonic() >= arguments.end
        started = time.perf_counter()
        losses.append(step())
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        if index >= arguments.warmups or last:
            seconds.append(time.perf_counter() - started)
        if last:
            break
    median = statistics.median(seconds)
    return {
        "engine": "pytorch",
        "version": f"{torch.__version__}, transformers {transformers.__version__}",
        "variant": variant,
        "precision": arguments.precision,
        "shape": shape.model,
        "profile": shape.profile,
        "pairs": shape.pairs,
        "prompt": shape.prompt,
        "chosen": shape.chosen,
        "rejected": shape.rejected,
        "warmup": arguments.warmups,
        "steps": arguments.calls,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": seconds,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "pair_tokens": shape.tokens,
        "computed_tokens": batch.computed_tokens,
        "pair_tokens_per_second": shape.tokens / median,
        "peak_rss_bytes": memory("VmHWM:"),
        "baseline_rss_bytes": baseline,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0,
        "losses": losses,
    }


def flops_of(shape):
    """As `bench::step::flops` in Rust: what the packed step needs."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_size + shape.heads * shape.head_size + 3 * shape.mlp
    layer = 6 * shape.tokens * shape.hidden * width + 14 * shape.visible * shape.heads * shape.head_size
    return shape.config["num_hidden_layers"] * layer + 6 * shape.scored * shape.vocabulary * shape.hidden


def main(argv=None):
    def extra(parser):
        parser.add_argument("--variant", choices=VARIANTS, action="append", help="may be repeated [default: padded]")
        parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of a CPU's products")
        parser.add_argument("--json", action="store_true")

    arguments = common.arguments_of(__doc__, argv, extra)
    shape = common.Shape(arguments)
    reports = []
    for variant in arguments.variant or ["padded"]:
        if not common.has_time(arguments, variant):
            continue
        with common.left_out(arguments, variant):
            reports.append(report_of(variant, shape, arguments))
    if not reports:
        raise SystemExit(f"{shape.name}: no step was measured")
    return reports[-1]


def report_of(variant, shape, arguments):
    report = measure(variant, shape, arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        print(f"first loss {report['losses'][0]:.5f}, peak {report['peak_device_bytes'] / 2**30:.2f} GiB on the device")
    if arguments.csv or not arguments.json:
        common.report(arguments, shape, "step", {f"pytorch {variant}": report["seconds"]}, flops=flops_of(shape))
    return report


if __name__ == "__main__":
    main()
