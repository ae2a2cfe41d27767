//! Stochastic rounding to bf16, by random bits that are a function of where and when they are used.
//!
//! A bf16 weight that is its own master copy moves in steps of 2^-8 of itself, and most updates are smaller: rounded to the
//! nearest value, they would all be lost. Rounded up or down with the probability that makes the mean right, they add up.
//!
//! The random bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), whose
//! counter is (element / 4, tensor, step) and whose key is the run's seed. So the bits depend on nothing that came before: a
//! resumed run draws the same ones. `kernels/adamw.cu` does the same.

/// What the random bits of a tensor depend on, beside the step and the element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StochasticRounding {
    /// The run's seed.
    pub seed: u64,
    /// Number of the tensor among all of the model, trained or not.
    pub tensor: u32,
}

impl StochasticRounding {
    /// The 16 random bits of an element in the update with 1-based number `step`.
    pub fn bits(self, step: u32, element: u64) -> u16 {
        let group = element / 4;
        let counter = [group as u32, (group >> 32) as u32, self.tensor, step];
        let words = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        let place = element % 4;
        (words[place as usize / 2] >> (16 * (place % 2))) as u16
    }

    /// `value` in bf16, rounded away from 0 if these bits, added at the end of its f32, carry into the bf16.
    pub fn round(self, value: f32, step: u32, element: u64) -> half::bf16 {
        if value.is_nan() {
            return half::bf16::from_bits(0x7fff);
        }
        let bits = value.to_bits() + u32::from(self.bits(step, element));
        half::bf16::from_bits((bits >> 16) as u16)
    }
}

/// Philox4x32 with ten rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [first, second] =
            [(counter[0], 0xd251_1f53_u32), (counter[2], 0xcd9e_8d57)].map(|(word, multiplier)| {
                let product = u64::from(word) * u64::from(multiplier);
                ((product >> 32) as u32, product as u32)
            });
        counter = [second.0 ^ counter[1] ^ key[0], second.1, first.0 ^ counter[3] ^ key[1], first.1];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the generator's authors publish with it.
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(
            philox(counter, [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// Values go to one of their two neighbours, and the mean over many elements is the value.
    #[test]
    fn the_mean_is_kept() {
        let rounding = StochasticRounding { seed: 3, tensor: 5 };
        const COUNT: u64 = 40_000;
        for value in [1.0f32 + 1.0 / 1024.0, -0.3, 2.5e-7, 1.0] {
            let rounded: Vec<f32> =
                (0..COUNT).map(|element| rounding.round(value, 7, element).to_f32()).collect();
            let unit = value.abs() / 128.0;
            assert!(rounded.iter().all(|rounded| (rounded - value).abs() <= unit), "{value}");
            let mean = rounded.iter().map(|&value| f64::from(value)).sum::<f64>() / COUNT as f64;
            // Five standard deviations of a mean of values that differ by half a unit at most.
            let error = (mean - f64::from(value)).abs();
            assert!(error <= 2.5 * f64::from(unit) / (COUNT as f64).sqrt(), "{value}: {mean}");
        }
    }

    #[test]
    fn each_of_seed_tensor_step_and_element_changes_the_bits() {
        let rounding = StochasticRounding { seed: 1, tensor: 2 };
        let draw = |rounding: StochasticRounding, step, first: u64| -> Vec<u16> {
            (first..first + 8).map(|element| rounding.bits(step, element)).collect()
        };
        let bits = draw(rounding, 3, 0);
        assert_eq!(bits, draw(rounding, 3, 0));
        for other in [
            draw(StochasticRounding { seed: 1 + (1 << 32), ..rounding }, 3, 0),
            draw(StochasticRounding { tensor: 3, ..rounding }, 3, 0),
            draw(rounding, 4, 0),
            draw(rounding, 3, 8),
            draw(rounding, 3, 1 << 34),
        ] {
            assert_ne!(bits, other);
        }
        let distinct: std::collections::BTreeSet<u16> =
            (0..1000).map(|element| rounding.bits(3, element)).collect();
        assert!(distinct.len() > 980, "{}", distinct.len());
    }

    #[test]
    fn what_is_no_number_or_is_exact_stays() {
        let rounding = StochasticRounding::default();
        for element in 0..64 {
            assert!(rounding.round(f32::NAN, 1, element).is_nan());
            for value in [0.0, -1.5, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(rounding.round(value, 1, element).to_f32(), value);
            }
        }
    }
}
