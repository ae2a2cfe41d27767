//! Which steps a run consists of, and what is known of them before the first: learning rates, batches, and what a
//! checkpoint of each step must say.

use super::layer_updates;
use crate::checkpoint::run_state::{RngPosition, RunIdentity, RunState};
use crate::config::{GradientConfig, RunConfig, ScheduleConfig, Warmup};
use crate::data::{BatchOrder, TokenizedPair, micro_batches};
use crate::error::{Error, Result};
use crate::optimizer::{AdamWSettings, AdamWStep, Schedule};

/// An AdamW update of this size or more is refused: two weights of that size have a product that f32 (and bf16, whose
/// range is the same) cannot hold, so that no forward pass would give a number.
const LARGEST_UPDATE: f64 = 1.8e19;

/// The steps of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub order: BatchOrder,
    pub total_steps: usize,
    pub warmup_steps: usize,
    pub pairs_per_step: usize,
    pairs: usize,
    schedule: Schedule,
    optimizer: AdamWSettings,
    seed: u64,
    /// Whether the number of steps was asked for.
    is_given: bool,
}

impl Plan {
    /// Plans a run over `pairs` training pairs.
    pub fn new(config: &RunConfig, pairs: usize) -> Self {
        // A step takes each pair once at most.
        let pairs_per_step = config.pairs_per_step(pairs).min(pairs.max(1));
        let order = BatchOrder::new(pairs, pairs_per_step, config.seed);
        let schedule = config.schedule;
        let total_steps = schedule.max_steps.unwrap_or_else(|| order.steps_of(schedule.epochs));
        let warmup_steps = match schedule.warmup {
            // A warm-up that is given as a share of the run leaves at least one step at the peak.
            Warmup::Ratio(ratio) => {
                ((ratio * total_steps as f64).ceil() as usize).min(total_steps.saturating_sub(1))
            }
            Warmup::Steps(steps) => steps,
        };
        Plan {
            order,
            total_steps,
            warmup_steps,
            pairs_per_step,
            pairs,
            schedule: schedule.kind,
            optimizer: config.optimizer,
            seed: config.seed,
            is_given: schedule.max_steps.is_some(),
        }
    }

    /// The run of this configuration with another length.
    pub fn of_length(config: &RunConfig, pairs: usize, epochs: f64, max_steps: Option<usize>) -> Self {
        let schedule = ScheduleConfig { epochs, max_steps, ..config.schedule };
        Plan::new(&RunConfig { schedule, ..config.clone() }, pairs)
    }

    /// Pairs that the run trains on.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// The update with 0-based number `step`.
    pub fn adamw(&self, step: usize) -> AdamWStep {
        self.optimizer.step(self.schedule.factor(step, self.warmup_steps, self.total_steps), step as u32 + 1)
    }

    /// Where a run stands after `step` steps.
    pub fn state(&self, step: usize, identity: &RunIdentity) -> RunState {
        let epoch = (step / self.order.steps_per_epoch().max(1)) as u64;
        RunState {
            step: step as u64,
            epoch,
            pairs_seen: (self.order.epochs_after(step) * self.pairs as f64).round() as u64,
            rng: RngPosition { seed: self.seed, stream: epoch, word: 0 },
            identity: identity.clone(),
        }
    }

    /// The largest learning rate of any step.
    fn largest_rate(&self) -> f64 {
        self.optimizer.learning_rate * self.schedule.largest_factor(self.warmup_steps, self.total_steps)
    }

    /// Refuses a run whose numbers are known to train nothing, or to end in no number, before any time is spent on it.
    ///
    /// # Errors
    /// [`Error::Numerics`] naming the option.
    pub fn check_numbers(&self) -> Result<()> {
        if u32::try_from(self.total_steps).is_err() {
            return Err(Error::config(
                format!(
                    "the run would take {} optimiser steps, and AdamW counts them in 32 bits",
                    self.total_steps
                ),
                "lower --epochs, or raise --pairs-per-step",
            ));
        }
        let optimizer = &self.optimizer;
        let rate = self.largest_rate();
        if rate as f32 == 0.0 {
            return Err(Error::numerics(
                format!(
                    "the learning rate is at most {rate:e}, which is 0 in f32: this run would train nothing"
                ),
                "raise --learning-rate",
            ));
        }
        if optimizer.max_grad_norm.is_some_and(|norm| norm as f32 == 0.0) {
            return Err(Error::numerics(
                format!(
                    "`max_grad_norm` = {:e} is 0 in f32: it clips every gradient to nothing",
                    optimizer.max_grad_norm.unwrap_or(0.0)
                ),
                "raise --max-grad-norm; --max-grad-norm 0 turns clipping off",
            ));
        }
        // A weight without a gradient is moved by 0 / (0 + epsilon).
        if optimizer.epsilon as f32 == 0.0 {
            return Err(Error::numerics(
                format!(
                    "`adam_epsilon` = {:e} is 0 in f32: weights without a gradient would become NaN",
                    optimizer.epsilon
                ),
                "raise --adam-epsilon, to 1e-8 for example",
            ));
        }
        for (name, flag, beta) in
            [("adam_beta1", "--adam-beta1", optimizer.beta1), ("adam_beta2", "--adam-beta2", optimizer.beta2)]
        {
            if beta as f32 >= 1.0 {
                return Err(Error::numerics(
                    format!("`{name}` = {beta} is 1 in f32: the moment would never take up a gradient"),
                    format!("lower {flag}"),
                ));
            }
        }
        self.check_largest_update(rate)
    }

    /// Refuses a run whose gradients are applied layer by layer where a step takes several micro-batches.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first such step.
    pub fn check_micro_batches(&self, config: &RunConfig, pairs: &[TokenizedPair]) -> Result<()> {
        if config.memory.gradients != GradientConfig::Layer {
            return Ok(());
        }
        let (budget, sides) = (config.batch.tokens_per_micro_batch, config.objective.sides());
        for batch in self.order.from_step(0).take_while(|batch| batch.step < self.total_steps) {
            let sizes: Vec<usize> = batch.pairs.iter().map(|&pair| pairs[pair].tokens_of(sides)).collect();
            let count = micro_batches(&sizes, budget).len();
            if count > 1 {
                let tokens: usize = sizes.iter().sum();
                return Err(layer_updates::several_micro_batches(format!(
                    "step {} has {tokens} tokens, which make {count} micro-batches of up to {budget}",
                    batch.step + 1
                )));
            }
        }
        Ok(())
    }

    fn check_largest_update(&self, rate: f64) -> Result<()> {
        let update = rate * self.largest_ratio();
        if update < LARGEST_UPDATE {
            return Ok(());
        }
        Err(Error::numerics(
            format!(
                "a learning rate of up to {rate:e} moves a weight by up to {update:.1e} in one step: products of such \
                 weights are no longer finite"
            ),
            "lower --learning-rate; rates from 1e-6 to 1e-3 are usual",
        ))
    }

    /// The most that `|first moment| / sqrt(second moment)` of AdamW can be, both with their bias corrections: 1 in the
    /// first step, and by the Cauchy-Schwarz inequality `(1 - b1) / sqrt((1 - b2) * (1 - b1^2 / b2))` in a long run.
    fn largest_ratio(&self) -> f64 {
        let (beta1, beta2) = (self.optimizer.beta1, self.optimizer.beta2);
        let ratio = beta1 * beta1 / beta2;
        // There is no limit where the first moment remembers for longer than the second: every step of the run counts
        // then.
        let sum = if ratio < 1.0 { 1.0 / (1.0 - ratio) } else { self.total_steps as f64 };
        (((1.0 - beta1) * (1.0 - beta1) * sum) / (1.0 - beta2)).sqrt().max(1.0)
    }

    /// Logs what will be trained. `given` says whether this number of pairs per step was asked for.
    pub fn log(&self, given: bool) {
        let Plan { total_steps, pairs, pairs_per_step, warmup_steps, .. } = *self;
        let chosen = match given {
            true => String::new(),
            false => format!(" (chosen for {pairs} pairs; --pairs-per-step sets it)"),
        };
        let tail = match pairs % pairs_per_step {
            0 => String::new(),
            rest => format!(", {rest} in the last of an epoch"),
        };
        tracing::info!(
            "{total_steps} steps of {pairs_per_step} pairs{chosen}{tail}: {:.2} epochs; learning rate up to {:.3e}, \
             {} steps of warm-up",
            self.order.epochs_after(total_steps),
            self.largest_rate(),
            warmup_steps.min(total_steps),
        );
        let unseen = pairs.saturating_sub(total_steps.saturating_mul(pairs_per_step));
        if unseen > 0 {
            tracing::info!("the run ends before {unseen} of the {pairs} pairs were trained on once");
        }
        if warmup_steps >= total_steps {
            tracing::warn!(
                "the warm-up of {warmup_steps} steps is not over when the run ends after {total_steps}: the learning rate \
                 never reaches its peak of {:.3e}",
                self.optimizer.learning_rate
            );
        }
        if total_steps == 1 && !self.is_given {
            tracing::warn!(
                "one optimiser step teaches little: a smaller --pairs-per-step or more --epochs make more of them"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::options::Options;
    use crate::config::resolve;

    /// The update of each step: its number, from 1, by which AdamW corrects its moments, and its learning rate.
    #[test]
    fn updates_are_counted_from_one_and_follow_the_schedule() {
        let mut config = resolve(Options::default(), None, false).unwrap();
        config.optimizer.learning_rate = 24.0;
        config.schedule.kind = Schedule::Linear;
        config.schedule.warmup = Warmup::Steps(2);
        let plan = Plan::of_length(&config, 64, 1.0, Some(10));
        let rates = [8.0, 16.0, 24.0, 21.0, 18.0, 15.0, 12.0, 9.0, 6.0, 3.0];
        for (step, rate) in rates.into_iter().enumerate() {
            let update = plan.adamw(step);
            assert_eq!(update.step as usize, step + 1);
            assert!((update.learning_rate - rate).abs() <= 1e-12, "step {step}: {}", update.learning_rate);
        }
        // A longer run has other rates from its first step after the warm-up on.
        let longer = Plan::of_length(&config, 64, 1.0, Some(18));
        assert!((longer.adamw(1).learning_rate - 16.0).abs() <= 1e-12);
        assert!((longer.adamw(10).learning_rate - 12.0).abs() <= 1e-12);
    }
}
