//! How far the host runs ahead of a GPU: the launches of a training step, and the host's time to queue all of them, beside the time
//! that the GPU is expected to take. `queue_steps [STEPS]` prints CSV; it needs no GPU.
//!
//! The device is one that is planned for: the model, the trainer and every operation run as they do on a GPU, up to the call of
//! the launcher, which is left out. So the time has everything of this program (sizes, checks, lists of tensors, packing,
//! locks), and nothing of the driver, whose own cost for a launch has to be added. The least time of
//! many steps is the one that other programs on the machine lengthen least.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use mmpo_fast::bench::shapes::{self, Lengths};
use mmpo_fast::config::MemoryConfig;
use mmpo_fast::data::{Sides, TokenizedPair};
use mmpo_fast::device::StorageType;
use mmpo_fast::device::cuda::{CudaDevice, KernelPath};
use mmpo_fast::device::prelude::*;
use mmpo_fast::model::Llama;
use mmpo_fast::objective::ReferencePair;
use mmpo_fast::plan::{Rates, Trained, Volume, find};
use mmpo_fast::train::{Trainer, TrainingPair, Workload};

const MODELS: [&str; 4] = ["tiny-5m", "smollm2-135m", "llama-3.2-1b", "llama-3-8b"];
/// Pairs of a step and of a micro-batch: a small step, for which the host has least time.
const STEPS_OF: [(usize, usize); 3] = [(8, 8), (8, 1), (128, 8)];
/// Untimed steps, after which every list has its room.
const WARMUPS: u32 = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let steps: usize = std::env::args().nth(1).map_or(Ok(20), |text| text.parse())?;
    let gpu = find("H200").ok_or("the table of GPUs has no H200")?;
    println!(
        "model,lengths,pairs,micro_batches,operations,host_seconds_median,host_seconds_least,host_microseconds_per_operation,\
         expected_seconds,share_of_expected"
    );
    for model in MODELS {
        for profile in ["hh-rlhf", "ultrafeedback"] {
            for (pairs, together) in STEPS_OF {
                row(model, (profile, shapes::lengths(profile)?), (pairs, together), steps, gpu.rates)?;
            }
        }
    }
    Ok(())
}

/// Measures one model at pairs of these lengths, and prints its row.
fn row(
    model: &str,
    (profile, lengths): (&str, Lengths),
    (pairs, together): (usize, usize),
    steps: usize,
    rates: Rates,
) -> Result<(), Box<dyn Error>> {
    let device = Arc::new(CudaDevice::planned_gpu(KernelPath::Hopper, false));
    let config = shapes::model(model, None)?;
    let batch: Vec<TokenizedPair> = (0..pairs).map(|record| pair(record, lengths)).collect();
    let tokens = together * batch[0].tokens_of(Sides::Both);
    let positions = batch[0].positions();
    let llama = Llama::planned(&device, config.clone(), positions, StorageType::Bf16)?;
    let settings = shapes::settings()?;
    let objective = settings.objective(pairs);
    let workload = Workload::plan(&batch, &objective, pairs, tokens);
    let mut trainer = Trainer::new(llama, objective, workload)?;
    let training: Vec<TrainingPair<'_>> =
        batch.iter().map(|pair| TrainingPair { pair, reference: ReferencePair::default() }).collect();
    let mut step = |number: u32| trainer.step(&training, settings.adamw(number), Some(1.0));
    for number in 1..=WARMUPS {
        step(number)?;
    }
    let mut seconds = Vec::new();
    for number in 0..steps {
        let start = Instant::now();
        step(WARMUPS + 1 + number as u32)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (_, operations) = device.trace(|| step(1))?;
    let micro_batches = pairs.div_ceil(together);
    let volume = Volume::of(&batch, Sides::Both).share(1.0, micro_batches as f64);
    let work = Trained::new(&config, None).work(&volume, &MemoryConfig::default(), false, 2);
    let (median, least, expected) = (seconds[seconds.len() / 2], seconds[0], work.seconds(&rates));
    println!(
        "{model},{profile},{pairs},{micro_batches},{},{median:.6},{least:.6},{:.3},{expected:.6},{:.4}",
        operations.len(),
        1e6 * least / operations.len() as f64,
        least / expected
    );
    Ok(())
}

fn pair(record: usize, lengths: Lengths) -> TokenizedPair {
    let part = |len: usize, first: usize| -> Vec<u32> {
        (0..len).map(|index| ((first + index * 7) % 251) as u32).collect()
    };
    TokenizedPair {
        record,
        prompt: part(lengths.prompt, record).into(),
        chosen: part(lengths.chosen, record + 1).into(),
        rejected: part(lengths.rejected, record + 2).into(),
    }
}
