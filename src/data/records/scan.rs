//! Where the values of a JSON text begin and end, without building them.
//!
//! serde_json parses what is used of a record; this scanner finds it. It is here because three things are asked of
//! the rest that no parser does together: `NaN`, `Infinity` and half surrogate pairs pass in columns that nobody
//! reads (Python's `json` writes and reads all three), a skipped value costs no memory, and what breaks a text is
//! named in the words of the people who write such texts (Python literals, comments, commas before a bracket).

use std::ops::Range;

/// Most levels of lists and objects inside one another; Python's own parser ends near this depth.
const MAX_DEPTH: usize = 1000;

/// What breaks a text, and the byte where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Broken {
    pub at: usize,
    pub message: String,
    /// Whether the text ends before its value does.
    pub ended: bool,
}

impl Broken {
    fn new(at: usize, message: impl Into<String>) -> Self {
        Broken { at, message: message.into(), ended: false }
    }

    /// Not an error: the code that goes through the values has seen enough.
    pub fn stop() -> Self {
        Broken::new(0, String::new())
    }
}

/// A value's type, and whether there is anything in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    Bool,
    Number,
    Text { empty: bool },
    List { empty: bool },
    Object { empty: bool },
}

/// One value of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub range: Range<usize>,
    pub kind: Kind,
    /// `NaN` or an infinity inside, in the text's own words.
    pub not_finite: Option<String>,
    /// The first half of a surrogate pair without its other half, as it is written.
    pub surrogate: Option<String>,
}

/// Reads a text from its beginning.
#[derive(Clone, Debug)]
pub(super) struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
    not_finite: Option<String>,
    surrogate: Option<String>,
}

impl<'a> Scanner<'a> {
    pub fn new(text: &'a [u8], at: usize) -> Self {
        Scanner { text, at, not_finite: None, surrogate: None }
    }

    /// The next byte that is not white space, still to be read.
    pub fn peek(&mut self) -> Option<u8> {
        while matches!(self.text.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    /// Reads one value.
    pub fn value(&mut self) -> Result<Span, Broken> {
        self.peek();
        let start = self.at;
        (self.not_finite, self.surrogate) = (None, None);
        let kind = self.nested()?;
        Ok(Span {
            range: start..self.at,
            kind,
            not_finite: self.not_finite.take(),
            surrogate: self.surrogate.take(),
        })
    }

    /// Fails unless only white space is left.
    pub fn end(&mut self) -> Result<(), Broken> {
        match self.peek() {
            None => Ok(()),
            Some(b'{' | b'[') => Err(Broken::new(self.at, "trailing text: a second value follows the first")),
            Some(b',') => Err(Broken::new(self.at, "trailing text: a comma follows the value")),
            Some(_) => Err(Broken::new(self.at, "trailing text follows the value")),
        }
    }

    /// Reads an object, member by member.
    pub fn members(
        &mut self,
        mut each: impl FnMut(String, Span) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        self.expect(b'{')?;
        if self.closed(b'}') {
            return Ok(());
        }
        loop {
            let key = self.key()?;
            let value = self.value()?;
            each(key, value)?;
            if self.separator(b'}')? {
                return Ok(());
            }
        }
    }

    /// Reads a list, item by item.
    pub fn items(&mut self, mut each: impl FnMut(Span) -> Result<(), Broken>) -> Result<(), Broken> {
        self.expect(b'[')?;
        if self.closed(b']') {
            return Ok(());
        }
        loop {
            let value = self.value()?;
            each(value)?;
            if self.separator(b']')? {
                return Ok(());
            }
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Broken> {
        match self.peek() {
            Some(found) if found == byte => {
                self.at += 1;
                Ok(())
            }
            _ => Err(self.no_value()),
        }
    }

    fn closed(&mut self, bracket: u8) -> bool {
        let closed = self.peek() == Some(bracket);
        self.at += usize::from(closed);
        closed
    }

    /// A key and its colon.
    fn key(&mut self) -> Result<String, Broken> {
        let start = match self.peek() {
            Some(b'"') => self.at,
            _ => return Err(self.no_key()),
        };
        self.string()?;
        let key = String::from_utf8_lossy(&self.text[start..self.at]).into_owned();
        self.colon()?;
        // A half surrogate pair in a key only makes it a name that nobody looks for.
        Ok(serde_json::from_str(&key).unwrap_or(key))
    }

    fn colon(&mut self) -> Result<(), Broken> {
        match self.peek() {
            Some(b':') => {
                self.at += 1;
                Ok(())
            }
            Some(_) => Err(Broken::new(self.at, "expected `:` after a key")),
            None => Err(self.ended("an object")),
        }
    }

    /// Reads a comma (`false`) or the closing bracket (`true`).
    fn separator(&mut self, bracket: u8) -> Result<bool, Broken> {
        let found = self.peek();
        self.at += usize::from(found.is_some());
        match found {
            Some(b',') => {
                if self.peek() == Some(bracket) {
                    let message = format!("a comma stands before `{}`: trailing comma", char::from(bracket));
                    return Err(Broken::new(self.at, message));
                }
                Ok(false)
            }
            Some(byte) if byte == bracket => Ok(true),
            Some(_) => {
                self.at -= 1;
                Err(match self.comment() {
                    Some(broken) => broken,
                    None => Broken::new(
                        self.at,
                        format!("expected `,` or `{}`, found {}", char::from(bracket), self.found()),
                    ),
                })
            }
            None => Err(self.ended(if bracket == b']' { "a list" } else { "an object" })),
        }
    }

    /// Reads a value with everything in it, on a stack of brackets instead of by recursion, so that no depth exhausts
    /// the thread's stack.
    fn nested(&mut self) -> Result<Kind, Broken> {
        let mut open: Vec<u8> = Vec::new();
        let mut outer = None;
        loop {
            let kind = match self.peek() {
                Some(b'{') => Kind::Object { empty: self.open(b'}', &mut open)? },
                Some(b'[') => Kind::List { empty: self.open(b']', &mut open)? },
                _ => self.scalar()?,
            };
            let outer = *outer.get_or_insert(kind);
            if matches!(kind, Kind::Object { empty: false } | Kind::List { empty: false }) {
                continue;
            }
            loop {
                let Some(&closing) = open.last() else { return Ok(outer) };
                if !self.separator(closing)? {
                    if closing == b'}' {
                        self.skip_key()?;
                    }
                    break;
                }
                open.pop();
            }
        }
    }

    /// Reads an opening bracket, and the closing one if it follows at once (`true`).
    fn open(&mut self, closing: u8, open: &mut Vec<u8>) -> Result<bool, Broken> {
        self.at += 1;
        if self.closed(closing) {
            return Ok(true);
        }
        if open.len() == MAX_DEPTH {
            let message = format!("lists and objects are nested more than {MAX_DEPTH} deep");
            return Err(Broken::new(self.at, message));
        }
        open.push(closing);
        if closing == b'}' {
            self.skip_key()?;
        }
        Ok(false)
    }

    fn skip_key(&mut self) -> Result<(), Broken> {
        match self.peek() {
            Some(b'"') => self.string()?,
            _ => return Err(self.no_key()),
        };
        self.colon()
    }

    fn scalar(&mut self) -> Result<Kind, Broken> {
        const WORDS: [(&str, Kind); 6] = [
            ("null", Kind::Null),
            ("true", Kind::Bool),
            ("false", Kind::Bool),
            ("NaN", Kind::Number),
            ("Infinity", Kind::Number),
            ("-Infinity", Kind::Number),
        ];
        let rest = &self.text[self.at..];
        if rest.first() == Some(&b'"') {
            return Ok(Kind::Text { empty: self.string()? });
        }
        for (word, kind) in WORDS {
            if rest.starts_with(word.as_bytes()) {
                self.at += word.len();
                if kind == Kind::Number {
                    self.not_finite.get_or_insert_with(|| word.to_string());
                }
                return Ok(kind);
            }
        }
        match rest.first() {
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err(self.no_value()),
        }
    }

    fn number(&mut self) -> Result<Kind, Broken> {
        let start = self.at;
        self.at += usize::from(self.text[start] == b'-');
        let whole = self.digits();
        let leading_zero = whole > 1 && self.text[self.at - whole] == b'0';
        let mut right = whole > 0 && !leading_zero;
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            right &= self.digits() > 0;
        }
        if matches!(self.text.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.text.get(self.at), Some(b'+' | b'-')));
            right &= self.digits() > 0;
        }
        match (right, self.text.len() == self.at) {
            (true, _) => Ok(Kind::Number),
            (false, true) if !leading_zero => Err(self.ended("a number")),
            (false, _) => {
                let number = String::from_utf8_lossy(&self.text[start..self.at]);
                Err(Broken::new(start, format!("`{}` is no number of JSON", excerpt(&number))))
            }
        }
    }

    fn digits(&mut self) -> usize {
        let count = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        count
    }

    /// Reads a string, and says whether it is empty.
    fn string(&mut self) -> Result<bool, Broken> {
        let start = self.at + 1;
        self.at = start;
        loop {
            let plain = self.text[self.at..]
                .iter()
                .take_while(|&&byte| byte != b'"' && byte != b'\\' && byte >= 0x20)
                .count();
            self.at += plain;
            match self.text.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(self.at == start + 1);
                }
                Some(b'\\') => self.escape()?,
                Some(&control) => {
                    let message = format!(
                        "a string holds the control character 0x{control:02x} itself; JSON writes it as `\\u{control:04x}`"
                    );
                    return Err(Broken::new(self.at, message));
                }
                None => return Err(self.ended("a string")),
            }
        }
    }

    fn escape(&mut self) -> Result<(), Broken> {
        let start = self.at;
        match self.text.get(start + 1) {
            Some(b'u') => {}
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                return Ok(());
            }
            Some(_) => {
                return Err(Broken::new(start, "a string holds `\\` before a character that is no escape"));
            }
            None => return Err(self.ended("a string")),
        }
        self.at += 6;
        match self.code_unit(start)? {
            0xD800..=0xDBFF if self.text[self.at..].starts_with(b"\\u") => {
                if matches!(self.code_unit(self.at)?, 0xDC00..=0xDFFF) {
                    self.at += 6;
                } else {
                    self.lone_surrogate(start);
                }
            }
            0xD800..=0xDFFF => self.lone_surrogate(start),
            _ => {}
        }
        Ok(())
    }

    /// The number in the escape at `start`: a backslash, `u`, and four hexadecimal digits.
    fn code_unit(&self, start: usize) -> Result<u32, Broken> {
        let Some(digits) = self.text.get(start + 2..start + 6) else { return Err(self.ended("a string")) };
        let digits =
            std::str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|d| d.is_ascii_hexdigit()));
        digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).ok_or_else(|| {
            Broken::new(start, "a string holds `\\u` without four hexadecimal digits after it")
        })
    }

    fn lone_surrogate(&mut self, start: usize) {
        let text = String::from_utf8_lossy(&self.text[start..start + 6]).into_owned();
        self.surrogate.get_or_insert(text);
    }

    fn ended(&self, inside: &str) -> Broken {
        let message = format!("the text ends inside {inside} (EOF)");
        Broken { at: self.text.len(), message, ended: true }
    }

    /// The error at a place where a value should begin.
    fn no_value(&self) -> Broken {
        const WORDS: [(&str, &str); 8] = [
            ("None", "`None` is Python; JSON has `null`"),
            ("True", "`True` is Python; JSON has `true`"),
            ("False", "`False` is Python; JSON has `false`"),
            ("nan", "`nan` is no value of JSON; write `null`"),
            ("inf", "`inf` is no value of JSON; write `null`"),
            ("-inf", "`-inf` is no value of JSON; write `null`"),
            ("undefined", "`undefined` is JavaScript; JSON has `null`"),
            ("'", "a single quote begins a string; JSON strings stand in double quotes"),
        ];
        let rest = &self.text[self.at..];
        if rest.is_empty() {
            return Broken {
                ended: true,
                ..Broken::new(self.at, "the text ends where a value should begin (EOF)")
            };
        }
        if let Some(broken) = self.comment() {
            return broken;
        }
        match WORDS.iter().find(|(word, _)| rest.starts_with(word.as_bytes())) {
            Some((_, message)) => Broken::new(self.at, *message),
            None => Broken::new(self.at, format!("expected a value, found {}", self.found())),
        }
    }

    /// The error at a place where a key should begin.
    fn no_key(&self) -> Broken {
        match self.text.get(self.at) {
            None => self.ended("an object"),
            Some(b'\'') => {
                Broken::new(self.at, "a single quote begins a key; JSON keys stand in double quotes")
            }
            Some(b',') => Broken::new(self.at, "a comma stands where a key should begin"),
            Some(_) => match self.comment() {
                Some(broken) => broken,
                None => {
                    Broken::new(self.at, format!("expected a key in double quotes, found {}", self.found()))
                }
            },
        }
    }

    fn comment(&self) -> Option<Broken> {
        match self.text.get(self.at..) {
            Some([b'/', b'/' | b'*', ..] | [b'#', ..]) => {
                Some(Broken::new(self.at, "a comment begins here; JSON has none"))
            }
            _ => None,
        }
    }

    /// The character at this place, for messages.
    fn found(&self) -> String {
        let rest = &self.text[self.at..self.text.len().min(self.at + 4)];
        let text = String::from_utf8_lossy(rest);
        text.chars().next().map_or_else(|| "the end".to_string(), |c| format!("`{}`", c.escape_debug()))
    }
}

/// The beginning of a long text, on one line, for messages.
pub(super) fn excerpt(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).map(printable).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    shown
}

/// A character as a terminal may show it: quotes as they are, everything that is not printed escaped.
fn printable(c: char) -> String {
    match c {
        '\'' | '"' => c.to_string(),
        c => c.escape_debug().to_string(),
    }
}

/// The end of a long text, on one line, for messages.
pub(super) fn excerpt_of_end(text: &str) -> String {
    const SHOWN: usize = 40;
    let skipped = text.chars().count().saturating_sub(SHOWN);
    let end: String = text.chars().skip(skipped).map(printable).collect();
    if skipped > 0 { format!("...{end}") } else { end }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> Result<Span, Broken> {
        let mut scanner = Scanner::new(text.as_bytes(), 0);
        let span = scanner.value()?;
        scanner.end()?;
        Ok(span)
    }

    #[test]
    fn what_serde_json_reads_is_read_and_what_it_refuses_is_refused() {
        for text in [
            "{}",
            "[]",
            "[[],{}]",
            "0",
            "-0.5e+10",
            "1e5",
            "\"\"",
            "\"\\u00e9\\n\"",
            " [1 , {\"a\" : null}] ",
            "true",
            "01",
            "-",
            "1.",
            ".5",
            "+1",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "[1 2]",
            "\"\\x\"",
            "\"\\u12g4\"",
            "\"\t\"",
            "[",
            "{\"a\"",
            "{\"a\":",
            "\"a",
            "tru",
            "[1]]",
            "",
            "1 2",
            "'a'",
            "[,1]",
            "{\"a\" 1}",
            "\"\\u+123\"",
        ] {
            let ours = scan(text);
            let theirs = serde_json::from_str::<serde::de::IgnoredAny>(text);
            assert_eq!(ours.is_ok(), theirs.is_ok(), "{text:?}: {ours:?}, {theirs:?}");
        }
    }

    #[test]
    fn what_python_reads_beyond_json_is_read_and_noted() {
        let span = scan("[1, {\"a\": -Infinity}, NaN]").unwrap();
        assert_eq!(span.not_finite.as_deref(), Some("-Infinity"));
        assert_eq!(scan("\"\\ud83d\\ude00\"").unwrap().surrogate, None);
        for (text, half) in [
            ("\"a\\ud83d\"", "\\ud83d"),
            ("\"\\ude00\\ud83d\"", "\\ude00"),
            ("\"\\ud83d\\u0041\"", "\\ud83d"),
        ] {
            assert_eq!(scan(text).unwrap().surrogate.as_deref(), Some(half), "{text}");
        }
    }

    #[test]
    fn the_kind_is_that_of_the_outermost_value() {
        for (text, kind) in [
            ("{\"a\": []}", Kind::Object { empty: false }),
            ("[{}]", Kind::List { empty: false }),
            ("[ ]", Kind::List { empty: true }),
            ("\"\"", Kind::Text { empty: true }),
            ("\" \"", Kind::Text { empty: false }),
            ("null", Kind::Null),
            ("-1", Kind::Number),
        ] {
            assert_eq!(scan(text).unwrap().kind, kind, "{text}");
        }
    }

    #[test]
    fn depth_is_bounded_without_recursion() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(scan(&nested(MAX_DEPTH)).is_ok());
        assert!(scan(&nested(100_000)).unwrap_err().message.contains("nested more than"));
        assert!(scan(&"{\"a\":".repeat(100_000)).unwrap_err().message.contains("nested more than"));
    }

    #[test]
    fn breaks_are_named_in_the_words_of_their_authors() {
        for (text, words) in [
            ("{\"a\": None}", "Python"),
            ("{'a': 1}", "double quotes"),
            ("[1,]", "trailing comma"),
            ("{\"a\": 1, // b\n}", "comment"),
            ("[1 # b\n]", "comment"),
            ("[nan]", "`nan`"),
            ("{} {}", "second value"),
            ("[\"a", "EOF"),
        ] {
            let message = scan(text).unwrap_err().message;
            assert!(message.contains(words), "{text}: {message}");
        }
    }
}
