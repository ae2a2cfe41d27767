//! Before the first step: where the policy is the reference, its log-probs must be the reference's, and DPO's loss ln 2.
//!
//! A few pairs are enough to find a reference cache of other pairs or of another model, a model that is loaded or adapted
//! wrongly, and kernels that do not agree with themselves.

use std::f64::consts::LN_2;
use std::path::Path;

use super::adapter::StartingAdapter;
use super::inputs::Inputs;
use super::reference::References;
use super::trainer::{Trainer, TrainingPair};
use crate::config::{ObjectiveKind, RunConfig};
use crate::data::{PairDataset, TokenizedPair};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::objective::ReferencePair;
use crate::score::{ScoredModel, Scorer};

/// Pairs that are looked at, spread over the data.
const PAIRS: usize = 8;

/// How far a response's log-prob may be from the reference's, in nats: a part of its own, and a part for each scored token.
///
/// The reference and the policy have the same weights. They run in batches of other pairs, so that sums may be in another
/// order, and adapters whose second matrix is 0 go through kernels of their own, which round in other places. In f32 that is
/// some 1e-5 of a nat for a token; in bf16, whose numbers have 8 bits, some 1e-2. The log-probs of another model, or of other
/// pairs, are further away by tenths of a nat for each token.
#[derive(Clone, Copy, Debug)]
struct Tolerance {
    own: f64,
    for_each_token: f64,
}

impl Tolerance {
    fn of<D: Device>() -> Self {
        match size_of::<D::Compute>() {
            4 => Tolerance { own: 1e-3, for_each_token: 1e-4 },
            _ => Tolerance { own: 0.1, for_each_token: 0.03 },
        }
    }

    fn of_response(self, tokens: u32) -> f64 {
        self.own + self.for_each_token * f64::from(tokens)
    }

    /// For the difference between the two responses of a pair.
    fn of_pair(self, reference: &ReferencePair) -> f64 {
        self.of_response(reference.tokens_chosen) + self.of_response(reference.tokens_rejected)
    }
}

/// Fails where the policy is the reference and its log-probs are not the reference's. Nothing is compared where they are two
/// models, or where no reference is known. Call it with the starting weights.
///
/// # Errors
/// [`Error::Numerics`] naming the record, both numbers and the cache; those of the device.
pub fn check_policy<D: Device>(
    trainer: &mut Trainer<D>,
    config: &RunConfig,
    inputs: &Inputs,
    references: &References,
) -> Result<()> {
    if is_another_model(inputs) {
        return Ok(());
    }
    let training = (&inputs.training, &references.training, references.training_cache.as_deref());
    let evaluation = inputs.evaluation.as_ref();
    let evaluation =
        evaluation.map(|dataset| (dataset, &references.evaluation, references.evaluation_cache.as_deref()));
    for (dataset, references, cache) in std::iter::once(training).chain(evaluation) {
        let chosen: Vec<usize> = spread(dataset.pairs.len())
            .filter(|&index| references.get(index).is_some_and(ReferencePair::is_known))
            .collect();
        if chosen.is_empty() {
            continue;
        }
        let pairs: Vec<TrainingPair<'_>> = chosen
            .iter()
            .map(|&index| TrainingPair { pair: &dataset.pairs[index], reference: references[index] })
            .collect();
        let (outcomes, loss) = trainer.evaluate(&pairs)?;
        for (pair, outcome) in pairs.iter().zip(&outcomes) {
            let policy = [outcome.logp_chosen, outcome.logp_rejected].map(f64::from);
            compare::<D>(pair.pair, policy, &pair.reference, ("the policy", cache))?;
        }
        if config.objective.kind() == ObjectiveKind::Dpo {
            check_dpo_loss::<D>(loss, config.objective.settings().beta, &pairs)?;
        }
    }
    Ok(())
}

/// Fails where the log-probs of `cache` are not those of the reference that is loaded.
///
/// # Errors
/// As [`check_policy`].
pub fn check_cache<D: Device>(
    mut reference: ScoredModel<'_, D>,
    dataset: &PairDataset,
    references: &[ReferencePair],
    (cache, token_budget): (&Path, usize),
) -> Result<()> {
    let chosen: Vec<usize> = spread(dataset.pairs.len()).collect();
    let pairs: Vec<TokenizedPair> = chosen.iter().map(|&index| dataset.pairs[index].clone()).collect();
    let scores = Scorer::new(reference.again(), &pairs, token_budget)?.run(false, |_| ())?;
    for ((&index, pair), score) in chosen.iter().zip(&pairs).zip(&scores) {
        let now = [score.logp_chosen, score.logp_rejected];
        compare::<D>(pair, now, &references[index], ("the reference", Some(cache)))?;
    }
    Ok(())
}

/// Whether the policy begins as another model than the reference.
pub fn is_another_model(inputs: &Inputs) -> bool {
    inputs.reference.is_some() || matches!(inputs.adapter, Some(StartingAdapter::Continued(_)))
}

/// Up to [`PAIRS`] indices below `count`, the first and the last among them.
fn spread(count: usize) -> impl Iterator<Item = usize> {
    let chosen = count.min(PAIRS);
    (0..chosen).map(move |place| place * (count - 1) / (chosen - 1).max(1))
}

fn compare<D: Device>(
    pair: &TokenizedPair,
    now: [f64; 2],
    known: &ReferencePair,
    (whose, cache): (&str, Option<&Path>),
) -> Result<()> {
    let known_logps = [known.logp_chosen, known.logp_rejected].map(f64::from);
    let tokens = [known.tokens_chosen, known.tokens_rejected];
    let counted = pair.scored_tokens().map(|tokens| tokens as u32);
    for (side, name) in ["chosen", "rejected"].into_iter().enumerate() {
        let tolerance = Tolerance::of::<D>().of_response(tokens[side]);
        let apart = (now[side] - known_logps[side]).abs();
        if apart <= tolerance && counted[side] == tokens[side] {
            continue;
        }
        let (from, help) = match cache {
            Some(cache) => (
                format!("the reference log-prob in {}", cache.display()),
                format!(
                    "remove {}: it is of another model or of other pairs, and it is computed again",
                    cache.display()
                ),
            ),
            None => (
                "the reference log-prob that was just computed".to_string(),
                "two evaluations of one model must agree: this is a fault of the machine or of this program, please report \
                 it"
                .to_string(),
            ),
        };
        return Err(Error::numerics(
            format!(
                "self-test before the first step: the {name} response of record {} has log-prob {:.4} under {whose} \
                 ({} scored tokens), and {from} is {:.4} ({} tokens). They are the same model and may differ by {tolerance:.4}",
                pair.record + 1,
                now[side],
                counted[side],
                known_logps[side],
                tokens[side]
            ),
            help,
        ));
    }
    Ok(())
}

/// The loss of DPO is `-log sigmoid(beta * margin)`, with or without label smoothing ln 2 at a margin of 0, where its slope
/// is at most `beta`.
fn check_dpo_loss<D: Device>(loss: f64, beta: f64, pairs: &[TrainingPair<'_>]) -> Result<()> {
    let tolerance = Tolerance::of::<D>();
    let margins: f64 = pairs.iter().map(|pair| tolerance.of_pair(&pair.reference)).sum();
    let allowed = 1e-6 + beta * margins / pairs.len() as f64;
    if (loss - LN_2).abs() <= allowed {
        return Ok(());
    }
    Err(Error::numerics(
        format!(
            "self-test before the first step: the loss of DPO is {loss:.6} where policy and reference are the same model; it \
             must be ln 2 = {LN_2:.6}, within {allowed:.6}"
        ),
        "this is a fault of the machine or of this program: please report it",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::CpuDevice;

    fn pair() -> TokenizedPair {
        TokenizedPair {
            record: 4,
            prompt: vec![1].into(),
            chosen: vec![2, 3, 4].into(),
            rejected: vec![5, 6].into(),
        }
    }

    #[test]
    fn pairs_are_spread_from_the_first_to_the_last() {
        assert_eq!(spread(0).count(), 0);
        assert_eq!(spread(1).collect::<Vec<_>>(), [0]);
        assert_eq!(spread(3).collect::<Vec<_>>(), [0, 1, 2]);
        let many: Vec<usize> = spread(1000).collect();
        assert_eq!((many.len(), many[0], many[7]), (8, 0, 999));
    }

    #[test]
    fn another_log_prob_or_token_count_is_noticed() {
        let pair = pair();
        let [chosen, rejected] = pair.scored_tokens().map(|tokens| tokens as u32);
        let known = ReferencePair {
            logp_chosen: -3.0,
            logp_rejected: -5.0,
            tokens_chosen: chosen,
            tokens_rejected: rejected,
        };
        let check = |now, known: &ReferencePair| {
            compare::<CpuDevice>(&pair, now, known, ("the policy", Some(Path::new("c.logps"))))
        };
        check([-3.0005, -5.0], &known).unwrap();
        let error = check([-3.0, -5.01], &known).unwrap_err();
        assert_eq!(error.exit_code(), 7);
        assert!(
            error.to_string().contains("the rejected response of record 5 has log-prob -5.0100"),
            "{error}"
        );
        assert!(check([f64::NAN, -5.0], &known).is_err());
        assert!(check([-3.0, -5.0], &ReferencePair { tokens_chosen: chosen + 1, ..known }).is_err());
    }

    #[test]
    fn the_loss_of_dpo_is_ln_2() {
        let pair = pair();
        let reference =
            ReferencePair { logp_chosen: -3.0, logp_rejected: -5.0, tokens_chosen: 3, tokens_rejected: 2 };
        let pairs = [TrainingPair { pair: &pair, reference }];
        check_dpo_loss::<CpuDevice>(LN_2 + 1e-5, 0.1, &pairs).unwrap();
        let error = check_dpo_loss::<CpuDevice>(0.7, 0.1, &pairs).unwrap_err();
        assert!(error.to_string().contains("0.700000"), "{error}");
        assert!(check_dpo_loss::<CpuDevice>(f64::NAN, 0.1, &pairs).is_err());
    }
}
