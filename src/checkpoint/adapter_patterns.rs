//! `rank_pattern` and `alpha_pattern` of PEFT's `adapter_config.json`: ranks and scales for the modules whose names match.
//!
//! A key is a regular expression in Python's syntax. It applies to a module whose whole name, or the end of it after a dot, it
//! matches; the first key in the file's order counts. That is `get_pattern_key` of PEFT 0.21, whose expression is used as it is:
//! `(.*\.)?(KEY)$`, from the name's beginning on.

use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::foreign::json;
use crate::model::{ModuleForm, ModuleForms};

/// One of the two patterns, as the file has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Patterns {
    /// `rank_pattern`
    pub ranks: Map<String, Value>,
    /// `alpha_pattern`
    pub alphas: Map<String, Value>,
}

/// A pattern whose keys are read.
struct Pattern<'a> {
    path: &'a Path,
    name: &'static str,
    entries: Vec<(&'a str, Regex, f64)>,
}

const AGAIN: &str = "copy the adapter's file again, or merge the adapter with PEFT's merge_and_unload()";

impl<'a> Pattern<'a> {
    fn read(
        path: &'a Path,
        name: &'static str,
        entries: &'a Map<String, Value>,
        (is_right, must): (fn(f64) -> bool, &str),
    ) -> Result<Self> {
        let read = |(key, value): (&'a String, &Value)| {
            let number = value.as_f64().filter(|&number| is_right(number)).ok_or_else(|| {
                let shown = json::shown(value.to_string());
                Error::model(path, format!("`{name}` has {shown} for {key:?}, and it must be {must}"), AGAIN)
            })?;
            let expression = Regex::new(&format!(r"\A(.*\.)?({key})$")).map_err(|error| {
                Error::model(
                    path,
                    format!("`{name}` has the key {key:?}, which is no regular expression: {error}"),
                    AGAIN,
                )
            })?;
            Ok((key.as_str(), expression, number))
        };
        Ok(Pattern { path, name, entries: entries.iter().map(read).collect::<Result<_>>()? })
    }

    /// The number of the first key that matches a module's name.
    fn find(&self, module: &str) -> Result<Option<f64>> {
        for (key, expression, number) in &self.entries {
            let matches = expression.is_match(module).map_err(|error| {
                let name = self.name;
                Error::model(
                    self.path,
                    format!("`{name}`: matching {key:?} with {module} takes too long: {error}"),
                    AGAIN,
                )
            })?;
            if matches {
                return Ok(Some(*number));
            }
        }
        Ok(None)
    }
}

impl Patterns {
    /// The patterns of a config.
    ///
    /// # Errors
    /// [`Error::Model`] for one that is no object.
    pub(super) fn of(path: &Path, keys: &Map<String, Value>) -> Result<Self> {
        let of = |name: &str| match keys.get(name) {
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Object(entries)) => Ok(entries.clone()),
            Some(other) => {
                let shown = json::shown(other.to_string());
                Err(Error::model(path, format!("`{name}` is {shown}, and must be an object"), AGAIN))
            }
        };
        Ok(Patterns { ranks: of("rank_pattern")?, alphas: of("alpha_pattern")? })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranks.is_empty() && self.alphas.is_empty()
    }

    /// The form of every module of a model with this many layers; `others` is that of modules that no key matches. `None` without
    /// patterns: all have that form.
    ///
    /// # Errors
    /// [`Error::Model`] for a key that is no regular expression, and a number that is no rank or scale.
    pub(super) fn forms(
        &self,
        path: &Path,
        layers: usize,
        others: ModuleForm,
    ) -> Result<Option<ModuleForms>> {
        let is_rank = |rank: f64| (1.0..=65536.0).contains(&rank) && rank.fract() == 0.0;
        let is_alpha = |alpha: f64| alpha as f32 > 0.0 && (alpha as f32).is_finite();
        let ranks =
            Pattern::read(path, "rank_pattern", &self.ranks, (is_rank, "a whole number from 1 to 65536"))?;
        let alphas = Pattern::read(path, "alpha_pattern", &self.alphas, (is_alpha, "greater than 0"))?;
        if self.is_empty() {
            return Ok(None);
        }
        let form = |module: &str| -> Result<ModuleForm> {
            Ok(ModuleForm {
                rank: ranks.find(module)?.map_or(others.rank, |rank| rank as usize),
                alpha: alphas.find(module)?.unwrap_or(others.alpha),
            })
        };
        ModuleForms::of(layers, form).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AdaptedModule;

    const OTHERS: ModuleForm = ModuleForm { rank: 8, alpha: 16.0 };

    fn ranks(text: &str) -> Result<ModuleForms> {
        let Value::Object(ranks) = serde_json::from_str(text).unwrap() else { panic!("{text}") };
        let patterns = Patterns { ranks, alphas: Map::new() };
        Ok(patterns.forms(Path::new("adapter_config.json"), 12, OTHERS)?.unwrap())
    }

    /// What `re.match(rf"(.*\.)?({key})$", name)` says of these keys and names.
    #[test]
    fn keys_match_as_in_peft() {
        let query = |text: &str, layer| ranks(text).unwrap().get(layer, AdaptedModule::Query).unwrap().rank;
        for (key, matches) in [
            ("q_proj", true),
            ("self_attn.q_proj", true),
            ("model.layers.3.self_attn.q_proj", true),
            (r"model\\.layers\\.3\\.self_attn\\.q_proj", true),
            (r"layers\\.\\d\\..*q_proj", true),
            ("q_proj|k_proj", true),
            ("(?!k)._proj", true),
            (r"(?<=\\.)q_proj", true),
            ("^model.*proj", true),
            ("proj", false),
            ("_proj", false),
            ("q", false),
            ("q_proj.", false),
            ("layers.3", false),
            ("^layers.*", false),
            ("Q_proj", false),
        ] {
            let found = query(&format!(r#"{{"{key}": 2}}"#), 3) == 2;
            assert_eq!(found, matches, "{key}");
        }
        assert_eq!(query(r#"{"layers.1.self_attn.q_proj": 2}"#, 11), 8, "the dot stands before a whole part");
        assert_eq!(query(r#"{"1.self_attn.q_proj": 2}"#, 11), 8);
        assert_eq!(query(r#"{"1.self_attn.q_proj": 2}"#, 1), 2);
        // The first key counts, in the order of the file.
        assert_eq!(query(r#"{"q_proj": 3, "self_attn.q_proj": 4}"#, 0), 3);
        assert_eq!(query(r#"{"self_attn.q_proj": 4, "q_proj": 3}"#, 0), 4);
    }

    #[test]
    fn what_is_no_pattern_is_refused_by_name() {
        for (text, part) in [
            (r#"{"q_proj": 0}"#, "\"q_proj\""),
            (r#"{"q_proj": 1.5}"#, "whole number"),
            (r#"{"q_proj": "8"}"#, "whole number"),
            (r#"{"q_(proj": 8}"#, "no regular expression"),
        ] {
            let error = ranks(text).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            assert!(
                error.to_string().contains("rank_pattern") && error.to_string().contains(part),
                "{error}"
            );
        }
    }
}
