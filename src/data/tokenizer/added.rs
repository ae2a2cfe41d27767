//! Added tokens inside a text: end-of-turn markers and the like, which no rule of the tokenizer cuts.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{AddedToken, NormalizedString, Normalizer};

/// A part of a text.
#[derive(Debug, PartialEq)]
pub(super) enum Part<'t> {
    Token(u32),
    /// Text between tokens, and its first byte's place in the whole.
    Text(&'t str, usize),
}

/// Finds the longest of several tokens at the leftmost place, as the library does.
#[derive(Debug)]
pub(super) struct Matcher {
    automaton: AhoCorasick,
    tokens: Vec<Token>,
}

#[derive(Debug)]
struct Token {
    id: u32,
    /// Whether it takes the white space on its left, and on its right.
    strips: [bool; 2],
    /// Whether it stays text where it is found (`split_special_tokens`).
    is_text: bool,
}

/// The matchers of a tokenizer: for the text as it comes, and for its normalised form.
#[derive(Debug, Default)]
pub(super) struct AddedTokens {
    pub raw: Option<Matcher>,
    pub normalised: Option<Matcher>,
}

impl AddedTokens {
    /// `None` where a token asks for something that is left to the library: `single_word`.
    pub fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let vocabulary = tokenizer.get_added_vocabulary();
        let mut tokens: Vec<(u32, &AddedToken)> =
            vocabulary.get_added_tokens_decoder().iter().map(|(&id, token)| (id, token)).collect();
        tokens.sort_unstable_by_key(|(id, _)| *id);
        if tokens.iter().any(|(_, token)| token.single_word) {
            return None;
        }
        let splits_special = vocabulary.get_encode_special_tokens();
        let matcher = |normalised: bool| -> Option<Option<Matcher>> {
            let chosen = tokens.iter().filter(|(_, token)| token.normalized == normalised);
            let mut patterns = Vec::new();
            let mut found = Vec::new();
            for (id, token) in chosen {
                patterns.push(match tokenizer.get_normalizer().filter(|_| normalised) {
                    None => token.content.clone(),
                    Some(normalizer) => {
                        let mut text = NormalizedString::from(token.content.as_str());
                        normalizer.normalize(&mut text).ok()?;
                        text.get().to_string()
                    }
                });
                let is_text = splits_special && vocabulary.is_special_token(&token.content);
                found.push(Token { id: *id, strips: [token.lstrip, token.rstrip], is_text });
            }
            if patterns.is_empty() {
                return Some(None);
            }
            if patterns.iter().any(String::is_empty) {
                return None;
            }
            let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&patterns);
            Some(Some(Matcher { automaton: automaton.ok()?, tokens: found }))
        };
        Some(AddedTokens { raw: matcher(false)?, normalised: matcher(true)? })
    }
}

impl Matcher {
    /// Hands the parts of `text` to the caller in order.
    pub fn split<'t, E>(
        &self,
        text: &'t str,
        mut part: impl FnMut(Part<'t>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        for found in self.automaton.find_iter(text) {
            let token = &self.tokens[found.pattern().as_usize()];
            if token.is_text {
                continue;
            }
            let [left, right] = token.strips;
            let (mut start, mut end) = (found.start(), found.end());
            if left {
                start = text[..start].trim_end().len().max(done);
            }
            if right {
                end = text.len() - text[end..].trim_start().len();
            }
            if done < start {
                part(Part::Text(&text[done..start], done))?;
            }
            part(Part::Token(token.id))?;
            done = end;
        }
        if done < text.len() { part(Part::Text(&text[done..], done)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> Vec<Part<'_>> {
        let token = |id, strips, is_text| Token { id, strips, is_text };
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(["<a>", "<a><b>", "<l>", "<r>", "<t>"])
            .unwrap();
        let tokens = vec![
            token(1, [false, false], false),
            token(2, [false, false], false),
            token(3, [true, false], false),
            token(4, [false, true], false),
            token(5, [false, false], true),
        ];
        let mut parts = Vec::new();
        let matcher = Matcher { automaton, tokens };
        let split = matcher.split(text, |part| -> Result<(), ()> {
            parts.push(part);
            Ok(())
        });
        split.unwrap();
        parts
    }

    #[test]
    fn the_longest_leftmost_token_counts_and_may_take_the_space_around_it() {
        use Part::{Text, Token};
        assert_eq!(parts("x<a><b>y<a>"), [Text("x", 0), Token(2), Text("y", 7), Token(1)]);
        assert_eq!(parts("x \n<l> y"), [Text("x", 0), Token(3), Text(" y", 6)]);
        assert_eq!(parts("x <r> \u{3000}y"), [Text("x ", 0), Token(4), Text("y", 9)]);
        assert_eq!(parts("<r>  <l>"), [Token(4), Token(3)]);
        assert_eq!(parts("a<t>b"), [Text("a<t>b", 0)]);
        assert_eq!(parts(""), []);
    }
}
