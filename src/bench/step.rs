//! `mmpo-fast bench step`: a whole training step (forward, MMPO loss, backward, AdamW), and where its time goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::measure::{Ceilings, Deadline, Sample, Stopwatch};
use super::report::{self, ResultRow, figures};
use super::shapes::{self, Shape};
use super::{BenchConfig, ModelChoice, Place, inputs};
use crate::checkpoint::ModelFolder;
use crate::data::TokenizedPair;
use crate::device::{Device, OperationTime};
use crate::error::Result;
use crate::model::Llama;
use crate::objective::ReferencePair;
use crate::train::{Trainer, TrainingPair, Workload};

/// Time of one part of a step.
#[derive(Clone, Debug, Serialize)]
struct Phase {
    phase: &'static str,
    operations: usize,
    seconds: f64,
}

/// Results of the timed steps.
struct Steps {
    parameters: usize,
    sample: Sample,
    losses: Vec<f64>,
    /// Seconds of the step that was traced, and the operations in it.
    traced: f64,
    operations: Vec<OperationTime>,
    baseline_rss_bytes: u64,
    peak_device_bytes: usize,
}

/// Measures a training step by its parts: forward, head, backward, update.
///
/// # Errors
/// Those of the device and of standard output.
pub fn run<D: Device>(device: &Arc<D>, config: &BenchConfig, shape: &Shape, place: Place) -> Result<()> {
    let (warmups, calls) = match place {
        Place::Gpu => (10, 20),
        Place::Cpu => (2, 5),
        Place::Emulated => (0, 1),
    };
    let (warmups, calls) = (config.warmups.unwrap_or(warmups), config.calls.unwrap_or(calls));
    let steps = measure(device, config, shape, warmups, calls)?;
    let ceilings = match config.json {
        // A program that compares engines wants nothing but the step in its memory and its time.
        true => None,
        false => Some(Ceilings::measure(&mut Stopwatch::new(&**device, place.method())?)?),
    };
    report(&**device, config, shape, warmups, ceilings, steps)
}

fn measure<D: Device>(
    device: &Arc<D>,
    config: &BenchConfig,
    shape: &Shape,
    warmups: usize,
    calls: usize,
) -> Result<Steps> {
    let baseline_rss_bytes = memory("VmRSS:");
    let model = load(device, config, shape)?;
    let parameters = model.parameters();
    let settings = shapes::settings()?;
    let objective = settings.objective(shape.pairs);
    let pairs = inputs::pairs(shape.lengths, shape.pairs, shape.config.vocab_size);
    let workload = Workload::plan(
        &pairs,
        &objective,
        pairs.len(),
        config.tokens.unwrap_or(usize::MAX).min(shape.tokens()),
    );
    let mut trainer = Trainer::new(model, objective, workload)?;
    let batch = with_reference(&mut trainer, &pairs)?;
    let (mut number, mut losses, mut sample) = (0, Vec::new(), Sample::default());
    let mut step = |trainer: &mut Trainer<D>| -> Result<f64> {
        number += 1;
        let started = Instant::now();
        losses.push(trainer.step(&batch, settings.adamw(number), None)?.loss);
        // The last update is queued and not waited for: a step ends when the device is done.
        device.download_compute(&mut [0.0f32], &trainer.model.weights.final_norm, 0)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let deadline = Deadline::of(config.seconds);
    for index in 0..warmups + calls {
        // Time that is up ends the warm-up too: one step is timed in any case.
        let last = deadline.is_over();
        let seconds = step(&mut trainer)?;
        if index >= warmups || last {
            sample.0.push(seconds);
        }
        if last {
            tracing::warn!(
                "only {} of {calls} steps are timed: the time of `--seconds` is over",
                sample.0.len()
            );
            break;
        }
    }
    let (traced, operations) = device.trace(|| step(&mut trainer))?;
    let peak_device_bytes = device.memory().peak;
    Ok(Steps { parameters, sample, losses, traced, operations, baseline_rss_bytes, peak_device_bytes })
}

fn load<D: Device>(device: &Arc<D>, config: &BenchConfig, shape: &Shape) -> Result<Llama<D>> {
    let positions = shape.lengths.prompt + shape.lengths.chosen.max(shape.lengths.rejected);
    match &config.model {
        Some(ModelChoice::Folder(folder)) => {
            Llama::load(device.clone(), &ModelFolder::open(folder)?, positions)
        }
        _ => {
            let values = |tensor: &_| inputs::weights(&shape.config, tensor);
            Llama::from_values(device.clone(), shape.config.clone(), positions, values)
        }
    }
}

/// The pairs with their log-probs under the untrained model, which is the reference.
fn with_reference<'a, D: Device>(
    trainer: &mut Trainer<D>,
    pairs: &'a [TokenizedPair],
) -> Result<Vec<TrainingPair<'a>>> {
    let mut batch: Vec<TrainingPair> =
        pairs.iter().map(|pair| TrainingPair { pair, reference: ReferencePair::default() }).collect();
    let (outcomes, _) = trainer.evaluate(&batch)?;
    for (member, outcome) in batch.iter_mut().zip(outcomes) {
        let [tokens_chosen, tokens_rejected] = member.pair.scored_tokens().map(|tokens| tokens as u32);
        member.reference = ReferencePair {
            logp_chosen: outcome.logp_chosen,
            logp_rejected: outcome.logp_rejected,
            tokens_chosen,
            tokens_rejected,
        };
    }
    Ok(batch)
}

/// The part of a step that an operation belongs to.
fn phase_of(operation: &str) -> &'static str {
    // The first that fits counts; the name of a Hopper launcher is the operation's with an ending.
    const PHASES: [(&str, &[&str]); 12] = [
        ("embedding", &["embedding_"]),
        ("norms, residual sums", &["rms_norm_", "add_rms_norm_", "add"]),
        ("rope", &["rope"]),
        ("attention forward", &["attention_forward"]),
        ("attention backward", &["attention_backward"]),
        ("swiglu", &["swiglu_"]),
        ("log-prob head", &["logp_head", "gather_rows"]),
        ("objective", &["pair_objective"]),
        ("gradient norm", &["gradient_norm"]),
        ("adamw", &["adamw"]),
        ("products", &["linear_"]),
        ("uploads, zeroing, copies", &["upload", "cast_to_bf16", "zero", "copy"]),
    ];
    let fits = |names: &[&str]| names.iter().any(|name| operation.starts_with(name));
    PHASES.iter().find(|(_, names)| fits(names)).map_or("other", |(phase, _)| phase)
}

/// Phases in descending order of time, then the time between the operations: launches that came late, and the host.
fn phases(operations: &[OperationTime], total: f64) -> Vec<Phase> {
    let mut by_phase: BTreeMap<&'static str, Phase> = BTreeMap::new();
    for operation in operations {
        let phase = phase_of(&operation.operation);
        let entry = by_phase.entry(phase).or_insert(Phase { phase, operations: 0, seconds: 0.0 });
        entry.operations += 1;
        entry.seconds += operation.seconds;
    }
    let mut phases: Vec<Phase> = by_phase.into_values().collect();
    phases.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let noted: f64 = phases.iter().map(|phase| phase.seconds).sum();
    phases.push(Phase { phase: "between operations", operations: 0, seconds: (total - noted).max(0.0) });
    phases
}

/// Floating-point operations that a step's gemms must do: 6 per weight and token, the head on scored tokens alone, and
/// attention on the pairs of tokens that see each other.
fn flops(shape: &Shape) -> f64 {
    let config = &shape.config;
    let attention = config.attention_shape();
    let layer = config.hidden_size
        * (attention.qkv_width() + attention.out_width() + 3 * config.intermediate_size)
        * shape.tokens();
    let head = shape.scored() * config.vocab_size * config.hidden_size;
    let scores = 14 * shape.visible() * attention.out_width();
    (6 * (config.layers * layer + head) + config.layers * scores) as f64
}

fn report<D: Device>(
    device: &D,
    config: &BenchConfig,
    shape: &Shape,
    warmup: usize,
    ceilings: Option<Ceilings>,
    steps: Steps,
) -> Result<()> {
    let (flops, median) = (flops(shape), steps.sample.median());
    let phases = phases(&steps.operations, steps.traced);
    if let Some(path) = &config.csv {
        let rows = rows(shape, flops, &steps, &phases);
        report::append_csv(path, &device.describe(), report::OURS, &rows)?;
    }
    let tokens = shape.tokens() as f64;
    if config.json {
        let report = as_json(&device.describe(), shape, warmup, flops, &steps, &phases);
        return report::print(&format!("{report}\n"));
    }
    let share = ceilings.map(|ceilings| {
        let rate = ceilings.rate();
        format!(
            ", {:.0} % of the {} of a product of {side} x {side} x {side}",
            100.0 * flops / median / rate,
            figures(rate / 1e12),
            side = ceilings.product_side
        )
    });
    report::print(&format!(
        "training step of {}: {} parameters, {} tokens, {} scored\ndevice   {}\nstep     {} ms ({} to {}; {warmup} steps \
         to warm up, {} timed)\nspeed    {} tokens/s, {} pairs/s, {} TFLOP/s{}\nmemory   {:.2} GiB on the device\n\n{}\n\
         Of one step more, traced: {} ms.\n",
        shape.name(),
        steps.parameters,
        shape.tokens(),
        shape.scored(),
        device.describe(),
        figures(median * 1e3),
        figures(steps.sample.min() * 1e3),
        figures(steps.sample.max() * 1e3),
        steps.sample.0.len(),
        figures(tokens / median),
        figures(shape.pairs as f64 / median),
        figures(flops / median / 1e12),
        share.unwrap_or_default(),
        steps.peak_device_bytes as f64 / f64::from(1 << 30),
        table(&phases, steps.traced),
        figures(steps.traced * 1e3),
    ))
}

/// The parts of a step that took `traced` seconds, as a table.
fn table(phases: &[Phase], traced: f64) -> String {
    let row = |phase: &Phase| {
        vec![
            phase.phase.to_owned(),
            phase.operations.to_string(),
            figures(phase.seconds * 1e3),
            format!("{:.1} %", 100.0 * phase.seconds / traced),
        ]
    };
    let rows: Vec<Vec<String>> = phases.iter().map(row).collect();
    report::table(&["part", "operations", "ms", "share"], &rows)
}

/// Rows of the whole step, and of each part of the traced one.
fn rows(shape: &Shape, flops: f64, steps: &Steps, phases: &[Phase]) -> Vec<ResultRow> {
    let step = ResultRow::new("step", &shape.name(), &steps.sample, flops, 0.0);
    let part = |phase: &Phase| {
        let (op, seconds) = (format!("step: {}", phase.phase), Sample(vec![phase.seconds]));
        ResultRow::new(&op, &shape.name(), &seconds, 0.0, 0.0)
    };
    std::iter::once(step).chain(phases.iter().map(part)).collect()
}

fn as_json(
    device: &str,
    shape: &Shape,
    warmup: usize,
    flops: f64,
    steps: &Steps,
    phases: &[Phase],
) -> serde_json::Value {
    let (median, tokens) = (steps.sample.median(), shape.tokens() as f64);
    json!({
        "engine": "mmpo-fast",
        "version": env!("CARGO_PKG_VERSION"),
        "variant": "shared prompts, packed",
        "device": device,
        "shape": shape.model,
        "profile": shape.profile,
        "pairs": shape.pairs,
        "prompt": shape.lengths.prompt,
        "chosen": shape.lengths.chosen,
        "rejected": shape.lengths.rejected,
        "warmup": warmup,
        "steps": steps.sample.0.len(),
        "parameters": steps.parameters,
        "seconds": steps.sample.0,
        "seconds_median": median,
        "seconds_min": steps.sample.min(),
        "seconds_max": steps.sample.max(),
        "pair_tokens": shape.tokens(),
        "computed_tokens": shape.tokens(),
        "pair_tokens_per_second": tokens / median,
        "flops": flops,
        "tflop_per_s": flops / median / 1e12,
        "peak_rss_bytes": memory("VmHWM:"),
        "baseline_rss_bytes": steps.baseline_rss_bytes,
        "peak_device_bytes": steps.peak_device_bytes,
        "losses": steps.losses,
        "phases": phases,
        "traced_seconds": steps.traced,
    })
}

/// Bytes in a line of what Linux says about this process; 0 where the system says nothing.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_step_and_what_lies_between() {
        let time = |operation: &str, seconds| OperationTime { operation: operation.into(), seconds };
        let operations = [
            time("rope", 1.0),
            time("linear_forward", 2.0),
            time("logp_head_forward/linear_forward_f32", 4.0),
            time("linear_backward_input_sm90", 1.0),
        ];
        let phases = phases(&operations, 10.0);
        let found: Vec<(&str, usize, f64)> =
            phases.iter().map(|phase| (phase.phase, phase.operations, phase.seconds)).collect();
        assert_eq!(
            found,
            [
                ("log-prob head", 1, 4.0),
                ("products", 2, 3.0),
                ("rope", 1, 1.0),
                ("between operations", 0, 2.0)
            ]
        );
    }

    /// 6 N T, as the literature has it, plus attention.
    #[test]
    fn a_steps_operations() {
        let config = shapes::model("smollm2-135m", None).unwrap();
        let lengths = shapes::lengths("1/1024/1024").unwrap();
        let parameters = config.parameters() as f64;
        let shape = Shape { model: String::new(), config, profile: String::new(), lengths, pairs: 1 };
        let rough = 6.0 * parameters * shape.tokens() as f64;
        let ratio = flops(&shape) / rough;
        assert!(1.0 < ratio && ratio <= 1.3, "{ratio}");
    }
}
