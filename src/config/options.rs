//! The options of a training run, each defined once: its name (flag `--learning-rate`, recipe key `learning_rate`),
//! documentation, type, default, the objectives it belongs to, and the values it may have.

use std::path::PathBuf;

use toml::de::DeValue;

use super::value::{Absent, Always, EntropyWeight, Fallback, OptionValue, PerObjective, Source};
use super::{ObjectiveKind, check};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::model::{AdaptedModules, HeadChoice, HeadOptions};
use crate::objective::{DESCRIPTORS, Descriptor};
use crate::optimizer::Schedule;

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
        /// Hugging Face folder of the Llama model to train; `builtin:demo` is the demo's.
        model: Source, Absent = Absent("required; without --data and --recipe too, the demo"),
            ALL, check::source;
        /// Preference pairs to train on: .jsonl, .json or .jsonl.gz; `builtin:demo` is the demo's.
        data: Source, Absent = Absent("required; without --model and --recipe too, the demo"), ALL, check::source;
        /// Folder that receives the model, metrics, report and checkpoints.
        output: PathBuf, Absent = Absent("required; the demo's is mmpo-fast-demo"), ALL, check::path;
        /// Hugging Face folder of the frozen reference model.
        reference: PathBuf, Absent = Absent("the starting model"), REFERENCE, check::path;
        /// Chat template instead of the model's default: the name of another one of the model's, or a Jinja file.
        chat_template: PathBuf, Absent = Absent("the model's"), ALL, check::path;
        /// Prompts are cut from the left to this many tokens.
        max_prompt_length: usize, Absent = Absent("1800, or the same share of a smaller --max-length"),
            ALL, check::at_least_one;
        /// Prompt plus one response are cut to this many tokens, the response from the right.
        max_length: usize, Absent = Absent("2312, or the model's max_position_embeddings where that is less"),
            ALL, check::at_least_two;
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
        /// Pairs to evaluate on.
        eval_data: PathBuf, Absent = Absent("no evaluation"), ALL, check::path;
        /// Optimiser steps between evaluations.
        eval_steps: usize, Absent = Absent("once per epoch"), ALL, check::at_least_one;
        /// Optimiser steps between checkpoints.
        save_steps: usize, Absent = Absent("only at the end and on Ctrl-C"), ALL, check::at_least_one;
        /// How many checkpoints are kept, the newest ones.
        keep_checkpoints: usize, Always<usize> = Always(2), ALL, check::at_least_one;
    }
    "Machine" {
        /// Where to compute: auto takes a CUDA GPU of compute capability 8.0 or later, else the CPU.
        device: DeviceChoice, Always<DeviceChoice> = Always(DeviceChoice::Auto), ALL, check::anything;
        /// How the log-prob head gets its gradient: main keeps the probabilities of a chunk of pairs, recompute forms
        /// them twice with less than 64 MiB, auto takes main where memory allows. Results agree but for rounding.
        head_mode: HeadChoice, Always<HeadChoice> = Always(HeadChoice::Auto), ALL, check::anything;
        /// MiB that kept probabilities may take; the recompute mode keeps none.
        head_workspace: usize, Always<usize> = Always(HeadOptions::DEFAULT_WORKSPACE >> 20), ALL, check::mebibytes;
        /// CPU threads.
        threads: usize, Absent = Absent("all cores"), ALL, check::threads;
    }
}
