//! A checkpoint that is written beside the steps after it is the one of its step.

use std::sync::Arc;

use super::save_beside;
use super::state_tests::{run_state, saved, train_clipped, trainer_with};
use crate::checkpoint::{BackgroundSaves, run_state as files};
use crate::config::MemoryConfig;
use crate::device::cpu::CpuDevice;
use crate::error::Error;

#[test]
fn training_goes_on_and_the_checkpoint_keeps_its_step() {
    let device = Arc::new(CpuDevice::new(Some(1)).unwrap());
    let mut trainer = trainer_with(&device, MemoryConfig::default()).unwrap();
    train_clipped(&mut trainer, 1..=2, Some(1.0));
    let wanted = saved(&trainer).2;
    let run = tempfile::tempdir().unwrap();
    let mut saves = BackgroundSaves::default();
    save_beside(&mut saves, run.path(), &mut trainer, &run_state(), (1, &[])).unwrap();
    train_clipped(&mut trainer, 3..=4, Some(1.0));
    saves.wait().unwrap();
    let path = files::latest(run.path()).unwrap().unwrap();
    assert!(std::fs::read(path.join("state.safetensors")).unwrap() == wanted);
    assert!(saved(&trainer).2 != wanted, "the steps after it changed the weights");
    // What cannot be written is an error of the next question, and the checkpoint before it stays.
    let folder = run.path().join(files::FOLDER);
    let in_the_way = folder.join("step-000003");
    std::fs::write(&in_the_way, "a file").unwrap();
    let state = crate::checkpoint::RunState { step: 3, ..run_state() };
    save_beside(&mut saves, run.path(), &mut trainer, &state, (1, &[])).unwrap();
    let error = saves.wait().unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error:?}");
    assert!(std::fs::read(path.join("state.safetensors")).unwrap() == wanted);
}
