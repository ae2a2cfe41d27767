//! Learning-rate schedules, as in transformers' `get_scheduler`.

/// Shape of the learning rate behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Half a cosine down to zero.
    Cosine,
    /// A straight line down to zero.
    Linear,
    Constant,
}

impl Schedule {
    /// Factor of the peak learning rate for the update with 0-based number `step`: a linear warm-up over
    /// `warmup_steps` from zero, then the schedule over the rest of `total_steps`.
    pub fn factor(self, step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
        if step < warmup_steps {
            return step as f64 / warmup_steps.max(1) as f64;
        }
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1);
        let progress = ((step - warmup_steps) as f64 / decay_steps as f64).min(1.0);
        match self {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => 1.0 - progress,
            Schedule::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_cosine_to_zero() {
        let factor = |step| Schedule::Cosine.factor(step, 10, 110);
        assert_eq!(factor(0), 0.0);
        assert_eq!(factor(5), 0.5);
        assert_eq!(factor(10), 1.0);
        assert!((factor(60) - 0.5).abs() <= 1e-12);
        assert!(factor(110).abs() <= 1e-12);
        assert!(factor(500).abs() <= 1e-12);
    }

    #[test]
    fn linear_and_constant() {
        assert_eq!(Schedule::Linear.factor(5, 0, 10), 0.5);
        assert_eq!(Schedule::Constant.factor(9, 0, 10), 1.0);
        assert_eq!(Schedule::Constant.factor(1, 4, 10), 0.25);
    }
}
