//! DPO: direct preference optimisation.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms, log_sigmoid, sigmoid};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Dpo,
    name: "dpo",
    title: "DPO",
    help: "direct preference optimisation",
    source: "Rafailov et al. 2023, arXiv 2305.18290",
    needs_reference: true,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: false,
    options: &[OwnOption::beta(0.1, "factor of the log-ratios"), OwnOption::named("label_smoothing")],
    learning_rate: 1e-5,
    build: |settings| Objective::Dpo(Dpo { beta: settings.beta, label_smoothing: settings.label_smoothing }),
};

/// `L = -log sigmoid(beta * ((lp_w - lp_ref_w) - (lp_l - lp_ref_l)))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    /// Factor of the log-ratios.
    pub beta: f64,
    /// Probability that a label is wrong (conservative DPO).
    pub label_smoothing: f64,
}

impl Formula for Dpo {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings { beta: self.beta, label_smoothing: self.label_smoothing, ..Settings::default() }
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        let reward = pair.log_ratio().map(|ratio| self.beta * ratio);
        let margin = reward[0] - reward[1];
        let wrong = self.label_smoothing;
        let slope = self.beta * (wrong * sigmoid(margin) - (1.0 - wrong) * sigmoid(-margin));
        PairTerms {
            loss: -(1.0 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin),
            reward,
            slope: [slope, -slope],
            ..PairTerms::default()
        }
    }
}
