//! What this peer shares with the others: arguments, shapes, made-up inputs, and rows of results.
//!
//! `benches/peers/README.md` is the specification, `benches/shapes.json` the shapes. Nothing of mmpo-fast is linked: it would
//! ask the same CUDA binding for other features than candle does.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use serde::Deserialize;
use serde_json::{Map, Value};

const TEXT: &str = include_str!("../../../shapes.json");
const HEADER: &str = "date,machine,peer,op,shape,median_us,min_us,max_us,flops,bytes,workspace";

#[derive(Deserialize)]
struct File {
    models: Map<String, Value>,
    profiles: Map<String, Value>,
    common: Common,
    step: StepSettings,
}

#[derive(Deserialize)]
struct Common {
    rms_norm_eps: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct StepSettings {
    pub beta: f64,
    pub epsilon: f64,
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub adam_epsilon: f64,
    pub weight_decay: f64,
}

/// A Llama's sizes, as its config names them.
#[derive(Clone, Debug, Deserialize)]
pub struct ModelShape {
    #[serde(rename = "num_hidden_layers")]
    pub layers: usize,
    #[serde(rename = "hidden_size")]
    pub hidden: usize,
    #[serde(rename = "intermediate_size")]
    pub mlp: usize,
    #[serde(rename = "num_attention_heads")]
    pub heads: usize,
    #[serde(rename = "num_key_value_heads")]
    pub kv_heads: usize,
    pub head_dim: usize,
    #[serde(rename = "vocab_size")]
    pub vocabulary: usize,
    #[serde(rename = "tie_word_embeddings")]
    pub tied: bool,
    rope_parameters: RopeParameters,
    #[serde(default)]
    pub rms_norm_eps: f64,
}

/// Scaling of frequencies is left out: it changes numbers and no time.
#[derive(Clone, Debug, Deserialize)]
struct RopeParameters {
    rope_theta: f64,
}

impl ModelShape {
    pub fn rope_theta(&self) -> f64 {
        self.rope_parameters.rope_theta
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Lengths {
    pub prompt: usize,
    pub chosen: usize,
    pub rejected: usize,
}

impl Lengths {
    pub fn longest(&self) -> usize {
        self.chosen.max(self.rejected)
    }

    fn tokens(&self) -> usize {
        self.prompt + self.chosen + self.rejected
    }
}

/// What is asked for.
pub struct Arguments {
    pub part: String,
    pub device: Device,
    pub dtype: DType,
    pub name: String,
    pub shape: ModelShape,
    pub profile: String,
    pub lengths: Lengths,
    pub pairs: usize,
    pub threads: usize,
    pub warmups: usize,
    pub calls: usize,
    pub json: bool,
    pub generation: Generation,
    csv: Option<PathBuf>,
    pub settings: StepSettings,
}

/// What `generate` is asked for.
pub struct Generation {
    /// Hugging Face folder.
    pub model: Option<PathBuf>,
    pub prompt: Vec<u32>,
    /// New tokens of the short run and of the long one.
    pub few: usize,
    pub all: usize,
}

fn command() -> Command {
    let own = |name: &'static str, help: &'static str| Arg::new(name).long(name).help(help);
    let count = |name: &'static str, help: &'static str| own(name, help).value_parser(value_parser!(u32));
    Command::new("candle-peer")
        .about("Times operations, a training step and generation in candle, to be compared with mmpo-fast's")
        .arg(Arg::new("part").required(true).value_parser(["step", "ops", "generate"]).help("What to time"))
        .arg(own("model", "Hugging Face folder (generate)").value_parser(value_parser!(PathBuf)))
        .arg(
            own("prompt-tokens", "Tokens of the prompt, with commas between them (generate)")
                .value_delimiter(',')
                .value_parser(value_parser!(u32)),
        )
        .arg(count("few", "New tokens of the short run (generate)").default_value("8"))
        .arg(count("new-tokens", "New tokens of the long run (generate)").default_value("136"))
        .arg(own("device", "cpu or cuda").default_value("cpu").value_parser(["cpu", "cuda"]))
        .arg(own("shape", "A model of benches/shapes.json").default_value("tiny-5m"))
        .arg(own("profile", "A profile of benches/shapes.json, or P/C/R").default_value("64/64/64"))
        .arg(count("pairs", "Pairs of a batch").default_value("2"))
        .arg(count("layers", "Layers of the model, where all are too many"))
        .arg(count("threads", "CPU threads").default_value("2"))
        .arg(count("warmups", "Calls before the timed ones").default_value("2"))
        .arg(count("calls", "Timed calls").default_value("5"))
        .arg(own("csv", "Add a row a result to this file").value_parser(value_parser!(PathBuf)))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object (step)"))
}

fn lengths(file: &File, text: &str) -> Result<Lengths> {
    let numbers: Vec<usize> = text.split('/').filter_map(|part| part.parse().ok()).collect();
    if let [prompt, chosen, rejected] = numbers[..] {
        return Ok(Lengths { prompt, chosen, rejected });
    }
    match file.profiles.get(text).map(Lengths::deserialize) {
        Some(Ok(lengths)) => Ok(lengths),
        _ => bail!("--profile = {text} is neither in benches/shapes.json nor P/C/R"),
    }
}

impl Arguments {
    pub fn from_process() -> Result<Arguments> {
        let matches: ArgMatches = command().get_matches();
        let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
        let count = |name: &str| matches.get_one::<u32>(name).map(|&count| count as usize);
        let file: File = serde_json::from_str(TEXT).map_err(candle_core::Error::wrap)?;
        let (mut name, profile) = (text("shape"), text("profile"));
        let Some(mut shape) = file.models.get(&name).and_then(|model| ModelShape::deserialize(model).ok())
        else {
            bail!("--shape = {name} is not in benches/shapes.json");
        };
        shape.rms_norm_eps = file.common.rms_norm_eps;
        if let Some(layers) = count("layers") {
            shape.layers = layers;
            name += &format!("[{layers}]");
        }
        let on_gpu = text("device") == "cuda";
        Ok(Arguments {
            part: text("part"),
            device: if on_gpu { Device::new_cuda(0)? } else { Device::Cpu },
            dtype: if on_gpu { DType::BF16 } else { DType::F32 },
            name,
            shape,
            lengths: lengths(&file, &profile)?,
            profile,
            pairs: count("pairs").unwrap_or(1).max(1),
            threads: count("threads").unwrap_or(1).max(1),
            warmups: count("warmups").unwrap_or(0),
            calls: count("calls").unwrap_or(1).max(1),
            json: matches.get_flag("json"),
            generation: Generation {
                model: matches.get_one::<PathBuf>("model").cloned(),
                prompt: matches.get_many::<u32>("prompt-tokens").unwrap_or_default().copied().collect(),
                few: count("few").unwrap_or(1),
                all: count("new-tokens").unwrap_or(1),
            },
            csv: matches.get_one::<PathBuf>("csv").cloned(),
            settings: file.step,
        })
    }

    /// Tokens of a batch's pairs, each prompt counted once.
    pub fn pair_tokens(&self) -> usize {
        self.pairs * self.lengths.tokens()
    }

    fn machine(&self) -> String {
        match self.device {
            Device::Cpu => format!("cpu ({} threads)", self.threads),
            _ => "cuda:0".to_owned(),
        }
    }

    /// Seconds of each timed call, by the clock, waiting for the device behind each.
    pub fn measure(&self, mut run: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let mut seconds = Vec::new();
        for index in 0..self.warmups + self.calls {
            self.device.synchronize()?;
            let started = Instant::now();
            run()?;
            self.device.synchronize()?;
            if index >= self.warmups {
                seconds.push(started.elapsed().as_secs_f64());
            }
        }
        Ok(seconds)
    }

    /// Prints a line, and adds a row to the file of `--csv`.
    pub fn report(&self, operation: &str, seconds: &[f64], flops: f64) -> Result<()> {
        let [low, median, high] = spread(seconds).map(|seconds| seconds * 1e6);
        if !self.json {
            println!("{operation:32} candle {median:12.1} us ({low:.1} to {high:.1})");
        }
        let Some(path) = &self.csv else { return Ok(()) };
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
        if file.metadata()?.len() == 0 {
            writeln!(file, "{HEADER}")?;
        }
        let (date, machine) = (jiff::Zoned::now().date(), self.machine());
        let shape = format!("{} {} x{}", self.name, self.profile, self.pairs);
        writeln!(
            file,
            "{date},{machine},candle,{operation},{shape},{median:.3},{low:.3},{high:.3},{flops},0,0"
        )?;
        Ok(())
    }
}

/// Least, median and most.
pub fn spread(seconds: &[f64]) -> [f64; 3] {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    let count = sorted.len();
    [at(0), (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0, at(count.saturating_sub(1))]
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

pub fn pairs(arguments: &Arguments) -> Vec<Pair> {
    const STREAM: u64 = 1 << 20;
    let Lengths { prompt, chosen, .. } = arguments.lengths;
    let length = arguments.lengths.tokens();
    let vocabulary = arguments.shape.vocabulary as u64;
    (0..arguments.pairs)
        .map(|pair| {
            let token = |at: usize| (scramble(STREAM, (pair * length + at) as u64) % vocabulary) as u32;
            let mut tokens: Vec<u32> = (0..length).map(token).collect();
            let rejected = tokens.split_off(prompt + chosen);
            let chosen = tokens.split_off(prompt);
            Pair { prompt: tokens, chosen, rejected }
        })
        .collect()
}

/// Normal values in the device's type.
pub fn normal(arguments: &Arguments, shape: &[usize], scale: f64) -> Result<Tensor> {
    Tensor::randn(0f32, scale as f32, shape, &arguments.device)?.to_dtype(arguments.dtype)
}

/// SplitMix64's finaliser over a counter: stateless, so any element can be made on its own.
fn scramble(stream: u64, element: u64) -> u64 {
    let mut z = ((stream << 40) + element + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Bytes in a line of Linux's account of this process; 0 where the system does not say.
pub fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
