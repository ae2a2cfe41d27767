//! The keys of a `config.json`, read one by one, each error naming file and key.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::device::StorageType;
use crate::error::{Error, Result};
use crate::foreign::json;

use super::family::{FAMILIES, Family};

/// Largest size any dimension may have: beyond it a config is taken for damaged.
pub(super) const MAX_SIZE: u64 = 1 << 24;
pub(super) const MAX_LAYERS: u64 = 10_000;

/// The keys of a JSON file, with errors that name file and key.
pub(super) struct Keys {
    path: PathBuf,
    pub(super) map: Map<String, Value>,
    /// The family that the config belongs to: Llama until `check_architecture` has looked.
    pub(super) family: Cell<&'static Family>,
    /// What the user should know although it is no error.
    warnings: RefCell<Vec<String>>,
}

impl Keys {
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self> {
        let broken =
            |message: String| Error::model(path, message, "download the file again, or mend its JSON");
        match json::parse(text) {
            Ok(Value::Object(map)) => {
                let (path, family) = (path.to_path_buf(), Cell::new(&FAMILIES[0]));
                Ok(Keys { path, map, family, warnings: RefCell::default() })
            }
            Ok(_) => Err(broken("holds JSON that is not an object".into())),
            Err(error) => Err(broken(format!("is not valid JSON: {error}"))),
        }
    }

    pub(super) fn error(&self, message: impl Into<String>, help: impl Into<String>) -> Error {
        Error::model(&self.path, message, help)
    }

    pub(super) fn warn(&self, message: String) {
        self.warnings.borrow_mut().push(message);
    }

    pub(super) fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// The error for a key whose value is of the wrong kind.
    pub(super) fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let value = json::shown(value.to_string());
        self.error(format!("`{key}` is {value}, not {wanted}"), format!("set `{key}` to {wanted}"))
    }

    /// The value of a key; `null` is absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn optional_size(&self, key: &str, largest: u64) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match whole_number(value) {
                Some(size) if (1..=largest).contains(&size) => Ok(Some(size as usize)),
                _ => Err(self.wrong(key, value, &format!("a whole number in 1..={largest}"))),
            },
        }
    }

    /// A size that every config should have. Where it is absent, `default` is that of the family's configuration class.
    pub(super) fn size(&self, key: &str, largest: u64, default: usize) -> Result<usize> {
        if let Some(size) = self.optional_size(key, largest)? {
            return Ok(size);
        }
        if let Some(value) = self.map.get(key) {
            return Err(self.wrong(key, value, &format!("a whole number in 1..={largest}")));
        }
        let class = self.family.get().config_class;
        self.warn(format!("`{key}` is missing; {default} is taken, the default of transformers' {class}"));
        Ok(default)
    }

    pub(super) fn head_size(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        if let Some(size) = self.optional_size("head_dim", MAX_SIZE)? {
            return Ok(size);
        }
        if !hidden_size.is_multiple_of(heads) {
            return Err(self.error(
                format!("hidden_size = {hidden_size} is not a multiple of num_attention_heads = {heads}"),
                "without `head_dim` the head size is their quotient: correct them, or add `head_dim`",
            ));
        }
        Ok(hidden_size / heads)
    }

    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(number),
                _ => Err(self.wrong(key, value, "a positive number")),
            },
        }
    }

    /// A probability that is 0 where it is absent.
    pub(super) fn rate(&self, key: &str) -> Result<f64> {
        match self.get(key) {
            None => Ok(0.0),
            Some(value) => match value.as_f64() {
                Some(number) if (0.0..=1.0).contains(&number) => Ok(number),
                _ => Err(self.wrong(key, value, "a number from 0 to 1")),
            },
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    /// One id or a list of them; `null` is none, an absent key is `default`. An id that the vocabulary does not have
    /// is left out with a warning: no model can generate it, and published configs do have such ids.
    pub(super) fn token_ids(&self, key: &str, default: &[u32], vocab_size: usize) -> Result<Vec<u32>> {
        let given: Vec<&Value> = match self.map.get(key) {
            None => return Ok(default.iter().copied().filter(|&id| (id as usize) < vocab_size).collect()),
            Some(Value::Null) => Vec::new(),
            Some(Value::Array(items)) => items.iter().collect(),
            Some(value) => vec![value],
        };
        let mut ids = Vec::new();
        for value in given {
            match whole_number(value) {
                Some(id) if id < vocab_size as u64 => ids.push(id as u32),
                _ if is_whole(value) => self.warn(format!(
                    "`{key}`: token id {value} lies outside the vocabulary of {vocab_size} and is ignored"
                )),
                _ => return Err(self.wrong(key, &self.map[key], "a token id or a list of them")),
            }
        }
        Ok(ids)
    }

    /// The padding token's row of the embedding. A negative id, as old configs write it, counts from the end, as
    /// torch's `Embedding` has it.
    pub(super) fn pad_token_id(&self, vocab_size: usize) -> Result<Option<u32>> {
        let Some(value) = self.get("pad_token_id") else { return Ok(None) };
        let Some(id) = value.as_f64().filter(|_| is_whole(value)) else {
            return Err(self.wrong("pad_token_id", value, "a token id"));
        };
        let size = vocab_size as f64;
        match if id < 0.0 { id + size } else { id } {
            row if (0.0..size).contains(&row) => Ok(Some(row as u32)),
            _ => Err(self.error(
                format!("`pad_token_id`: token id {value} lies outside the vocabulary of {vocab_size}"),
                "correct pad_token_id, or vocab_size; transformers refuses such a model too",
            )),
        }
    }

    /// The type that the config names for the weights; `None` also for a type that this program does not store.
    pub(super) fn dtype(&self) -> Result<Option<StorageType>> {
        let Some(value) = self.get("dtype").or_else(|| self.get("torch_dtype")) else {
            return Ok(None);
        };
        let name = value.as_str().map(|name| name.strip_prefix("torch.").unwrap_or(name));
        match name {
            Some("float32" | "float") => Ok(Some(StorageType::F32)),
            Some("float16" | "half") => Ok(Some(StorageType::F16)),
            Some("bfloat16") => Ok(Some(StorageType::Bf16)),
            Some("auto" | "float64" | "double") => Ok(None),
            _ => Err(self.wrong("dtype", value, "float32, float16 or bfloat16")),
        }
    }
}

/// A whole number of at least 0, also where it is written as `4096.0`.
fn whole_number(value: &Value) -> Option<u64> {
    let float = || value.as_f64().filter(|number| *number >= 0.0 && *number < 2f64.powi(53));
    value.as_u64().or_else(|| float().filter(|number| number.fract() == 0.0).map(|number| number as u64))
}

/// Any whole number, whatever its sign and size.
fn is_whole(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number.fract() == 0.0)
}
