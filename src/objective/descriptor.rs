//! What the rest of the program needs to know of an objective, apart from its mathematics.

use super::{Objective, ObjectiveKind};
use crate::data::Sides;

/// The one description of an objective. Options, help, error messages, reports, the scale of pairs and the devices read it.
///
/// Whether entropies are needed depends on an objective's numbers: see [`super::Formula::needs_entropy`].
#[derive(Debug)]
pub struct Descriptor {
    /// Which objective this describes.
    pub kind: ObjectiveKind,
    /// The word of `--objective` and of recipes.
    pub name: &'static str,
    /// The name as its paper writes it, for reports.
    pub title: &'static str,
    /// What it optimises, in a few words for `--help`.
    pub help: &'static str,
    /// The paper, for `--help`.
    pub source: &'static str,
    /// Whether log-probs under the frozen reference are part of the loss.
    pub needs_reference: bool,
    /// Which responses go through the model.
    pub sides: Sides,
    /// What the loss of a batch is a mean over.
    pub mean_over: LossMean,
    /// Whether [`super::PairOutcome::weight_chosen`] holds a weight.
    pub has_weights: bool,
    /// The options that belong to this objective and not to all.
    pub options: &'static [OwnOption],
    /// Default of `--learning-rate`.
    pub learning_rate: f64,
    /// Makes the objective from the values of its options.
    pub build: fn(&Settings) -> Objective,
}

/// What the loss of a batch is a mean over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossMean {
    /// The pairs of the optimiser batch.
    Pairs,
    /// The scored tokens of all chosen responses of the optimiser batch.
    ChosenTokens,
}

/// An option that belongs to some objectives and not to others.
#[derive(Clone, Copy, Debug)]
pub struct OwnOption {
    /// The option's name, as in a recipe.
    pub name: &'static str,
    /// The default, where objectives differ in it.
    pub default: Option<f64>,
    /// What the option means to this objective, where objectives differ in it.
    pub meaning: Option<&'static str>,
}

impl OwnOption {
    /// `beta`, whose default and meaning are each objective's own.
    pub const fn beta(default: f64, meaning: &'static str) -> Self {
        OwnOption { name: "beta", default: Some(default), meaning: Some(meaning) }
    }

    /// An option whose own documentation and default hold for all objectives that have it.
    pub const fn named(name: &'static str) -> Self {
        OwnOption { name, default: None, meaning: None }
    }
}

impl Descriptor {
    /// The option `name` of this objective; `None` where it does not belong to it.
    pub fn option(&self, name: &str) -> Option<&OwnOption> {
        self.options.iter().find(|option| option.name == name)
    }

    /// The objective's default of `beta`; 0 for an objective without one.
    pub fn beta(&self) -> f64 {
        self.option("beta").and_then(|option| option.default).unwrap_or(0.0)
    }
}

/// The values of all options that are numbers of objectives, under the options' names. An objective reads those that
/// its descriptor lists, and ignores the others.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Settings {
    /// Each objective's descriptor says what this means.
    pub beta: f64,
    /// [`super::Mmpo::epsilon`]
    pub epsilon: f64,
    /// [`super::Mmpo::reward_group`]
    pub reward_group: usize,
    /// [`super::Mmpo::reward_normalize`]
    pub reward_normalize: bool,
    /// [`super::Mmpo::length_normalize`]
    pub length_normalize: bool,
    /// [`super::Mmpo::preference_weight`]
    pub preference_weight: f64,
    /// [`super::Mmpo::entropy_weight`]
    pub entropy_weight: f64,
    /// [`super::Simpo::gamma_beta_ratio`]
    pub gamma_beta_ratio: f64,
    /// [`super::Dpo::label_smoothing`]
    pub label_smoothing: f64,
}
