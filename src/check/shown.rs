//! A pair as a person reads it: its text in pieces, special tokens visible, prompt and responses apart.

use serde::Serialize;

use crate::data::{TextEncoder, TokenizedPair};
use crate::error::Result;

/// Characters of one piece of text that are shown: so many at its beginning and at its end.
const SHOWN: usize = 240;

/// A pair that is shown whole, but for the middle of long texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownPair {
    /// 1-based line or record.
    pub place: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the chosen and of the rejected response.
    pub response_tokens: [usize; 2],
    /// What both responses follow.
    pub prompt: Vec<Piece>,
    /// The better response.
    pub chosen: Vec<Piece>,
    /// The worse response.
    pub rejected: Vec<Piece>,
}

/// Text between special tokens, or one of those.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// The text, as the tokens say it.
    pub text: String,
    /// Whether it is a special token.
    pub special: bool,
    /// Characters left out in its middle; they stand where [`Piece::CUT`] is.
    pub left_out: usize,
}

impl Piece {
    /// Stands for characters that are left out.
    pub const CUT: &str = " … ";
}

impl ShownPair {
    pub(super) fn new(encoder: &TextEncoder, place: usize, pair: &TokenizedPair) -> Result<Self> {
        let of = |response: &[u32]| pieces(encoder, &[&pair.prompt, response].concat(), pair.prompt.len());
        Ok(ShownPair {
            place,
            prompt_tokens: pair.prompt.len(),
            response_tokens: [pair.chosen.len(), pair.rejected.len()],
            prompt: pieces(encoder, &pair.prompt, 0)?,
            chosen: of(&pair.chosen)?,
            rejected: of(&pair.rejected)?,
        })
    }
}

/// The text of `ids` from `start` on, cut at special tokens.
fn pieces(encoder: &TextEncoder, ids: &[u32], start: usize) -> Result<Vec<Piece>> {
    let tokenizer = &encoder.tokenizer;
    let mut pieces = Vec::new();
    let mut begin = start;
    for place in start..=ids.len() {
        let special = ids.get(place).filter(|id| tokenizer.is_special(**id));
        if place < ids.len() && special.is_none() {
            continue;
        }
        if place > begin {
            pieces.push(piece(tokenizer.tail_text(&ids[..place], begin)?, false));
        }
        if let Some(id) = special {
            pieces.push(piece(tokenizer.decode(&[*id], false)?, true));
        }
        begin = place + 1;
    }
    Ok(pieces)
}

fn piece(text: String, special: bool) -> Piece {
    let count = text.chars().count();
    if count <= 2 * SHOWN + Piece::CUT.len() {
        return Piece { text, special, left_out: 0 };
    }
    let end_of_start = text.char_indices().nth(SHOWN).map_or(text.len(), |(at, _)| at);
    let start_of_end = text.char_indices().nth(count - SHOWN).map_or(text.len(), |(at, _)| at);
    let text = [&text[..end_of_start], Piece::CUT, &text[start_of_end..]].concat();
    Piece { text, special, left_out: count - 2 * SHOWN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_long_text_is_left_out_and_counted() {
        let long: String = ('a'..='z').chain(['ü']).cycle().take(1000).collect();
        let cut = piece(long.clone(), false);
        assert_eq!(cut.left_out, 1000 - 2 * SHOWN);
        assert!(cut.text.contains(Piece::CUT) && long.starts_with(&cut.text[..50]));
        assert_eq!(cut.text.chars().count(), 2 * SHOWN + Piece::CUT.chars().count());
        let short = piece("short".into(), false);
        assert_eq!((short.text.as_str(), short.left_out), ("short", 0));
    }
}
