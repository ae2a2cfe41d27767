"""One whole training run with TRL, on the same pairs in the same order as `mmpo-fast train`.

    .venv/bin/python benches/trl/train_trl.py --objective dpo --model DIR --pairs FILE --output DIR [options]

DPO is `DPOTrainer`, SFT `SFTTrainer` on prompts and chosen responses, SimPO `CPOTrainer` of trl.experimental. All in f32, with a
constant learning rate. The output folder gets metrics.jsonl, a line a step as TRL logs it; run.json, the seconds of training alone;
and the trained model, as `mmpo-fast train` leaves one too.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The caller chooses the threads, and the trainers of trl.experimental warn about being experimental.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from order import permutation  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback  # noqa: E402

disable_progress_bars()

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
BETA = {"dpo": 0.1, "simpo": 2.0}
GAMMA_BETA_RATIO = 0.5


def messages(turns):
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def columns(objective, record):
    """A record of the pairs (ShareGPT form, or plain text for SimPO) as TRL has it."""
    if objective == "simpo":
        return {name: record[name] for name in ("prompt", "chosen", "rejected")}
    prompt, chosen = messages(record["conversations"]), messages([record["chosen"]])
    if objective == "sft":
        return {"prompt": prompt, "completion": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": messages([record["rejected"]])}


class Clock(TrainerCallback):
    """Seconds of the steps alone, and every line that is logged."""

    def __init__(self):
        self.lines, self.started, self.seconds = [], 0.0, 0.0

    def on_train_begin(self, *_, **__):
        self.started = time.monotonic()

    def on_step_end(self, *_, **__):
        self.seconds = time.monotonic() - self.started

    def on_log(self, _arguments, state, _control, logs=None, **__):
        if "grad_norm" in logs:
            self.lines.append({"step": state.global_step, **logs})


def trainer_classes(objective):
    if objective == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOConfig, DPOTrainer
    if objective == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOConfig, CPOTrainer


def clip_in_f64(parameters, max_norm, norm_type=2):
    """Clips as PyTorch does, by the norm in f64: PyTorch adds up 28 million squares in f32, and is off in the fifth digit."""
    assert norm_type == 2, norm_type
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    for gradient in gradients:
        gradient.mul_(min(1.0, (max_norm / (norm + 1e-6)).item()))
    return norm


def train(objective, model, records, output, *, pairs_per_step, learning_rate, steps=None, seed=42, micro_batch=None,
          checkpointing=False, precompute=False, exact_norm=False):
    """Trains one epoch, or `steps` steps, over `records`; returns the trainer, the logged lines and the seconds of the steps.

    With `exact_norm` gradients are clipped by `clip_in_f64`.
    """
    config, trainer = trainer_classes(objective)
    order = permutation(len(records), seed, 0)
    rows = [columns(objective, records[at]) for at in order]
    micro_batch = micro_batch or pairs_per_step
    special = {"max_length": 1024}
    if objective in BETA:
        special["beta"] = BETA[objective]
    if objective == "dpo":
        special["precompute_ref_log_probs"] = precompute
    if objective == "simpo":
        special |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": GAMMA_BETA_RATIO * BETA["simpo"]}
    arguments = config(
        output_dir=str(output),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=pairs_per_step // micro_batch,
        num_train_epochs=1,
        max_steps=steps or -1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=checkpointing,
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=seed,
        **special,
    )
    clock = Clock()
    trainer = trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    if exact_norm:
        trainer.accelerator.clip_grad_norm_ = clip_in_f64
    trainer.train()
    return trainer, clock.lines, clock.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("dpo", "sft", "simpo"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, help="pairs that go through the model at once; default: all of a step")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, as TRL does by default")
    parser.add_argument("--precompute", action="store_true", help="reference log-probs before training (DPO)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer, lines, seconds = train(
        options.objective,
        options.model,
        json.loads(options.pairs.read_text()),
        options.output,
        pairs_per_step=options.pairs_per_step,
        learning_rate=options.learning_rate,
        steps=options.steps,
        seed=options.seed,
        micro_batch=options.micro_batch,
        checkpointing=options.checkpointing,
        precompute=options.precompute,
    )
    trainer.save_model(str(options.output / "model"))
    (options.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = {"steps_seconds": seconds, "command_seconds": time.monotonic() - STARTED}
    (options.output / "run.json").write_text(json.dumps(spent) + "\n")


if __name__ == "__main__":
    main()
