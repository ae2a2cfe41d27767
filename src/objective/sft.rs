//! SFT: supervised fine-tuning on the chosen responses.

use super::descriptor::{Descriptor, LossMean, Settings};
use super::formula::{Formula, PairSums, PairTerms};
use super::{Objective, ObjectiveKind};
use crate::data::Sides;

pub(super) const DESCRIPTOR: Descriptor = Descriptor {
    kind: ObjectiveKind::Sft,
    name: "sft",
    title: "SFT",
    help: "supervised fine-tuning on the chosen responses",
    source: "maximum likelihood",
    needs_reference: false,
    sides: Sides::ChosenOnly,
    mean_over: LossMean::ChosenTokens,
    has_weights: false,
    options: &[],
    learning_rate: 2e-5,
    build: |_| Objective::Sft,
};

/// `L = -lp(y_w)`; over a batch it is the mean over all chosen tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sft;

impl Formula for Sft {
    fn descriptor(&self) -> &'static Descriptor {
        &DESCRIPTOR
    }

    fn settings(&self) -> Settings {
        Settings::default()
    }

    fn terms(&self, pair: &PairSums) -> PairTerms {
        PairTerms { loss: -pair.logp[0], reward: pair.logp, slope: [-1.0, 0.0], ..PairTerms::default() }
    }
}
