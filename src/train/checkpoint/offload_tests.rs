//! Optimiser states in host memory give the bits of states on the device, on the emulated GPU, whose copies land as late as they
//! may.

use std::collections::HashMap;
use std::sync::Arc;

use super::state_tests::{all_options, run_state, saved, train_clipped, trainer_freezing, trainer_with};
use super::{StoredTensor, download, restore, stored_parts};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::shared_save::{self, Writer};
use crate::config::{GradientConfig, MemoryConfig, OffloadConfig};
use crate::device::GroupPlace;
use crate::device::cpu::CpuDevice;
use crate::device::cuda::{CudaDevice, EmulatorVariant};
use crate::device::prelude::*;
use crate::optimizer::{MomentFormat, StateOptions};
use crate::train::Trainer;
use crate::train::cut::Cut;
use crate::train::offload::{self, Offloaded};

/// Values of a piece: queries, keys and values of 12288 make two full pieces and a smaller one, and no tensor is a multiple of it.
const PIECE: usize = 4352;

fn device() -> Arc<CudaDevice> {
    Arc::new(CudaDevice::emulated(EmulatorVariant::Plain))
}

fn resident(device: &Arc<CudaDevice>, memory: MemoryConfig) -> Trainer<CudaDevice> {
    trainer_with(device, MemoryConfig { offload: OffloadConfig::None, ..memory }).unwrap()
}

/// A trainer whose states are offloaded in pieces of [`PIECE`] values.
fn offloaded(device: &Arc<CudaDevice>, memory: MemoryConfig) -> Trainer<CudaDevice> {
    let memory = MemoryConfig { offload: OffloadConfig::States, ..memory };
    let mut trainer = trainer_with(device, memory).unwrap();
    trainer.offloaded = Offloaded::with_pieces(&trainer.model, &memory, 9, PIECE).unwrap();
    trainer
}

fn every_memory() -> Vec<MemoryConfig> {
    let of = |states| {
        [GradientConfig::F32, GradientConfig::Bf16, GradientConfig::Layer].map(|gradients| MemoryConfig {
            states,
            gradients,
            ..MemoryConfig::default()
        })
    };
    all_options().into_iter().flat_map(of).collect()
}

/// In every format, with gradients of all tensors and of one layer at a time. A run may be resumed with the other choice.
#[test]
fn offloaded_states_have_the_bits_of_resident_ones() {
    let device = device();
    for memory in every_memory() {
        let clip = (memory.gradients != GradientConfig::Layer).then_some(1.0);
        let (mut here, mut there) = (resident(&device, memory), offloaded(&device, memory));
        train_clipped(&mut here, 1..=2, clip);
        train_clipped(&mut there, 1..=2, clip);
        let ((_one, from_here, wanted), (_two, from_there, bytes)) = (saved(&here), saved(&there));
        assert!(bytes == wanted, "{memory:?}: after two steps");
        // Into trainers that have other values of their own, with pieces on their way.
        restore(&from_here, &mut there).unwrap();
        let mut resumed = resident(&device, memory);
        restore(&from_there, &mut resumed).unwrap();
        for trainer in [&mut here, &mut there, &mut resumed] {
            train_clipped(trainer, 3..=4, clip);
        }
        let wanted = saved(&here).2;
        assert!(saved(&there).2 == wanted, "{memory:?}: resumed with offload");
        assert!(saved(&resumed).2 == wanted, "{memory:?}: resumed without offload");
    }
}

/// A restored checkpoint replaces what the slots already hold of the next pieces.
#[test]
fn a_checkpoint_is_restored_over_states_of_another_step() {
    let (device, memory) = (device(), MemoryConfig::default());
    let mut trainer = offloaded(&device, memory);
    let (_run, start, wanted) = saved(&trainer);
    train_clipped(&mut trainer, 1..=3, Some(1.0));
    let after = saved(&trainer).2;
    assert!(after != wanted);
    restore(&start, &mut trainer).unwrap();
    assert!(saved(&trainer).2 == wanted, "restored");
    train_clipped(&mut trainer, 1..=3, Some(1.0));
    assert!(saved(&trainer).2 == after, "the same steps again");
}

/// Copies that are still on their way back from the last step do not land over what is restored.
#[test]
fn a_checkpoint_is_restored_while_states_are_on_their_way() {
    let (device, memory) = (device(), MemoryConfig::default());
    let mut trainer = offloaded(&device, memory);
    let (_run, start, wanted) = saved(&trainer);
    // Nothing here waits for the copies of the last update.
    train_clipped(&mut trainer, 1..=3, Some(1.0));
    restore(&start, &mut trainer).unwrap();
    assert!(saved(&trainer).2 == wanted);
}

/// Saves `trainer` as two ranks do, each one part of every tensor.
fn saved_by_two(trainer: &Trainer<CudaDevice>) -> (tempfile::TempDir, Checkpoint) {
    let (run, state) = (tempfile::tempdir().unwrap(), run_state());
    let parts = [0, 1].map(|rank| {
        let own = move |len| Cut::new(len, GroupPlace { rank, ranks: 2 }).own();
        stored_parts(&trainer.model.layout, trainer.state_options(), own)
    });
    let of_first: HashMap<&str, usize> =
        parts[0].iter().map(|tensor| (tensor.name.as_str(), tensor.values())).collect();
    let first = |tensor: &StoredTensor, offset: usize, bytes: &mut [u8]| {
        download(trainer, &tensor.name, offset, bytes)
    };
    let second = |tensor: &StoredTensor, offset: usize, bytes: &mut [u8]| {
        // A tensor of few values is all of the second one's.
        let before = of_first.get(tensor.name.as_str()).copied().unwrap_or_default();
        download(trainer, &tensor.name, before + offset, bytes)
    };
    let begun = shared_save::begin(run.path(), &state).unwrap();
    let writer = (Writer { number: 1, count: 2 }, std::process::id());
    shared_save::write_part(run.path(), &state, writer, &parts[1], second).unwrap();
    let path = begun.finish(&state, 2, &parts[0], first).unwrap();
    (run, Checkpoint::open(&path).unwrap())
}

/// Ranks that share the states among them cannot offload them, but one process goes on from their checkpoint with offload: each
/// part lands where it belongs.
#[test]
fn a_checkpoint_in_parts_is_restored_to_host_memory() {
    let device = device();
    for states in all_options() {
        let memory = MemoryConfig { states, ..MemoryConfig::default() };
        let (mut trainer, mut other) = (offloaded(&device, memory), offloaded(&device, memory));
        train_clipped(&mut trainer, 1..=2, Some(1.0));
        let (_run, parts) = saved_by_two(&trainer);
        restore(&parts, &mut other).unwrap();
        assert!(saved(&other).2 == saved(&trainer).2, "{memory:?}");
    }
}

/// A frozen tensor has no state in host memory either, and no turn among the updates.
#[test]
fn frozen_tensors_have_no_states_to_offload() {
    let device = device();
    for gradients in [GradientConfig::F32, GradientConfig::Layer] {
        let clip = (gradients != GradientConfig::Layer).then_some(1.0);
        let trained = [OffloadConfig::None, OffloadConfig::States].map(|offload| {
            let memory = MemoryConfig { gradients, offload, ..MemoryConfig::default() };
            let mut trainer =
                trainer_freezing(&device, memory, |tensor| tensor.name().contains("mlp")).unwrap();
            train_clipped(&mut trainer, 1..=2, clip);
            saved(&trainer).2
        });
        assert!(trained[0] == trained[1], "{gradients:?}");
    }
}

/// The plan says the bytes that are taken, on the device and on the host.
#[test]
fn the_plan_of_an_offload_is_exact() {
    let device = device();
    for memory in every_memory() {
        let memory = MemoryConfig { offload: OffloadConfig::States, ..memory };
        let trainer = trainer_with(&device, memory).unwrap();
        let plan = offload::plan(&trainer.model.layout, &memory, true);
        assert_eq!(device.host_memory().now, plan.host_bytes(), "{memory:?}");
        let before = device.memory().now;
        let again = Offloaded::new(&trainer.model, &memory, 0).unwrap();
        assert_eq!(device.memory().now - before, plan.device_bytes(), "{memory:?}");
        drop(again);
        drop(trainer);
        assert_eq!(device.host_memory().now, 0, "all of it is given back");
    }
    let none = offload::plan(
        &resident(&device, MemoryConfig::default()).model.layout,
        &MemoryConfig::default(),
        true,
    );
    assert_eq!((none.host_bytes(), none.device_bytes()), (0, 0));
}

/// A step takes no memory, and the host waits once, for the numbers that it prints, whatever is kept where. Updates inside the
/// backward cost a second wait: for the loss, which must be finite before the first of them.
#[test]
fn the_host_waits_for_a_steps_numbers_alone() {
    let device = device();
    let states = StateOptions { moments: MomentFormat::EightBit, ..StateOptions::default() };
    for gradients in [GradientConfig::F32, GradientConfig::Bf16, GradientConfig::Layer] {
        for offload in [OffloadConfig::None, OffloadConfig::States] {
            let memory = MemoryConfig { gradients, offload, states, ..MemoryConfig::default() };
            let clip = (gradients != GradientConfig::Layer).then_some(1.0);
            let mut trainer = trainer_with(&device, memory).unwrap();
            train_clipped(&mut trainer, 1..=1, clip);
            let (waits, taken) = (device.host_waits(), (device.memory(), device.host_memory()));
            train_clipped(&mut trainer, 2..=3, clip);
            let each = if gradients == GradientConfig::Layer { 2 } else { 1 };
            assert_eq!(device.host_waits() - waits, 2 * each, "{memory:?}: the waits of two steps");
            assert_eq!((device.memory(), device.host_memory()), taken, "{memory:?}");
        }
    }
}

#[test]
fn the_cpu_has_nothing_to_offload() {
    let device = Arc::new(CpuDevice::new(Some(1)).unwrap());
    let memory = MemoryConfig { offload: OffloadConfig::States, ..MemoryConfig::default() };
    let error = trainer_with(&device, memory).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("on the CPU they are there already"), "{error}");
}
