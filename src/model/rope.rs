//! Rotary position embeddings (Su et al. 2021) and their stretched variants: the table of cosines and sines.
//!
//! Angles are formed in f32, one rounding after another, in the order of transformers' `modeling_rope_utils`: at
//! position 8000 the last bit of an f32 angle is worth 5e-4, so a "more exact" table would be a different model.

/// How positions become angles.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No stretching.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divides every frequency.
        factor: f64,
    },
    /// NTK-aware scaling whose base grows with the sequence: the default rope up to `max_position_embeddings`
    /// positions. Beyond them all angles depend on the longest sequence of a batch, so that no table holds them.
    Dynamic {
        /// Grows the base with the sequence.
        factor: f64,
        /// Positions up to which the rope is the default one.
        max_position_embeddings: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        /// Divides the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths above the original context over this are long.
        low_freq_factor: f64,
        /// Wavelengths below the original context over this are short.
        high_freq_factor: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023): as Llama 3.1's, but by dimension instead of wavelength, and with cosines and sines
    /// multiplied by `attention_factor`.
    Yarn {
        /// Divides the frequencies of slow dimensions.
        factor: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Dimensions that rotate more often than this over the original context keep their frequency.
        beta_fast: f64,
        /// Frequencies of dimensions that rotate less often than this are divided by `factor`.
        beta_slow: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
        /// Whether the two bounds are rounded to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024) within its original context: each frequency divided by a factor of its own.
    /// Beyond that, other factors would hold for the whole of a batch with one longer sequence in it.
    LongRope {
        /// `[E/2]`
        short_factor: Vec<f64>,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Positions of pre-training.
        original_max_position_embeddings: usize,
    },
    /// The first `share` of the frequencies divided by `factor`; the other dimensions are not rotated.
    Proportional {
        /// Divides the first frequencies.
        factor: f64,
        /// Share of the dimensions that are rotated.
        share: f64,
    },
}

impl Rope {
    /// `[E/2]` angles per position, f32.
    pub fn inverse_frequencies(&self, head_size: usize) -> Vec<f32> {
        let theta = self.theta_within_context(head_size) as f32 as f64;
        // The power is rounded once from f64: torch's f32 power is within one unit in the last place of it.
        let power = |i: usize| theta.powf(((2 * i) as f32 / head_size as f32) as f64) as f32;
        let powers: Vec<f32> = (0..head_size / 2).map(power).collect();
        match &self.scaling {
            RopeScaling::Yarn { .. } => self.yarn(&powers, head_size),
            RopeScaling::LongRope { short_factor, .. } => powers
                .iter()
                .zip(short_factor)
                .map(|(power, factor)| 1.0 / (*factor as f32 * power))
                .collect(),
            RopeScaling::Proportional { factor, share } => {
                let turned = (share * head_size as f64 / 2.0).floor() as usize;
                let frequency =
                    |(i, power): (usize, &f32)| if i < turned { 1.0 / power / *factor as f32 } else { 0.0 };
                powers.iter().enumerate().map(frequency).collect()
            }
            scaling => powers.iter().map(|power| scaling.scale(1.0 / power)).collect(),
        }
    }

    /// `[positions, E]`: for each position `E/2` cosines, then `E/2` sines.
    pub fn table(&self, head_size: usize, positions: usize) -> Vec<f32> {
        let frequencies = self.inverse_frequencies(head_size);
        let factor = self.attention_factor() as f32;
        let mut table = Vec::with_capacity(positions * head_size);
        for position in 0..positions {
            let angles = frequencies.iter().map(|frequency| (position as f32 * frequency) as f64);
            table.extend(angles.clone().map(|angle| angle.cos() as f32 * factor));
            table.extend(angles.map(|angle| angle.sin() as f32 * factor));
        }
        table
    }

    /// Number of positions for which [`Rope::table`] holds; `None` if it holds for all.
    pub fn positions(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => Some(max_position_embeddings),
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(original_max_position_embeddings)
            }
            _ => None,
        }
    }

    /// What cosines and sines are multiplied by.
    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// The base for a sequence within the context. Dynamic scaling computes it by the formula for any length even here,
    /// because the formula's rounding can move the last digit.
    fn theta_within_context(&self, head_size: usize) -> f64 {
        match self.scaling {
            RopeScaling::Dynamic { factor, max_position_embeddings } => {
                let (context, size) = (max_position_embeddings as f64, head_size as f64);
                let stretch = (factor * context / context) - (factor - 1.0);
                self.theta * stretch.powf(size / (size - 2.0))
            }
            _ => self.theta,
        }
    }

    fn yarn(&self, powers: &[f32], head_size: usize) -> Vec<f32> {
        let RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_position_embeddings,
            truncate,
            ..
        } = self.scaling
        else {
            return powers.to_vec();
        };
        let (size, context) = (head_size as f64, original_max_position_embeddings as f64);
        let dimension = |turns: f64| {
            size * (context / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(size - 1.0));
        if low == high {
            high += 0.001;
        }
        let blend = |(i, power): (usize, &f32)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        powers.iter().enumerate().map(blend).collect()
    }
}

impl RopeScaling {
    fn scale(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                let wavelength = (2.0 * std::f64::consts::PI) as f32 / frequency;
                if wavelength > (context / low_freq_factor) as f32 {
                    frequency / factor as f32
                } else if wavelength < (context / high_freq_factor) as f32 {
                    frequency
                } else {
                    let smooth = (context as f32 / wavelength - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
            _ => frequency,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use crate::model::config::LlamaConfig;

    #[test]
    fn tables_are_those_of_transformers() {
        let goldens: Value = serde_json::from_str(include_str!("../../tests/goldens/rope.json")).unwrap();
        for golden in goldens.as_array().unwrap() {
            let name = &golden["name"];
            let config = LlamaConfig::parse(Path::new("config.json"), &golden["config"].to_string()).unwrap();
            let frequencies = config.rope.inverse_frequencies(config.head_size);
            let expected = floats(&golden["inverse_frequencies"]);
            assert_eq!(frequencies.len(), expected.len());
            for (ours, theirs) in frequencies.iter().zip(&expected) {
                let error = (ours - theirs).abs();
                // One unit in the last place: powers are rounded differently.
                assert!(
                    error <= f32::EPSILON * theirs,
                    "{name}: frequency {ours}, transformers {theirs}, error {error}"
                );
            }
            let positions =
                golden["positions"].as_array().unwrap().iter().map(|p| p.as_u64().unwrap() as usize);
            let table = config.rope_table(8192);
            for (position, row) in positions.zip(golden["table"].as_array().unwrap()) {
                let half = config.head_size / 2;
                let ours = &table[position * config.head_size..][..config.head_size];
                for (i, (ours, theirs)) in ours.iter().zip(floats(row)).enumerate() {
                    // A unit in the last place of frequency, and half of one of angle and result.
                    let angle = position as f32 * frequencies[i % half];
                    let tolerance = f32::EPSILON * (1.5 * angle + 1.0);
                    let error = (ours - theirs).abs();
                    assert!(
                        error <= tolerance,
                        "{name} {position} {i}: {ours}, transformers {theirs}, {error}"
                    );
                }
            }
        }
    }

    fn floats(values: &Value) -> Vec<f32> {
        values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
    }
}
