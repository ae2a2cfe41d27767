//! The rope section of `config.json`: `rope_parameters` of new configs, `rope_theta` and `rope_scaling` of old ones,
//! read as `modeling_rope_utils` of transformers reads them.

use serde_json::{Map, Value};

use super::config_keys::Keys;
use super::known_keys::asks_nothing;
use super::rope::{Rope, RopeScaling};
use crate::error::Result;

/// Keys of the section that every type may have.
const COMMON_KEYS: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];

/// What the types read beside [`COMMON_KEYS`].
const TYPES: [(&str, &[&str]); 7] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    ),
    (
        "longrope",
        &["factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"],
    ),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
    ("proportional", &["factor"]),
];

/// The rope, and the keys of its section that its type does not read.
pub(super) fn parse(
    keys: &Keys,
    max_position_embeddings: usize,
    head_size: usize,
) -> Result<(Rope, Vec<String>)> {
    let new = section(keys, "rope_parameters")?;
    let old = section(keys, "rope_scaling")?;
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        keys.warn(
            "`rope_parameters` and `rope_scaling` differ; `rope_scaling` is read, as transformers does"
                .into(),
        );
    }
    let empty = Map::new();
    let (name, map) = match (old, new) {
        (Some(map), _) => ("rope_scaling", map),
        (None, Some(map)) => ("rope_parameters", map),
        (None, None) => ("rope_parameters", &empty),
    };
    let section = Section { keys, name, map, max_position_embeddings, head_size };
    let theta = match section.get("rope_theta") {
        Some(_) => section.positive("rope_theta")?,
        None => keys.positive("rope_theta", 10_000.0)?,
    };
    let (kind, read) = section.kind()?;
    let scaling = section.scaling(kind)?;
    let unread = section.unread(kind, read);
    Ok((Rope { theta, scaling }, unread))
}

/// The section of this name, unless it is empty: transformers takes an empty one for absent.
fn section<'a>(keys: &'a Keys, name: &str) -> Result<Option<&'a Map<String, Value>>> {
    match keys.get(name) {
        Some(Value::Object(map)) if !map.is_empty() => Ok(Some(map)),
        Some(value) if !asks_nothing(value) => Err(keys.error(
            format!("`{name}` is {value}, not an object"),
            format!("set `{name}` to null or to an object with `rope_type`"),
        )),
        _ => Ok(None),
    }
}

/// One of the two objects that may hold the scaling.
struct Section<'a> {
    keys: &'a Keys,
    name: &'static str,
    map: &'a Map<String, Value>,
    max_position_embeddings: usize,
    head_size: usize,
}

impl Section<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The rope type and the keys it reads.
    fn kind(&self) -> Result<(&'static str, &'static [&'static str])> {
        if let Some((layer, _)) = self.map.iter().find(|(_, value)| value.is_object()) {
            return Err(self.keys.error(
                format!(
                    "`{}.{layer}`: a rope of its own for a kind of layers is not computed here",
                    self.name
                ),
                "choose a model with one rope for all layers, as Llamas have it",
            ));
        }
        let given = self.get("rope_type").or_else(|| self.get("type"));
        let name = match given {
            None => "default",
            Some(value) => value.as_str().unwrap_or_default(),
        };
        TYPES.into_iter().find(|(known, _)| *known == name).ok_or_else(|| {
            self.keys.error(
                format!("`{}`: unknown rope type {}", self.name, given.unwrap_or(&Value::Null)),
                format!("supported are {}", TYPES.map(|(known, _)| known).join(", ")),
            )
        })
    }

    fn scaling(&self, kind: &str) -> Result<RopeScaling> {
        // The default rope of a Llama does not read the key; the others would rotate a part of the head only, which
        // does not fit the head in transformers either.
        if !["default", "proportional"].contains(&kind) {
            self.check_partial()?;
        }
        Ok(match kind {
            "linear" => RopeScaling::Linear { factor: self.positive("factor")? },
            "dynamic" => RopeScaling::Dynamic {
                factor: self.positive("factor")?,
                max_position_embeddings: self.max_position_embeddings,
            },
            "yarn" => self.yarn()?,
            "longrope" => self.longrope()?,
            "llama3" => RopeScaling::Llama3 {
                factor: self.positive("factor")?,
                low_freq_factor: self.positive("low_freq_factor")?,
                high_freq_factor: self.positive("high_freq_factor")?,
                original_max_position_embeddings: self.original_positions()?,
            },
            "proportional" => RopeScaling::Proportional {
                factor: self.optional("factor")?.unwrap_or(1.0),
                share: self.partial()?.unwrap_or(1.0),
            },
            _ => RopeScaling::Default,
        })
    }

    fn yarn(&self) -> Result<RopeScaling> {
        if !self.map.contains_key("factor") {
            return Err(self.keys.error(
                format!("`{}.factor` is missing, which rope type yarn needs", self.name),
                "download config.json again",
            ));
        }
        let original = self.original_positions()?;
        let factor = self.factor_or_ratio(original)?;
        let strength = |scale: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let attention_factor = match self.optional("attention_factor")? {
            Some(given) => given,
            None => match (self.nonzero("mscale")?, self.nonzero("mscale_all_dim")?) {
                (Some(scale), Some(scale_all)) => strength(scale) / strength(scale_all),
                _ => strength(1.0),
            },
        };
        let truncate = match self.get("truncate") {
            None => true,
            Some(Value::Bool(truncate)) => *truncate,
            Some(value) => return Err(self.wrong("truncate", value, "true or false")),
        };
        Ok(RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast: self.nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.nonzero("beta_slow")?.unwrap_or(1.0),
            original_max_position_embeddings: original,
            truncate,
        })
    }

    fn longrope(&self) -> Result<RopeScaling> {
        let original = self.original_positions()?;
        let factor = self.factor_or_ratio(original)?;
        let attention_factor = match self.optional("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        self.factors("long_factor")?;
        Ok(RopeScaling::LongRope {
            short_factor: self.factors("short_factor")?,
            attention_factor,
            original_max_position_embeddings: original,
        })
    }

    /// A positive number for each pair of values of a head.
    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let pairs = self.head_size / 2;
        let value = self.map.get(key).unwrap_or(&Value::Null);
        let numbers = value.as_array().map(|items| {
            items.iter().filter_map(Value::as_f64).filter(|number| *number > 0.0).collect::<Vec<f64>>()
        });
        match numbers {
            Some(numbers) if numbers.len() == pairs && value.as_array().map(Vec::len) == Some(pairs) => {
                Ok(numbers)
            }
            _ => Err(self.keys.error(
                format!(
                    "`{}.{key}` is not a list of {pairs} positive numbers, half the head size",
                    self.name
                ),
                "download config.json again",
            )),
        }
    }

    /// `factor`; where it is null, how much longer the context is than the original one.
    fn factor_or_ratio(&self, original: usize) -> Result<f64> {
        let ratio = self.max_position_embeddings as f64 / original as f64;
        Ok(self.optional("factor")?.unwrap_or(ratio))
    }

    /// `original_max_position_embeddings` of the whole config, else of the section, as in transformers; else the
    /// context length.
    fn original_positions(&self) -> Result<usize> {
        const KEY: &str = "original_max_position_embeddings";
        if let Some(whole) = self.keys.optional_size(KEY, 1 << 53)? {
            return Ok(whole);
        }
        match self.optional(KEY)? {
            None => Ok(self.max_position_embeddings),
            Some(number) if number >= 1.0 && number < 2f64.powi(53) => Ok(number as usize),
            Some(_) => Err(self.wrong(KEY, &self.map[KEY], "a whole number of at least 1")),
        }
    }

    /// The share of a head that is rotated: `partial_rotary_factor` of the section, else of the whole config.
    fn partial(&self) -> Result<Option<f64>> {
        let value = self.get("partial_rotary_factor").or_else(|| self.keys.get("partial_rotary_factor"));
        match value.map(|value| (value, value.as_f64())) {
            None => Ok(None),
            Some((_, Some(share))) if (0.0..=1.0).contains(&share) => Ok(Some(share)),
            Some((value, _)) => Err(self.keys.error(
                format!("`partial_rotary_factor` is {value}, not a number from 0 to 1"),
                "set it to 1, or remove it",
            )),
        }
    }

    fn check_partial(&self) -> Result<()> {
        match self.partial()? {
            Some(share) if share != 1.0 => Err(self.keys.error(
                format!(
                    "`partial_rotary_factor` is {share}; with this rope type a Llama turns whole heads only"
                ),
                "choose another model: transformers' Llama cannot run this one either",
            )),
            _ => Ok(()),
        }
    }

    /// The keys in the section, or beside it, that are not read.
    fn unread(&self, kind: &str, read: &[&str]) -> Vec<String> {
        let strange = |key: &str| !COMMON_KEYS.contains(&key) && !read.contains(&key);
        let mut unread: Vec<String> = self
            .map
            .iter()
            .filter(|(key, value)| strange(key) && !asks_nothing(value))
            .map(|(key, _)| format!("{}.{key}", self.name))
            .collect();
        let share = self.get("partial_rotary_factor").and_then(Value::as_f64);
        if kind == "default" && share.is_some_and(|share| share != 1.0) {
            unread.push(format!("{}.partial_rotary_factor", self.name));
        }
        unread
    }

    fn optional(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|_| self.positive(key)).transpose()
    }

    /// As [`Section::optional`], for a key whose 0 stands for "not set".
    fn nonzero(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => self.optional(key),
        }
    }

    fn positive(&self, key: &str) -> Result<f64> {
        let value = self.map.get(key).unwrap_or(&Value::Null);
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(self.wrong(key, value, "a positive number")),
        }
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> crate::Error {
        self.keys.error(
            format!("`{}.{key}` is {value}, not {wanted}", self.name),
            format!("set `{}.{key}` to {wanted}, or download config.json again", self.name),
        )
    }
}
