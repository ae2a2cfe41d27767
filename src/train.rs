mod guard;
mod trainer;

pub use trainer::{StepResult, Trainer, TrainingPair, Workload};
pub fn run(_config: &crate::config::RunConfig) -> crate::Result<()> { unimplemented!() }
