//! What is counted while the records go by.

use super::shown::ShownPair;
use crate::data::{Cause, EncodedRecord, TextEncoder, TokenizedPair, tokens_after_end};
use crate::error::Result;

/// Counts over all records, and the pairs that are shown.
pub(super) struct Survey<'a> {
    encoder: &'a TextEncoder,
    /// The tokens that end a response.
    pub ends: Vec<u32>,
    bos: Option<u32>,
    /// Tokens of prompt, chosen and rejected response of every record, before anything was cut.
    pub uncut: Vec<[usize; 3]>,
    pub tokens: TokenCounts,
    /// Pairs to show: the first ones, and the first whose prompt ends within a token.
    pub shown: Vec<ShownPair>,
    most_shown: usize,
    shows_boundary: bool,
    /// The first error of making a pair fit to be shown.
    failure: Option<crate::error::Error>,
}

/// Counts of begin and end tokens over the pairs that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TokenCounts {
    /// Prompts that begin with the BOS token.
    pub prompts_begin_with_bos: usize,
    /// Prompts that hold the BOS token more than once.
    pub prompts_with_several_bos: usize,
    /// Responses that hold a BOS token.
    pub responses_with_bos: usize,
    /// Responses without an end token.
    pub responses_without_end: usize,
    /// Responses with one end token.
    pub responses_with_one_end: usize,
    /// Responses with several end tokens, as those of several turns have.
    pub responses_with_several_ends: usize,
    /// Responses in which tokens follow the last end token.
    pub responses_with_tokens_after_end: usize,
    /// How many tokens those are. They are scored like all others.
    pub tokens_after_end: usize,
    /// Tokens that are scored, of chosen and rejected responses.
    pub scored: [usize; 2],
}

impl<'a> Survey<'a> {
    /// A survey of no records yet, which shows at most `most_shown` pairs.
    pub fn new(encoder: &'a TextEncoder, most_shown: usize) -> Result<Self> {
        Ok(Survey {
            encoder,
            ends: encoder.end_tokens()?,
            bos: encoder.tokenizer.bos(),
            uncut: Vec::new(),
            tokens: TokenCounts::default(),
            shown: Vec::new(),
            most_shown,
            shows_boundary: false,
            failure: None,
        })
    }

    /// Takes the next record.
    pub fn add(&mut self, record: &EncodedRecord) {
        self.uncut.extend(record.uncut);
        let Some(pair) = &record.pair else { return };
        self.count(pair);
        let on_boundary = [Cause::BoundaryToken, Cause::PromptShortened];
        let on_boundary = on_boundary.iter().any(|cause| record.causes.contains(cause));
        let is_first_on_boundary = on_boundary && !self.shows_boundary && self.most_shown > 0;
        if self.shown.len() < self.most_shown || is_first_on_boundary {
            self.shows_boundary |= on_boundary;
            match ShownPair::new(self.encoder, record.place, pair) {
                Ok(pair) => self.shown.push(pair),
                Err(error) => _ = self.failure.get_or_insert(error),
            }
        }
    }

    /// The first error of a pair that could not be shown.
    pub fn take_failure(&self) -> Option<&crate::error::Error> {
        self.failure.as_ref()
    }

    fn count(&mut self, pair: &TokenizedPair) {
        let tokens = &mut self.tokens;
        let is_bos = |id: &&u32| Some(**id) == self.bos;
        tokens.prompts_begin_with_bos += usize::from(pair.prompt.first().as_ref().is_some_and(is_bos));
        tokens.prompts_with_several_bos += usize::from(pair.prompt.iter().filter(is_bos).count() > 1);
        for (sum, scored) in tokens.scored.iter_mut().zip(pair.scored_tokens()) {
            *sum += scored;
        }
        for response in [&pair.chosen, &pair.rejected] {
            // Some models have one token for both.
            let has_bos = response.iter().any(|id| Some(*id) == self.bos && !self.ends.contains(id));
            tokens.responses_with_bos += usize::from(has_bos);
            match response.iter().filter(|id| self.ends.contains(id)).count() {
                0 => tokens.responses_without_end += 1,
                1 => tokens.responses_with_one_end += 1,
                _ => tokens.responses_with_several_ends += 1,
            }
            let after = tokens_after_end(response, &self.ends);
            tokens.responses_with_tokens_after_end += usize::from(after > 0);
            tokens.tokens_after_end += after;
        }
    }
}
