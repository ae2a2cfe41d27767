//! Packed batches of pairs: `prompt | chosen | rejected`, back to back, no padding.
//!
//! Legend: `T` tokens of the batch, `P C R` tokens of one pair's prompt, chosen and rejected response,
//! `N` scored response tokens.

use std::ops::Range;

use super::TokenIds;

/// A pair as token ids; the prompt is stored once for both responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizedPair {
    /// 0-based position of the record in its file, counting dropped ones.
    pub record: usize,
    /// Token ids of the prompt.
    pub prompt: TokenIds,
    /// Token ids of the chosen response, without the prompt.
    pub chosen: TokenIds,
    /// Token ids of the rejected response, without the prompt.
    pub rejected: TokenIds,
}

impl TokenizedPair {
    /// Tokens the pair takes in a packed batch: `P + C + R`.
    pub fn tokens(&self) -> usize {
        self.tokens_of(Sides::Both)
    }

    /// As [`TokenizedPair::tokens`], of the responses that `sides` names.
    pub fn tokens_of(&self, sides: Sides) -> usize {
        let rejected = match sides {
            Sides::Both => self.rejected.len(),
            Sides::ChosenOnly => 0,
        };
        self.prompt.len() + self.chosen.len() + rejected
    }

    /// Positions that RoPE needs: the longer of both sequences, `P + max(C, R)`.
    pub fn positions(&self) -> usize {
        self.prompt.len() + self.chosen.len().max(self.rejected.len())
    }

    /// Tokens of the chosen and of the rejected response that the head scores: all of them, but for the first one
    /// where there is no prompt to predict it from.
    pub fn scored_tokens(&self) -> [usize; 2] {
        let unscored = usize::from(self.prompt.is_empty());
        [&self.chosen, &self.rejected].map(|response| response.len().saturating_sub(unscored))
    }
}

/// Where one pair lies in a packed batch, and what its tokens may attend to.
///
/// Rows `start .. start+P` are the prompt, then `C` rows of the chosen and `R` rows of the rejected response.
/// A row attends to its prompt and to earlier rows (itself included) of its own part. A plain causal sequence
/// is a span with `chosen = rejected = 0`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PairSpan {
    /// First row of the pair.
    pub start: u32,
    /// `P`
    pub prompt: u32,
    /// `C`
    pub chosen: u32,
    /// `R`
    pub rejected: u32,
}

impl PairSpan {
    /// Rows of the prompt.
    pub fn prompt_rows(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + self.prompt as usize
    }

    /// Rows of the chosen response.
    pub fn chosen_rows(&self) -> Range<usize> {
        let start = self.prompt_rows().end;
        start..start + self.chosen as usize
    }

    /// Rows of the rejected response.
    pub fn rejected_rows(&self) -> Range<usize> {
        let start = self.chosen_rows().end;
        start..start + self.rejected as usize
    }

    /// (Query, key) entries that attention visits: each row sees its prompt and its own part up to itself.
    pub fn visible(&self) -> usize {
        let (prompt, chosen, rejected) = (self.prompt as usize, self.chosen as usize, self.rejected as usize);
        let causal = |rows: usize| rows * (rows + 1) / 2;
        causal(prompt + chosen) + causal(rejected) + rejected * prompt
    }

    /// All rows of the pair.
    pub fn rows(&self) -> Range<usize> {
        self.start as usize..self.rejected_rows().end
    }
}

/// The scored tokens of one pair: ranges into the `N` rows of the head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScoredPair {
    /// Scored tokens of the chosen response.
    pub chosen: Range<usize>,
    /// Scored tokens of the rejected response.
    pub rejected: Range<usize>,
}

/// Which responses of a pair are computed. SFT never looks at the rejected one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sides {
    /// Both responses.
    Both,
    /// The chosen response alone, as SFT has it.
    ChosenOnly,
}

/// A packed batch, on the host. The order of pairs is the order given to [`PairBatch::pack`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairBatch {
    /// Where each pair lies.
    pub spans: Vec<PairSpan>,
    /// `[T]` token ids.
    pub token_ids: Vec<u32>,
    /// `[T]` positions for RoPE; those of the rejected response restart after the prompt.
    pub positions: Vec<u32>,
    /// `[N]` the row whose hidden state predicts the target: for a response's first token, the prompt's last row.
    pub scored_rows: Vec<u32>,
    /// `[N]` the token to be predicted.
    pub targets: Vec<u32>,
    /// One entry per pair; its ranges tile `0..N` in order, chosen before rejected.
    pub scored: Vec<ScoredPair>,
}

impl PairBatch {
    /// Packs `pairs` in the order given. With an empty prompt nothing predicts a response's first token, so
    /// that token is context only and is not scored.
    pub fn pack<'a>(pairs: impl IntoIterator<Item = &'a TokenizedPair>, sides: Sides) -> Self {
        let mut batch = PairBatch::default();
        for pair in pairs {
            batch.push(pair, sides);
        }
        batch
    }

    /// `T`.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// `N`.
    pub fn scored_tokens(&self) -> usize {
        self.targets.len()
    }

    fn push(&mut self, pair: &TokenizedPair, sides: Sides) {
        let rejected: &[u32] = match sides {
            Sides::Both => &pair.rejected,
            Sides::ChosenOnly => &[],
        };
        let span = PairSpan {
            start: self.token_ids.len() as u32,
            prompt: pair.prompt.len() as u32,
            chosen: pair.chosen.len() as u32,
            rejected: rejected.len() as u32,
        };
        self.token_ids.extend_from_slice(&pair.prompt);
        self.positions.extend(0..span.prompt);
        let chosen = self.push_response(&span, &pair.chosen);
        let rejected = self.push_response(&span, rejected);
        self.scored.push(ScoredPair { chosen, rejected });
        self.spans.push(span);
    }

    fn push_response(&mut self, span: &PairSpan, response: &[u32]) -> Range<usize> {
        let first_row = self.token_ids.len() as u32;
        let first_scored = self.targets.len();
        for (offset, &token) in response.iter().enumerate() {
            let offset = offset as u32;
            let predicting_row = match (offset, span.prompt) {
                (0, 0) => None,
                (0, prompt) => Some(span.start + prompt - 1),
                (offset, _) => Some(first_row + offset - 1),
            };
            if let Some(row) = predicting_row {
                self.scored_rows.push(row);
                self.targets.push(token);
            }
            self.token_ids.push(token);
            self.positions.push(span.prompt + offset);
        }
        first_scored..self.targets.len()
    }
}

/// Cuts `pairs` (in order) into runs of whole pairs of at most `token_budget` tokens each. A single pair larger
/// than the budget gets a run of its own.
pub fn micro_batches(tokens: &[usize], token_budget: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut used) = (0, 0);
    for (index, &tokens) in tokens.iter().enumerate() {
        if index > start && used + tokens > token_budget {
            runs.push(start..index);
            (start, used) = (index, 0);
        }
        used += tokens;
    }
    if start < tokens.len() {
        runs.push(start..tokens.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> TokenizedPair {
        TokenizedPair {
            record: 0,
            prompt: prompt.to_vec().into(),
            chosen: chosen.to_vec().into(),
            rejected: rejected.to_vec().into(),
        }
    }

    #[test]
    fn the_last_prompt_row_predicts_both_first_tokens() {
        let batch = PairBatch::pack([&pair(&[9], &[7], &[8]), &pair(&[1, 2], &[3, 4], &[5])], Sides::Both);
        assert_eq!(batch.token_ids, [9, 7, 8, 1, 2, 3, 4, 5]);
        assert_eq!(batch.positions, [0, 1, 1, 0, 1, 2, 3, 2]);
        assert_eq!(batch.scored_rows, [0, 0, 4, 5, 4]);
        assert_eq!(batch.targets, [7, 8, 3, 4, 5]);
        assert_eq!(batch.scored[1], ScoredPair { chosen: 2..4, rejected: 4..5 });
        assert_eq!(batch.spans[1].rejected_rows(), 7..8);
    }

    #[test]
    fn without_a_prompt_the_first_token_is_context_only() {
        let batch = PairBatch::pack([&pair(&[], &[3, 4], &[5])], Sides::Both);
        assert_eq!(batch.scored_rows, [0]);
        assert_eq!(batch.targets, [4]);
        assert!(batch.scored[0].rejected.is_empty());
    }

    #[test]
    fn chosen_only_leaves_the_rejected_response_out() {
        let batch = PairBatch::pack([&pair(&[1], &[2], &[3])], Sides::ChosenOnly);
        assert_eq!(batch.token_ids, [1, 2]);
        assert_eq!(batch.spans[0].rejected, 0);
    }

    #[test]
    fn micro_batches_keep_order_and_budget() {
        assert_eq!(micro_batches(&[3, 3, 9, 1, 1], 6), [0..2, 2..3, 3..5]);
        assert!(micro_batches(&[], 6).is_empty());
    }
}
