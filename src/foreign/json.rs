//! JSON of Python programs: `NaN`, `Infinity` and `-Infinity` stand where the standard has only numbers.
//!
//! Python's `json` writes and reads them, so model folders may hold them. Such a number is kept as a string that begins
//! with a zero byte, which no other string of a config does: it is no number for whoever reads the key, and [`write()`]
//! writes it as it was.

use serde_json::Value;

/// The words in the order in which they are looked for.
const WORDS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];

/// Reads JSON with Python's words for numbers that are not finite.
///
/// # Errors
/// The error of the parser, with line and column.
pub fn parse(text: &str) -> serde_json::Result<Value> {
    match marked(text) {
        None => serde_json::from_str(text),
        Some(marked) => serde_json::from_str(&marked),
    }
}

/// A value as JSON on several lines, with Python's words where [`parse`] read them.
pub fn write(value: &Value) -> String {
    shown(format!("{value:#}"))
}

/// JSON that was written from values of [`parse`], with Python's words.
pub fn shown(json: String) -> String {
    WORDS.iter().fold(json, |json, word| json.replace(&mark(word), word))
}

fn mark(word: &str) -> String {
    format!("\"\\u0000{word}\"")
}

/// The text with each word outside strings turned into a string; `None` if there is none.
fn marked(text: &str) -> Option<String> {
    if !WORDS.iter().any(|word| text.contains(word)) {
        return None;
    }
    let mut marked = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match WORDS.iter().find(|word| rest.starts_with(**word)) {
            Some(word) => {
                marked.push_str(&mark(word));
                rest = &rest[word.len()..];
                continue;
            }
            None if first == '"' => string_end(rest),
            None => first.len_utf8(),
        };
        marked.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    Some(marked)
}

/// Bytes of the string at the beginning of `text`, with its quotes; all of it if it does not end.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (place, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return place + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_words_are_read_and_written_again_and_strings_stay() {
        let text = r#"{"a": NaN, "NaN": "NaN \" Infinity", "b": [-Infinity, Infinity, 1], "c": "\\"}"#;
        let value = parse(text).unwrap();
        assert_eq!(value["NaN"], "NaN \" Infinity");
        assert_eq!(value["a"].as_f64(), None);
        assert_eq!(value["c"], "\\");
        assert_eq!(shown(value["b"].to_string()), "[-Infinity,Infinity,1]");
        let written = write(&value);
        assert!(
            written.contains("\"a\": NaN") && written.contains("\"NaN\": \"NaN \\\" Infinity\""),
            "{written}"
        );
        assert_eq!(parse(&written).unwrap(), value);
        assert_eq!(parse("{\"a\": 1}").unwrap()["a"], 1);
    }

    #[test]
    fn an_error_has_the_place_in_the_text() {
        for text in ["{\"a\": NaN,\n \"b\": nan}", "{\"a\": 1,\n \"b\": nan}", "{\"a\": NaN,\n \"b"] {
            assert!(parse(text).unwrap_err().to_string().contains("line 2"), "{text}");
        }
    }
}
