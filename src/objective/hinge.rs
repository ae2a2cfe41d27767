//! Hinge: SLiC's calibration loss on DPO's log-ratios.

use super::descriptor::{Descriptor, LossMean, OwnOption, Settings};
use super::formula::{Formula, PairSums, PairTerms};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Hinge,
    name: "hinge",
    title: "SLiC hinge",
    help: "hinge loss on DPO's margin, which leaves a pair alone once its margin is 1",
    source: "Zhao et al. 2023, arXiv 2305.10425",
    needs_reference: true,
    sides: Sides::Both,
    mean_over: LossMean::Pairs,
    has_weights: false,
    options: &[OwnOption::beta(0.1, "factor of the log-ratios; 1 / beta nats is the margin aimed at")],
    learning_rate: 1e-5,
    build: |settings| Objective::Hinge(Hinge { beta: settings.beta }),
};

/// `L = max(0, 1 - beta * ((lp_w - lp_ref_w) - (lp_l - lp_ref_l)))`.
///
/// SLiC's calibration loss, with log-ratios to the reference in place of log-probs (Liu et al. 2023, arXiv 2309.06657), as
/// TRL's `loss_type="hinge"` has it; SLiC's second term, a likelihood of reference texts, is not part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hinge {
    /// Factor of the log-ratios.
    pub beta: f64,
}

impl Formula for Hinge {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings { beta: self.beta, ..Settings::default() }
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        let reward = pair.log_ratio().map(|ratio| self.beta * ratio);
        let missing = 1.0 - (reward[0] - reward[1]);
        // Not `max`, which takes a NaN for the other number.
        let (loss, slope) = if missing <= 0.0 { (0.0, 0.0) } else { (missing, -self.beta) };
        PairTerms { loss, reward, slope: [slope, -slope], ..PairTerms::default() }
    }
}
