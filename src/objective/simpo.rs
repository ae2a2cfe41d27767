//! SimPO: preference by mean log-probs, with a target margin and without a reference.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms, log_sigmoid, sigmoid};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Simpo,
    name: "simpo",
    title: "SimPO",
    help: "preference by mean log-probs with a target margin",
    source: "Meng et al. 2024, arXiv 2405.14734",
    needs_reference: false,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: false,
    options: &[OwnOption::beta(2.0, "factor of the mean log-probs"), OwnOption::named("gamma_beta_ratio")],
    learning_rate: 1e-4,
    build: |settings| {
        Objective::Simpo(Simpo { beta: settings.beta, gamma_beta_ratio: settings.gamma_beta_ratio })
    },
};

/// `L = -log sigmoid(beta * (lp_w / n_w - lp_l / n_l - gamma_beta_ratio))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Simpo {
    /// Factor of the mean log-probs.
    pub beta: f64,
    /// Target margin in units of `beta`.
    pub gamma_beta_ratio: f64,
}

impl Formula for Simpo {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings { beta: self.beta, gamma_beta_ratio: self.gamma_beta_ratio, ..Settings::default() }
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        let reward = [0, 1].map(|side| self.beta * pair.logp[side] / pair.length[side]);
        let margin = reward[0] - reward[1] - self.beta * self.gamma_beta_ratio;
        let slope = -self.beta * sigmoid(-margin);
        PairTerms {
            loss: -log_sigmoid(margin),
            reward,
            slope: [slope / pair.length[0], -slope / pair.length[1]],
            ..PairTerms::default()
        }
    }
}
