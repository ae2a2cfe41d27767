//! What the Rust engines of the step benchmark share: arguments, model shapes, made-up weights and tokens, the report.
//!
//! Weights and tokens come from a formula, not a generator with a state, so that every engine, in whatever language,
//! trains the same model on the same pairs: equal losses then say that equal work was done. `README.md` beside this
//! file is the specification, `pytorch_step.py` its second implementation.

use std::time::Instant;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, Command, value_parser};
use serde::Serialize;

pub const BETA: f64 = 0.05;
pub const EPSILON: f64 = 0.9;
pub const LEARNING_RATE: f64 = 1e-4;
pub const ADAM_BETAS: [f64; 2] = [0.9, 0.999];
pub const ADAM_EPSILON: f64 = 1e-8;
pub const WEIGHT_DECAY: f64 = 0.01;

/// What an engine is asked for.
#[derive(Clone, Debug)]
pub struct Arguments {
    pub shape: Shape,
    pub pairs: usize,
    pub prompt: usize,
    pub response: usize,
    pub threads: usize,
    /// Timed steps.
    pub steps: usize,
    pub warmup: usize,
    pub json: bool,
}

impl Arguments {
    /// The process's arguments; `cargo bench` adds a `--bench` that means nothing here.
    pub fn from_process() -> Arguments {
        let count = |name: &'static str, default: &'static str, help: &'static str| {
            Arg::new(name)
                .long(name)
                .default_value(default)
                .value_parser(value_parser!(u32).range(1..))
                .help(help)
        };
        let shape = PossibleValuesParser::new(Shape::ALL.map(Shape::name));
        let matches = Command::new("step")
            .about("Times a full training step (forward, MMPO loss, backward, AdamW) on made-up weights and pairs")
            .arg(Arg::new("shape").long("shape").default_value("tiny-5m").value_parser(shape).help("Model's shapes"))
            .arg(count("pairs", "2", "Preference pairs of one step"))
            .arg(count("prompt", "64", "Tokens of each prompt"))
            .arg(count("response", "64", "Tokens of each response"))
            .arg(count("threads", "2", "CPU threads"))
            .arg(count("steps", "10", "Timed steps"))
            .arg(count("warmup", "2", "Steps before the timed ones"))
            .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object"))
            .get_matches_from(std::env::args().filter(|argument| argument != "--bench"));
        let count = |name: &str| matches.get_one::<u32>(name).map_or(0, |&value| value as usize);
        let shape = matches.get_one::<String>("shape").map(String::as_str);
        Arguments {
            shape: Shape::ALL.into_iter().find(|known| Some(known.name()) == shape).unwrap_or(Shape::Tiny),
            pairs: count("pairs"),
            prompt: count("prompt"),
            response: count("response"),
            threads: count("threads"),
            steps: count("steps"),
            warmup: count("warmup"),
            json: matches.get_flag("json"),
        }
    }

    /// Tokens of a step's pairs, each prompt counted once.
    pub fn pair_tokens(&self) -> usize {
        self.pairs * (self.prompt + 2 * self.response)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Smollm2,
    Tiny,
}

/// A Llama's sizes.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    pub layers: usize,
    pub hidden: usize,
    pub mlp: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub tied: bool,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
}

impl Shape {
    const ALL: [Shape; 2] = [Shape::Smollm2, Shape::Tiny];

    pub fn name(self) -> &'static str {
        match self {
            Shape::Smollm2 => "smollm2-135m",
            Shape::Tiny => "tiny-5m",
        }
    }

    pub fn model(self) -> ModelShape {
        match self {
            Shape::Smollm2 => ModelShape {
                layers: 30,
                hidden: 576,
                mlp: 1536,
                heads: 9,
                kv_heads: 3,
                head_dim: 64,
                vocabulary: 49152,
                tied: true,
                rope_theta: 100_000.0,
                rms_norm_eps: 1e-5,
            },
            Shape::Tiny => ModelShape {
                layers: 4,
                hidden: 256,
                mlp: 704,
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                vocabulary: 4096,
                tied: false,
                rope_theta: 10_000.0,
                rms_norm_eps: 1e-5,
            },
        }
    }
}

/// A weight matrix; norm weights are 1 and need no formula.
#[derive(Clone, Copy, Debug)]
pub enum Matrix {
    Embedding,
    /// `projection`: 0 q, 1 k, 2 v, 3 o, 4 gate, 5 up, 6 down.
    Layer {
        layer: usize,
        projection: usize,
    },
    Head {
        layers: usize,
    },
}

impl Matrix {
    /// Values of the matrix in row-major order, `[out, in]`: uniform with standard deviation 0.02.
    pub fn values(self, len: usize) -> Vec<f32> {
        let stream = match self {
            Matrix::Embedding => 0,
            Matrix::Layer { layer, projection } => 1 + 7 * layer + projection,
            Matrix::Head { layers } => 1 + 7 * layers,
        } as u64;
        let width = 0.02 * 3f32.sqrt();
        (0..len as u64)
            .map(|element| {
                // 24 bits: exact in an f32.
                let unit = (scramble(stream, element) >> 40) as f32 / (1u32 << 24) as f32;
                (2.0 * unit - 1.0) * width
            })
            .collect()
    }
}

/// Tokens of one pair.
#[derive(Clone, Debug)]
pub struct Pair {
    pub prompt: Vec<u32>,
    pub chosen: Vec<u32>,
    pub rejected: Vec<u32>,
}

pub fn pairs(arguments: &Arguments, vocabulary: usize) -> Vec<Pair> {
    const STREAM: u64 = 1 << 20;
    let length = arguments.prompt + 2 * arguments.response;
    (0..arguments.pairs)
        .map(|pair| {
            let mut tokens: Vec<u32> = (0..length)
                .map(|at| (scramble(STREAM, (pair * length + at) as u64) % vocabulary as u64) as u32)
                .collect();
            let rejected = tokens.split_off(arguments.prompt + arguments.response);
            let chosen = tokens.split_off(arguments.prompt);
            Pair { prompt: tokens, chosen, rejected }
        })
        .collect()
}

/// SplitMix64's finaliser over a counter: stateless, so any element can be made on its own.
fn scramble(stream: u64, element: u64) -> u64 {
    let mut z = ((stream << 40) + element + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What an engine says of itself.
#[derive(Clone, Debug)]
pub struct Engine {
    pub name: &'static str,
    pub version: String,
    pub variant: &'static str,
    /// Trainable weights; a tied matrix counts once.
    pub parameters: usize,
    /// Token rows that went through the layers in one step, padding and repeated prompts included.
    pub computed_tokens: usize,
    /// Resident bytes before the model was made.
    pub baseline_rss_bytes: u64,
}

/// Seconds and losses of the timed steps.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    pub seconds: Vec<f64>,
    pub losses: Vec<f64>,
}

impl Timings {
    /// Runs warm-up and timed steps; `step` returns its loss. Warm-up losses are kept, so that engines can be compared
    /// from the first step on.
    pub fn measure<E>(arguments: &Arguments, mut step: impl FnMut() -> Result<f64, E>) -> Result<Timings, E> {
        let mut timings = Timings::default();
        for index in 0..arguments.warmup + arguments.steps {
            let start = Instant::now();
            timings.losses.push(step()?);
            if index >= arguments.warmup {
                timings.seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(timings)
    }
}

/// One JSON object; `README.md` explains the fields.
#[derive(Serialize, Clone, Debug)]
struct Report {
    engine: &'static str,
    version: String,
    variant: &'static str,
    shape: &'static str,
    pairs: usize,
    prompt: usize,
    response: usize,
    threads: usize,
    warmup: usize,
    steps: usize,
    parameters: usize,
    seconds: Vec<f64>,
    seconds_median: f64,
    seconds_min: f64,
    seconds_max: f64,
    pair_tokens: usize,
    computed_tokens: usize,
    pair_tokens_per_second: f64,
    computed_tokens_per_second: f64,
    peak_rss_bytes: u64,
    baseline_rss_bytes: u64,
    losses: Vec<f64>,
}

/// Prints the report, as JSON or as a line.
pub fn print_report(arguments: &Arguments, engine: Engine, timings: Timings) {
    let mut sorted = timings.seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    let count = sorted.len();
    let median = (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0;
    let report = Report {
        engine: engine.name,
        version: engine.version,
        variant: engine.variant,
        shape: arguments.shape.name(),
        pairs: arguments.pairs,
        prompt: arguments.prompt,
        response: arguments.response,
        threads: arguments.threads,
        warmup: arguments.warmup,
        steps: arguments.steps,
        parameters: engine.parameters,
        seconds_median: median,
        seconds_min: at(0),
        seconds_max: at(count.saturating_sub(1)),
        seconds: timings.seconds,
        pair_tokens: arguments.pair_tokens(),
        computed_tokens: engine.computed_tokens,
        pair_tokens_per_second: arguments.pair_tokens() as f64 / median,
        computed_tokens_per_second: engine.computed_tokens as f64 / median,
        peak_rss_bytes: memory("VmHWM:"),
        baseline_rss_bytes: engine.baseline_rss_bytes,
        losses: timings.losses,
    };
    if arguments.json {
        println!("{}", serde_json::json!(report));
    } else {
        println!(
            "{} {} ({}), {}: {:.4} s a step ({:.4} to {:.4}), {:.0} pair tokens/s, peak {:.0} MiB",
            report.engine,
            report.version,
            report.variant,
            report.shape,
            report.seconds_median,
            report.seconds_min,
            report.seconds_max,
            report.pair_tokens_per_second,
            report.peak_rss_bytes as f64 / (1 << 20) as f64,
        );
    }
}

/// Resident bytes of this process now; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    memory("VmRSS:")
}

/// A line of Linux's account of this process, which is in kB.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
