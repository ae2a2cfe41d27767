//! Recipes: TOML files whose keys are the options of [`super::options`], read with lines for messages and written back.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::options::{Given, Options, Origin, Row, rows};
use super::value::{EntropyWeight, Source};
use super::{ObjectiveKind, PairData, Policies, RunConfig, Warmup, suggest};
use crate::error::{Error, Result};
use crate::objective::Objective;

/// The resolved recipe beside a result: the whole configuration, defaults included.
pub const RESOLVED_FILE: &str = "resolved.toml";

/// The demo's recipe, as messages name it.
pub const DEMO_PATH: &str = "recipes/demo.toml";
const DEMO: &str = include_str!("../../recipes/demo.toml");

/// Bytes of a recipe.
const MOST_BYTES: usize = 1 << 20;

/// Options that only a command line can have.
const FLAGS_ONLY: [&str; 4] = ["recipe", "resume", "live", "replay"];

/// Reads a recipe file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::Config`] naming line and key of what is wrong in it.
pub fn read(path: &Path) -> Result<Options> {
    parse(&read_text(path, MOST_BYTES)?, path)
}

/// Reads a configuration's file as text of at most `limit` bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::Config`] for a larger file and for one that is not UTF-8.
pub(crate) fn read_text(path: &Path, limit: usize) -> Result<String> {
    let failed = |source| Error::io(path, "read", source);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit {
        return Err(Error::config(
            format!("{}: more than {limit} bytes are too many for a configuration", path.display()),
            "check the path: a configuration is a short file of names and values",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let place = error.utf8_error().valid_up_to();
        let found = match error.as_bytes() {
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
            _ => "LATIN1",
        };
        Error::config(
            format!("{}: not UTF-8 text, from byte {place} on", path.display()),
            format!(
                "check the path; a text that may be {found} becomes UTF-8 with `iconv -f {found} -t UTF-8 FILE > NEW`"
            ),
        )
    })
}

/// Reads a recipe's text; `path` is for messages.
///
/// # Errors
/// [`Error::Config`] naming line and key of what is wrong.
pub fn parse(text: &str, path: &Path) -> Result<Options> {
    parse_with(text, &path.display().to_string(), |line| Origin::Recipe { path: path.to_path_buf(), line })
}

/// The built-in demo's recipe.
///
/// # Errors
/// [`Error::Config`], as for any recipe; a test reads it.
pub fn demo() -> Result<Options> {
    parse_with(DEMO, DEMO_PATH, |line| Origin::Demo { line })
}

fn parse_with(text: &str, path: &str, origin: impl Fn(usize) -> Origin) -> Result<Options> {
    let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count();
    let table = DeTable::parse(text).map_err(|error| {
        let line = line_of(error.span().map_or(0, |span| span.start));
        let help = match path.ends_with(".yaml") || path.ends_with(".yml") {
            true => "a recipe is TOML; `mmpo-fast import FILE` makes one of another trainer's YAML",
            false => "a recipe is lines of `name = value`; text and paths stand in quotes",
        };
        Error::config(format!("{path}:{line}: not TOML: {}", error.message()), help)
    })?;
    let rows = rows();
    let mut options = Options::default();
    for (key, value) in table.get_ref().iter() {
        let line = line_of(key.span().start);
        let row = rows
            .iter()
            .find(|row| row.name == key.get_ref().as_ref())
            .ok_or_else(|| unknown_key(key.get_ref(), value.get_ref(), &format!("{path}:{line}"), &rows))?;
        (row.put_toml)(&mut options, value.get_ref(), origin(line))?;
    }
    Ok(options)
}

fn unknown_key(key: &str, value: &DeValue<'_>, place: &str, rows: &[Row]) -> Error {
    if FLAGS_ONLY.contains(&key) {
        return Error::config(
            format!("{place}: `{key}` is a flag, not a recipe key"),
            format!("give --{key} on the command line"),
        );
    }
    let nearest = suggest::nearest(key, rows.iter().map(|row| row.name)).unwrap_or_default();
    let help = match value {
        DeValue::Table(_) => "a recipe is flat: all options at the top level, no [tables]",
        _ => "`mmpo-fast train --help` lists all options; a recipe key is a flag's name with underscores",
    };
    Error::config(format!("{place}: unknown key `{key}`; did you mean `{nearest}`?"), help)
}

impl RunConfig {
    /// The whole configuration as a recipe; reading that back gives an equal configuration (but for `resume` and
    /// `live`, which are a matter of one command line).
    pub fn to_toml(&self) -> String {
        let options = given(self);
        let mut text = String::from("# The resolved configuration of this run, defaults included.\n");
        let mut heading = "";
        for row in rows() {
            let Some(value) = (row.to_toml)(&options) else { continue };
            if row.heading != heading {
                heading = row.heading;
                text.push_str(&format!("\n# {heading}\n"));
            }
            text.push_str(&format!("{} = {value}\n", row.name));
        }
        text
    }
}

/// The options that make `config`.
fn given(config: &RunConfig) -> Options {
    let schedule = &config.schedule;
    let (warmup_ratio, warmup_steps) = match schedule.warmup {
        Warmup::Ratio(ratio) => (some(ratio), None),
        Warmup::Steps(steps) => (None, some(steps)),
    };
    let mut options = Options {
        model: some(Source::from_path(config.model.as_ref())),
        data: some(PairData::from_files(config.data.as_ref())),
        columns: some(config.columns.clone()).filter(|given| !given.value.0.is_empty()),
        template_date: config.template_date.and_then(some),
        output: some(config.output.clone()),
        reference: config.reference.clone().and_then(some),
        chat_template: config.chat_template.clone().and_then(some),
        min_score_gap: config.min_score_gap.and_then(some),
        data_cache: config.data_cache.clone().and_then(some),
        lora: config.lora.and_then(|lora| some(lora.modules)),
        lora_rank: config.lora.and_then(|lora| some(lora.rank)),
        lora_alpha: config.lora.and_then(|lora| some(lora.alpha)),
        lora_dropout: config.lora.and_then(|lora| some(lora.dropout)),
        lora_rslora: config.lora.and_then(|lora| some(lora.rslora)),
        adapter: config.adapter.clone().and_then(some),
        max_prompt_length: some(config.limits.max_prompt_length),
        max_length: some(config.limits.max_length),
        objective: some(config.objective.kind()),
        learning_rate: some(config.optimizer.learning_rate),
        adam_beta1: some(config.optimizer.beta1),
        adam_beta2: some(config.optimizer.beta2),
        adam_epsilon: some(config.optimizer.epsilon),
        weight_decay: some(config.optimizer.weight_decay),
        max_grad_norm: some(config.optimizer.max_grad_norm.unwrap_or(0.0)),
        schedule: some(schedule.kind),
        warmup_ratio,
        warmup_steps,
        epochs: if schedule.max_steps.is_some() { None } else { some(schedule.epochs) },
        max_steps: schedule.max_steps.and_then(some),
        pairs_per_step: config.batch.pairs_per_step.and_then(some),
        tokens_per_micro_batch: some(config.batch.tokens_per_micro_batch),
        seed: some(config.seed),
        eval_data: config.evaluation.data.clone().and_then(some),
        eval_split: config.evaluation.split.and_then(some),
        eval_steps: config.evaluation.steps.and_then(some),
        save_steps: config.save_steps.and_then(some),
        keep_checkpoints: some(config.keep_checkpoints),
        // A default is left out where it would be refused as idle when it is read back.
        eval_on_start: some(config.evaluation.on_start).filter(|given| !given.value),
        keep_best: config.evaluation.keep_best.and_then(some),
        early_stopping: config.evaluation.patience.and_then(some),
        early_stopping_delta: some(config.evaluation.delta).filter(|given| given.value > 0.0),
        capsule_weights: some(config.capsule_weights).filter(|given| given.value),
        device: some(config.device),
        precision: config.precision.and_then(some),
        optimizer_states: some(config.memory.states.moments),
        master_weights: some(config.memory.states.master),
        recompute: some(config.memory.recompute),
        gradients: some(config.memory.gradients),
        memory: config.memory_limit.and_then(some),
        tflops: config.tflops.and_then(some),
        offload: some(config.memory.offload),
        shard: some(config.memory.shard),
        head_mode: some(config.head.mode),
        head_workspace: some(config.head.workspace >> 20),
        threads: config.threads.and_then(some),
        ..Options::default()
    };
    set_policies(&mut options, &config.policies);
    set_objective(&mut options, config.objective);
    options
}

/// The options that make `policies`.
fn set_policies(options: &mut Options, policies: &Policies) {
    options.on_refused = some(policies.refused);
    options.on_empty = some(policies.empty);
    options.on_long_prompt = some(policies.long_prompt);
    options.on_long_response = some(policies.long_response);
    options.on_identical = some(policies.identical);
    options.on_duplicate = some(policies.duplicate);
    options.on_contradiction = some(policies.contradiction);
    options.on_boundary = some(policies.boundary);
    options.on_lost_text = some(policies.lost_text);
    options.on_no_end = some(policies.no_end);
    options.on_after_end = some(policies.after_end);
    options.on_suspicious = some(policies.suspicious);
}

/// The options that make `objective`, but for its name.
fn set_objective(options: &mut Options, objective: Objective) {
    let settings = objective.settings();
    options.beta = some(settings.beta);
    options.epsilon = some(settings.epsilon);
    options.reward_normalize = some(settings.reward_normalize);
    options.reward_group = if settings.reward_normalize { some(settings.reward_group) } else { None };
    options.length_normalize = some(settings.length_normalize);
    options.preference_weight = some(settings.preference_weight);
    options.entropy_weight = some(EntropyWeight::Number(settings.entropy_weight));
    options.gamma_beta_ratio = some(settings.gamma_beta_ratio);
    options.label_smoothing = some(settings.label_smoothing);
    clear_strangers(options, objective.kind());
}

fn some<T>(value: T) -> Option<Given<T>> {
    Some(Given { value, origin: Origin::Flag })
}

/// Removes the options that do not belong to the objective.
fn clear_strangers(options: &mut Options, kind: ObjectiveKind) {
    rows().iter().filter(|row| !row.only.contains(&kind)).for_each(|row| (row.clear)(options));
}
