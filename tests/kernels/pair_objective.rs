use mmpo_fast::device::{TokenCoefficients, TokenScores};
use mmpo_fast::objective::{
    Dpo, Mmpo, Objective, PairCoefficients, PairConstants, PairOutcome, PairScores, Simpo,
};

use crate::harness::*;

/// MMPO plain and with every switch, DPO, SimPO and SFT.
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
    vec![
        Objective::Mmpo(mmpo),
        Objective::Mmpo(Mmpo {
            length_normalize: true,
            preference_weight: 0.5,
            entropy_weight: 0.05,
            ..mmpo
        }),
        Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.1 }),
        Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 1.6 }),
        Objective::Sft,
    ]
}

device_tests! {
    /// Each pair's outcome and coefficients are those of `objective.rs`, and a call touches its own pairs only.
    fn agrees_with_the_objective(device, bounds) {
        let batch = pair_batch(RAGGED, 50);
        let (pairs, scored) = (batch.spans.len(), batch.scored_tokens());
        let constants: Vec<PairConstants> = random(1, pairs * 2, 1.0)
            .chunks(2)
            .map(|pair| PairConstants { chosen: pair[0], rejected: pair[1], scale: 0.25, reserved: 0.0 })
            .collect();
        let buffers = load_batch(device, &batch, &constants);
        let logp: Vec<f32> = random(2, scored, 1.0).iter().map(|value| -value.abs()).collect();
        let entropy: Vec<f32> = random(3, scored, 1.0).iter().map(|value| value.abs()).collect();
        let scores: TokenScores<_> = TokenScores {
            lse: floats(device, &vec![0.0; scored]),
            logp: floats(device, &logp),
            entropy: floats(device, &entropy),
        };
        for objective in objectives() {
            let mut outcomes = unset_floats(device, pairs * PairOutcome::WIDTH);
            let mut coefficients: TokenCoefficients<_> =
                TokenCoefficients { logp: unset_floats(device, scored), entropy: unset_floats(device, scored) };
            device.pair_objective(&mut outcomes, &mut coefficients, &scores, &buffers, &objective, 1..pairs).unwrap();
            let outcomes = read(device, &outcomes);
            let (a, b) = (read(device, &coefficients.logp), read(device, &coefficients.entropy));
            assert!(outcomes[..PairOutcome::WIDTH].iter().all(|value| value.is_nan()), "pair 0 was not asked for");
            for pair in 1..pairs {
                let ranges = &batch.scored[pair];
                let (c, r) = (ranges.chosen.clone(), ranges.rejected.clone());
                let wants_entropy = objective.needs_entropy();
                let mut wanted = [vec![0.0; c.len()], vec![0.0; r.len()], vec![0.0; c.len()], vec![0.0; r.len()]];
                let [logp_chosen, logp_rejected, entropy_chosen, entropy_rejected] = &mut wanted;
                let outcome = objective.evaluate(
                    &PairScores {
                        logp_chosen: &logp[c.clone()],
                        logp_rejected: &logp[r.clone()],
                        entropy_chosen: if wants_entropy { &entropy[c.clone()] } else { &[] },
                        entropy_rejected: if wants_entropy { &entropy[r.clone()] } else { &[] },
                        constants: constants[pair],
                    },
                    &mut PairCoefficients { logp_chosen, logp_rejected, entropy_chosen, entropy_rejected },
                );
                let got = &outcomes[pair * PairOutcome::WIDTH..][..PairOutcome::WIDTH];
                assert_close("outcome", got, &wide(bytemuck::cast_slice(&[outcome])), Tolerance::F32);
                assert_close("a chosen", &a[c.clone()], &wide(&wanted[0]), Tolerance::F32);
                assert_close("a rejected", &a[r.clone()], &wide(&wanted[1]), Tolerance::F32);
                assert_close("b chosen", &b[c.clone()], &wide(&wanted[2]), Tolerance::F32);
                assert_close("b rejected", &b[r.clone()], &wide(&wanted[3]), Tolerance::F32);
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
            .pair_objective(&mut outcomes, &mut coefficients, &scores, &buffers, &Objective::Sft, 0..2)
            .unwrap_err()
            .to_string();
        assert!(error.contains("pair_objective") && error.contains("outcomes"), "{error}");
    }
}
