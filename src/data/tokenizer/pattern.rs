//! Regular expressions that cut text into words, found in one pass.
//!
//! The patterns of byte-level tokenizers end in two alternatives, `\s+(?!\S)|\s+`: white space before a word leaves its
//! last character to that word. The lookahead makes the library go through every match with a backtracking engine.
//! Here the rest of the pattern runs on an automaton, and the lookahead is two lines of code.

use regex_automata::meta::{Cache, Regex};
use regex_automata::{Anchored, Input, Match};

/// The end of a pattern by which white space leaves its last character to the word that follows.
const TRIMMED_SPACE: &str = r"|\s+(?!\S)|\s+";

/// A pattern whose matches are words.
#[derive(Debug)]
pub(super) struct Pattern {
    /// The pattern without its end [`TRIMMED_SPACE`], then white space if it has that end.
    regex: Regex,
    /// Whether text between matches is a word too. It is dropped otherwise.
    keeps_gaps: bool,
}

/// The number of the expression for white space in [`Pattern::regex`].
const SPACE: usize = 1;

impl Pattern {
    /// `None` for a pattern with anything that two engines may read differently.
    pub fn new(source: &str, keeps_gaps: bool) -> Option<Self> {
        let regex = match source.strip_suffix(TRIMMED_SPACE) {
            Some(rest) if is_plain(rest) => Regex::new_many(&[rest, r"\s+"]),
            None if is_plain(source) => Regex::new_many(&[source]),
            _ => return None,
        };
        let regex = regex.ok()?;
        // A match of nothing would have to be stepped over as the library does it.
        (!regex.is_match("")).then_some(Pattern { regex, keeps_gaps })
    }

    /// Memory for searches, which a thread keeps from one text to the next.
    pub fn cache(&self) -> Cache {
        self.regex.create_cache()
    }

    /// The next word of `text` from byte `at` on, and where to go on after it. `None` at the end.
    pub fn next<'t>(&self, cache: &mut Cache, text: &'t str, at: &mut usize) -> Option<&'t str> {
        while *at < text.len() {
            let input = Input::new(text).range(*at..);
            // Most words follow one another without a gap, and an anchored search need not look for its start.
            let found = match self.regex.search_with(cache, &input.clone().anchored(Anchored::Yes)) {
                None => self.regex.search_with(cache, &input),
                found => found,
            };
            let (start, end) =
                found.map_or((text.len(), text.len()), |found| (found.start(), end_of(text, &found)));
            let from = *at;
            if from == start {
                *at = end;
                return Some(&text[start..end]);
            }
            *at = start;
            if self.keeps_gaps {
                return Some(&text[from..start]);
            }
        }
        None
    }
}

/// Where a match ends: white space of several characters before a word leaves the last one to the word.
fn end_of(text: &str, found: &Match) -> usize {
    let (start, end) = (found.start(), found.end());
    if found.pattern().as_usize() != SPACE || end == text.len() {
        return end;
    }
    let last = text[start..end].char_indices().next_back().map_or(0, |(last, _)| last);
    if last == 0 { end } else { start + last }
}

/// Whether a pattern has only what all engines read alike: letters, classes, groups, and greedy or lazy repetition.
fn is_plain(pattern: &str) -> bool {
    let mut rest = pattern;
    let mut depth = 0usize;
    let mut repeats = false;
    while let Some(character) = rest.chars().next() {
        rest = &rest[character.len_utf8()..];
        let repeated = std::mem::take(&mut repeats);
        match character {
            '\\' => {
                let Some(escaped) = rest.chars().next() else { return false };
                rest = &rest[escaped.len_utf8()..];
                match escaped {
                    'p' | 'P' => match rest.strip_prefix('{').and_then(|name| name.split_once('}')) {
                        Some((_, after)) => rest = after,
                        None => return false,
                    },
                    's' | 'S' | 'd' | 'D' | 'w' | 'W' | 'n' | 'r' | 't' => {}
                    _ if escaped.is_ascii_punctuation() => {}
                    _ => return false,
                }
            }
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            '(' => match rest.strip_prefix("?:").or_else(|| rest.strip_prefix("?i:")) {
                Some(after) => rest = after,
                None if rest.starts_with('?') => return false,
                None => {}
            },
            '^' | '$' => return false,
            // A second sign makes a repetition lazy (`+?`) or possessive (`++`), which not all engines have.
            '+' if repeated => return false,
            '*' | '+' | '?' | '}' => repeats = true,
            _ => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    fn words<'t>(pattern: &str, keeps_gaps: bool, text: &'t str) -> Vec<&'t str> {
        let pattern = Pattern::new(pattern, keeps_gaps).expect("a pattern of the plain kind");
        let mut cache = pattern.cache();
        let mut at = 0;
        std::iter::from_fn(|| pattern.next(&mut cache, text, &mut at)).collect()
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word_that_follows() {
        assert_eq!(words(GPT2, true, "a  b"), ["a", " ", " b"]);
        assert_eq!(words(GPT2, true, "a   12 \n\n x's  "), ["a", "  ", " 12", " \n\n", " x", "'s", "  "]);
        assert_eq!(words(GPT2, true, "a\nb"), ["a", "\n", "b"]);
        assert_eq!(words(GPT2, true, "  \u{3000}é"), ["  ", "\u{3000}", "é"]);
        assert_eq!(words(GPT2, true, ""), [""; 0]);
    }

    #[test]
    fn text_between_matches_is_kept_or_dropped() {
        assert_eq!(words(r"\p{N}{1,3}", true, "ab1234c"), ["ab", "123", "4", "c"]);
        assert_eq!(words(r"\p{N}{1,3}", false, "ab1234c"), ["123", "4"]);
    }

    #[test]
    fn what_engines_read_differently_is_not_taken() {
        for pattern in [
            r"\p{L}++",
            r"a?+",
            r"(?=x)y",
            r"(?<!x)y",
            r"^a",
            r"a$",
            r"\bx",
            r"(a)\1",
            r"\h",
            r"(?>a)",
            r"x*",
            r"\p{N}{1,3}+",
            r"a|\s+(?!\S)",
        ] {
            assert!(Pattern::new(pattern, true).is_none(), "{pattern}");
        }
        let marks = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
        assert!(Pattern::new(marks, true).is_some());
        assert!(Pattern::new(r"(?i:'s|'t)|\p{L}+?", true).is_some());
    }
}
