//! IPO: identity preference optimisation.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Ipo,
    name: "ipo",
    title: "IPO",
    help: "squared distance of the mean log-ratios' difference from 1 / (2 beta)",
    source: "Azar et al. 2023, arXiv 2310.12036",
    needs_reference: true,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: false,
    options: &[OwnOption::beta(
        0.1,
        "regularisation; the mean log-ratios are driven 1 / (2 beta) nats apart",
    )],
    learning_rate: 1e-5,
    build: |settings| Objective::Ipo(Ipo { beta: settings.beta }),
};

/// `L = (h - 1 / (2 beta))^2`, `h = (lp_w - lp_ref_w) / n_w - (lp_l - lp_ref_l) / n_l`.
///
/// Equation 17 of the paper, its `tau` being `beta`. The paper writes sequence probabilities; the means over tokens are what its
/// authors computed, and what TRL's `loss_type="ipo"` does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ipo {
    /// Strength of the regularisation towards the reference.
    pub beta: f64,
}

impl Formula for Ipo {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings { beta: self.beta, ..Settings::default() }
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        let ratio = pair.log_ratio();
        let gap = ratio[0] / pair.length[0] - ratio[1] / pair.length[1] - 0.5 / self.beta;
        PairTerms {
            loss: gap * gap,
            reward: ratio.map(|ratio| self.beta * ratio),
            slope: [2.0 * gap / pair.length[0], -2.0 * gap / pair.length[1]],
            ..PairTerms::default()
        }
    }
}
