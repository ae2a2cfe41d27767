//! Values as Python writes them, in `str`, `repr` and `json.dumps`: what chat templates were written against.

use std::fmt::Write;

use minijinja::value::ValueKind;
use serde_json::{Map, Value};

/// A template's value as `str` writes it.
pub(super) fn text(value: &minijinja::Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => repr(value),
    }
}

/// A template's value as `repr` writes it.
fn repr(value: &minijinja::Value) -> String {
    match value.kind() {
        ValueKind::None => "None".to_string(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).to_string(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), python_float)
        }
        ValueKind::String => quoted(&value.to_string()),
        ValueKind::Seq => format!("[{}]", joined(value, repr)),
        ValueKind::Map => {
            let member = |key: &minijinja::Value| {
                format!(
                    "{}: {}",
                    repr(key),
                    value.get_item(key).map_or_else(|_| String::new(), |item| repr(&item))
                )
            };
            format!("{{{}}}", joined(value, member))
        }
        _ => value.to_string(),
    }
}

fn joined(items: &minijinja::Value, write: impl Fn(&minijinja::Value) -> String) -> String {
    match items.try_iter() {
        Ok(items) => items.map(|item| write(&item)).collect::<Vec<_>>().join(", "),
        Err(_) => String::new(),
    }
}

/// Single quotes, unless the text holds those and no double ones.
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
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(text, "\\x{:02x}", c as u32);
            }
            c => text.push(c),
        }
    }
    text.push(quote);
    text
}

/// The arguments of `json.dumps` that Hugging Face's `tojson` takes.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub ensure_ascii: bool,
    pub indent: Option<usize>,
    /// Between items, and between key and value; by default `", "` (`","` with an indent) and `": "`.
    pub separators: Option<(String, String)>,
    pub sort_keys: bool,
}

pub(super) fn dumps(value: &Value, layout: &Layout) -> String {
    let mut text = String::new();
    write_value(value, layout, 0, &mut text);
    text
}

fn write_value(value: &Value, layout: &Layout, depth: usize, text: &mut String) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(flag) => text.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => match (number.is_f64(), number.as_f64()) {
            (true, Some(float)) => text.push_str(&python_float(float)),
            _ => text.push_str(&number.to_string()),
        },
        Value::String(string) => write_string(string, layout.ensure_ascii, text),
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item)).collect();
            write_items(['[', ']'], items, layout, depth, text);
        }
        Value::Object(members) => write_items(['{', '}'], sorted(members, layout), layout, depth, text),
    }
}

fn sorted<'a>(members: &'a Map<String, Value>, layout: &Layout) -> Vec<(Option<&'a str>, &'a Value)> {
    let mut items: Vec<_> = members.iter().map(|(key, value)| (Some(key.as_str()), value)).collect();
    if layout.sort_keys {
        items.sort_by_key(|(key, _)| *key);
    }
    items
}

fn write_items(
    [open, close]: [char; 2],
    items: Vec<(Option<&str>, &Value)>,
    layout: &Layout,
    depth: usize,
    text: &mut String,
) {
    let default_separator = if layout.indent.is_some() { "," } else { ", " };
    let (between, colon) = match &layout.separators {
        Some((between, colon)) => (between.as_str(), colon.as_str()),
        None => (default_separator, ": "),
    };
    let line_break = |depth: usize, text: &mut String| {
        if let Some(indent) = layout.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    text.push(open);
    let empty = items.is_empty();
    for (position, (key, value)) in items.into_iter().enumerate() {
        if position > 0 {
            text.push_str(between);
        }
        line_break(depth + 1, text);
        if let Some(key) = key {
            write_string(key, layout.ensure_ascii, text);
            text.push_str(colon);
        }
        write_value(value, layout, depth + 1, text);
    }
    if !empty {
        line_break(depth, text);
    }
    text.push(close);
}

fn write_string(string: &str, ensure_ascii: bool, text: &mut String) {
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
            c if (c as u32) < 0x20 || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
            c => text.push(c),
        }
    }
    text.push('"');
}

/// Python's `repr` of a finite float: the shortest digits, in scientific form below 1e-4 and from 1e16 on.
fn python_float(float: f64) -> String {
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
    use super::*;

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
        ] {
            assert_eq!(python_float(float), text);
        }
    }

    #[test]
    fn layouts_are_those_of_json_dumps() {
        let value = serde_json::json!({"b": [1, {"x": null}], "a": "é\u{1F600}\u{1}\"", "e": [], "o": {}});
        assert_eq!(
            dumps(&value, &Layout::default()),
            "{\"b\": [1, {\"x\": null}], \"a\": \"é\u{1F600}\\u0001\\\"\", \"e\": [], \"o\": {}}"
        );
        let layout = Layout { ensure_ascii: true, indent: Some(2), sort_keys: true, separators: None };
        assert_eq!(
            dumps(&value, &layout),
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude00\\u0001\\\"\",\n  \"b\": [\n    1,\n    {\n      \"x\": null\n    }\n  ],\n  \"e\": [],\n  \"o\": {}\n}"
        );
    }
}
