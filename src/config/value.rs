//! What an option's value may be, read from a flag's text or from a TOML value, and the default in its place.

use std::path::PathBuf;

use toml::de::DeValue;

use super::{GradientConfig, ObjectiveKind, OffloadConfig, Policy, ShardConfig, suggest};
use crate::device::{DeviceChoice, Precision};
use crate::model::{AdaptedModule, AdaptedModules, HeadChoice, Recompute};
use crate::objective::{DESCRIPTORS, Descriptor};
use crate::optimizer::{MasterWeights, MomentFormat, Schedule};

/// A type of value that a flag and a recipe key can hold.
///
/// Messages complete the sentence "`name` ...", for example "`beta` must be a number, not `high`".
pub trait OptionValue: Clone {
    /// The word that stands for the value in `--help`.
    const PLACEHOLDER: &'static str;
    /// Whether the flag may stand alone, meaning `true`.
    const IS_SWITCH: bool = false;

    /// Reads the value of a flag.
    ///
    /// # Errors
    /// The end of a sentence that begins with the option's name.
    fn from_text(text: &str) -> Result<Self, String>;
    /// Reads the value of a recipe's key.
    ///
    /// # Errors
    /// The end of a sentence that begins with the option's name.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String>;
    /// The value as TOML text; reading it back gives the same value.
    fn to_toml(&self) -> String;
}

/// A TOML value, described for people.
pub(super) fn toml_kind(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the string \"{text}\""),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(_) => "a date".into(),
        DeValue::Array(_) => "an array".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

impl OptionValue for f64 {
    const PLACEHOLDER: &'static str = "NUMBER";

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("must be a number, not `{text}`"))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let parsed = match value {
            DeValue::Float(number) => number.as_str().parse().ok(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().parse().ok(),
            _ => None,
        };
        parsed.ok_or_else(|| format!("must be a number, not {}", toml_kind(value)))
    }

    fn to_toml(&self) -> String {
        toml::Value::Float(*self).to_string()
    }
}

impl OptionValue for u64 {
    const PLACEHOLDER: &'static str = "COUNT";

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("must be a whole number of at least 0, not `{text}`"))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value
            .as_integer()
            .and_then(|number| u64::from_str_radix(number.as_str(), number.radix()).ok())
            .ok_or_else(|| format!("must be a whole number of at least 0, not {}", toml_kind(value)))
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl OptionValue for usize {
    const PLACEHOLDER: &'static str = "COUNT";

    fn from_text(text: &str) -> Result<Self, String> {
        narrow(u64::from_text(text)?)
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        narrow(u64::from_toml(value)?)
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

fn narrow(value: u64) -> Result<usize, String> {
    usize::try_from(value).map_err(|_| format!("is too large: {value}"))
}

impl OptionValue for bool {
    const PLACEHOLDER: &'static str = "true|false";
    const IS_SWITCH: bool = true;

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("must be true or false, not `{text}`"))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| format!("must be true or false, not {}", toml_kind(value)))
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl OptionValue for PathBuf {
    const PLACEHOLDER: &'static str = "PATH";

    fn from_text(text: &str) -> Result<Self, String> {
        Ok(PathBuf::from(text))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value
            .as_str()
            .map(PathBuf::from)
            .ok_or_else(|| format!("must be a path in quotes, not {}", toml_kind(value)))
    }

    fn to_toml(&self) -> String {
        toml::Value::String(self.display().to_string()).to_string()
    }
}

/// A value out of a fixed list of words.
trait Word: Sized + Copy + PartialEq {
    fn words() -> Vec<(&'static str, Self)>;

    fn from_word(word: &str) -> Result<Self, String> {
        let words = Self::words();
        words.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
            let nearest = suggest::nearest(word, words.iter().map(|(name, _)| *name)).unwrap_or_default();
            format!("must be one of {}, not `{word}` (did you mean `{nearest}`?)", Self::names())
        })
    }

    /// All words, for a message.
    fn names() -> String {
        Self::words().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }
}

impl Word for ObjectiveKind {
    fn words() -> Vec<(&'static str, Self)> {
        DESCRIPTORS.iter().map(|objective| (objective.name, objective.kind)).collect()
    }
}

impl Word for Schedule {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)]
    }
}

impl Word for HeadChoice {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("auto", HeadChoice::Auto), ("main", HeadChoice::Main), ("recompute", HeadChoice::Recompute)]
    }
}

impl Word for MomentFormat {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("f32", MomentFormat::F32), ("bf16", MomentFormat::Bf16), ("8bit", MomentFormat::EightBit)]
    }
}

impl Word for MasterWeights {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("f32", MasterWeights::F32), ("split", MasterWeights::Split), ("none", MasterWeights::None)]
    }
}

impl Word for Recompute {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("none", Recompute::None), ("selective", Recompute::Selective), ("layer", Recompute::Layer)]
    }
}

impl Word for GradientConfig {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("f32", GradientConfig::F32), ("bf16", GradientConfig::Bf16), ("layer", GradientConfig::Layer)]
    }
}

impl Word for ShardConfig {
    fn words() -> Vec<(&'static str, Self)> {
        vec![
            ("none", ShardConfig::None),
            ("states", ShardConfig::States),
            ("gradients", ShardConfig::Gradients),
            ("weights", ShardConfig::Weights),
        ]
    }
}

impl Word for OffloadConfig {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("none", OffloadConfig::None), ("states", OffloadConfig::States)]
    }
}

impl Word for Policy {
    fn words() -> Vec<(&'static str, Self)> {
        vec![("keep", Policy::Keep), ("cut", Policy::Cut), ("drop", Policy::Drop), ("error", Policy::Error)]
    }
}

macro_rules! word_option {
    ($type:ty, $placeholder:literal) => {
        impl OptionValue for $type {
            const PLACEHOLDER: &'static str = $placeholder;

            fn from_text(text: &str) -> Result<Self, String> {
                Self::from_word(text)
            }

            fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
                let word = value
                    .as_str()
                    .ok_or_else(|| format!("must be one of {}, not {}", Self::names(), toml_kind(value)))?;
                Self::from_word(word)
            }

            fn to_toml(&self) -> String {
                format!("\"{self}\"")
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let word =
                    Self::words().into_iter().find(|(_, value)| value == self).map_or("", |(name, _)| name);
                f.write_str(word)
            }
        }
    };
}

word_option!(ObjectiveKind, "NAME");
word_option!(Schedule, "cosine|linear|constant");
word_option!(HeadChoice, "auto|main|recompute");
word_option!(MomentFormat, "f32|bf16|8bit");
word_option!(MasterWeights, "f32|split|none");
word_option!(Recompute, "none|selective|layer");
word_option!(GradientConfig, "f32|bf16|layer");
word_option!(OffloadConfig, "none|states");
word_option!(ShardConfig, "none|states|gradients|weights");
word_option!(Policy, "keep|cut|drop|error");

impl OptionValue for DeviceChoice {
    const PLACEHOLDER: &'static str = "auto|cpu|cuda|cuda:N|emulated";

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("must be one of auto, cpu, cuda, cuda:N, emulated, not `{text}`"))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text =
            value.as_str().ok_or_else(|| format!("must be a device in quotes, not {}", toml_kind(value)))?;
        Self::from_text(text)
    }

    fn to_toml(&self) -> String {
        format!("\"{self}\"")
    }
}

impl OptionValue for Precision {
    const PLACEHOLDER: &'static str = "f32|bf16";

    fn from_text(text: &str) -> Result<Self, String> {
        text.parse()
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value
            .as_str()
            .ok_or_else(|| format!("must be f32 or bf16 in quotes, not {}", toml_kind(value)))?;
        Self::from_text(text)
    }

    fn to_toml(&self) -> String {
        format!("\"{self}\"")
    }
}

impl std::fmt::Display for AdaptedModules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.iter().map(AdaptedModule::name).collect::<Vec<_>>().join(","))
    }
}

impl OptionValue for AdaptedModules {
    const PLACEHOLDER: &'static str = "all|q,k,v,o,gate,up,down";

    fn from_text(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(AdaptedModules::of(AdaptedModule::ALL));
        }
        let mut modules = Vec::new();
        for word in text.split(',').map(str::trim) {
            let named = |module: &AdaptedModule| [module.name(), module.peft_name()].contains(&word);
            let module = AdaptedModule::ALL.into_iter().find(named).ok_or_else(|| {
                format!("must be all, or some of q, k, v, o, gate, up and down separated by commas; `{word}` is none of them")
            })?;
            if modules.contains(&module) {
                return Err(format!("names `{word}` twice"));
            }
            modules.push(module);
        }
        Ok(AdaptedModules::of(modules))
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| {
            format!("must be names of modules in quotes, such as \"q,v\", not {}", toml_kind(value))
        })?;
        Self::from_text(text)
    }

    fn to_toml(&self) -> String {
        format!("\"{self}\"")
    }
}

/// A model or data source: a path, or the one built into the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or folder.
    Path(PathBuf),
    /// Written [`Source::BUILTIN`].
    Builtin,
}

impl Source {
    /// The name of the built-in demo's model and pairs. It never means a path; `./builtin:demo` does.
    pub const BUILTIN: &'static str = "builtin:demo";

    /// A path, or the built-in source where there is none.
    pub fn from_path(path: Option<&PathBuf>) -> Self {
        path.map_or(Source::Builtin, |path| Source::Path(path.clone()))
    }

    /// The path, unless the source is built in.
    pub fn into_path(self) -> Option<PathBuf> {
        match self {
            Source::Path(path) => Some(path),
            Source::Builtin => None,
        }
    }
}

impl OptionValue for Source {
    const PLACEHOLDER: &'static str = "PATH";

    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            Source::BUILTIN => Ok(Source::Builtin),
            _ => PathBuf::from_text(text).map(Source::Path),
        }
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some(text) => Self::from_text(text),
            None => PathBuf::from_toml(value).map(Source::Path),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            Source::Path(path) => path.to_toml(),
            Source::Builtin => format!("\"{}\"", Source::BUILTIN),
        }
    }
}

/// The weight of the entropy term: a number, or the word `beta` for the value of beta, as in the paper's ablation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EntropyWeight {
    /// The value of beta.
    Beta,
    /// This number.
    Number(f64),
}

impl OptionValue for EntropyWeight {
    const PLACEHOLDER: &'static str = "NUMBER|beta";

    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            "beta" => Ok(EntropyWeight::Beta),
            _ => text
                .parse()
                .map(EntropyWeight::Number)
                .map_err(|_| format!("must be a number or beta, not `{text}`")),
        }
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("beta") => Ok(EntropyWeight::Beta),
            _ => f64::from_toml(value)
                .map(EntropyWeight::Number)
                .map_err(|_| format!("must be a number or \"beta\", not {}", toml_kind(value))),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            EntropyWeight::Beta => "\"beta\"".into(),
            EntropyWeight::Number(number) => number.to_toml(),
        }
    }
}

/// The default of an option, used where nobody gave a value.
pub trait Fallback<T> {
    /// Type of the option after defaults.
    type Settled;

    /// The option's value: the given one, or the default for that objective.
    fn settle(self, given: Option<T>, objective: ObjectiveKind) -> Self::Settled;
    /// The default for `--help`.
    fn label(self, only: &[ObjectiveKind]) -> String;
}

/// One default, whatever the objective.
pub struct Always<T>(pub T);

impl<T: OptionValue> Fallback<T> for Always<T> {
    type Settled = T;

    fn settle(self, given: Option<T>, _objective: ObjectiveKind) -> T {
        given.unwrap_or(self.0)
    }

    fn label(self, _only: &[ObjectiveKind]) -> String {
        self.0.to_toml().trim_matches('"').to_string()
    }
}

/// A default that each objective's descriptor has.
pub struct PerObjective(pub fn(&Descriptor) -> f64);

impl Fallback<f64> for PerObjective {
    type Settled = f64;

    fn settle(self, given: Option<f64>, objective: ObjectiveKind) -> f64 {
        given.unwrap_or_else(|| (self.0)(objective.descriptor()))
    }

    fn label(self, only: &[ObjectiveKind]) -> String {
        let label = |kind: &ObjectiveKind| format!("{kind} {}", (self.0)(kind.descriptor()).to_toml());
        only.iter().map(label).collect::<Vec<_>>().join(", ")
    }
}

/// No default, or one that depends on other options; the words say which.
pub struct Absent(pub &'static str);

impl<T> Fallback<T> for Absent {
    type Settled = Option<T>;

    fn settle(self, given: Option<T>, _objective: ObjectiveKind) -> Option<T> {
        given
    }

    fn label(self, _only: &[ObjectiveKind]) -> String {
        self.0.to_string()
    }
}
