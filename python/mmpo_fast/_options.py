"""The options of the commands, made from the program's own table: `MMPO_FAST_RECORD=1 cargo test --test training python`.
"""

from __future__ import annotations

import os
from typing import TypedDict, Union

PathLike = Union[str, "os.PathLike[str]"]


class RunOptions(TypedDict, total=False):
    """What `train` and `plan` have in common."""

    recipe: PathLike
    """Read options from a recipe; flags go before it"""
    model: PathLike
    """Hugging Face folder of the Llama model to train, or its name on the Hub where it is in the cache on this disk; `builtin:demo` is the demo's. [default: required; without --data and --recipe too, the demo]"""
    data: PathLike
    """Preference pairs to train on: JSON Lines, JSON, CSV or Parquet files, folders of them, or a data set's name on the Hub where it is in the cache on this disk. Separate several by commas; =0.5 after one takes half of its pairs, =2 takes each twice. `builtin:demo` is the demo's. [default: required; without --model and --recipe too, the demo]"""
    columns: str
    """Columns that have other names in the files: what each is read as, and its name there, such as prompt=question,chosen=answer_good. [default: the files' own names]"""
    output: PathLike
    """Folder that receives the model, metrics, report and checkpoints. [default: required; the demo's is mmpo-fast-demo]"""
    reference: PathLike
    """Hugging Face folder of the frozen reference model. [only mmpo, dpo, ipo, hinge] [default: the starting model]"""
    data_cache: PathLike
    """Folder in which tokenised pairs are kept between runs, or off: then they are held in memory and not kept. [default: pairs in MMPO_FAST_CACHE or in mmpo-fast in the user's cache folder]"""
    min_score_gap: float
    """Leave out pairs whose scores in the file (score_chosen and score_rejected, chosen_rating and rejected_rating and the like) are less far apart than this; a record without scores is refused. [default: scores are not looked at]"""
    chat_template: PathLike
    """Chat template instead of the model's default: the name of another one of the model's, or a Jinja file. [default: the model's]"""
    template_date: str
    """The date that `strftime_now` of a chat template gives. [default: the time of the run]"""
    max_prompt_length: int
    """Prompts are cut from the left to this many tokens. [default: 1800, or the same share of a smaller --max-length]"""
    max_length: int
    """Prompt plus one response are cut to this many tokens, the response from the right. [default: 2312, or the model's max_position_embeddings where that is less]"""
    on_refused: str
    """Records that cannot be read as a pair or that the chat template refuses: error or drop. [default: error]"""
    on_empty: str
    """Pairs with a response that has no text, or no token to score: drop or error. [default: drop]"""
    on_long_prompt: str
    """Prompts longer than --max-prompt-length: cut them on the left, drop or error. [default: cut]"""
    on_long_response: str
    """Responses that end beyond --max-length: cut them on the right, drop or error. [default: cut]"""
    on_identical: str
    """Pairs whose responses have the same tokens: keep, drop or error. [default: keep]"""
    on_duplicate: str
    """Pairs that came before: keep, drop or error. [default: keep]"""
    on_contradiction: str
    """Pairs that came before with their responses exchanged: keep, drop or error. [default: keep]"""
    on_boundary: str
    """Pairs whose prompt ends within a token of a response, or is written otherwise before one: keep, drop or error. [default: keep]"""
    on_lost_text: str
    """Pairs of which the chat template leaves out or rewrites some text: keep, drop or error. [default: keep]"""
    on_no_end: str
    """Pairs with a response after which the chat template writes no end token: keep, drop or error. [default: keep]"""
    on_after_end: str
    """Responses with tokens after their last end token, which are scored too: keep, cut them off, drop or error. [default: keep]"""
    on_suspicious: str
    """Pairs that do not look like what their author meant, such as a list written as text: keep, drop or error. [default: keep]"""
    objective: str
    """What is optimised: - mmpo: maximum marginal likelihood of the preferred output (Najafi and Fyshe, EACL 2026, arXiv 2510.22881) - dpo: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) - simpo: preference by mean log-probs with a target margin (Meng et al. 2024, arXiv 2405.14734) - sft: supervised fine-tuning on the chosen responses (maximum likelihood) - ipo: squared distance of the mean log-ratios' difference from 1 / (2 beta) (Azar et al. 2023, arXiv 2310.12036) - orpo: supervised fine-tuning on the chosen responses, and an odds ratio that sets the rejected ones apart (Hong et al. 2024, arXiv 2403.07691) - hinge: hinge loss on DPO's margin, which leaves a pair alone once its margin is 1 (Zhao et al. 2023, arXiv 2305.10425) [default: mmpo]"""
    beta: float
    """The main number of the objective: - mmpo: weight of the reference log-prob in the reward - dpo: factor of the log-ratios - simpo: factor of the mean log-probs - ipo: regularisation; the mean log-ratios are driven 1 / (2 beta) nats apart - orpo: weight of the odds ratio, the paper's lambda - hinge: factor of the log-ratios; 1 / beta nats is the margin aimed at [only mmpo, dpo, simpo, ipo, orpo, hinge] [default: mmpo 0.05, dpo 0.1, simpo 2.0, ipo 0.1, orpo 0.1, hinge 0.1]"""
    epsilon: float
    """Reward of the chosen response before the reference's part; the rejected one gets 1 - epsilon. [only mmpo] [default: 0.9]"""
    reward_group: int
    """Pairs whose rewards are normalised together; 2 is what the authors do. [only mmpo] [default: 2, or 1 if --pairs-per-step is 1]"""
    reward_normalize: bool
    """Scale the rewards of a group to 0..1; false is the paper's \"- InBatchNormalization\". [only mmpo] [default: true]"""
    length_normalize: bool
    """Use means over tokens instead of sums, for policy, reference and entropy; the paper's \"+ LengthNorm\". [only mmpo] [default: false]"""
    preference_weight: float
    """Weight of an added DPO-like loss; at 1 the whole is plain SFT on the chosen responses. [only mmpo] [default: 0.0]"""
    entropy_weight: Union[float, str]
    """Weight of the entropy bonus; `beta` is the paper's \"+ EntropyOptim\". [only mmpo] [default: 0.0]"""
    gamma_beta_ratio: float
    """Target margin of SimPO in units of beta. [only simpo] [default: 0.5]"""
    label_smoothing: float
    """Probability that a label is the wrong way round (conservative DPO). [only dpo] [default: 0.0]"""
    lora: str
    """Train low-rank adapters of these modules in place of the weights, which are frozen: all, or some of q, k, v, o, gate, up and down, such as q,v. The result is an adapter folder as PEFT has it. [default: the weights themselves are trained]"""
    lora_rank: int
    """Rank of the adapters. [default: 64]"""
    lora_alpha: float
    """Scale of the adapters, times their rank. [default: the rank, for a scale of 1]"""
    lora_dropout: float
    """Probability that an input of an adapter is dropped in training. [default: 0.0]"""
    lora_rslora: bool
    """Divide --lora-alpha by the root of the rank in place of the rank (rsLoRA). [default: false]"""
    adapter: PathLike
    """Folder of an adapter, as PEFT has it, to go on training; it says what --lora and its options say. [default: new adapters]"""
    learning_rate: float
    """Peak learning rate of AdamW. The defaults of mmpo, dpo and simpo are the smallest that MMPO's paper uses for each; its full training of small models takes 5e-4 for mmpo, see recipes/. [default: mmpo 0.0001, dpo 0.00001, simpo 0.0001, sft 0.00002, ipo 0.00001, orpo 0.00001, hinge 0.00001]"""
    adam_beta1: float
    """Decay of the first moment. [default: 0.9]"""
    adam_beta2: float
    """Decay of the second moment. [default: 0.999]"""
    adam_epsilon: float
    """Added to the root of the second moment. [default: 0.00000001]"""
    weight_decay: float
    """Decoupled weight decay, on every tensor. [default: 0.0]"""
    max_grad_norm: float
    """Global l2 norm that gradients are clipped to; 0 turns clipping off. [default: 1.0]"""
    schedule: str
    """Shape of the learning rate after the warm-up: cosine, linear or constant. [default: cosine]"""
    warmup_ratio: float
    """Warm-up as a share of all steps, at most all but one. Step `i` of a warm-up of `n` steps has `i / (n + 1)` of the peak learning rate, so that no step has none. [default: 0.1, unless --warmup-steps is given]"""
    warmup_steps: int
    """Warm-up in steps. [default: see --warmup-ratio]"""
    epochs: float
    """Passes over the data; fractions are allowed. [default: 1, unless --max-steps is given]"""
    max_steps: int
    """Optimiser steps of the whole run, instead of --epochs. [default: see --epochs]"""
    pairs_per_step: int
    """Pairs of one optimiser step, gathered over micro-batches. An epoch's last step takes what is left over. [default: 128; with under 2560 pairs, the largest power of two from 2 that makes at least 20 steps per epoch]"""
    tokens_per_micro_batch: int
    """Tokens of one micro-batch: more is faster and takes more memory, and the result stays the same. A pair larger than that is a micro-batch of its own. [default: 4096]"""
    seed: int
    """Seed of the order of the pairs, and of the first values and the dropout of adapters. [default: 42]"""
    eval_data: PathLike
    """Pairs to evaluate on, named as with --data. [default: no evaluation]"""
    eval_split: float
    """Share of the pairs of --data that is held out and evaluated on, instead of --eval-data. A hash of each prompt decides, so that the same pairs are held out wherever they stand, and no prompt is on both sides. [default: none]"""
    eval_steps: int
    """Optimiser steps between evaluations. [default: once per epoch]"""
    save_steps: int
    """Optimiser steps between checkpoints. [default: only at the end and on Ctrl-C]"""
    keep_checkpoints: int
    """How many checkpoints are kept, the newest ones. [default: 2]"""
    eval_on_start: bool
    """Evaluate before the first step too; false saves that time, and the report cannot compare before and after. [default: true]"""
    keep_best: str
    """Keep the checkpoint with the best value of this metric beside the newest ones, and write its model to `best`: loss, implicit/accuracies, implicit/margins, rewards/accuracies, rewards/margins, rewards/chosen, logps/accuracies, logps/margins or logps/chosen of the evaluation. The loss is best where it is lowest, all others where they are highest. [default: only the newest checkpoints are kept]"""
    early_stopping: int
    """End the run after this many evaluations in a row in which the metric of --keep-best (the loss, where none is named) did not become better; 0 never does. [default: 0]"""
    early_stopping_delta: float
    """With --early-stopping, a metric became better only where it did by more than this. [default: 0.0]"""
    capsule_weights: bool
    """Copy the weights and optimiser states into the capsule that a step with a number that is not finite leaves. Without that, `train --replay` takes the steps since the last checkpoint again. [default: false]"""
    device: str
    """Where to compute: auto takes a CUDA GPU of compute capability 8.0 or later, else the CPU. [default: auto]"""
    precision: str
    """Numbers that weights and activations are stored in; sums are f32 with either. bf16 halves activations, and on CPUs with AVX-512 BF16 the time of gemms. A GPU has bf16 alone. [default: f32 on the CPU, bf16 on a GPU]"""
    memory: str
    """Most device memory that the run may take, such as 24GB or 22GiB; it is refused where it would take more. With auto it takes what is free: the run chooses --optimizer-states, --master-weights, --gradients, --recompute, --offload and --tokens-per-micro-batch so that it fits, says what it chose, and writes it down for --resume. [default: what is free on the device]"""
    optimizer_states: str
    """Format of AdamW's moments: f32 takes 8 bytes per parameter, bf16 4, 8bit 2 by bitsandbytes' block-wise dynamic map; tensors of fewer than 4096 values stay f32 with 8bit. [default: f32]"""
    master_weights: str
    """Copy of the weights that updates are added to: f32 takes 4 bytes per parameter beside bf16 weights; split takes 2, the bits that the weights lack of the f32 copy; none rounds the updated bf16 weight up or down at random, with the seed. f32 weights need no copy. [default: f32]"""
    recompute: str
    """What the backward computes again instead of keeping it, to the same bits: none, selective (gate and up of the MLP, the largest activations), or layer (all between the residual streams of two layers). [default: none]"""
    gradients: str
    """Which gradients exist at a time: f32 sums those of all tensors over micro-batches; bf16 keeps the sums of the layers in half the memory; layer updates each layer inside the backward, so that only one layer has some. It needs each step in one micro-batch, and --max-grad-norm 0. [default: f32]"""
    offload: str
    """What lives in pinned host memory: states moves AdamW's moments and f32 master copies there, from where they visit the GPU piece by piece while it computes. The results have the same bits. [default: none]"""
    shard: str
    """What is cut among the ranks of a run on several GPUs, so that each keeps its part alone: states (AdamW's moments and f32 master copies), gradients (these too), weights (these too). [default: none]"""
    head_mode: str
    """How the log-prob head gets its gradient: main keeps the probabilities of a chunk of pairs, recompute forms them twice with less than 64 MiB, auto takes main where memory allows. Results agree but for rounding. [default: auto]"""
    head_workspace: int
    """MiB that kept probabilities may take; the recompute mode keeps none. [default: 1024]"""
    tflops: float
    """Peak rate of the device in 10^12 bf16 operations per second, for the metric `mfu`. [default: the GPU's, where it is known]"""
    threads: int
    """CPU threads. [default: all cores]"""


class TrainOptions(RunOptions, total=False):
    """Options of `train`."""

    resume: bool
    """Go on from the newest checkpoint in the output folder; with --output alone, that run's options hold too"""
    replay: str
    """Repeat the step that left this capsule (a folder capsules/step-N of a run) and show where the first number appears that is not finite; only --device and --threads may be given with it"""
    live: bool
    """Write report.html again every few seconds while the run goes on; an open page loads itself again"""
    gpus: int
    """Run on this many GPUs of this machine, a process for each; with --device cpu or emulated, in as many processes"""


class ScoreOptions(TypedDict, total=False):
    """Options of `score`."""

    model: PathLike
    """Hugging Face folder of the model"""
    adapter: PathLike
    """Folder of an adapter of that model, as PEFT has it: the adapted model is scored"""
    data: PathLike
    """Preference pairs, named as with `train`"""
    output: PathLike
    """File that receives one line per pair, in the order of the data; `-` is standard output"""
    reference: PathLike
    """Hugging Face folder of a reference model: writes rewards and margins too"""
    beta: float
    """Factor of the rewards, beta * (logp - reference logp) [default: 0.1]"""
    explain: bool
    """Show how much likelier than under the reference each token of the responses is; the reference is --reference, or the model without its --adapter"""
    show: int
    """Pairs that are explained, the first of the data [default: 3]"""
    html: PathLike
    """Write the explained pairs as one page, which fetches nothing"""
    color: str
    """Colours: auto (on a terminal, unless NO_COLOR is set), always or never"""
    columns: str
    """Columns that have other names in the files: what each is read as, and its name there, such as prompt=question,chosen=answer_good. [default: the files' own names]"""
    data_cache: PathLike
    """Folder in which tokenised pairs are kept between runs, or off: then they are held in memory and not kept. [default: pairs in MMPO_FAST_CACHE or in mmpo-fast in the user's cache folder]"""
    min_score_gap: float
    """Leave out pairs whose scores in the file (score_chosen and score_rejected, chosen_rating and rejected_rating and the like) are less far apart than this; a record without scores is refused. [default: scores are not looked at]"""
    chat_template: PathLike
    """Chat template instead of the model's default: the name of another one of the model's, or a Jinja file. [default: the model's]"""
    template_date: str
    """The date that `strftime_now` of a chat template gives. [default: the time of the run]"""
    max_prompt_length: int
    """Prompts are cut from the left to this many tokens. [default: 1800, or the same share of a smaller --max-length]"""
    max_length: int
    """Prompt plus one response are cut to this many tokens, the response from the right. [default: 2312, or the model's max_position_embeddings where that is less]"""
    on_refused: str
    """Records that cannot be read as a pair or that the chat template refuses: error or drop. [default: error]"""
    on_empty: str
    """Pairs with a response that has no text, or no token to score: drop or error. [default: drop]"""
    on_long_prompt: str
    """Prompts longer than --max-prompt-length: cut them on the left, drop or error. [default: cut]"""
    on_long_response: str
    """Responses that end beyond --max-length: cut them on the right, drop or error. [default: cut]"""
    on_identical: str
    """Pairs whose responses have the same tokens: keep, drop or error. [default: keep]"""
    on_duplicate: str
    """Pairs that came before: keep, drop or error. [default: keep]"""
    on_contradiction: str
    """Pairs that came before with their responses exchanged: keep, drop or error. [default: keep]"""
    on_boundary: str
    """Pairs whose prompt ends within a token of a response, or is written otherwise before one: keep, drop or error. [default: keep]"""
    on_lost_text: str
    """Pairs of which the chat template leaves out or rewrites some text: keep, drop or error. [default: keep]"""
    on_no_end: str
    """Pairs with a response after which the chat template writes no end token: keep, drop or error. [default: keep]"""
    on_after_end: str
    """Responses with tokens after their last end token, which are scored too: keep, cut them off, drop or error. [default: keep]"""
    on_suspicious: str
    """Pairs that do not look like what their author meant, such as a list written as text: keep, drop or error. [default: keep]"""
    tokens_per_micro_batch: int
    """Tokens of one micro-batch: more is faster and takes more memory, and the result stays the same. A pair larger than that is a micro-batch of its own. [default: 4096]"""
    device: str
    """Where to compute: auto takes a CUDA GPU of compute capability 8.0 or later, else the CPU. [default: auto]"""
    precision: str
    """Numbers that weights and activations are stored in; sums are f32 with either. bf16 halves activations, and on CPUs with AVX-512 BF16 the time of gemms. A GPU has bf16 alone. [default: f32 on the CPU, bf16 on a GPU]"""
    threads: int
    """CPU threads. [default: all cores]"""


class GenerateOptions(TypedDict, total=False):
    """Options of `generate`."""

    model: PathLike
    """Hugging Face folder of the model"""
    adapter: PathLike
    """Folder of an adapter of that model, as PEFT has it"""
    prompt: str
    """What the user says"""
    system: str
    """What the system message says"""
    raw: bool
    """Continue the prompt as it stands, with no chat template around it"""
    max_new_tokens: int
    """Most tokens of the answer [default: 256]"""
    temperature: float
    """0 is greedy, 1 samples from the model as it is [default: 0]"""
    top_p: float
    """Sample from the likeliest tokens whose probabilities add up to this; needs a temperature [default: 1]"""
    seed: int
    """Seed of the sampling; needs a temperature [default: 42]"""
    chat_template: PathLike
    """Chat template instead of the model's default: the name of another one of the model's, or a Jinja file. [default: the model's]"""
    template_date: str
    """The date that `strftime_now` of a chat template gives. [default: the time of the run]"""
    device: str
    """Where to compute: auto takes a CUDA GPU of compute capability 8.0 or later, else the CPU. [default: auto]"""
    precision: str
    """Numbers that weights and activations are stored in; sums are f32 with either. bf16 halves activations, and on CPUs with AVX-512 BF16 the time of gemms. A GPU has bf16 alone. [default: f32 on the CPU, bf16 on a GPU]"""
    threads: int
    """CPU threads. [default: all cores]"""


class PlanOptions(RunOptions, total=False):
    """Options of `plan`."""

    gpu: str
    """The GPU to plan for, such as H200 or 'RTX 4090'; it need not be here"""
    bandwidth: float
    """10^9 bytes of device memory per second, in place of the GPU's"""
    bus_bandwidth: float
    """10^9 bytes per second and direction between host and GPU, in place of the GPU's"""
    largest_pair: str
    """Plan for pairs of up to these tokens of prompt, chosen and rejected response, in place of --data"""
    ranks: int
    """Tell also what N GPUs, a process each, send each other with each --shard"""
    ranks_per_machine: int
    """GPUs of a machine (default: 8)"""
    link_bandwidth: float
    """10^9 bytes per second and direction of a GPU inside its machine (default: 450, NVLink of H100)"""
    network_bandwidth: float
    """10^9 bytes per second and direction of a GPU between machines (default: 50, 400 Gb/s)"""
    json: bool
    """Print one JSON object instead"""
