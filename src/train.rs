mod guard;
mod trainer;

pub use trainer::{StepResult, Trainer, TrainingPair, Workload};
