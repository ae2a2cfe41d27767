//! The objectives against the formulas of their papers, written once more in f64: losses by value, coefficients by
//! central differences. And against PyTorch's autograd (`tests/goldens/objectives.json`).

use mmpo_fast::data::Sides;
use mmpo_fast::objective::{
    DESCRIPTORS, Dpo, Hinge, Ipo, Mmpo, Objective, ObjectiveKind, Orpo, PairCoefficients, PairConstants,
    PairOutcome, PairScores, ReferencePair, Settings, Simpo,
};
use serde_json::Value;

use crate::support::close::{self, Bounds};

const MMPO: Mmpo = Mmpo {
    beta: 0.05,
    epsilon: 0.9,
    reward_group: 2,
    reward_normalize: true,
    length_normalize: false,
    preference_weight: 0.0,
    entropy_weight: 0.0,
};

/// One response: log-probs and entropies of its tokens.
#[derive(Clone, Debug)]
struct Response {
    logp: Vec<f64>,
    entropy: Vec<f64>,
}

impl Response {
    /// `tokens` plausible values.
    fn new(tokens: usize, seed: usize) -> Self {
        let value = |i: usize, k: usize| ((i * 37 + seed * 101 + k * 53) % 97) as f64 / 97.0;
        Response {
            logp: (0..tokens).map(|i| -3.0 * value(i, 1) - 0.01).collect(),
            entropy: (0..tokens).map(|i| 4.0 * value(i, 2) + 0.01).collect(),
        }
    }

    fn of_logp(logp: &[f64]) -> Self {
        Response { logp: logp.to_vec(), entropy: vec![1.0; logp.len()] }
    }

    fn sum(&self) -> f64 {
        self.logp.iter().sum()
    }

    fn length(&self) -> f64 {
        self.logp.len().max(1) as f64
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `sum_t P_t * stop(H_t) + H_t`; `stopped` holds the entropies without a gradient.
fn entropy_bonus(response: &Response, stopped: &[f64]) -> f64 {
    (0..response.logp.len())
        .map(|t| response.logp[..t].iter().sum::<f64>() * stopped[t] + response.entropy[t])
        .sum()
}

/// The loss of a pair, straight from the definitions. `stopped` are the entropies as constants.
fn naive_loss(
    objective: &Objective,
    [chosen, rejected]: [&Response; 2],
    stopped: [&[f64]; 2],
    constants: PairConstants,
) -> f64 {
    let (known_chosen, known_rejected) = (f64::from(constants.chosen), f64::from(constants.rejected));
    match objective {
        Objective::Mmpo(mmpo) => {
            let length = |response: &Response| if mmpo.length_normalize { response.length() } else { 1.0 };
            let s_w = chosen.sum() / length(chosen) + known_chosen;
            let s_l = rejected.sum() / length(rejected) + known_rejected;
            let bonus = 0.5
                * (entropy_bonus(chosen, stopped[0]) / length(chosen)
                    + entropy_bonus(rejected, stopped[1]) / length(rejected));
            -(s_w.exp() + s_l.exp()).ln()
                - mmpo.preference_weight * sigmoid(s_w - s_l).ln()
                - mmpo.entropy_weight * bonus
        }
        Objective::Dpo(dpo) => {
            let margin = dpo.beta * ((chosen.sum() - known_chosen) - (rejected.sum() - known_rejected));
            -(1.0 - dpo.label_smoothing) * sigmoid(margin).ln() - dpo.label_smoothing * sigmoid(-margin).ln()
        }
        Objective::Simpo(simpo) => {
            let margin =
                chosen.sum() / chosen.length() - rejected.sum() / rejected.length() - simpo.gamma_beta_ratio;
            -sigmoid(simpo.beta * margin).ln()
        }
        Objective::Sft => -chosen.sum(),
        Objective::Ipo(ipo) => {
            let mean_ratio = |response: &Response, known: f64| (response.sum() - known) / response.length();
            let h = mean_ratio(chosen, known_chosen) - mean_ratio(rejected, known_rejected);
            (h - 1.0 / (2.0 * ipo.beta)).powi(2)
        }
        Objective::Hinge(hinge) => {
            let ratio = (chosen.sum() - known_chosen) - (rejected.sum() - known_rejected);
            (1.0 - hinge.beta * ratio).max(0.0)
        }
        Objective::Orpo(orpo) => {
            let mean = |response: &Response| response.sum() / response.length();
            // Responses without tokens are certain, and certainty counts as a log-prob of -1e-6.
            let odds = |response: &Response| {
                let probability = mean(response).min(-1e-6).exp();
                probability / (1.0 - probability)
            };
            -mean(chosen) - orpo.beta * sigmoid((odds(chosen) / odds(rejected)).ln()).ln()
        }
    }
}

/// What `objective.evaluate` gave for a pair.
#[derive(Debug)]
struct Evaluation {
    outcome: PairOutcome,
    /// `a` of the chosen and of the rejected response.
    logp: [Vec<f32>; 2],
    /// `b` of both.
    entropy: [Vec<f32>; 2],
}

fn evaluate(objective: &Objective, pair: [&Response; 2], constants: PairConstants) -> Evaluation {
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<f32>>();
    let logp = pair.map(|response| narrow(&response.logp));
    let entropy =
        pair.map(|response| if objective.needs_entropy() { narrow(&response.entropy) } else { Vec::new() });
    // NaN, so that a coefficient left out shows.
    let unset = || pair.map(|response| vec![f32::NAN; response.logp.len()]);
    let (mut a, mut b) = (unset(), unset());
    let ([a_chosen, a_rejected], [b_chosen, b_rejected]) = (&mut a, &mut b);
    let outcome = objective.evaluate(
        &PairScores {
            logp_chosen: &logp[0],
            logp_rejected: &logp[1],
            entropy_chosen: &entropy[0],
            entropy_rejected: &entropy[1],
            constants,
        },
        &mut PairCoefficients {
            logp_chosen: a_chosen,
            logp_rejected: a_rejected,
            entropy_chosen: b_chosen,
            entropy_rejected: b_rejected,
        },
    );
    Evaluation { outcome, logp: a, entropy: b }
}

#[track_caller]
fn assert_close(what: &str, got: f64, wanted: f64) {
    close::assert_close(what, got, wanted, Bounds { relative: 2e-6, absolute: 1e-6 });
}

/// Every objective with every switch.
fn objectives() -> Vec<Objective> {
    let mut all = vec![Objective::Sft];
    for length_normalize in [false, true] {
        for preference_weight in [0.0, 0.4, 1.0] {
            for entropy_weight in [0.0, 0.05] {
                all.push(Objective::Mmpo(Mmpo {
                    length_normalize,
                    preference_weight,
                    entropy_weight,
                    ..MMPO
                }));
            }
        }
    }
    for label_smoothing in [0.0, 0.1, 0.5] {
        all.push(Objective::Dpo(Dpo { beta: 0.3, label_smoothing }));
    }
    all.extend([0.1, 0.7].map(|beta| Objective::Ipo(Ipo { beta })));
    all.extend([0.1, 1.0].map(|beta| Objective::Orpo(Orpo { beta })));
    all.extend([0.1, 0.7].map(|beta| Objective::Hinge(Hinge { beta })));
    for gamma_beta_ratio in [0.0, 1.6] {
        all.push(Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio }));
    }
    all
}

fn constants(chosen: f32, rejected: f32) -> PairConstants {
    PairConstants { chosen, rejected, scale: 0.125, reserved: 0.0 }
}

#[test]
fn every_objective_is_among_those_that_are_tested() {
    for descriptor in DESCRIPTORS {
        let mut tested = objectives().into_iter().filter(|objective| objective.kind() == descriptor.kind);
        assert!(tested.next().is_some(), "{} is not tested", descriptor.name);
    }
}

#[test]
fn losses_and_coefficients_follow_the_definitions() {
    for objective in objectives() {
        for (tokens_chosen, tokens_rejected) in [(3, 5), (1, 1), (6, 1), (1, 4), (0, 2), (2, 0)] {
            let pair = [Response::new(tokens_chosen, 1), Response::new(tokens_rejected, 2)];
            let constants = constants(0.75, -0.5);
            let got = evaluate(&objective, [&pair[0], &pair[1]], constants);
            let stopped = [&pair[0].entropy[..], &pair[1].entropy[..]];
            let loss =
                |pair: &[Response; 2]| naive_loss(&objective, [&pair[0], &pair[1]], stopped, constants);
            let label = format!("{objective:?}, {tokens_chosen} and {tokens_rejected} tokens");
            assert_close(&label, got.outcome.loss.into(), loss(&pair));
            for side in 0..2 {
                for t in 0..pair[side].logp.len() {
                    let slope = |pick: fn(&mut Response) -> &mut Vec<f64>| {
                        let at = |offset: f64| {
                            let mut moved = pair.clone();
                            pick(&mut moved[side])[t] += offset;
                            loss(&moved)
                        };
                        f64::from(constants.scale) * (at(1e-4) - at(-1e-4)) / 2e-4
                    };
                    let what = format!("{label}: side {side}, token {t}");
                    assert_close(&format!("a, {what}"), got.logp[side][t].into(), slope(|r| &mut r.logp));
                    assert_close(
                        &format!("b, {what}"),
                        got.entropy[side][t].into(),
                        slope(|r| &mut r.entropy),
                    );
                }
            }
        }
    }
}

#[test]
fn rewards_and_sums_are_what_the_charts_say() {
    let pair = [Response::of_logp(&[-1.0, -2.0]), Response::of_logp(&[-0.5, -0.5, -2.0])];
    let constants = constants(-4.0, -2.0);
    let outcome = |objective| evaluate(&objective, [&pair[0], &pair[1]], constants).outcome;
    let mmpo = outcome(Objective::Mmpo(MMPO));
    assert_close("s_w", mmpo.reward_chosen.into(), -7.0);
    assert_close("s_l", mmpo.reward_rejected.into(), -5.0);
    assert_close("p_w", mmpo.weight_chosen.into(), sigmoid(-2.0));
    assert_close("lp_w", mmpo.logp_chosen.into(), -3.0);
    assert_close("lp_l", mmpo.logp_rejected.into(), -3.0);
    let mean = outcome(Objective::Mmpo(Mmpo { length_normalize: true, ..MMPO }));
    assert_close("s_w of means", mean.reward_chosen.into(), -5.5);
    assert_close("s_l of means", mean.reward_rejected.into(), -3.0);
    assert_close("lp stays a sum", mean.logp_rejected.into(), -3.0);
    let dpo = outcome(Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 }));
    assert_close("beta (lp - ref)", dpo.reward_chosen.into(), 0.1);
    assert_close("beta (lp - ref)", dpo.reward_rejected.into(), -0.1);
    let simpo = outcome(Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 1.6 }));
    assert_close("beta lp / n", simpo.reward_chosen.into(), -3.0);
    assert_close("beta lp / n", simpo.reward_rejected.into(), -2.0);
}

/// Rewards are TRL's, sums times beta; `h` is 1 / (2 beta) at its target, where nothing is left to learn.
#[test]
fn ipo_rests_at_its_target() {
    let pair = [Response::of_logp(&[-1.0, -2.0]), Response::of_logp(&[-0.5, -0.5, -2.0])];
    let ipo = Objective::Ipo(Ipo { beta: 0.25 });
    // Mean log-ratios of 0.5 and -1.5 nats per token: 2 apart.
    let rest = evaluate(&ipo, [&pair[0], &pair[1]], constants(-4.0, 1.5));
    assert_eq!(
        (rest.outcome.loss, rest.outcome.reward_chosen, rest.outcome.reward_rejected),
        (0.0, 0.25, -1.125)
    );
    assert!(rest.logp.iter().flatten().all(|&a| a == 0.0), "{rest:?}");
    // Equal log-ratios per token are 1 / (2 beta) short of it.
    let start = evaluate(&ipo, [&pair[0], &pair[1]], constants(-3.0, -3.0));
    assert_eq!(start.outcome.loss, 4.0);
    assert_close("-4 scale / n_w", start.logp[0][0].into(), -4.0 * 0.125 / 2.0);
    assert_close("4 scale / n_l", start.logp[1][2].into(), 4.0 * 0.125 / 3.0);
}

/// Where a response is all but certain, `1 - e^m` vanishes: odds, losses and slopes stay finite and keep their signs. That of
/// the chosen response has a limit, `e^(o_l)`; that of the rejected one grows as `1 / -m` up to the bound of 1e-6.
#[test]
fn orpo_near_certainty() {
    let orpo = Objective::Orpo(Orpo { beta: 0.5 });
    let at = |chosen: f64, rejected: f64| {
        let pair = [Response::of_logp(&[chosen]), Response::of_logp(&[rejected])];
        evaluate(&orpo, [&pair[0], &pair[1]], constants(0.0, 0.0))
    };
    for chosen in [-1e-3, -1e-5, -1e-6, -1e-9, -1e-40, 0.0, 1e-7] {
        let got = at(chosen, -1.0);
        let odds = (-1.0f64).exp() / (1.0 - (-1.0f64).exp());
        // The limit is reached as fast as the probability reaches 1.
        let error = (f64::from(got.logp[0][0]) - 0.125 * (-1.0 - 0.5 * odds)).abs();
        assert!(error <= 0.2 * chosen.abs().max(1e-6) + 1e-7, "{chosen}: {got:?}, error {error:e}");
        assert!(got.outcome.loss.is_finite() && got.outcome.loss.abs() <= 0.01, "{chosen}: {got:?}");
    }
    for (rejected, slope) in [(-1e-3, 1e3), (-1e-5, 1e5), (-1e-6, 1e6), (-1e-9, 1e6), (0.0, 1e6), (1e-7, 1e6)]
    {
        let got = at(-1.0, rejected);
        let wanted = 0.125 * 0.5 * slope;
        let error = (f64::from(got.logp[1][0]) - wanted).abs();
        assert!(error <= 2e-3 * wanted, "{rejected}: {got:?}, error {error:e}");
        assert!(got.outcome.loss.is_finite() && got.outcome.loss > 1.0, "{rejected}: {got:?}");
    }
    let equal = at(0.0, 0.0);
    assert_close("log 2 / 2", equal.outcome.loss.into(), 0.5 * std::f64::consts::LN_2);
    assert!(equal.logp[0][0] < -1e4 && equal.logp[1][0] > 1e4, "{equal:?}");
    let impossible = at(-1e4, -1e4);
    assert_close("m and log 2", impossible.outcome.loss.into(), 1e4 + 0.5 * std::f64::consts::LN_2);
}

/// A pair whose margin is 1 or more has nothing left to learn, and one below is pulled with all of beta.
#[test]
fn hinge_lets_go_of_a_pair_at_a_margin_of_one() {
    let pair = [Response::of_logp(&[-1.0, -2.0]), Response::of_logp(&[-0.5, -0.5, -2.0])];
    let hinge = Objective::Hinge(Hinge { beta: 0.5 });
    // Margins of half the difference of the log-ratios: 0, 0.75, 1 and 2.
    for (known, loss, slope) in [(-3.0, 1.0, 0.5), (-4.5, 0.25, 0.5), (-5.0, 0.0, 0.0), (-7.0, 0.0, 0.0)] {
        let got = evaluate(&hinge, [&pair[0], &pair[1]], constants(known, -3.0));
        assert_eq!(got.outcome.loss, loss, "{known}");
        assert!(got.logp[0].iter().all(|&a| a == -0.125 * slope), "{known}: {got:?}");
        assert!(got.logp[1].iter().all(|&a| a == 0.125 * slope), "{known}: {got:?}");
    }
}

/// `-log sigmoid(s_w - s_l) - logsumexp(s_w, s_l) = -s_w`: the rejected response drops out.
#[test]
fn preference_weight_one_is_supervised_fine_tuning() {
    for length_normalize in [false, true] {
        let objective = Objective::Mmpo(Mmpo { preference_weight: 1.0, length_normalize, ..MMPO });
        for (chosen, rejected) in [(4, 9), (1, 1), (30, 2)] {
            let pair = [Response::new(chosen, 3), Response::new(rejected, 4)];
            let got = evaluate(&objective, [&pair[0], &pair[1]], constants(0.9, 0.1));
            assert_close("loss", got.outcome.loss.into(), f64::from(-got.outcome.reward_chosen));
            let length = if length_normalize { chosen as f64 } else { 1.0 };
            assert!(
                got.logp[0].iter().all(|&a| (f64::from(a) + 0.125 / length).abs() <= 1e-8),
                "{:?}",
                got.logp
            );
            assert!(got.logp[1].iter().all(|&a| a.abs() <= 1e-8), "{:?}", got.logp);
        }
    }
}

#[test]
fn equal_scores_share_the_gradient() {
    let response = Response::new(5, 1);
    let got = evaluate(&Objective::Mmpo(MMPO), [&response, &response], constants(0.3, 0.3));
    assert_eq!(got.outcome.weight_chosen, 0.5);
    assert!(got.logp.iter().flatten().all(|&a| a == -0.0625), "{:?}", got.logp);
    let dpo = Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 });
    let got = evaluate(&dpo, [&response, &response], constants(-3.0, -3.0));
    assert_close("log 2", got.outcome.loss.into(), std::f64::consts::LN_2);
}

/// Log-probs of -1e4 on either side saturate the weights, and nothing overflows or becomes NaN.
#[test]
fn extreme_scores_stay_finite() {
    let far = Response::of_logp(&[-1e4; 3]);
    let near = Response::of_logp(&[-0.1]);
    for objective in objectives() {
        for pair in [[&far, &near], [&near, &far], [&far, &far]] {
            let got = evaluate(&objective, pair, constants(0.9, 0.1));
            let outcome: &[f32] = bytemuck::cast_slice(std::slice::from_ref(&got.outcome));
            assert!(outcome.iter().all(|value| value.is_finite()), "{objective:?}: {got:?}");
            let coefficients = got.logp.iter().chain(&got.entropy).flatten();
            assert!(coefficients.clone().all(|value| value.is_finite()), "{objective:?}: {got:?}");
        }
    }
    let saturated = evaluate(&Objective::Mmpo(MMPO), [&near, &far], constants(0.9, 0.1));
    assert_eq!(saturated.outcome.weight_chosen, 1.0);
    assert_close("-s_w", saturated.outcome.loss.into(), 0.1 - 0.9);
    let lost = evaluate(&Objective::Mmpo(MMPO), [&far, &near], constants(0.9, 0.1));
    assert_eq!(lost.outcome.weight_chosen, 0.0);
    assert_close("-s_l", lost.outcome.loss.into(), 0.1 - 0.1);
    let dpo = Objective::Dpo(Dpo { beta: 1.0, label_smoothing: 0.0 });
    let lost = evaluate(&dpo, [&far, &near], constants(0.0, 0.0));
    assert_close("-margin", lost.outcome.loss.into(), 3e4 - 0.1);
    assert!(lost.logp[0].iter().all(|&a| a == -0.125), "{lost:?}");
}

/// A log-prob that is not a number makes a loss that is none, of which training would not hear otherwise.
#[test]
fn a_nan_reaches_the_loss() {
    for objective in objectives() {
        let sides = if objective.sides() == Sides::Both { 2 } else { 1 };
        for side in 0..sides {
            let mut pair = [Response::new(3, 1), Response::new(5, 2)];
            pair[side].logp[1] = f64::NAN;
            let got = evaluate(&objective, [&pair[0], &pair[1]], constants(0.9, 0.1));
            assert!(got.outcome.loss.is_nan(), "{objective:?}, side {side}: {got:?}");
        }
    }
}

fn reference(
    logp_chosen: f32,
    logp_rejected: f32,
    tokens_chosen: u32,
    tokens_rejected: u32,
) -> ReferencePair {
    ReferencePair { logp_chosen, logp_rejected, tokens_chosen, tokens_rejected }
}

/// By hand: raw rewards 0.9 - 0.05 * (20, 40, 60) and 0.1 - 0.05 * (30, 10, 100), groups of two pairs.
#[test]
fn rewards_are_normalised_within_their_group() {
    let references =
        [reference(-20.0, -30.0, 4, 5), reference(-40.0, -10.0, 8, 2), reference(-60.0, -100.0, 10, 20)];
    let tokens = [4, 8, 10];
    let raw = [[-0.1, -1.4], [-1.1, -0.4], [-2.1, -4.9]];
    let group = |value: f64, low: f64, high: f64| (value + 1e-6 - low) / (high - low + 1e-6);
    let constants = Objective::Mmpo(MMPO).batch_constants(&references, &tokens);
    for (pair, constants) in constants.iter().enumerate() {
        let (low, high) = if pair < 2 { (-1.4, -0.1) } else { (-4.9, -2.1) };
        assert_close("rhat_w", constants.chosen.into(), group(raw[pair][0], low, high));
        assert_close("rhat_l", constants.rejected.into(), group(raw[pair][1], low, high));
        assert_close("scale", constants.scale.into(), 1.0 / 3.0);
    }
    let whole = Objective::Mmpo(Mmpo { reward_group: 3, ..MMPO }).batch_constants(&references, &tokens);
    assert_close("rhat_w", whole[0].chosen.into(), 1.0);
    assert_close("rhat_l", whole[2].rejected.into(), group(-4.9, -4.9, -0.1));
    assert_close("rhat_l", whole[1].rejected.into(), group(-0.4, -4.9, -0.1));

    let raw_only = Objective::Mmpo(Mmpo { reward_normalize: false, ..MMPO });
    let constants = raw_only.batch_constants(&references, &tokens);
    assert_close("r_w", constants[1].chosen.into(), raw[1][0]);
    assert_close("r_l", constants[1].rejected.into(), raw[1][1]);

    let means = Objective::Mmpo(Mmpo { reward_normalize: false, length_normalize: true, ..MMPO });
    let constants = means.batch_constants(&references, &tokens);
    assert_close("r_w of means", constants[2].chosen.into(), 0.9 - 0.05 * 6.0);
    assert_close("r_l of means", constants[2].rejected.into(), 0.1 - 0.05 * 5.0);
}

/// A group whose rewards are all equal gives 1 and not 0 / 0.
#[test]
fn a_group_of_equal_rewards_is_finite() {
    let mmpo = Objective::Mmpo(Mmpo { epsilon: 0.5, ..MMPO });
    let constants = mmpo.batch_constants(&[reference(-5.0, -5.0, 3, 3)], &[3]);
    assert_close("rhat_w", constants[0].chosen.into(), 1.0);
    assert_close("rhat_l", constants[0].rejected.into(), 1.0);
}

#[test]
fn constants_of_the_baselines() {
    let references = [reference(-20.0, -30.0, 4, 5), reference(-40.0, -10.0, 8, 2)];
    let dpo = Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 }).batch_constants(&references, &[4, 8]);
    assert_eq!((dpo[1].chosen, dpo[1].rejected, dpo[1].scale), (-40.0, -10.0, 0.5));
    let simpo = Objective::Simpo(Simpo { beta: 2.0, gamma_beta_ratio: 1.6 }).batch_constants(&[], &[4, 8]);
    assert_eq!((simpo[0].chosen, simpo[0].rejected, simpo[0].scale), (0.0, 0.0, 0.5));
    // The mean over all chosen tokens of the batch, however they are spread over pairs.
    let sft = Objective::Sft.batch_constants(&[], &[4, 12]);
    assert_eq!(sft[0].scale, 1.0 / 16.0);
}

#[test]
fn what_each_objective_needs() {
    for objective in objectives() {
        let (reference, entropy, sides) = match &objective {
            Objective::Mmpo(mmpo) => (true, mmpo.entropy_weight != 0.0, Sides::Both),
            Objective::Dpo(_) | Objective::Ipo(_) | Objective::Hinge(_) => (true, false, Sides::Both),
            Objective::Simpo(_) | Objective::Orpo(_) => (false, false, Sides::Both),
            Objective::Sft => (false, false, Sides::ChosenOnly),
        };
        assert_eq!(objective.needs_reference(), reference, "{objective:?}");
        assert_eq!(objective.needs_entropy(), entropy, "{objective:?}");
        assert_eq!(objective.sides(), sides, "{objective:?}");
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not an array: {value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// The objective of a golden case, over a batch of `pairs`.
fn golden_objective(case: &Value, pairs: usize) -> Objective {
    let options = &case["options"];
    let number = |name: &str, default: f64| options[name].as_f64().unwrap_or(default);
    let flag = |name: &str, default: bool| options[name].as_bool().unwrap_or(default);
    let name = case["objective"].as_str().unwrap();
    let kind = ObjectiveKind::from_name(name).unwrap_or_else(|| panic!("no objective {name}"));
    (kind.descriptor().build)(&Settings {
        beta: number("beta", 0.0),
        epsilon: number("epsilon", 0.9),
        reward_group: number("reward_group", pairs as f64) as usize,
        reward_normalize: flag("reward_normalize", true),
        length_normalize: flag("length_normalize", false),
        preference_weight: number("preference_weight", 0.0),
        entropy_weight: number("entropy_weight", 0.0),
        gamma_beta_ratio: number("gamma_beta_ratio", 0.0),
        label_smoothing: number("label_smoothing", 0.0),
    })
}

/// A golden batch: both responses of each pair, and what the reference says of them.
fn golden_batch(batch: &Value) -> (Vec<[Response; 2]>, Vec<ReferencePair>) {
    let numbers = |value: &Value| array(value).iter().map(number).collect::<Vec<f64>>();
    let sides = |pair: usize| {
        [0, 1].map(|side| Response {
            logp: numbers(&batch["logp"][pair][side]),
            entropy: numbers(&batch["entropy"][pair][side]),
        })
    };
    let pairs: Vec<[Response; 2]> = (0..array(&batch["logp"]).len()).map(sides).collect();
    let of_reference = |(pair, sums): (&[Response; 2], &Value)| ReferencePair {
        logp_chosen: number(&sums[0]) as f32,
        logp_rejected: number(&sums[1]) as f32,
        tokens_chosen: pair[0].logp.len() as u32,
        tokens_rejected: pair[1].logp.len() as u32,
    };
    let references = pairs.iter().zip(array(&batch["reference"])).map(of_reference).collect();
    (pairs, references)
}

/// Losses and derivatives by each token that PyTorch's autograd found, of plausible, nearly certain, nearly impossible and
/// equal responses.
#[test]
fn losses_and_coefficients_are_those_of_autograd() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/objectives.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for descriptor in DESCRIPTORS {
        let mut names = array(&golden["cases"]).iter().map(|case| &case["objective"]);
        assert!(names.any(|name| name == descriptor.name), "{} has no golden", descriptor.name);
    }
    for case in array(&golden["cases"]) {
        let (pairs, references) = golden_batch(&golden["batches"][case["batch"].as_str().unwrap()]);
        let objective = golden_objective(case, pairs.len());
        let label = format!("{objective:?}, {}", case["batch"]);
        let chosen_tokens: Vec<usize> = pairs.iter().map(|[chosen, _]| chosen.logp.len()).collect();
        let constants = objective.batch_constants(&references, &chosen_tokens);
        let mut loss = 0.0;
        for (at, ([chosen, rejected], constants)) in pairs.iter().zip(constants).enumerate() {
            let got = evaluate(&objective, [chosen, rejected], constants);
            loss += f64::from(constants.scale) * f64::from(got.outcome.loss);
            for side in 0..2 {
                let what = format!("{label}: pair {at}, side {side}");
                assert_golden(&format!("a, {what}"), &got.logp[side], &case["logp"][at][side]);
                assert_golden(&format!("b, {what}"), &got.entropy[side], &case["entropy_slope"][at][side]);
            }
        }
        assert_close(&label, loss, number(&case["loss"]));
    }
}

/// A golden list holds a value for each token, or one for all.
#[track_caller]
fn assert_golden(what: &str, got: &[f32], wanted: &Value) {
    let wanted = array(wanted);
    assert!(wanted.len() == 1 || wanted.len() == got.len(), "{what}: {got:?}, wanted {wanted:?}");
    for (token, &got) in got.iter().enumerate() {
        assert_close(
            &format!("{what}, token {token}"),
            got.into(),
            number(&wanted[token.min(wanted.len() - 1)]),
        );
    }
}
