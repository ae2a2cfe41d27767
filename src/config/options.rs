//! The options of a training run, each defined once: its name (flag `--learning-rate`, recipe key `learning_rate`),
//! documentation, type, default, the objectives it belongs to, and the values it may have.

use std::path::PathBuf;

use toml::de::DeValue;

use super::value::{Absent, Always, EntropyWeight, Fallback, OptionValue, PerObjective, Source};
use super::{
    ColumnNames, DataCache, EvalMetric, GradientConfig, MemoryLimit, ObjectiveKind, OffloadConfig, PairData,
    PairFiles, Policies, Policy, ShardConfig, TemplateDate, check,
};
use crate::device::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::model::{AdaptedModules, HeadChoice, HeadOptions, Recompute};
use crate::objective::{DESCRIPTORS, Descriptor};
use crate::optimizer::{MasterWeights, MomentFormat, Schedule};

/// The heading of the options that say what is done with pairs that have a problem.
pub const PROBLEMS_HEADING: &str = "Pairs with a problem";

/// The heading of the options that are numbers of the objective.
pub const OBJECTIVE_HEADING: &str = "Objective";

/// Whether the option of this name belongs to an objective: the column of the table that says so.
type Belongs = fn(&Descriptor, &str) -> bool;

/// An option of every run.
const ALL: Belongs = |_, _| true;
/// An option of the objectives whose descriptors list it.
const OWN: Belongs = |objective, name| objective.option(name).is_some();
/// An option of the objectives with a reference.
const REFERENCE: Belongs = |objective, _| objective.needs_reference;

/// Who gave a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag of the command line.
    Flag,
    /// A key of a recipe file, and its 1-based line.
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// Line of the key.
        line: usize,
    },
    /// A key of the built-in demo's recipe: no choice of the user's.
    Demo {
        /// Line of the key.
        line: usize,
    },
}

impl Origin {
    /// The option as its giver wrote it, for the beginning of a message.
    pub fn name(&self, option: &str) -> String {
        match self {
            Origin::Flag => format!("`{}`", flag_name(option)),
            Origin::Recipe { path, line } => format!("{}:{line}: `{option}`", path.display()),
            Origin::Demo { line } => format!("{}:{line}: `{option}`", super::recipe::DEMO_PATH),
        }
    }
}

/// `learning_rate` as a flag: `--learning-rate`.
pub fn flag_name(option: &str) -> String {
    format!("--{}", option.replace('_', "-"))
}

/// A value, and who gave it.
#[derive(Clone, Debug, PartialEq)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// Who gave it.
    pub origin: Origin,
}

/// An option without its type, for code that treats all options alike: flags, recipe files, help.
pub struct Row {
    /// The recipe's key; the flag has `-` for `_`.
    pub name: &'static str,
    /// The heading under which it stands in `--help`.
    pub heading: &'static str,
    /// What it does, in a sentence.
    pub documentation: String,
    /// The word that stands for the value in `--help`.
    pub placeholder: &'static str,
    /// Whether the flag may stand alone, meaning `true`.
    pub is_switch: bool,
    /// The objectives that the option belongs to.
    pub only: Vec<ObjectiveKind>,
    /// The default, for people.
    pub default: String,
    /// Sets it from a flag's text.
    pub put_text: fn(&mut Options, &str, Origin) -> Result<()>,
    /// Sets it from a recipe's value.
    pub put_toml: fn(&mut Options, &DeValue<'_>, Origin) -> Result<()>,
    /// Where the value came from; `None` if nobody gave one.
    pub origin: fn(&Options) -> Option<&Origin>,
    /// Removes the value.
    pub clear: fn(&mut Options),
    /// Its value as TOML, if it has one.
    pub to_toml: fn(&Options) -> Option<String>,
}

impl Row {
    /// The text of `--help` about it.
    pub fn help(&self) -> String {
        let for_objectives = match self.only.len() == DESCRIPTORS.len() {
            true => String::new(),
            false => format!("[only {}] ", join(&self.only)),
        };
        let gap = if self.documentation.ends_with('\n') { "" } else { " " };
        format!("{}{gap}{for_objectives}[default: {}]", self.documentation, self.default)
    }
}

fn objectives(name: &str, belongs: Belongs) -> Vec<ObjectiveKind> {
    DESCRIPTORS.iter().filter(|objective| belongs(objective, name)).map(|objective| objective.kind).collect()
}

/// The documentation of an option, with a line for each objective whose descriptor says something about it.
fn documented(name: &str, documentation: &str) -> String {
    let line = |objective: &&Descriptor| {
        let text = match name {
            "objective" => format!("{} ({})", objective.help, objective.source),
            _ => objective.option(name)?.meaning?.to_string(),
        };
        Some(format!("\n- {}: {text}", objective.name))
    };
    let lines: Vec<String> = DESCRIPTORS.iter().filter_map(line).collect();
    let after = if lines.is_empty() { "" } else { "\n" };
    format!("{}{}{after}", documentation.trim(), lines.concat())
}

/// `mmpo, dpo`
pub fn join(objectives: &[ObjectiveKind]) -> String {
    objectives.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn checked<T: OptionValue>(
    name: &str,
    parsed: std::result::Result<T, String>,
    check: check::Check<T>,
    origin: Origin,
) -> Result<Option<Given<T>>> {
    let checked = parsed.and_then(|value| match check(&value) {
        Ok(()) => Ok(value),
        Err(rule) => Err(format!("= {} {rule}", value.to_toml())),
    });
    match checked {
        Ok(value) => Ok(Some(Given { value, origin })),
        Err(problem) => Err(Error::config(
            format!("{} {problem}", origin.name(name)),
            format!("`mmpo-fast train --help` explains {}", flag_name(name)),
        )),
    }
}

/// Makes from the table: [`Options`] (the values that were given), [`Settled`] (the values that hold), and the
/// [`rows`].
macro_rules! options {
    ($($heading:literal { $(
        $(#[doc = $documentation:literal])+
        $name:ident: $type:ty, $fallback_type:ty = $fallback:expr, $only:expr, $check:expr;
    )+ })+) => {
        /// The options that were given, by flags, a recipe, or both.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct Options { $($(
            $(#[doc = $documentation])+
            pub $name: Option<Given<$type>>,
        )+)+ }

        /// Every option's value after defaults.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Settled { $($(
            $(#[doc = $documentation])+
            pub $name: <$fallback_type as Fallback<$type>>::Settled,
        )+)+ }

        impl Options {
            /// The values of `self`, and those of `lower` where `self` has none.
            pub fn or(self, lower: Options) -> Options {
                Options { $($( $name: self.$name.or(lower.$name), )+)+ }
            }

            /// Fills in the defaults.
            pub fn settle(self, objective: ObjectiveKind) -> Settled {
                Settled { $($(
                    $name: <$fallback_type as Fallback<$type>>::settle(
                        $fallback, self.$name.map(|given| given.value), objective,
                    ),
                )+)+ }
            }
        }

        /// The table, in the order of `--help` and of a resolved recipe.
        pub fn rows() -> Vec<Row> {
            vec![$($( Row {
                name: stringify!($name),
                heading: $heading,
                documentation: documented(stringify!($name), concat!($($documentation),+)),
                placeholder: <$type as OptionValue>::PLACEHOLDER,
                is_switch: <$type as OptionValue>::IS_SWITCH,
                only: objectives(stringify!($name), $only),
                default: <$fallback_type as Fallback<$type>>::label($fallback, &objectives(stringify!($name), $only)),
                put_text: |options, text, origin| {
                    let parsed = <$type as OptionValue>::from_text(text);
                    options.$name = checked(stringify!($name), parsed, $check, origin)?;
                    Ok(())
                },
                put_toml: |options, value, origin| {
                    let parsed = <$type as OptionValue>::from_toml(value);
                    options.$name = checked(stringify!($name), parsed, $check, origin)?;
                    Ok(())
                },
                origin: |options| options.$name.as_ref().map(|given| &given.origin),
                clear: |options| options.$name = None,
                to_toml: |options| options.$name.as_ref().map(|given| given.value.to_toml()),
            }, )+)+]
        }
    };
}

options! {
    "Input and output" {
        /// Hugging Face folder of the Llama model to train, or its name on the Hub where it is in the cache on this disk;
        /// `builtin:demo` is the demo's.
        model: Source, Absent = Absent("required; without --data and --recipe too, the demo"),
            ALL, check::source;
        /// Preference pairs to train on: JSON Lines, JSON, CSV or Parquet files, folders of them, or a data set's name on
        /// the Hub where it is in the cache on this disk. Separate several by commas; =0.5 after one takes half of its
        /// pairs, =2 takes each twice. `builtin:demo` is the demo's.
        data: PairData, Absent = Absent("required; without --model and --recipe too, the demo"), ALL, check::anything;
        /// Columns that have other names in the files: what each is read as, and its name there, such as
        /// prompt=question,chosen=answer_good.
        columns: ColumnNames, Absent = Absent("the files' own names"), ALL, check::anything;
        /// Folder that receives the model, metrics, report and checkpoints.
        output: PathBuf, Absent = Absent("required; the demo's is mmpo-fast-demo"), ALL, check::path;
        /// Hugging Face folder of the frozen reference model.
        reference: PathBuf, Absent = Absent("the starting model"), REFERENCE, check::path;
        /// Folder in which tokenised pairs are kept between runs, or off: then they are held in memory and not kept.
        data_cache: DataCache, Absent = Absent("pairs in MMPO_FAST_CACHE or in mmpo-fast in the user's cache folder"),
            ALL, check::data_cache;
        /// Leave out pairs whose scores in the file (score_chosen and score_rejected, chosen_rating and rejected_rating and
        /// the like) are less far apart than this; a record without scores is refused.
        min_score_gap: f64, Absent = Absent("scores are not looked at"), ALL, check::not_negative;
        /// Chat template instead of the model's default: the name of another one of the model's, or a Jinja file.
        chat_template: PathBuf, Absent = Absent("the model's"), ALL, check::path;
        /// The date that `strftime_now` of a chat template gives.
        template_date: TemplateDate, Absent = Absent("the time of the run"), ALL, check::anything;
        /// Prompts are cut from the left to this many tokens.
        max_prompt_length: usize, Absent = Absent("1800, or the same share of a smaller --max-length"),
            ALL, check::at_least_one;
        /// Prompt plus one response are cut to this many tokens, the response from the right.
        max_length: usize, Absent = Absent("2312, or the model's max_position_embeddings where that is less"),
            ALL, check::at_least_two;
    }
    "Pairs with a problem" {
        /// Records that cannot be read as a pair or that the chat template refuses: error or drop.
        on_refused: Policy, Always<Policy> = Always(Policy::Error), ALL, check::drop_or_error;
        /// Pairs with a response that has no text, or no token to score: drop or error.
        on_empty: Policy, Always<Policy> = Always(Policy::Drop), ALL, check::drop_or_error;
        /// Prompts longer than --max-prompt-length: cut them on the left, drop or error.
        on_long_prompt: Policy, Always<Policy> = Always(Policy::Cut), ALL, check::cut_drop_or_error;
        /// Responses that end beyond --max-length: cut them on the right, drop or error.
        on_long_response: Policy, Always<Policy> = Always(Policy::Cut), ALL, check::cut_drop_or_error;
        /// Pairs whose responses have the same tokens: keep, drop or error.
        on_identical: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Pairs that came before: keep, drop or error.
        on_duplicate: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Pairs that came before with their responses exchanged: keep, drop or error.
        on_contradiction: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Pairs whose prompt ends within a token of a response, or is written otherwise before one: keep, drop or error.
        on_boundary: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Pairs of which the chat template leaves out or rewrites some text: keep, drop or error.
        on_lost_text: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Pairs with a response after which the chat template writes no end token: keep, drop or error.
        on_no_end: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
        /// Responses with tokens after their last end token, which are scored too: keep, cut them off, drop or error.
        on_after_end: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::anything;
        /// Pairs that do not look like what their author meant, such as a list written as text: keep, drop or error.
        on_suspicious: Policy, Always<Policy> = Always(Policy::Keep), ALL, check::keep_drop_or_error;
    }
    "Objective" {
        /// What is optimised:
        objective: ObjectiveKind, Always<ObjectiveKind> = Always(ObjectiveKind::Mmpo), ALL, check::anything;
        /// The main number of the objective:
        beta: f64, PerObjective = PerObjective(Descriptor::beta), OWN, check::positive;
        /// Reward of the chosen response before the reference's part; the rejected one gets 1 - epsilon.
        epsilon: f64, Always<f64> = Always(0.9), OWN, check::half_to_one;
        /// Pairs whose rewards are normalised together; 2 is what the authors do.
        reward_group: usize, Absent = Absent("2, or 1 if --pairs-per-step is 1"), OWN, check::at_least_one;
        /// Scale the rewards of a group to 0..1; false is the paper's "- InBatchNormalization".
        reward_normalize: bool, Always<bool> = Always(true), OWN, check::anything;
        /// Use means over tokens instead of sums, for policy, reference and entropy; the paper's "+ LengthNorm".
        length_normalize: bool, Always<bool> = Always(false), OWN, check::anything;
        /// Weight of an added DPO-like loss; at 1 the whole is plain SFT on the chosen responses.
        preference_weight: f64, Always<f64> = Always(0.0), OWN, check::not_negative;
        /// Weight of the entropy bonus; `beta` is the paper's "+ EntropyOptim".
        entropy_weight: EntropyWeight, Always<EntropyWeight> = Always(EntropyWeight::Number(0.0)),
            OWN, check::entropy_weight;
        /// Target margin of SimPO in units of beta.
        gamma_beta_ratio: f64, Always<f64> = Always(0.5), OWN, check::not_negative;
        /// Probability that a label is the wrong way round (conservative DPO).
        label_smoothing: f64, Always<f64> = Always(0.0), OWN, check::below_half;
    }
    "LoRA" {
        /// Train low-rank adapters of these modules in place of the weights, which are frozen: all, or some of q, k, v, o,
        /// gate, up and down, such as q,v. The result is an adapter folder as PEFT has it.
        lora: AdaptedModules, Absent = Absent("the weights themselves are trained"), ALL, check::anything;
        /// Rank of the adapters.
        lora_rank: usize, Always<usize> = Always(64), ALL, check::rank;
        /// Scale of the adapters, times their rank.
        lora_alpha: f64, Absent = Absent("the rank, for a scale of 1"), ALL, check::positive;
        /// Probability that an input of an adapter is dropped in training.
        lora_dropout: f64, Always<f64> = Always(0.0), ALL, check::below_one;
        /// Divide --lora-alpha by the root of the rank in place of the rank (rsLoRA).
        lora_rslora: bool, Always<bool> = Always(false), ALL, check::anything;
        /// Folder of an adapter, as PEFT has it, to go on training; it says what --lora and its options say.
        adapter: PathBuf, Absent = Absent("new adapters"), ALL, check::path;
    }
    "Optimiser and schedule" {
        /// Peak learning rate of AdamW. The defaults of mmpo, dpo and simpo are the smallest that MMPO's paper uses for each;
        /// its full training of small models takes 5e-4 for mmpo, see recipes/.
        learning_rate: f64, PerObjective = PerObjective(|objective| objective.learning_rate), ALL, check::positive;
        /// Decay of the first moment.
        adam_beta1: f64, Always<f64> = Always(0.9), ALL, check::below_one;
        /// Decay of the second moment.
        adam_beta2: f64, Always<f64> = Always(0.999), ALL, check::below_one;
        /// Added to the root of the second moment.
        adam_epsilon: f64, Always<f64> = Always(1e-8), ALL, check::positive;
        /// Decoupled weight decay, on every tensor.
        weight_decay: f64, Always<f64> = Always(0.0), ALL, check::not_negative;
        /// Global l2 norm that gradients are clipped to; 0 turns clipping off.
        max_grad_norm: f64, Always<f64> = Always(1.0), ALL, check::not_negative;
        /// Shape of the learning rate after the warm-up: cosine, linear or constant.
        schedule: Schedule, Always<Schedule> = Always(Schedule::Cosine), ALL, check::anything;
        /// Warm-up as a share of all steps, at most all but one. Step `i` of a warm-up of `n` steps has `i / (n + 1)` of the peak learning
        /// rate, so that no step has none.
        warmup_ratio: f64, Absent = Absent("0.1, unless --warmup-steps is given"), ALL, check::zero_to_one;
        /// Warm-up in steps.
        warmup_steps: usize, Absent = Absent("see --warmup-ratio"), ALL, check::count;
        /// Passes over the data; fractions are allowed.
        epochs: f64, Absent = Absent("1, unless --max-steps is given"), ALL, check::epochs;
        /// Optimiser steps of the whole run, instead of --epochs.
        max_steps: usize, Absent = Absent("see --epochs"), ALL, check::at_least_one;
    }
    "Batches" {
        /// Pairs of one optimiser step, gathered over micro-batches. An epoch's last step takes what is left over.
        pairs_per_step: usize, Absent = Absent("128; with under 2560 pairs, the largest power of two from 2 that makes \
            at least 20 steps per epoch"), ALL, check::at_least_one;
        /// Tokens of one micro-batch: more is faster and takes more memory, and the result stays the same. A pair
        /// larger than that is a micro-batch of its own.
        tokens_per_micro_batch: usize, Always<usize> = Always(4096), ALL, check::at_least_one;
        /// Seed of the order of the pairs, and of the first values and the dropout of adapters.
        seed: u64, Always<u64> = Always(42), ALL, check::fits_toml;
    }
    "Evaluation and checkpoints" {
        /// Pairs to evaluate on, named as with --data.
        eval_data: PairFiles, Absent = Absent("no evaluation"), ALL, check::anything;
        /// Share of the pairs of --data that is held out and evaluated on, instead of --eval-data. A hash of each prompt
        /// decides, so that the same pairs are held out wherever they stand, and no prompt is on both sides.
        eval_split: f64, Absent = Absent("none"), ALL, check::between_zero_and_one;
        /// Optimiser steps between evaluations.
        eval_steps: usize, Absent = Absent("once per epoch"), ALL, check::at_least_one;
        /// Optimiser steps between checkpoints.
        save_steps: usize, Absent = Absent("only at the end and on Ctrl-C"), ALL, check::at_least_one;
        /// How many checkpoints are kept, the newest ones.
        keep_checkpoints: usize, Always<usize> = Always(2), ALL, check::at_least_one;
        /// Evaluate before the first step too; false saves that time, and the report cannot compare before and after.
        eval_on_start: bool, Always<bool> = Always(true), ALL, check::anything;
        /// Keep the checkpoint with the best value of this metric beside the newest ones, and write its model to `best`: loss,
        /// implicit/accuracies, implicit/margins, rewards/accuracies, rewards/margins, rewards/chosen, logps/accuracies,
        /// logps/margins or logps/chosen of the evaluation. The loss is best where it is lowest, all others where they are highest.
        keep_best: EvalMetric, Absent = Absent("only the newest checkpoints are kept"), ALL, check::anything;
        /// End the run after this many evaluations in a row in which the metric of --keep-best (the loss, where none is named) did
        /// not become better; 0 never does.
        early_stopping: usize, Always<usize> = Always(0), ALL, check::count;
        /// With --early-stopping, a metric became better only where it did by more than this.
        early_stopping_delta: f64, Always<f64> = Always(0.0), ALL, check::not_negative;
        /// Copy the weights and optimiser states into the capsule that a step with a number that is not finite leaves. Without
        /// that, `train --replay` takes the steps since the last checkpoint again.
        capsule_weights: bool, Always<bool> = Always(false), ALL, check::anything;
    }
    "Machine" {
        /// Where to compute: auto takes a CUDA GPU of compute capability 8.0 or later, else the CPU.
        device: DeviceChoice, Always<DeviceChoice> = Always(DeviceChoice::Auto), ALL, check::anything;
        /// Numbers that weights and activations are stored in; sums are f32 with either. bf16 halves activations, and on CPUs with
        /// AVX-512 BF16 the time of gemms. A GPU has bf16 alone.
        precision: Precision, Absent = Absent("f32 on the CPU, bf16 on a GPU"), ALL, check::anything;
        /// Most device memory that the run may take, such as 24GB or 22GiB; it is refused where it would take more. With auto
        /// it takes what is free: the run chooses --optimizer-states, --master-weights, --gradients, --recompute,
        /// --offload and --tokens-per-micro-batch so that it fits, says what it chose, and writes it down for --resume.
        memory: MemoryLimit, Absent = Absent("what is free on the device"), ALL, check::anything;
        /// Format of AdamW's moments: f32 takes 8 bytes per parameter, bf16 4, 8bit 2 by bitsandbytes' block-wise dynamic map;
        /// tensors of fewer than 4096 values stay f32 with 8bit.
        optimizer_states: MomentFormat, Always<MomentFormat> = Always(MomentFormat::F32), ALL, check::anything;
        /// Copy of the weights that updates are added to: f32 takes 4 bytes per parameter beside bf16 weights; split takes 2, the
        /// bits that the weights lack of the f32 copy; none rounds the updated bf16 weight up or down at random, with the seed.
        /// f32 weights need no copy.
        master_weights: MasterWeights, Always<MasterWeights> = Always(MasterWeights::F32), ALL, check::anything;
        /// What the backward computes again instead of keeping it, to the same bits: none, selective (gate and up of the MLP, the
        /// largest activations), or layer (all between the residual streams of two layers).
        recompute: Recompute, Always<Recompute> = Always(Recompute::None), ALL, check::anything;
        /// Which gradients exist at a time: f32 sums those of all tensors over micro-batches; bf16 keeps the sums of the layers in
        /// half the memory; layer updates each layer inside the backward, so that only one layer has some. It needs each step in
        /// one micro-batch, and --max-grad-norm 0.
        gradients: GradientConfig, Always<GradientConfig> = Always(GradientConfig::F32), ALL, check::anything;
        /// What lives in pinned host memory: states moves AdamW's moments and f32 master copies there, from where they visit the
        /// GPU piece by piece while it computes. The results have the same bits.
        offload: OffloadConfig, Always<OffloadConfig> = Always(OffloadConfig::None), ALL, check::anything;
        /// What is cut among the ranks of a run on several GPUs, so that each keeps its part alone: states (AdamW's moments and f32
        /// master copies), gradients (these too), weights (these too).
        shard: ShardConfig, Always<ShardConfig> = Always(ShardConfig::None), ALL, check::anything;
        /// How the log-prob head gets its gradient: main keeps the probabilities of a chunk of pairs, recompute forms
        /// them twice with less than 64 MiB, auto takes main where memory allows. Results agree but for rounding.
        head_mode: HeadChoice, Always<HeadChoice> = Always(HeadChoice::Auto), ALL, check::anything;
        /// MiB that kept probabilities may take; the recompute mode keeps none.
        head_workspace: usize, Always<usize> = Always(HeadOptions::DEFAULT_WORKSPACE >> 20), ALL, check::mebibytes;
        /// Peak rate of the device in 10^12 bf16 operations per second, for the metric `mfu`.
        tflops: f64, Absent = Absent("the GPU's, where it is known"), ALL, check::positive;
        /// CPU threads.
        threads: usize, Absent = Absent("all cores"), ALL, check::threads;
    }
}

impl Settled {
    /// What is done with pairs that have a problem.
    pub fn policies(&self) -> Policies {
        Policies {
            refused: self.on_refused,
            empty: self.on_empty,
            long_prompt: self.on_long_prompt,
            long_response: self.on_long_response,
            identical: self.on_identical,
            duplicate: self.on_duplicate,
            contradiction: self.on_contradiction,
            boundary: self.on_boundary,
            lost_text: self.on_lost_text,
            no_end: self.on_no_end,
            after_end: self.on_after_end,
            suspicious: self.on_suspicious,
        }
    }
}
