//! `mmpo-fast bench`: each kernel beside this machine's ceilings, and a whole training step by its parts.

pub mod cases;
#[cfg(mmpo_emulated)]
pub mod counts;
mod gemm;
pub mod inputs;
mod kernels;
mod load;
mod measure;
mod report;
pub mod shapes;
mod step;

use std::path::PathBuf;
use std::sync::Arc;

use self::measure::Method;
use self::shapes::{Lengths, Shape};
use crate::device::{Device, DeviceChoice, DeviceTask, run_on};
use crate::error::{Error, Result};
use crate::model::LlamaConfig;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Each operation by itself.
    Kernels,
    /// A whole training step, and its parts.
    Step,
    /// Linear layers by our kernels and by the vendor's.
    Gemm,
    /// How fast weights come from the disk onto the device.
    Load,
    /// What the kernels do, counted on the emulated device, instead of how long they take.
    Counts,
}

/// The model whose shapes are measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelChoice {
    /// A name in `benches/shapes.json`.
    Named(String),
    /// A Hugging Face folder, whose `config.json` is read; the step takes its weights too.
    Folder(PathBuf),
}

/// One of several shapes that are measured beside the same ceilings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchCase {
    /// Name of a model in `benches/shapes.json`.
    pub model: String,
    /// Name of a profile of pair lengths, or the lengths themselves.
    pub profile: String,
    /// Pairs of a batch; the shape's own where absent.
    pub pairs: Option<usize>,
}

impl BenchCase {
    /// `MODEL:PROFILE`, or `MODEL:PROFILE:PAIRS`.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let (model, profile, pairs) = match parts[..] {
            [model, profile] => (model, profile, None),
            [model, profile, pairs] => (model, profile, Some(pairs.parse().ok().filter(|&pairs| pairs > 0)?)),
            _ => return None,
        };
        Some(BenchCase { model: model.to_owned(), profile: profile.to_owned(), pairs })
    }
}

/// A checked command line; `None` leaves a number to the device.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchConfig {
    /// What to measure.
    pub parts: Vec<Part>,
    /// Shapes of `bench kernels`, instead of one model, profile and number of pairs.
    pub cases: Vec<BenchCase>,
    /// A model folder or a named shape.
    pub model: Option<ModelChoice>,
    /// Layers instead of the model's own number, for a quicker step.
    pub layers: Option<usize>,
    /// A name in `benches/shapes.json`, or `P/C/R`.
    pub profile: Option<String>,
    /// Pairs of a batch.
    pub pairs: Option<usize>,
    /// Tokens of a batch, from which the number of pairs follows.
    pub tokens: Option<usize>,
    /// Only kernels whose names contain one of these; all if there is none.
    pub only: Vec<String>,
    /// Calls before the measured ones.
    pub warmups: Option<usize>,
    /// Measured calls.
    pub calls: Option<usize>,
    /// Seconds after which nothing more is begun.
    pub seconds: Option<f64>,
    /// Whether results are printed as JSON.
    pub json: bool,
    /// A file to which a row for each result is appended.
    pub csv: Option<PathBuf>,
    /// The device to measure.
    pub device: DeviceChoice,
    /// CPU threads; all cores where absent.
    pub threads: Option<usize>,
}

impl BenchConfig {
    /// Whether a kernel of this name is wanted.
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| name.contains(only.as_str()))
    }
}

/// Measures and prints.
///
/// # Errors
/// Those of the parts, of the device and of standard output.
pub fn run(config: &BenchConfig) -> Result<()> {
    match config.parts[..] {
        [Part::Gemm] => gemm::run(config),
        [Part::Counts] => counts(config),
        _ => run_on(config.device, config.threads, Task(config)),
    }
}

#[cfg(mmpo_emulated)]
fn counts(config: &BenchConfig) -> Result<()> {
    counts::run(config, &shape(config, Place::Emulated)?)
}

#[cfg(not(mmpo_emulated))]
fn counts(_: &BenchConfig) -> Result<()> {
    Err(crate::device::cuda::no_emulated_device())
}

/// The kind of device, as far as measuring depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Gpu,
    Cpu,
    Emulated,
}

impl Place {
    fn of<D: Device>(choice: DeviceChoice) -> Self {
        match choice {
            DeviceChoice::Emulated => Place::Emulated,
            // The CPU device computes in f32, GPUs in bf16.
            _ if size_of::<D::Compute>() == size_of::<f32>() => Place::Cpu,
            _ => Place::Gpu,
        }
    }

    fn method(self) -> Method {
        match self {
            Place::Gpu => Method::GPU,
            Place::Cpu => Method::CPU,
            Place::Emulated => Method::EMULATED,
        }
    }

    /// Model, profile and tokens of a batch where none are given.
    fn defaults(self) -> (&'static str, &'static str, usize) {
        match self {
            Place::Gpu => ("smollm2-135m", "ultrafeedback", 8192),
            Place::Cpu => ("smollm2-135m", "hh-rlhf", 600),
            Place::Emulated => ("tiny", "tiny", 104),
        }
    }
}

struct Task<'a>(&'a BenchConfig);

impl DeviceTask for Task<'_> {
    type Output = ();

    fn run<D: Device>(self, device: Arc<D>) -> Result<()> {
        let config = self.0;
        let place = Place::of::<D>(config.device);
        if config.parts == [Part::Load] {
            return load::run(&device, config);
        }
        let shapes = shapes(config, place)?;
        if place == Place::Emulated {
            tracing::warn!("the emulated device runs kernels on the CPU: its times say nothing about a GPU");
        }
        if config.parts.contains(&Part::Kernels) {
            let method = place.method().with_calls(config.warmups, config.calls);
            kernels::run(&*device, config, &shapes, method)?;
        }
        if config.parts.contains(&Part::Step) {
            step::run(&device, config, &shape(config, place)?, place)?;
        }
        Ok(())
    }
}

fn shapes(config: &BenchConfig, place: Place) -> Result<Vec<Shape>> {
    if config.cases.is_empty() {
        return Ok(vec![shape(config, place)?]);
    }
    let of_case = |case: &BenchCase| {
        let case = BenchConfig {
            model: Some(ModelChoice::Named(case.model.clone())),
            profile: Some(case.profile.clone()),
            pairs: case.pairs.or(config.pairs),
            ..config.clone()
        };
        shape(&case, place)
    };
    config.cases.iter().map(of_case).collect()
}

/// Most tokens of a batch: more than any GPU holds, and few enough to count in 32 bits.
const MOST_TOKENS: usize = 1 << 24;

fn shape(config: &BenchConfig, place: Place) -> Result<Shape> {
    let (model, profile, tokens) = place.defaults();
    let (model, llama) = match &config.model {
        None => (model.to_owned(), shapes::model(model, config.layers)?),
        Some(ModelChoice::Named(name)) => (name.clone(), shapes::model(name, config.layers)?),
        Some(ModelChoice::Folder(folder)) => {
            let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
            (name, LlamaConfig::from_folder(folder)?)
        }
    };
    let profile = config.profile.as_deref().unwrap_or(profile);
    let lengths: Lengths = shapes::lengths(profile)?;
    let of_pair = lengths.prompt.saturating_add(lengths.chosen).saturating_add(lengths.rejected);
    if of_pair.saturating_mul(config.pairs.unwrap_or(1)) > MOST_TOKENS {
        return Err(Error::config(
            format!("`--profile` = {profile}: a batch of more than {MOST_TOKENS} tokens"),
            "give fewer tokens, or fewer `--pairs`",
        ));
    }
    let model = match config.layers {
        Some(layers) => format!("{model}[{layers}]"),
        None => model,
    };
    let tokens = config.tokens.unwrap_or(tokens);
    let pairs = config.pairs.unwrap_or((tokens / lengths.tokens()).max(1));
    let shape = Shape { model, config: llama, profile: profile.to_owned(), lengths, pairs };
    let attention = |only: &String| only.starts_with("attention_");
    if shape.is_plain() && (config.only.is_empty() || !config.only.iter().all(attention)) {
        return Err(Error::config(
            format!("`--profile` = {profile}: without responses only attention has something to do"),
            "add `--only attention_forward`, or give the responses some tokens",
        ));
    }
    Ok(shape)
}
