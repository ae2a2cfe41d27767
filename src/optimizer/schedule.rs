//! Learning-rate schedules: the decay of transformers' `get_scheduler` after the warm-up of torchtitan.

/// Shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Half a cosine down to zero.
    Cosine,
    /// A straight line down to zero.
    Linear,
    /// The peak to the end.
    Constant,
}

impl Schedule {
    /// Factor of the peak learning rate for the update with 0-based number `step`: a linear warm-up over
    /// `warmup_steps`, then the schedule over the rest of `total_steps`.
    ///
    /// The factor of every step of the run is greater than 0. The warm-up is `(step + 1) / (warmup_steps + 1)`, as
    /// in torchtitan (transformers begins at 0, which wastes the first batch); the decay would reach 0 one step after
    /// the last.
    pub fn factor(self, step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
        if step < warmup_steps {
            return (step as f64 + 1.0) / (warmup_steps as f64 + 1.0);
        }
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / decay_steps as f64).min(1.0);
        match self {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => 1.0 - progress,
            Schedule::Constant => 1.0,
        }
    }

    /// The largest factor of a run: 1, unless the run ends within its warm-up.
    pub fn largest_factor(self, warmup_steps: usize, total_steps: usize) -> f64 {
        self.factor(warmup_steps.min(total_steps.saturating_sub(1)), warmup_steps, total_steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_cosine_to_zero() {
        let factor = |step| Schedule::Cosine.factor(step, 9, 109);
        assert_eq!(factor(0), 0.1);
        assert_eq!(factor(4), 0.5);
        assert_eq!(factor(9), 1.0);
        assert!((factor(59) - 0.5).abs() <= 1e-12);
        assert!(factor(109).abs() <= 1e-12);
        assert!(factor(500).abs() <= 1e-12);
    }

    #[test]
    fn linear_and_constant() {
        assert_eq!(Schedule::Linear.factor(5, 0, 10), 0.5);
        assert_eq!(Schedule::Constant.factor(9, 0, 10), 1.0);
        assert_eq!(Schedule::Constant.factor(1, 4, 10), 0.4);
    }

    #[test]
    fn no_step_of_any_run_has_a_learning_rate_of_zero() {
        for schedule in [Schedule::Cosine, Schedule::Linear, Schedule::Constant] {
            for total in [1, 2, 3, 10, 1000] {
                for warmup in [0, 1, 2, total - 1, total, total + 1, 5 * total] {
                    let factors: Vec<f64> =
                        (0..total).map(|step| schedule.factor(step, warmup, total)).collect();
                    let what = format!("{schedule} {warmup} {total}: {factors:?}");
                    assert!(factors.iter().all(|&factor| factor > 0.0 && factor <= 1.0), "{what}");
                    let largest = factors.iter().copied().fold(0.0, f64::max);
                    assert_eq!(schedule.largest_factor(warmup, total), largest, "{what}");
                }
            }
        }
    }
}
