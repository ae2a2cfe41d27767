//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it: its settings, and the numbers of one update.

/// AdamW's settings for a whole run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// The peak of the learning rate; the schedule gives each update its share of it.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of the weight that an update at learning rate 1 would take away.
    pub weight_decay: f64,
    /// The l2 norm that all gradients together are clipped to; `None` does not clip.
    pub max_grad_norm: Option<f64>,
}

impl AdamWSettings {
    /// Update number `step`, counted from 1, at `factor` times the peak of the learning rate.
    pub fn step(&self, factor: f64, step: u32) -> AdamWStep {
        let AdamWSettings { learning_rate, beta1, beta2, epsilon, weight_decay, .. } = *self;
        AdamWStep { learning_rate: learning_rate * factor, beta1, beta2, epsilon, weight_decay, step }
    }
}

/// One AdamW update, with decoupled weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this update, as the schedule gives it.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of the weight that an update at learning rate 1 would take away.
    pub weight_decay: f64,
    /// 1-based number of this update, for the bias correction.
    pub step: u32,
}

/// The numbers of one update that are the same for every weight, as kernels take them: worked out in f64 and rounded to
/// f32 once, at the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWFactors {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta1`
    pub rest1: f32,
    /// `1 - beta2`, which would be off by 5e-5 if it were taken from an f32 of 0.999.
    pub rest2: f32,
    /// `1 - learning_rate * weight_decay`
    pub decay: f32,
    /// `learning_rate / (1 - beta1^step)`
    pub step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`
    pub root_correction: f32,
    /// Added to the corrected root of the second moment.
    pub epsilon: f32,
    /// 1-based number of the update, for the random bits of stochastic rounding.
    pub step: u32,
}

impl AdamWFactors {
    /// The factors of one update.
    ///
    /// The learning rate and the weight decay enter as the nearest f32. That moves an update by 6e-8 of itself at most,
    /// and it keeps the bits of runs whose checkpoints were written when these two settings were f32.
    pub fn new(step: AdamWStep) -> Self {
        let AdamWStep { beta1, beta2, .. } = step;
        let power = i32::try_from(step.step).unwrap_or(i32::MAX);
        let learning_rate = nearest_f32(step.learning_rate);
        AdamWFactors {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            decay: (1.0 - learning_rate * nearest_f32(step.weight_decay)) as f32,
            step_size: (learning_rate / (1.0 - beta1.powi(power))) as f32,
            root_correction: (1.0 / (1.0 - beta2.powi(power)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
            step: step.step,
        }
    }
}

fn nearest_f32(value: f64) -> f64 {
    f64::from(value as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The factors that runs had whose settings were f32: the betas' decimal text brought the f64 back, CUDA took the
    /// powers by `powf` and the CPU by `powi`.
    fn from_f32_settings(step: AdamWStep, power: fn(f64, u32) -> f64) -> AdamWFactors {
        let decimal = |value: f64| -> f64 { (value as f32).to_string().parse().unwrap() };
        let (beta1, beta2) = (decimal(step.beta1), decimal(step.beta2));
        let learning_rate = f64::from(step.learning_rate as f32);
        AdamWFactors {
            beta1: step.beta1 as f32,
            beta2: step.beta2 as f32,
            rest1: (1.0 - beta1) as f32,
            rest2: (1.0 - beta2) as f32,
            decay: (1.0 - learning_rate * f64::from(step.weight_decay as f32)) as f32,
            step_size: (learning_rate / (1.0 - power(beta1, step.step))) as f32,
            root_correction: (1.0 / (1.0 - power(beta2, step.step)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
            step: step.step,
        }
    }

    /// A checkpoint of such a run goes on with the same bits.
    #[test]
    fn factors_have_the_bits_of_f32_settings() {
        let betas = [(0.9, 0.999), (0.9, 0.95), (0.9, 0.99), (0.95, 0.98), (0.8, 0.9999), (0.0, 0.5)];
        for (beta1, beta2) in betas {
            for number in (1..=3000).chain([10_000, 123_456, 1_000_000]) {
                let learning_rate = 5e-7 * (1.0 + f64::from(number) / 7.0);
                let step = AdamWStep {
                    learning_rate,
                    beta1,
                    beta2,
                    epsilon: 1e-8,
                    weight_decay: 0.01,
                    step: number,
                };
                let factors = AdamWFactors::new(step);
                let on_the_cpu = from_f32_settings(step, |beta, step| beta.powi(step as i32));
                let on_cuda = from_f32_settings(step, |beta, step| beta.powf(f64::from(step)));
                assert_eq!(factors, on_the_cpu, "{step:?}");
                assert_eq!(factors, on_cuda, "{step:?}");
            }
        }
    }

    /// A beta with more digits than an f32 holds is no longer rounded to one before `1 - beta` is taken.
    #[test]
    fn settings_stay_f64() {
        let beta2 = 0.999_123_456_789;
        let settings = AdamWSettings {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: None,
        };
        let step = settings.step(0.5, 1);
        assert_eq!((step.learning_rate, step.beta2, step.step), (5e-4, beta2, 1));
        let factors = AdamWFactors::new(step);
        assert_eq!(factors.rest2, (1.0 - beta2) as f32);
        assert_ne!(factors.rest2, from_f32_settings(step, |beta, step| beta.powi(step as i32)).rest2);
        assert_eq!(factors.decay, 1.0);
    }
}
