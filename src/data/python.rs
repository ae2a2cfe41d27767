//! Values as Python writes them, in `str`, `repr` and `json.dumps`: what chat templates were written against.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Limits of what may be written of one value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Lists and mappings within each other.
    pub levels: usize,
    pub bytes: usize,
}

/// A template's value as `str` writes it.
pub(super) fn text(value: &Value, bounds: Bounds) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(String::new()),
        ValueKind::String => Ok(value.to_string()),
        _ => {
            let mut writer = Writer::new(bounds);
            writer.repr(value, 0)?;
            Ok(writer.text)
        }
    }
}

/// The arguments of `json.dumps` that Hugging Face's `tojson` takes.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub ensure_ascii: bool,
    /// What one level is indented by; `None` writes one line.
    pub indent: Option<String>,
    /// Between items, and between key and value; by default `", "` (`","` with an indent) and `": "`.
    pub separators: Option<(String, String)>,
    pub sort_keys: bool,
}

/// A template's value as `json.dumps` writes it.
pub(super) fn dumps(value: &Value, layout: &Layout, bounds: Bounds) -> Result<String, Error> {
    let mut writer = Writer::new(bounds);
    writer.json(value, layout, 0)?;
    Ok(writer.text)
}

struct Writer {
    text: String,
    bounds: Bounds,
}

impl Writer {
    fn new(bounds: Bounds) -> Self {
        Writer { text: String::new(), bounds }
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.text.push_str(text);
        self.check(0)
    }

    /// Refuses to grow by `more` bytes beyond the bound.
    fn check(&self, more: usize) -> Result<(), Error> {
        match self.text.len().saturating_add(more) <= self.bounds.bytes {
            true => Ok(()),
            false => Err(Error::from(ErrorKind::OutOfFuel)),
        }
    }

    fn enter(&self, level: usize) -> Result<usize, Error> {
        match level < self.bounds.levels {
            true => Ok(level + 1),
            false => Err(super::template::too_deep()),
        }
    }

    fn repr(&mut self, value: &Value, level: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined => self.push("Undefined"),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number => self.push(&number(value)),
            ValueKind::String => self.push(&quoted(value.as_str().unwrap_or_default())),
            ValueKind::Seq | ValueKind::Iterable => {
                let level = self.enter(level)?;
                let is_tuple = value.is_tuple();
                self.push(if is_tuple { "(" } else { "[" })?;
                let mut count = 0;
                for item in value.try_iter()?.checked() {
                    if count > 0 {
                        self.push(", ")?;
                    }
                    count += 1;
                    self.repr(&item?, level)?;
                }
                self.push(match (is_tuple, count) {
                    (false, _) => "]",
                    (true, 1) => ",)",
                    (true, _) => ")",
                })
            }
            ValueKind::Map => {
                let level = self.enter(level)?;
                self.push("{")?;
                for (index, key) in value.try_iter()?.checked().enumerate() {
                    let key = key?;
                    if index > 0 {
                        self.push(", ")?;
                    }
                    self.repr(&key, level)?;
                    self.push(": ")?;
                    self.repr(&value.get_item(&key)?, level)?;
                }
                self.push("}")
            }
            _ => self.push(&value.to_string()),
        }
    }

    fn json(&mut self, value: &Value, layout: &Layout, level: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&json_number(value)),
            ValueKind::String => self.json_string(value.as_str().unwrap_or_default(), layout),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Result<Vec<Value>, Error> = value.try_iter()?.checked().collect();
                let items = items?.into_iter().map(|item| (None, item)).collect();
                self.json_items(["[", "]"], items, layout, level)
            }
            ValueKind::Map => {
                let mut members = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    let member = value.get_item(&key)?;
                    members.push((Some(json_key(&key)?), member));
                }
                if layout.sort_keys {
                    members.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.json_items(["{", "}"], members, layout, level)
            }
            _ => Err(not_json(value)),
        }
    }

    fn json_items(
        &mut self,
        [open, close]: [&str; 2],
        items: Vec<(Option<String>, Value)>,
        layout: &Layout,
        level: usize,
    ) -> Result<(), Error> {
        let inner = self.enter(level)?;
        let default_separator = if layout.indent.is_some() { "," } else { ", " };
        let (between, colon) = match &layout.separators {
            Some((between, colon)) => (between.as_str(), colon.as_str()),
            None => (default_separator, ": "),
        };
        self.push(open)?;
        for (position, (key, value)) in items.iter().enumerate() {
            if position > 0 {
                self.push(between)?;
            }
            self.line_break(layout, inner)?;
            if let Some(key) = key {
                self.json_string(key, layout)?;
                self.push(colon)?;
            }
            self.json(value, layout, inner)?;
        }
        if !items.is_empty() {
            self.line_break(layout, level)?;
        }
        self.push(close)
    }

    fn line_break(&mut self, layout: &Layout, level: usize) -> Result<(), Error> {
        let Some(indent) = &layout.indent else { return Ok(()) };
        self.check(indent.len().saturating_mul(level))?;
        self.text.push('\n');
        self.text.extend(std::iter::repeat_n(indent.as_str(), level));
        Ok(())
    }

    fn json_string(&mut self, string: &str, layout: &Layout) -> Result<(), Error> {
        let text = &mut self.text;
        text.push('"');
        for c in string.chars() {
            match c {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                '\u{8}' => text.push_str("\\b"),
                '\u{c}' => text.push_str("\\f"),
                c if (c as u32) < 0x20 || (layout.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(text, "\\u{unit:04x}");
                    }
                }
                c => text.push(c),
            }
        }
        text.push('"');
        self.check(0)
    }
}

fn not_json(value: &Value) -> Error {
    let kind = value.kind();
    Error::new(
        ErrorKind::InvalidOperation,
        format!("tojson: a value of kind {kind} cannot be written as JSON"),
    )
}

/// The member name that `json.dumps` makes of a key.
fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_string()),
        ValueKind::None => Ok("null".to_string()),
        ValueKind::Bool => Ok((if key.is_true() { "true" } else { "false" }).to_string()),
        ValueKind::Number => Ok(json_number(key)),
        _ => Err(not_json(key)),
    }
}

fn number(value: &Value) -> String {
    match value.is_integer() {
        true => value.to_string(),
        false => f64::try_from(value.clone()).map_or_else(|_| value.to_string(), python_float),
    }
}

fn json_number(value: &Value) -> String {
    match number(value) {
        text if text == "nan" => "NaN".to_string(),
        text if text == "inf" => "Infinity".to_string(),
        text if text == "-inf" => "-Infinity".to_string(),
        text => text,
    }
}

/// Single quotes, unless the text holds those and no double ones. Characters that Python does not print are escaped.
fn quoted(string: &str) -> String {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    let mut text = String::from(quote);
    for c in string.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            c if c == quote => text.extend(['\\', c]),
            c if is_printable(c) => text.push(c),
            c => {
                // Writing to a String cannot fail.
                let _ = match c as u32 {
                    code @ 0..=0xff => write!(text, "\\x{code:02x}"),
                    code @ 0x100..=0xffff => write!(text, "\\u{code:04x}"),
                    code => write!(text, "\\U{code:08x}"),
                };
            }
        }
    }
    text.push(quote);
    text
}

/// `str.isprintable` of one character: controls, format characters, separators but the space, and private use are
/// not. Code points that Unicode has not assigned are taken for printable.
pub(super) fn is_printable(c: char) -> bool {
    let is_format = matches!(c as u32,
        0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890..=0x891 | 0x8e2 | 0x180e | 0x200b..=0x200f
        | 0x202a..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb | 0x110bd | 0x110cd | 0x13430..=0x1343f
        | 0x1bca0..=0x1bca3 | 0x1d173..=0x1d17a | 0xe0001 | 0xe0020..=0xe007f);
    let is_private = matches!(c as u32, 0xe000..=0xf8ff | 0xf0000..=0x10ffff);
    !(c.is_control() || (c.is_whitespace() && c != ' ') || is_format || is_private)
}

/// Python's `repr` of a float: the shortest digits, in scientific form below 1e-4 and from 1e16 on.
fn python_float(float: f64) -> String {
    if !float.is_finite() {
        return (if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        })
        .to_string();
    }
    let scientific = format!("{float:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if float != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;

    use super::*;

    const BOUNDS: Bounds = Bounds { levels: 200, bytes: 1000 };

    fn value(json: serde_json::Value) -> Value {
        Value::from(Serde(json))
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // Right-hand sides: CPython's repr().
        for (float, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (2.5e300, "2.5e+300"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(python_float(float), text);
        }
    }

    #[test]
    fn layouts_are_those_of_json_dumps() {
        let value =
            value(serde_json::json!({"b": [1, {"x": null}], "a": "é\u{1F600}\u{1}\"", "e": [], "o": {}}));
        assert_eq!(
            dumps(&value, &Layout::default(), BOUNDS).unwrap(),
            "{\"b\": [1, {\"x\": null}], \"a\": \"é\u{1F600}\\u0001\\\"\", \"e\": [], \"o\": {}}"
        );
        let layout =
            Layout { ensure_ascii: true, indent: Some("  ".to_string()), sort_keys: true, separators: None };
        assert_eq!(
            dumps(&value, &layout, BOUNDS).unwrap(),
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude00\\u0001\\\"\",\n  \"b\": [\n    1,\n    {\n      \"x\": null\n    }\n  ],\n  \"e\": [],\n  \"o\": {}\n}"
        );
    }

    #[test]
    fn lists_and_strings_are_written_as_python_writes_them() {
        let value = value(serde_json::json!({"a": [1, "it's", "\"'\u{7}\u{200b}é"], "b": {}}));
        assert_eq!(text(&value, BOUNDS).unwrap(), r#"{'a': [1, "it's", '"\'\x07\u200bé'], 'b': {}}"#);
    }

    #[test]
    fn what_is_written_is_bounded() {
        let long = value(serde_json::json!(["x".repeat(2000)]));
        assert!(text(&long, BOUNDS).is_err() && dumps(&long, &Layout::default(), BOUNDS).is_err());
        let wide = Layout { indent: Some(" ".repeat(2000)), ..Layout::default() };
        assert!(dumps(&value(serde_json::json!([1])), &wide, BOUNDS).is_err());
        let deep = value(serde_json::json!([[[1]]]));
        for (levels, fits) in [(2, false), (3, true)] {
            let bounds = Bounds { levels, ..BOUNDS };
            assert_eq!(text(&deep, bounds).is_ok(), fits);
            assert_eq!(dumps(&deep, &Layout::default(), bounds).is_ok(), fits);
        }
    }
}
