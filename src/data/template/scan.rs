//! A template's source before minijinja reads it: its tags are found as Jinja finds them, counted, and rewritten.
//!
//! Two things are rewritten, in place, so that line numbers stay: `{% generation %}` blocks become `with` blocks, and
//! what `{% set %}` keeps goes through a check of its depth ([`KEEP`], [`KEEP_IN_NAMESPACE`]).

use std::ops::Range;

/// Longest source. The longest published templates have 30 thousand bytes.
const SOURCE_BYTES: usize = 1 << 20;
/// Most words and signs in all tags together, and in one tag: they bound how deep the parsed template nests, and
/// so how much stack its compilation takes.
const TEMPLATE_TOKENS: usize = 40_000;
const TAG_TOKENS: usize = 8_000;

/// The function that a value passes before `{% set name = value %}` keeps it.
pub(super) const KEEP: &str = "__mmpo_keep";
/// As [`KEEP`], before `{% set namespace.name = value %}`; its second argument says that the value is a new namespace.
pub(super) const KEEP_IN_NAMESPACE: &str = "__mmpo_keep_in_namespace";

/// Why a source is refused before it is compiled.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge {
    pub message: String,
    /// 1-based.
    pub line: usize,
}

/// A source that is ready to be compiled.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prepared {
    pub text: String,
    /// Words and signs in the tag that has most of them.
    pub largest_tag: usize,
    /// Whether it has macros or recursive loops, which can call themselves.
    pub has_calls: bool,
}

/// The source that minijinja compiles.
pub(super) fn prepare(source: &str) -> Result<Prepared, TooLarge> {
    let refuse = |message: String, offset: usize| TooLarge {
        message,
        line: 1 + source[..offset].bytes().filter(|&byte| byte == b'\n').count(),
    };
    if source.len() > SOURCE_BYTES {
        let message = format!("it has {} bytes; at most {SOURCE_BYTES} are read", source.len());
        return Err(refuse(message, 0));
    }
    let mut text = String::with_capacity(source.len());
    let mut copied = 0;
    let mut all_tokens = 0;
    let (mut largest_tag, mut has_calls) = (0, false);
    let mut at = 0;
    while let Some(tag) = next_tag(source, at) {
        at = tag.end;
        all_tokens += tag.tokens.len();
        largest_tag = largest_tag.max(tag.tokens.len());
        if tag.tokens.len() > TAG_TOKENS {
            let message = format!("one tag holds more than {TAG_TOKENS} words and signs");
            return Err(refuse(message, tag.start));
        }
        if all_tokens > TEMPLATE_TOKENS {
            let message = format!("its tags hold more than {TEMPLATE_TOKENS} words and signs");
            return Err(refuse(message, tag.start));
        }
        if tag.is_block && source[..tag.end].ends_with("%}") {
            has_calls |=
                tag.tokens.iter().any(|token| matches!(&source[token.place.clone()], "macro" | "recursive"));
            for (place, replacement) in rewritten(source, &tag.tokens) {
                text.push_str(&source[copied..place.start]);
                text.push_str(&replacement);
                copied = place.end;
            }
        }
    }
    text.push_str(&source[copied..]);
    Ok(Prepared { text, largest_tag, has_calls })
}

/// A `{{ ... }}` or a `{% ... %}`.
struct Tag {
    start: usize,
    /// The byte after the closing sign, or the source's end where the tag is not closed.
    end: usize,
    is_block: bool,
    tokens: Vec<Token>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Token {
    kind: Kind,
    place: Range<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Name,
    /// A string or a number.
    Literal,
    Sign,
}

/// The next tag from byte `at` on; comments and raw blocks are passed over.
fn next_tag(source: &str, mut at: usize) -> Option<Tag> {
    loop {
        let start = at + source[at..].find('{')?;
        match source.as_bytes()[start..].get(1) {
            Some(b'#') => at = start + 2 + source[start + 2..].find("#}")? + 2,
            Some(b'%') => {
                let tag = read_tag(source, start, "%}");
                match tag.tokens.as_slice() {
                    [only] if &source[only.place.clone()] == "raw" => at = end_of_raw(source, tag.end)?,
                    _ => return Some(tag),
                }
            }
            Some(b'{') => return Some(read_tag(source, start, "}}")),
            _ => at = start + 1,
        }
    }
}

/// The byte after the `{% endraw %}` that closes a raw block whose text begins at `at`.
fn end_of_raw(source: &str, mut at: usize) -> Option<usize> {
    loop {
        let start = at + source[at..].find("{%")?;
        let end = start + source[start..].find("%}")? + 2;
        let inner = source[start + 2..end - 2].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        if inner.trim() == "endraw" {
            return Some(end);
        }
        at = start + 2;
    }
}

/// The tag that opens at `start`. It ends at the first `close` that stands in no string and no bracket.
fn read_tag(source: &str, start: usize, close: &str) -> Tag {
    let bytes = source.as_bytes();
    let mut tokens: Vec<Token> = Vec::new();
    let mut brackets = 0usize;
    let mut at = start + 2;
    if matches!(bytes.get(at), Some(b'-' | b'+')) {
        at += 1;
    }
    let tag = |end: usize, tokens: Vec<Token>| Tag { start, end, is_block: close == "%}", tokens };
    while at < bytes.len() {
        let rest = &source[at..];
        if brackets == 0 {
            if rest.starts_with(close) {
                return tag(at + 2, tokens);
            }
            if matches!(bytes[at], b'-' | b'+') && rest[1..].starts_with(close) {
                return tag(at + 3, tokens);
            }
        }
        let length = match bytes[at] {
            byte if byte.is_ascii_whitespace() => {
                at += 1;
                continue;
            }
            b'\'' | b'"' => string_length(rest),
            byte if is_word(byte) => rest.bytes().take_while(|&byte| is_word(byte)).count(),
            byte => {
                match byte {
                    b'(' | b'[' | b'{' => brackets += 1,
                    b')' | b']' | b'}' => brackets = brackets.saturating_sub(1),
                    _ => {}
                }
                1
            }
        };
        let kind = match bytes[at] {
            b'\'' | b'"' | b'0'..=b'9' => Kind::Literal,
            byte if is_word(byte) => Kind::Name,
            _ => Kind::Sign,
        };
        tokens.push(Token { kind, place: at..at + length });
        at += length;
    }
    tag(source.len(), tokens)
}

/// Letters, digits, underscores, and every byte of a character beyond ASCII.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// Bytes of the string that `text` begins with, quotes included; all of `text` if it is not closed.
fn string_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == bytes[0] => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The replacements in a block tag: each range and its new text.
fn rewritten(source: &str, tokens: &[Token]) -> Vec<(Range<usize>, String)> {
    let word = |index: usize| tokens.get(index).map_or("", |token| &source[token.place.clone()]);
    match (tokens.len(), word(0)) {
        // These mark the assistant's tokens and print nothing. A `with` block keeps their white space control, and
        // names set inside it stay inside, as they do in theirs.
        (1, "generation") => vec![(tokens[0].place.clone(), "with".to_string())],
        (1, "endgeneration") => vec![(tokens[0].place.clone(), "endwith".to_string())],
        (_, "set") => checked_set(source, tokens),
        _ => Vec::new(),
    }
}

/// Puts the value of a `set` tag through a check, where it might be deeper than what it is made of.
fn checked_set(source: &str, tokens: &[Token]) -> Vec<(Range<usize>, String)> {
    let text = |token: &Token| &source[token.place.clone()];
    let Some(assign) = tokens.iter().position(|token| text(token) == "=") else { return Vec::new() };
    let value = &tokens[assign + 1..];
    let (Some(first), Some(last)) = (value.first(), value.last()) else { return Vec::new() };
    // `==` can stand in no target, so this is not a tag that compiles.
    if text(first) == "=" {
        return Vec::new();
    }
    let in_namespace = tokens[..assign].iter().any(|token| text(token) == ".");
    let (function, is_new) = match in_namespace {
        true => (KEEP_IN_NAMESPACE, if is_new_namespace(source, value) { ", true" } else { "" }),
        false if may_nest(source, value) => (KEEP, ""),
        false => return Vec::new(),
    };
    let (start, end) = (first.place.start, last.place.end);
    vec![(start..start, format!("{function}((")), (end..end, format!("){is_new})"))]
}

/// Whether an expression can hold more levels than its operands: it makes a list, a tuple or a mapping, or calls.
fn may_nest(source: &str, value: &[Token]) -> bool {
    let is_operand = |token: &Token| match &source[token.place.clone()] {
        "in" | "not" | "and" | "or" | "if" | "else" | "is" => false,
        ")" | "]" | "}" => true,
        _ => token.kind != Kind::Sign,
    };
    value.iter().enumerate().any(|(index, token)| match &source[token.place.clone()] {
        "(" | "{" | "," | "|" => true,
        "[" => index == 0 || !is_operand(&value[index - 1]),
        _ => false,
    })
}

/// Whether an expression is one call of `namespace` and nothing else.
fn is_new_namespace(source: &str, value: &[Token]) -> bool {
    let text = |token: &Token| &source[token.place.clone()];
    if value.len() < 3 || text(&value[0]) != "namespace" || text(&value[1]) != "(" {
        return false;
    }
    let mut open = 0usize;
    let closed = value.iter().position(|token| {
        match text(token) {
            "(" => open += 1,
            ")" => open -= 1,
            _ => return false,
        }
        open == 0
    });
    closed == Some(value.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(source: &str) -> String {
        prepare(source).expect("a small source").text
    }

    #[test]
    fn generation_tags_become_with_tags_and_nothing_else_changes() {
        for (source, expected) in [
            ("{%- generation -%}a{% endgeneration %}", "{%- with -%}a{% endwith %}"),
            ("{%generation%}a{%+endgeneration+%}", "{%with%}a{%+endwith+%}"),
        ] {
            assert_eq!(prepared(source), expected);
        }
        for source in [
            "{% if '{% generation %}' %}{{ generation }}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"{% generation %}\" }}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{% endraw %}",
            "{%- raw -%}{% set a = [1] %}{%- endraw -%}",
            "{% set generation = 1 %}",
            "{%",
            "{%}",
            "{% %}",
            "{%-",
            "{%-%}",
            "{{",
            "{{}}",
            "{#",
            "{% raw %}{%",
            "{% 'é",
            "{% 'a\\",
            "{",
            "é{é%é}",
            "{% set a = {'b': '%}'}['b'] %}{% generation",
        ] {
            assert_eq!(
                prepared(source).replace("__mmpo_keep((", "").replace("['b'])) %}", "['b'] %}"),
                source
            );
        }
    }

    #[test]
    fn values_that_may_nest_are_checked_before_they_are_kept() {
        for (source, expected) in [
            ("{% set x = [1] %}", "{% set x = __mmpo_keep(([1])) %}"),
            ("{%- set x = f(1)-%}", "{%- set x = __mmpo_keep((f(1)))-%}"),
            ("{% set x, y = 1, 2 %}", "{% set x, y = __mmpo_keep((1, 2)) %}"),
            ("{% set n.x = n.x + 1 %}", "{% set n.x = __mmpo_keep_in_namespace((n.x + 1)) %}"),
            (
                "{% set n.x = namespace(a=(1)) %}",
                "{% set n.x = __mmpo_keep_in_namespace((namespace(a=(1))), true) %}",
            ),
            (
                "{% set n.x = namespace() if n else namespace() %}",
                "{% set n.x = __mmpo_keep_in_namespace((namespace() if n else namespace())) %}",
            ),
        ] {
            assert_eq!(prepared(source), expected);
        }
        for source in
            ["{% set x = a.b[1:] %}", "{% set x %}[1]{% endset %}", "{% set x = %}", "{% set x == [] %}"]
        {
            assert_eq!(prepared(source), source);
        }
    }

    #[test]
    fn long_sources_and_long_tags_are_refused_with_their_line() {
        let long_tag = format!("a\n{{{{ 1{} }}}}", "+1".repeat(TAG_TOKENS));
        assert_eq!(prepare(&long_tag).unwrap_err().line, 2);
        assert!(prepare(&"{{ a }}".repeat(TEMPLATE_TOKENS + 1)).is_err());
        assert!(prepare(&"a".repeat(SOURCE_BYTES + 1)).is_err());
        assert!(prepare(&"a".repeat(SOURCE_BYTES)).is_ok());
    }
}
