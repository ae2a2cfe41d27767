//! Rotary position embeddings (Su et al. 2021): their parameters in `config.json`, and the table of cosines and sines.
//!
//! Angles are formed in f32, one rounding after another, in the order of transformers' `modeling_rope_utils`: at
//! position 8000 the last bit of an f32 angle is worth 5e-4, so a "more exact" table would be a different model.

use serde_json::{Map, Value};

use crate::error::Result;
use crate::model::config_keys::Keys;

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts longer than those of pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
}

impl Rope {
    /// `[E/2]` angles per position, f32.
    pub fn inverse_frequencies(&self, head_size: usize) -> Vec<f32> {
        (0..head_size / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_size as f32;
                // The power is rounded once from f64: torch's f32 power is within one unit in the last place of it.
                let base = (self.theta as f32 as f64).powf(exponent as f64) as f32;
                self.scaling.scale(1.0 / base)
            })
            .collect()
    }

    /// `[positions, E]`: of each position `E/2` cosines, then `E/2` sines.
    pub fn table(&self, head_size: usize, positions: usize) -> Vec<f32> {
        let frequencies = self.inverse_frequencies(head_size);
        let mut table = Vec::with_capacity(positions * head_size);
        for position in 0..positions {
            let angles = frequencies.iter().map(|frequency| (position as f32 * frequency) as f64);
            table.extend(angles.clone().map(|angle| angle.cos() as f32));
            table.extend(angles.map(|angle| angle.sin() as f32));
        }
        table
    }
}

impl RopeScaling {
    fn scale(&self, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
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
        }
    }
}

/// Reads the new `rope_parameters`, or the old `rope_theta` and `rope_scaling`.
pub(super) fn parse(keys: &Keys, max_position_embeddings: usize) -> Result<Rope> {
    let new = section(keys, "rope_parameters")?;
    let old = section(keys, "rope_scaling")?;
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(keys.error(
            "`rope_parameters` and `rope_scaling` are both given and differ",
            "keep the one the model was trained with",
        ));
    }
    let (name, map) = match (new, old) {
        (Some(map), _) => ("rope_parameters", map),
        (None, Some(map)) => ("rope_scaling", map),
        (None, None) => ("rope_parameters", &Map::new()),
    };
    let section = Section { keys, name, map, max_position_embeddings };
    let theta = match map.contains_key("rope_theta") {
        true => section.number("rope_theta", 1.0)?,
        false => keys.positive("rope_theta", 10_000.0)?,
    };
    section.check_partial()?;
    Ok(Rope { theta, scaling: section.scaling()? })
}

fn section<'a>(keys: &'a Keys, name: &str) -> Result<Option<&'a Map<String, Value>>> {
    match keys.get(name) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(value) => Err(keys.error(
            format!("`{name}` is {value}, not an object"),
            format!("set `{name}` to null or to an object with `rope_type`"),
        )),
    }
}

/// One of the two objects that may hold the scaling.
struct Section<'a> {
    keys: &'a Keys,
    name: &'static str,
    map: &'a Map<String, Value>,
    max_position_embeddings: usize,
}

impl Section<'_> {
    fn scaling(&self) -> Result<RopeScaling> {
        let kind = match self.map.get("rope_type").or_else(|| self.map.get("type")) {
            None => "default",
            Some(Value::String(kind)) => kind,
            Some(value) => return Err(self.unknown_type(&value.to_string())),
        };
        let (scaling, read): (_, &[&str]) = match kind {
            "default" => (RopeScaling::Default, &[]),
            "linear" => (RopeScaling::Linear { factor: self.number("factor", 1.0)? }, &["factor"]),
            "llama3" => (
                self.llama3()?,
                &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
            ),
            kind => return Err(self.unknown_type(kind)),
        };
        let common = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        for (key, value) in self.map {
            if !value.is_null() && !common.contains(&key.as_str()) && !read.contains(&key.as_str()) {
                return Err(self.keys.error(
                    format!("`{}.{key}` = {value} is unknown for rope type `{kind}`", self.name),
                    "remove it if it has no effect, or choose another model",
                ));
            }
        }
        Ok(scaling)
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let low_freq_factor = self.number("low_freq_factor", f64::MIN_POSITIVE)?;
        let high_freq_factor = self.number("high_freq_factor", f64::MIN_POSITIVE)?;
        if high_freq_factor <= low_freq_factor {
            return Err(self.keys.error(
                format!(
                    "`{}`: high_freq_factor = {high_freq_factor} is not above low_freq_factor = {low_freq_factor}",
                    self.name
                ),
                "Llama 3 uses 1 and 4",
            ));
        }
        let original_max_position_embeddings = match self.map.get("original_max_position_embeddings") {
            None | Some(Value::Null) => self.max_position_embeddings,
            Some(_) => self.number("original_max_position_embeddings", 1.0)? as usize,
        };
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor", 1.0)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        })
    }

    fn check_partial(&self) -> Result<()> {
        let inside = self.map.get("partial_rotary_factor");
        match inside.or_else(|| self.keys.get("partial_rotary_factor")) {
            Some(value) if !value.is_null() && value.as_f64() != Some(1.0) => Err(self.keys.error(
                format!("`partial_rotary_factor` is {value}; only whole heads are turned"),
                "choose another model: Llama turns the whole head",
            )),
            _ => Ok(()),
        }
    }

    fn number(&self, key: &str, least: f64) -> Result<f64> {
        let value = self.map.get(key).unwrap_or(&Value::Null);
        match value.as_f64() {
            Some(number) if number >= least && number.is_finite() => Ok(number),
            _ => Err(self.keys.error(
                format!("`{}.{key}` is {value}, not a number of at least {least}", self.name),
                format!("set `{}.{key}`, or download config.json again", self.name),
            )),
        }
    }

    fn unknown_type(&self, kind: &str) -> crate::Error {
        self.keys.error(
            format!("`{}`: unknown rope type `{kind}`", self.name),
            "default, linear and llama3 are supported",
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
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
                let error = (ours - theirs).abs() / theirs;
                // One unit in the last place: powers are rounded differently.
                assert!(
                    error <= f32::EPSILON,
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
