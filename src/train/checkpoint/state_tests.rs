//! A run that is saved and restored goes on with the bits of one in one piece, whatever its states are made of.

use std::path::Path;
use std::sync::Arc;

use half::bf16;

use super::{restore, save, stored_tensors};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::run_state::{self, RngPosition, RunIdentity, RunState};
use crate::config::{GradientConfig, MemoryConfig};
use crate::data::TokenizedPair;
use crate::device::cpu::CpuDevice;
use crate::device::prelude::*;
use crate::error::Result;
use crate::model::{FusedTensor, Llama, LlamaConfig, TensorSpec};
use crate::objective::{Objective, ReferencePair};
use crate::optimizer::{AdamWStep, MasterWeights, MomentFormat, StateOptions};
use crate::train::{Trainer, TrainingPair, Workload};

/// Heads that the kernels know, and matrices of 4096 values and more, which 8-bit moments have.
const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 80,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": true}"#;

pub(super) fn pairs() -> Vec<TokenizedPair> {
    let pair = |record, first: u32| TokenizedPair {
        record,
        prompt: vec![first, 2, 3].into(),
        chosen: vec![first + 1, 5, 6].into(),
        rejected: vec![7, first].into(),
    };
    vec![pair(0, 1), pair(1, 4)]
}

fn trainer<D: Device>(device: &Arc<D>, states: StateOptions) -> Trainer<D> {
    trainer_with(device, MemoryConfig { states, ..MemoryConfig::default() }).unwrap()
}

pub(super) fn trainer_with<D: Device>(device: &Arc<D>, memory: MemoryConfig) -> Result<Trainer<D>> {
    trainer_freezing(device, memory, |_| false)
}

pub(super) fn trainer_freezing<D: Device>(
    device: &Arc<D>,
    memory: MemoryConfig,
    is_frozen: impl Fn(&FusedTensor) -> bool,
) -> Result<Trainer<D>> {
    let config = LlamaConfig::parse(Path::new("config.json"), CONFIG).unwrap();
    let values = |tensor: &TensorSpec| -> Vec<f32> {
        let salt = tensor.name.len() as f32;
        (0..tensor.values()).map(|index| 0.1 * (salt + 0.37 * index as f32).sin()).collect()
    };
    let mut model = Llama::from_values(Arc::clone(device), config, 16, values).unwrap();
    model.freeze(is_frozen);
    let workload = Workload { memory, rounding_seed: 9, ..Workload::plan(&pairs(), &Objective::Sft, 2, 64) };
    Trainer::new(model, Objective::Sft, workload)
}

fn train<D: Device>(trainer: &mut Trainer<D>, steps: std::ops::RangeInclusive<u32>) {
    train_clipped(trainer, steps, Some(1.0));
}

pub(super) fn train_clipped<D: Device>(
    trainer: &mut Trainer<D>,
    steps: std::ops::RangeInclusive<u32>,
    max_grad_norm: Option<f64>,
) {
    let pairs = pairs();
    let pairs: Vec<TrainingPair<'_>> =
        pairs.iter().map(|pair| TrainingPair { pair, reference: ReferencePair::default() }).collect();
    for step in steps {
        let adamw = AdamWStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step,
        };
        trainer.step(&pairs, adamw, max_grad_norm).unwrap();
    }
}

pub(super) fn run_state() -> RunState {
    let rng = RngPosition::default();
    RunState { step: 2, epoch: 0, pairs_seen: 2, rng, identity: RunIdentity::default() }
}

/// Saves `trainer` into a folder of its own; the checkpoint, and the bytes of its tensors.
pub(super) fn saved<D: Device>(trainer: &Trainer<D>) -> (tempfile::TempDir, Checkpoint, Vec<u8>) {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), trainer, &run_state(), (1, &[])).unwrap();
    let path = run_state::latest(run.path()).unwrap().unwrap();
    let bytes = std::fs::read(path.join("state.safetensors")).unwrap();
    (run, Checkpoint::open(&path).unwrap(), bytes)
}

pub(super) fn all_options() -> Vec<StateOptions> {
    let moments = [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit];
    let masters = [MasterWeights::F32, MasterWeights::Split, MasterWeights::None];
    moments.into_iter().flat_map(|moments| masters.map(|master| StateOptions { moments, master })).collect()
}

fn every_state_is_restored_to_the_bit<D: Device>(device: &Arc<D>) {
    let mut sizes = Vec::new();
    for options in all_options() {
        let mut whole = trainer(device, options);
        train(&mut whole, 1..=2);
        let (_run, checkpoint, bytes) = saved(&whole);
        sizes.push(bytes.len());
        train(&mut whole, 3..=4);

        let mut cut = trainer(device, options);
        checkpoint.check_tensors(&stored_tensors(&cut.model.layout, options)).unwrap();
        restore(&checkpoint, &mut cut).unwrap();
        assert!(saved(&cut).2 == bytes, "{options:?}: what was restored");
        train(&mut cut, 3..=4);
        assert!(saved(&cut).2 == saved(&whole).2, "{options:?}: after two more steps");

        // A checkpoint of another format is no part of this run.
        let others = all_options().into_iter().filter(|other| other.moments != options.moments);
        for other in others {
            let error = checkpoint.check_tensors(&stored_tensors(&cut.model.layout, other)).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{options:?} as {other:?}: {error}");
        }
    }
    // Smaller states make smaller files.
    assert!(sizes[0] > sizes[3] && sizes[3] > sizes[6], "{sizes:?}");
}

#[test]
fn every_state_is_restored_to_the_bit_on_the_cpu() {
    every_state_is_restored_to_the_bit(&Arc::new(CpuDevice::new(Some(2)).unwrap()));
}

/// With bf16 weights, beside which there are master copies.
#[test]
fn every_state_is_restored_to_the_bit_on_the_cpu_in_bf16() {
    every_state_is_restored_to_the_bit(&Arc::new(CpuDevice::<bf16>::open(Some(2)).unwrap()));
}

/// Sums of gradients in bf16 begin at zero in each step: a checkpoint has no part of them.
#[test]
fn a_run_with_bf16_gradients_is_resumed_to_the_bit() {
    let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let memory = MemoryConfig { gradients: GradientConfig::Bf16, ..MemoryConfig::default() };
    let (mut whole, mut cut) =
        (trainer_with(&device, memory).unwrap(), trainer_with(&device, memory).unwrap());
    train(&mut whole, 1..=2);
    let (_run, checkpoint, _) = saved(&whole);
    train(&mut whole, 3..=4);
    train(&mut cut, 1..=1);
    restore(&checkpoint, &mut cut).unwrap();
    train(&mut cut, 3..=4);
    assert!(saved(&cut).2 == saved(&whole).2, "after two more steps");
    let mut f32_sums = trainer(&device, StateOptions::default());
    train(&mut f32_sums, 1..=4);
    assert!(saved(&f32_sums).2 != saved(&whole).2, "f32 sums have other bits");
}

#[cfg(mmpo_emulated)]
#[test]
fn every_state_is_restored_to_the_bit_on_the_emulated_gpu() {
    use crate::device::cuda::{CudaDevice, EmulatorVariant};
    every_state_is_restored_to_the_bit(&Arc::new(CudaDevice::emulated(EmulatorVariant::Plain)));
}
