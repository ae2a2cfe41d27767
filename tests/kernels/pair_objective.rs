use std::ops::Range;

use mmpo_fast::data::{PairBatch, Sides};
use mmpo_fast::device::{Device, ObjectiveOperands, TokenCoefficients, TokenScores};
use mmpo_fast::objective::{
    DESCRIPTORS, Dpo, Hinge, Ipo, Mmpo, Objective, Orpo, PairCoefficients, PairConstants, PairOutcome,
    PairScores, Simpo,
};
#[cfg(mmpo_emulated)]
use proptest::prelude::*;

use crate::harness::*;

/// Every objective, and MMPO and DPO with each switch too. (`reward_normalize` only changes constants.)
fn objectives() -> Vec<Objective> {
    let mmpo = Mmpo {
        beta: 0.05,
        epsilon: 0.9,
        reward_group: 2,
        reward_normalize: true,
        length_normalize: false,
        preference_weight: 0.0,
        entropy_weight: 0.0,
    };
    let all = Mmpo { length_normalize: true, preference_weight: 0.5, entropy_weight: 0.05, ..mmpo };
    vec![
        Objective::Mmpo(mmpo),
        Objective::Mmpo(Mmpo { length_normalize: true, ..mmpo }),
        Objective::Mmpo(Mmpo { preference_weight: 1.0, ..mmpo }),
        Objective::Mmpo(Mmpo { entropy_weight: 0.05, ..mmpo }),
        Objective::Mmpo(all),
        Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 }),
        Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.1 }),
        Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 1.6 }),
        Objective::Sft,
        Objective::Ipo(Ipo { beta: 0.1 }),
        Objective::Orpo(Orpo { beta: 0.1 }),
        Objective::Hinge(Hinge { beta: 0.1 }),
    ]
}

#[test]
fn every_objective_is_among_those_that_are_tested() {
    for descriptor in DESCRIPTORS {
        let mut tested = objectives().into_iter().filter(|objective| objective.kind() == descriptor.kind);
        assert!(tested.next().is_some(), "{} is not tested", descriptor.name);
    }
}

/// What the head's forward leaves of a batch of pairs: log-probs and entropies of its scored tokens.
struct Scores {
    batch: PairBatch,
    constants: Vec<PairConstants>,
    logp: Vec<f32>,
    entropy: Vec<f32>,
}

impl Scores {
    /// Log-probs around `-size`, entropies up to about 1.
    fn new(sizes: &[(usize, usize, usize)], seed: u64, size: f32) -> Self {
        let batch = pair_batch(sizes, 50);
        let scored = batch.scored_tokens();
        let constants = random(seed, batch.spans.len() * 2, 1.0)
            .chunks(2)
            .map(|pair| PairConstants { chosen: pair[0], rejected: pair[1], scale: 0.25, reserved: 0.0 })
            .collect();
        let logp = random(seed + 1, scored, size).iter().map(|value| -value.abs()).collect();
        let entropy = random(seed + 2, scored, 1.0).iter().map(|value| value.abs()).collect();
        Scores { batch, constants, logp, entropy }
    }

    /// What `objective.rs` makes of one pair: outcome, then `a` and `b` of chosen and rejected.
    fn wanted(&self, objective: &Objective, pair: usize) -> (PairOutcome, [Vec<f32>; 4]) {
        let ranges = &self.batch.scored[pair];
        let (chosen, rejected) = (ranges.chosen.clone(), ranges.rejected.clone());
        let entropy_of =
            |range: Range<usize>| if objective.needs_entropy() { &self.entropy[range] } else { &[] };
        let mut wanted =
            [chosen.len(), rejected.len(), chosen.len(), rejected.len()].map(|len| vec![0.0; len]);
        let [logp_chosen, logp_rejected, entropy_chosen, entropy_rejected] = &mut wanted;
        let outcome = objective.evaluate(
            &PairScores {
                logp_chosen: &self.logp[chosen.clone()],
                logp_rejected: &self.logp[rejected.clone()],
                entropy_chosen: entropy_of(chosen),
                entropy_rejected: entropy_of(rejected),
                constants: self.constants[pair],
            },
            &mut PairCoefficients { logp_chosen, logp_rejected, entropy_chosen, entropy_rejected },
        );
        (outcome, wanted)
    }

    /// Outcomes and both kinds of coefficients of a batch whose pairs `asked` the device was asked for; the rest is NaN.
    fn run<D: Device>(&self, device: &D, objective: &Objective, asked: Range<usize>) -> [Vec<f32>; 3] {
        let (pairs, scored) = (self.batch.spans.len(), self.batch.scored_tokens());
        let buffers = load_batch(device, &self.batch, &self.constants);
        let scores: TokenScores<D> = TokenScores {
            lse: floats(device, &vec![0.0; scored]),
            logp: floats(device, &self.logp),
            entropy: floats(device, &self.entropy),
        };
        let mut outcomes = unset_floats(device, pairs * PairOutcome::WIDTH);
        let mut coefficients: TokenCoefficients<D> =
            TokenCoefficients { logp: unset_floats(device, scored), entropy: unset_floats(device, scored) };
        device
            .pair_objective(ObjectiveOperands {
                outcomes: &mut outcomes,
                coefficients: &mut coefficients,
                scores: &scores,
                batch: &buffers,
                objective,
                pairs: asked,
            })
            .unwrap();
        [read(device, &outcomes), read(device, &coefficients.logp), read(device, &coefficients.entropy)]
    }

    /// Runs the device over `asked` and compares; pairs before stay untouched.
    fn check<D: Device>(&self, device: &D, objective: &Objective, asked: Range<usize>) {
        let [outcomes, a, b] = self.run(device, objective, asked.clone());
        let untouched = &outcomes[..asked.start * PairOutcome::WIDTH];
        assert!(untouched.iter().all(|value| value.is_nan()), "pairs before {asked:?} were not asked for");
        for pair in asked {
            let ranges = &self.batch.scored[pair];
            let (outcome, wanted) = self.wanted(objective, pair);
            let got = &outcomes[pair * PairOutcome::WIDTH..][..PairOutcome::WIDTH];
            assert_close("outcome", got, &wide(bytemuck::cast_slice(&[outcome])), Tolerance::F32);
            assert_close("a chosen", &a[ranges.chosen.clone()], &wide(&wanted[0]), Tolerance::F32);
            assert_close("a rejected", &a[ranges.rejected.clone()], &wide(&wanted[1]), Tolerance::F32);
            assert_close("b chosen", &b[ranges.chosen.clone()], &wide(&wanted[2]), Tolerance::F32);
            assert_close("b rejected", &b[ranges.rejected.clone()], &wide(&wanted[3]), Tolerance::F32);
        }
    }
}

#[cfg(mmpo_emulated)]
proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Responses of any length up to some warps' worth of tokens, log-probs from 0 to -1e4, on the emulated GPU.
    #[test]
    fn agrees_for_any_pairs(
        responses in proptest::collection::vec((0_usize..90, 0_usize..90), 1..4),
        seed in 0_u64..1000,
        size in prop_oneof![Just(0.0_f32), Just(1.0), Just(1e4)],
        objective in 0..objectives().len(),
    ) {
        let sizes: Vec<_> = responses.iter().map(|&(chosen, rejected)| (1, chosen, rejected)).collect();
        Scores::new(&sizes, seed, size).check(&emulated(), &objectives()[objective], 0..sizes.len());
    }
}

device_tests! {
    /// Each pair's outcome and coefficients are those of `objective.rs`, and a call touches its own pairs only.
    fn agrees_with_the_objective(device, bounds) {
        let scores = Scores::new(RAGGED, 1, 1.0);
        for objective in objectives() {
            scores.check(device, &objective, 1..RAGGED.len());
        }
    }

    /// Single tokens, equal scores, and log-probs of -1e4 on either side or both.
    fn extremes(device, bounds) {
        let mut scores = Scores::new(&[(1, 1, 1), (3, 1, 40), (3, 40, 1), (2, 33, 33)], 1, 1.0);
        for constants in &mut scores.constants {
            (constants.chosen, constants.rejected) = (0.0, 0.0);
        }
        for (chosen, rejected) in [(-1.0, -1.0), (-1e4, -1e4), (0.0, -1e4), (-1e4, 0.0), (0.0, 0.0)] {
            for pair in 0..scores.batch.scored.len() {
                let ranges = scores.batch.scored[pair].clone();
                scores.logp[ranges.chosen].fill(chosen);
                scores.logp[ranges.rejected].fill(rejected);
            }
            for objective in objectives() {
                scores.check(device, &objective, 0..4);
            }
        }
    }

    /// A log-prob that is not a number makes a loss that is none: the run must stop there.
    fn a_nan_reaches_the_loss(device, bounds) {
        for objective in objectives() {
            let sides = if objective.sides() == Sides::Both { 2 } else { 1 };
            for side in 0..sides {
                let mut scores = Scores::new(&[(2, 3, 40)], 1, 1.0);
                let range = &scores.batch.scored[0];
                let token = [range.chosen.start, range.rejected.end - 1][side];
                scores.logp[token] = f32::NAN;
                let [outcomes, ..] = scores.run(device, &objective, 0..1);
                assert!(outcomes[0].is_nan(), "{objective:?}, side {side}: loss {}", outcomes[0]);
            }
        }
    }

    /// Buffers for fewer pairs than asked for are an error.
    fn too_small(device, bounds) {
        let batch = pair_batch(&[(2, 3, 3), (2, 2, 2)], 50);
        let buffers = load_batch(device, &batch, &[]);
        let scores = TokenScores::new(device, 10).unwrap();
        let mut coefficients = TokenCoefficients::new(device, 10).unwrap();
        let mut outcomes = unset_floats(device, PairOutcome::WIDTH);
        let error = device
            .pair_objective(ObjectiveOperands {
                outcomes: &mut outcomes,
                coefficients: &mut coefficients,
                scores: &scores,
                batch: &buffers,
                objective: &Objective::Sft,
                pairs: 0..2,
            })
            .unwrap_err()
            .to_string();
        assert!(error.contains("pair_objective") && error.contains("outcomes"), "{error}");
    }
}
