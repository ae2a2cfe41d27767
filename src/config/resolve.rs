//! From the options that were given to the configuration that holds: layers, defaults, and the rules between options.

use std::path::{Path, PathBuf};

use super::options::{Given, OBJECTIVE_HEADING, Options, Origin, Settled, flag_name, join, rows};
use super::recipe::{self, RESOLVED_FILE};
use super::value::{EntropyWeight, OptionValue, Source};
use super::{
    AskedLengths, BatchConfig, EvaluationConfig, GradientConfig, LengthLimits, MemoryConfig, ObjectiveKind,
    PAIRS_PER_STEP, PairData, RunConfig, ScheduleConfig, Warmup,
};
use crate::data::Sides;
use crate::error::{Error, Result};
use crate::model::{HeadOptions, LoraSettings};
use crate::objective::{Objective, Settings};
use crate::optimizer::{AdamWSettings, StateOptions};

/// Defaults that depend on other options, so that the table can only describe them.
const WARMUP_RATIO: f64 = 0.1;
const EPOCHS: f64 = 1.0;
const REWARD_GROUP: usize = 2;
const MAX_PROMPT_LENGTH: usize = 1800;
/// The `max_length` that [`MAX_PROMPT_LENGTH`] goes with.
const MAX_LENGTH: usize = 2312;

/// Pairs of options of which a run may have only one.
const RIVALS: [(&str, &str); 3] =
    [("warmup_ratio", "warmup_steps"), ("epochs", "max_steps"), ("eval_data", "eval_split")];

/// The configuration of a run. A flag is taken before the recipe file, and that before a default.
///
/// With neither model, data nor recipe it is the built-in demo; with `resume`, the run that was saved in the output
/// folder.
///
/// # Errors
/// [`Error::Config`] naming the options that are missing, contradict each other or do not belong to the objective;
/// [`Error::Io`] for a recipe that cannot be read.
pub fn resolve(flags: Options, recipe_file: Option<&Path>, resume: bool) -> Result<RunConfig> {
    let bare = recipe_file.is_none() && flags.model.is_none() && flags.data.is_none();
    let base = match recipe_file {
        Some(path) => recipe::read(path)?,
        None if bare && resume => saved_run(&flags)?,
        None if bare => demo(&flags)?,
        None => Options::default(),
    };
    if let (Some(path), true, None) = (recipe_file, resume, &flags.output) {
        refuse_moved_run(path, &base)?;
    }
    whole(layer(flags, base), resume)
}

/// The configuration that `train --recipe` makes of a recipe's text; `path` is for messages.
///
/// # Errors
/// As [`resolve`] for a recipe.
pub fn resolve_text(text: &str, path: &Path) -> Result<RunConfig> {
    whole(recipe::parse(text, path)?, false)
}

/// The configuration of these options: the rules between them hold, and defaults are filled in.
fn whole(options: Options, resume: bool) -> Result<RunConfig> {
    require_one_of_rivals(&options)?;
    let kind = options.objective.as_ref().map_or(ObjectiveKind::Mmpo, |given| given.value);
    refuse_strangers(&options, kind)?;
    refuse_idle(&options)?;
    let files = require_files(&options)?;
    build(options.settle(kind), files, resume)
}

/// The configuration in which the step of `capsule` is repeated: that of its run, on the device that the flags name.
///
/// # Errors
/// [`Error::Config`] for a flag that would make it another step; those of the capsule's recipe.
pub fn resolve_replay(flags: Options, capsule: PathBuf) -> Result<RunConfig> {
    let is_free = |name: &str| ["device", "threads"].contains(&name);
    if let Some(row) = rows().iter().find(|row| (row.origin)(&flags).is_some() && !is_free(row.name)) {
        return Err(Error::config(
            format!("{} cannot be given together with `--replay`", flag_name(row.name)),
            "a capsule is repeated with the options of its run; only --device and --threads may differ",
        ));
    }
    let config = resolve(flags, Some(&capsule.join(RESOLVED_FILE)), false)?;
    Ok(RunConfig { replay: Some(capsule), ..config })
}

/// The demo's recipe. Its numbers belong to its objective: where the flags ask for another objective, that one's
/// defaults hold instead.
fn demo(flags: &Options) -> Result<Options> {
    let mut demo = recipe::demo()?;
    let objective = |options: &Options| options.objective.as_ref().map(|given| given.value);
    if flags.objective.is_some() && objective(flags) != objective(&demo) {
        rows().iter().filter(|row| row.heading == OBJECTIVE_HEADING).for_each(|row| (row.clear)(&mut demo));
    }
    Ok(demo)
}

/// Refuses a resolved recipe that lies in another folder than the run's folder that it names: the run was moved, or the
/// recipe has a relative path and is read from elsewhere. Resuming would begin a new run in the folder that it names.
fn refuse_moved_run(recipe_file: &Path, recipe: &Options) -> Result<()> {
    let Some(output) = &recipe.output else { return Ok(()) };
    let folder =
        recipe_file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if recipe_file.file_name() != Some(RESOLVED_FILE.as_ref()) || is_same_folder(folder, &output.value) {
        return Ok(());
    }
    Err(Error::config(
        format!(
            "{}: this recipe's run is in {}, and `output` names {}",
            recipe_file.display(),
            folder.display(),
            output.value.display()
        ),
        format!(
            "give --output {} to resume the run there; or leave --resume out to start another",
            folder.display()
        ),
    ))
}

fn is_same_folder(one: &Path, other: &Path) -> bool {
    match (std::fs::canonicalize(one), std::fs::canonicalize(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}

/// The recipe that an earlier run left in its output folder. With no flags at all the run is the demo, which begins
/// where none has been.
fn saved_run(flags: &Options) -> Result<Options> {
    let output = match &flags.output {
        Some(given) => given.value.clone(),
        None => recipe::demo()?.output.map(|given| given.value).unwrap_or_default(),
    };
    let saved = output.join(RESOLVED_FILE);
    if flags.output.is_none() && !output.exists() {
        return demo(flags);
    }
    if !saved.is_file() {
        return Err(Error::config(
            format!("nothing to resume: {} does not exist", saved.display()),
            "--output must be the folder of the run to go on with; or give that run's --model and --data again",
        ));
    }
    recipe::read(&saved)
}

/// Merges `upper` over `lower`. Where `upper` sets one of two options of [`RIVALS`], the other one of `lower` is
/// removed.
fn layer(upper: Options, mut lower: Options) -> Options {
    let rows = rows();
    let find = |name: &str| rows.iter().find(|row| row.name == name);
    for (one, other) in RIVALS {
        let (Some(one), Some(other)) = (find(one), find(other)) else { continue };
        if (one.origin)(&upper).is_some() || (other.origin)(&upper).is_some() {
            (one.clear)(&mut lower);
            (other.clear)(&mut lower);
        }
    }
    upper.or(lower)
}

fn require_one_of_rivals(options: &Options) -> Result<()> {
    let rows = rows();
    let origin = |name: &str| rows.iter().find(|row| row.name == name).and_then(|row| (row.origin)(options));
    for (one, other) in RIVALS {
        if let (Some(_), Some(second)) = (origin(one), origin(other)) {
            return Err(Error::config(
                format!("{} cannot be given together with `{one}`", second.name(other)),
                format!(
                    "{} and {} say the same thing in two ways: keep one",
                    flag_name(one),
                    flag_name(other)
                ),
            ));
        }
    }
    Ok(())
}

/// Refuses an option that belongs to another objective: it is never ignored.
fn refuse_strangers(options: &Options, kind: ObjectiveKind) -> Result<()> {
    for row in rows().iter().filter(|row| !row.only.contains(&kind)) {
        let Some(origin) = (row.origin)(options) else { continue };
        let source =
            options.objective.as_ref().map_or("by default".to_string(), |given| match &given.origin {
                Origin::Flag => "by --objective".into(),
                Origin::Recipe { path, line } => format!("by {}:{line}", path.display()),
                Origin::Demo { .. } => "by the demo's recipe".into(),
            });
        let belongs = join(&row.only);
        return Err(Error::config(
            format!("{} belongs to {belongs}, and the objective is {kind} ({source})", origin.name(row.name)),
            format!("leave it out, or choose an objective that has it: {belongs}"),
        ));
    }
    Ok(())
}

/// Refuses an option that another one makes idle.
fn refuse_idle(options: &Options) -> Result<()> {
    if let (Some(group), Some(Given { value: false, .. })) =
        (&options.reward_group, &options.reward_normalize)
    {
        return Err(Error::config(
            format!("{} has no effect where `reward_normalize` is false", group.origin.name("reward_group")),
            "leave one of the two out",
        ));
    }
    if let (Some(steps), None, None) = (&options.eval_steps, &options.eval_data, &options.eval_split) {
        return Err(Error::config(
            format!("{} has no effect without `eval_data`", steps.origin.name("eval_steps")),
            "name the pairs to evaluate on with --eval-data",
        ));
    }
    refuse_idle_choice(options)?;
    refuse_idle_lora(options)
}

/// Options that choose among evaluations where there are none, or where the objective has not got the metric.
fn refuse_idle_choice(options: &Options) -> Result<()> {
    let is_demo = options.data.as_ref().is_some_and(|given| given.value == PairData::from_files(None));
    let is_evaluated = options.eval_data.is_some() || options.eval_split.is_some() || is_demo;
    let rows = rows();
    let given = |name: &str| rows.iter().find(|row| row.name == name).and_then(|row| (row.origin)(options));
    for name in ["keep_best", "early_stopping", "early_stopping_delta", "eval_on_start"] {
        if let (Some(origin), false) = (given(name), is_evaluated) {
            return Err(Error::config(
                format!("{} has no effect without `eval_data` or `eval_split`", origin.name(name)),
                "name the pairs to evaluate on with --eval-data, or hold out a share of --data with --eval-split",
            ));
        }
    }
    let has_patience = options.early_stopping.as_ref().is_some_and(|given| given.value > 0);
    if let (Some(delta), false) = (&options.early_stopping_delta, has_patience) {
        return Err(Error::config(
            format!("{} has no effect without `early_stopping`", delta.origin.name("early_stopping_delta")),
            "say after how many evaluations the run may end, for example with --early-stopping 3",
        ));
    }
    let kind = options.objective.as_ref().map_or(ObjectiveKind::Mmpo, |given| given.value);
    match &options.keep_best {
        Some(metric) if metric.value.needs_both() && kind.descriptor().sides != Sides::Both => {
            Err(Error::config(
                format!(
                    "{} = {} needs rejected responses, which {kind} does not look at",
                    metric.origin.name("keep_best"),
                    metric.value.to_toml()
                ),
                "choose loss or logps/chosen",
            ))
        }
        _ => Ok(()),
    }
}

/// Options of adapters where there are none, or where a folder says them already.
fn refuse_idle_lora(options: &Options) -> Result<()> {
    let rows = rows();
    let given = |name: &str| rows.iter().find(|row| row.name == name).and_then(|row| (row.origin)(options));
    for name in ["lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_rslora"] {
        let Some(origin) = given(name) else { continue };
        if options.adapter.is_some() {
            return Err(Error::config(
                format!("{} cannot be given together with `adapter`", origin.name(name)),
                "an adapter that is trained further keeps its modules, rank, scale and dropout, which are in its \
                 adapter_config.json: leave one of the two out",
            ));
        }
        if options.lora.is_none() {
            return Err(Error::config(
                format!("{} has no effect without `lora`", origin.name(name)),
                "say which modules get adapters, for example with --lora all",
            ));
        }
    }
    Ok(())
}

struct Files {
    model: Source,
    data: PairData,
    output: PathBuf,
}

fn require_files(options: &Options) -> Result<Files> {
    let missing: Vec<String> = [
        ("model", options.model.is_none()),
        ("data", options.data.is_none()),
        ("output", options.output.is_none()),
    ]
    .into_iter()
    .filter(|(_, absent)| *absent)
    .map(|(name, _)| flag_name(name))
    .collect();
    match (&options.model, &options.data, &options.output) {
        (Some(model), Some(data), Some(output)) => {
            Ok(Files { model: model.value.clone(), data: data.value.clone(), output: output.value.clone() })
        }
        _ => Err(Error::config(
            format!("{} missing: a run needs a model, pairs and an output folder", missing.join(" and ")),
            "mmpo-fast train --model DIR --data FILE --output DIR; with no arguments at all the built-in demo runs",
        )),
    }
}

fn build(settled: Settled, files: Files, resume: bool) -> Result<RunConfig> {
    let asked_lengths = asked_lengths(&settled)?;
    let objective = objective(&settled)?;
    refuse_clipping_by_layer(&settled)?;
    let policies = settled.policies();
    let (optimizer, schedule, memory) = (optimizer(&settled), schedule(&settled), memory(&settled));
    Ok(RunConfig {
        policies,
        model: files.model.into_path(),
        data: files.data.into_files(),
        columns: settled.columns.unwrap_or_default(),
        output: files.output,
        reference: settled.reference,
        chat_template: settled.chat_template,
        min_score_gap: settled.min_score_gap,
        data_cache: settled.data_cache,
        lora: settled.lora.map(|modules| LoraSettings {
            modules,
            rank: settled.lora_rank,
            alpha: settled.lora_alpha.unwrap_or(settled.lora_rank as f64),
            dropout: settled.lora_dropout,
            rslora: settled.lora_rslora,
        }),
        adapter: settled.adapter,
        template_date: settled.template_date,
        objective,
        optimizer,
        schedule,
        batch: BatchConfig {
            pairs_per_step: settled.pairs_per_step,
            tokens_per_micro_batch: settled.tokens_per_micro_batch,
        },
        limits: asked_lengths.limits(None)?,
        asked_lengths,
        evaluation: EvaluationConfig {
            data: settled.eval_data,
            split: settled.eval_split,
            steps: settled.eval_steps,
            on_start: settled.eval_on_start,
            keep_best: settled.keep_best,
            patience: Some(settled.early_stopping).filter(|&evaluations| evaluations > 0),
            delta: settled.early_stopping_delta,
        },
        capsule_weights: settled.capsule_weights,
        replay: None,
        save_steps: settled.save_steps,
        keep_checkpoints: settled.keep_checkpoints,
        seed: settled.seed,
        device: settled.device,
        precision: settled.precision,
        memory,
        memory_limit: settled.memory,
        tflops: settled.tflops,
        head: HeadOptions {
            mode: settled.head_mode,
            workspace: settled.head_workspace.saturating_mul(1 << 20),
        },
        threads: settled.threads,
        resume,
        live: false,
    })
}

fn optimizer(settled: &Settled) -> AdamWSettings {
    AdamWSettings {
        learning_rate: settled.learning_rate,
        beta1: settled.adam_beta1,
        beta2: settled.adam_beta2,
        epsilon: settled.adam_epsilon,
        weight_decay: settled.weight_decay,
        max_grad_norm: Some(settled.max_grad_norm).filter(|&norm| norm > 0.0),
    }
}

fn schedule(settled: &Settled) -> ScheduleConfig {
    ScheduleConfig {
        kind: settled.schedule,
        warmup: match (settled.warmup_steps, settled.warmup_ratio) {
            (Some(steps), _) => Warmup::Steps(steps),
            (None, ratio) => Warmup::Ratio(ratio.unwrap_or(WARMUP_RATIO)),
        },
        epochs: settled.epochs.unwrap_or(EPOCHS),
        max_steps: settled.max_steps,
    }
}

/// What is kept on the device.
pub fn memory(settled: &Settled) -> MemoryConfig {
    MemoryConfig {
        states: StateOptions { moments: settled.optimizer_states, master: settled.master_weights },
        recompute: settled.recompute,
        gradients: settled.gradients,
        offload: settled.offload,
        shard: settled.shard,
    }
}

/// Refuses clipping where layers are updated inside the backward: a layer cannot be clipped by the norm of gradients
/// that are still to come. A first backward for the norm alone would make a step half as long again, so it is not done
/// unasked.
fn refuse_clipping_by_layer(settled: &Settled) -> Result<()> {
    if settled.gradients != GradientConfig::Layer || settled.max_grad_norm == 0.0 {
        return Ok(());
    }
    Err(Error::config(
        format!(
            "`gradients` = layer updates a layer before the gradients of the layers below it are there: `max_grad_norm` = {} \
             would clip by a norm that is not known yet",
            settled.max_grad_norm
        ),
        "give --max-grad-norm 0, which turns clipping off, or --gradients f32",
    ))
}

/// The lengths given to `train` or `score`, checked as far as they can be without the model.
///
/// # Errors
/// [`Error::Config`] for a prompt that leaves no room for a response.
pub fn asked_lengths(settled: &Settled) -> Result<AskedLengths> {
    let asked = AskedLengths { max_length: settled.max_length, max_prompt_length: settled.max_prompt_length };
    asked.limits(None)?;
    Ok(asked)
}

impl AskedLengths {
    /// The least `max_length`: a token of the prompt and one of the response.
    pub const LEAST: usize = 2;

    /// The limits for a model that was trained for `context` positions, which a default does not exceed; a prompt must
    /// leave room for a response.
    ///
    /// # Errors
    /// [`Error::Config`] for a prompt that leaves none.
    pub fn limits(self, context: Option<usize>) -> Result<LengthLimits> {
        let default = MAX_LENGTH.min(context.unwrap_or(MAX_LENGTH)).max(Self::LEAST);
        let max_length = self.max_length.unwrap_or(default);
        let same_share = (max_length as u128 * MAX_PROMPT_LENGTH as u128 / MAX_LENGTH as u128) as usize;
        let max_prompt_length = self.max_prompt_length.unwrap_or(MAX_PROMPT_LENGTH.min(same_share.max(1)));
        if max_prompt_length >= max_length {
            return Err(Error::config(
                format!(
                    "`max_prompt_length` = {max_prompt_length} leaves no room for a response in `max_length` = {max_length}"
                ),
                "max_length counts the prompt and one response: raise --max-length or lower --max-prompt-length",
            ));
        }
        Ok(LengthLimits { max_length, max_prompt_length })
    }
}

fn objective(settled: &Settled) -> Result<Objective> {
    let settings = Settings {
        beta: settled.beta,
        epsilon: settled.epsilon,
        reward_group: reward_group(settled)?,
        reward_normalize: settled.reward_normalize,
        length_normalize: settled.length_normalize,
        preference_weight: settled.preference_weight,
        entropy_weight: match settled.entropy_weight {
            EntropyWeight::Beta => settled.beta,
            EntropyWeight::Number(weight) => weight,
        },
        gamma_beta_ratio: settled.gamma_beta_ratio,
        label_smoothing: settled.label_smoothing,
    };
    Ok((settled.objective.descriptor().build)(&settings))
}

fn reward_group(settled: &Settled) -> Result<usize> {
    let pairs = settled.pairs_per_step.unwrap_or(PAIRS_PER_STEP);
    let group = settled.reward_group.unwrap_or(REWARD_GROUP.min(pairs));
    if group > pairs {
        return Err(Error::config(
            format!("`reward_group` = {group} is more than the pairs of a step, `pairs_per_step` = {pairs}"),
            "rewards are normalised within one optimiser step: lower --reward-group or raise --pairs-per-step",
        ));
    }
    Ok(group)
}
