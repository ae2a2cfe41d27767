//! Packing, as properties: spans tile the batch, and every response sees what it would see alone.

use mmpo_fast::data::{PairBatch, Sides, TokenizedPair, micro_batches};
use proptest::collection::vec;
use proptest::prelude::*;

fn pairs() -> impl Strategy<Value = Vec<TokenizedPair>> {
    let pair = (vec(0u32..50, 0..9), vec(0u32..50, 1..9), vec(0u32..50, 1..9));
    vec(pair, 0..8).prop_map(|pairs| {
        let with_records = pairs.into_iter().enumerate();
        with_records
            .map(|(record, (prompt, chosen, rejected))| TokenizedPair {
                record,
                prompt: prompt.into(),
                chosen: chosen.into(),
                rejected: rejected.into(),
            })
            .collect()
    })
}

/// One response alone after its prompt: for each token that something predicts, the tokens up to its predictor and the
/// token.
fn alone(prompt: &[u32], response: &[u32]) -> Vec<(Vec<u32>, u32)> {
    let sequence = [prompt, response].concat();
    (prompt.len().max(1)..sequence.len()).map(|at| (sequence[..at].to_vec(), sequence[at])).collect()
}

/// What row `row` of the batch attends to, in the order of positions.
fn visible(batch: &PairBatch, row: usize) -> Vec<u32> {
    let span = batch.spans.iter().find(|span| span.rows().contains(&row)).expect("spans cover every row");
    let own = [span.prompt_rows(), span.chosen_rows(), span.rejected_rows()];
    let own = own.into_iter().find(|rows| rows.contains(&row)).expect("parts cover the span");
    let prompt = span.prompt_rows();
    let before = if own == prompt { 0..0 } else { prompt };
    let rows: Vec<usize> = before.chain(own.start..row + 1).collect();
    for (position, &row) in rows.iter().enumerate() {
        assert_eq!(batch.positions[row] as usize, position, "positions count what is visible");
    }
    rows.into_iter().map(|row| batch.token_ids[row]).collect()
}

proptest! {
    #[test]
    fn spans_tile_the_batch_and_scored_ranges_tile_the_targets(pairs in pairs()) {
        let batch = PairBatch::pack(&pairs, Sides::Both);
        let mut row = 0;
        let mut target = 0;
        prop_assert_eq!(batch.spans.len(), pairs.len());
        for ((span, scored), pair) in batch.spans.iter().zip(&batch.scored).zip(&pairs) {
            prop_assert_eq!(span.prompt_rows().start, row);
            prop_assert_eq!(span.prompt_rows().len(), pair.prompt.len());
            prop_assert_eq!(&batch.token_ids[span.chosen_rows()], &pair.chosen[..]);
            prop_assert_eq!(&batch.token_ids[span.rejected_rows()], &pair.rejected[..]);
            row = span.rows().end;
            prop_assert_eq!(scored.chosen.start, target);
            prop_assert_eq!(scored.rejected.start, scored.chosen.end);
            target = scored.rejected.end;
        }
        prop_assert_eq!(row, batch.tokens());
        prop_assert_eq!(row, pairs.iter().map(TokenizedPair::tokens).sum::<usize>());
        prop_assert_eq!(target, batch.scored_tokens());
        prop_assert_eq!(batch.positions.len(), row);
        prop_assert_eq!(batch.scored_rows.len(), target);
    }

    #[test]
    fn each_response_sees_what_it_would_see_alone(pairs in pairs()) {
        let batch = PairBatch::pack(&pairs, Sides::Both);
        for (pair, scored) in pairs.iter().zip(&batch.scored) {
            for (range, response) in [(&scored.chosen, &pair.chosen), (&scored.rejected, &pair.rejected)] {
                let packed: Vec<(Vec<u32>, u32)> = range
                    .clone()
                    .map(|n| (visible(&batch, batch.scored_rows[n] as usize), batch.targets[n]))
                    .collect();
                prop_assert_eq!(packed, alone(&pair.prompt, response));
            }
        }
    }

    #[test]
    fn chosen_only_is_both_without_the_rejected_side(pairs in pairs()) {
        let chosen_only = PairBatch::pack(&pairs, Sides::ChosenOnly);
        let without: Vec<TokenizedPair> =
            pairs.iter().map(|pair| TokenizedPair { rejected: Vec::new().into(), ..pair.clone() }).collect();
        prop_assert_eq!(chosen_only, PairBatch::pack(&without, Sides::Both));
    }

    #[test]
    fn micro_batches_tile_the_pairs_within_the_budget(tokens in vec(1usize..40, 0..30), budget in 1usize..80) {
        let runs = micro_batches(&tokens, budget);
        let mut next = 0;
        for run in &runs {
            prop_assert_eq!(run.start, next);
            prop_assert!(!run.is_empty());
            let used: usize = tokens[run.clone()].iter().sum();
            prop_assert!(used <= budget || run.len() == 1, "{} tokens in {:?}", used, run);
            if let Some(&following) = tokens.get(run.end) {
                prop_assert!(used + following > budget, "{:?} had room for the next pair", run);
            }
            next = run.end;
        }
        prop_assert_eq!(next, tokens.len());
    }
}
