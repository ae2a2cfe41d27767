//! Python's methods of strings, mappings and lists, which templates call on their values.
//!
//! Where minijinja's own set has a method and does what Python does, that one is used.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::limits::pay_for_bytes;
use crate::data::python;

type Result<T> = std::result::Result<T, Error>;

/// Calls `method` of `value`.
pub(super) fn call(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value> {
    let answer = match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            pay_for_bytes(state, text.len())?;
            of_string(state, text, method, arguments)?
        }
        ValueKind::Map => of_mapping(value, method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => of_list(state, value, method, arguments)?,
        ValueKind::Number if method == "is_integer" => {
            Some(Value::from(f64::try_from(value.clone()).is_ok_and(|float| float.fract() == 0.0)))
        }
        _ => None,
    };
    match answer {
        Some(answer) => Ok(answer),
        None => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn of_mapping(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>> {
    match method {
        "copy" => {
            let () = from_args(arguments)?;
            Ok(Some(value.clone()))
        }
        _ => Ok(None),
    }
}

fn of_list(state: &State, value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>> {
    match method {
        "copy" => {
            let () = from_args(arguments)?;
            Ok(Some(value.clone()))
        }
        "index" | "count" => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let mut count = 0;
            for (index, item) in value.try_iter()?.checked().enumerate() {
                state.consume_fuel(1)?;
                if item? == *wanted {
                    if method == "index" {
                        return Ok(Some(Value::from(index)));
                    }
                    count += 1;
                }
            }
            match method {
                "count" => Ok(Some(Value::from(count))),
                _ => Err(invalid("index: the value is not in the list")),
            }
        }
        _ => Ok(None),
    }
}

fn of_string(state: &State, text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>> {
    let answer = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(arguments)?;
            Value::from(stripped(text, characters, method))
        }
        "split" | "rsplit" => split(state, text, method == "rsplit", arguments)?,
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(arguments)?;
            let keep = keep.or(named.get("keepends")?).unwrap_or(false);
            named.assert_all_used()?;
            split_lines(text, keep).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            partition(text, separator, method == "rpartition")?
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "startswith" | "endswith" => {
            let (affixes, start, end): (&Value, Option<i64>, Option<i64>) = from_args(arguments)?;
            Value::from(has_affix(text, method == "startswith", affixes, start, end)?)
        }
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, method, arguments)?,
        "title" => Value::from(title(text)),
        "swapcase" => Value::from(swap_case(text)),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss").replace('ς', "σ")),
        "ljust" | "rjust" | "center" | "zfill" => justified(state, text, method, arguments)?,
        "expandtabs" => {
            let (size, named): (Option<i64>, Kwargs) = from_args(arguments)?;
            let size = size.or(named.get("tabsize")?).unwrap_or(8);
            named.assert_all_used()?;
            Value::from(expand_tabs(state, text, size)?)
        }
        "isspace" => every(text, python_space),
        "isdecimal" | "isdigit" | "isnumeric" if text.is_ascii() => every(text, |c| c.is_ascii_digit()),
        "isprintable" => Value::from(text.chars().all(python::is_printable)),
        "isidentifier" => Value::from(is_identifier(text)),
        "join" => join(state, text, arguments)?,
        "format" => {
            pay_for_bytes(state, asked_width(text))?;
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(answer))
}

fn every(text: &str, holds: impl Fn(char) -> bool) -> Value {
    Value::from(!text.is_empty() && text.chars().all(holds))
}

/// What `str.isspace` calls white space: Unicode's, and the four separators of ASCII.
pub(super) fn python_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

fn is_identifier(text: &str) -> bool {
    let is_start = |c: char| c == '_' || c.is_alphabetic();
    text.starts_with(is_start) && text.chars().all(|c| is_start(c) || c.is_alphanumeric())
}

/// `strip`, `lstrip` and `rstrip`.
pub(super) fn stripped<'a>(text: &'a str, characters: Option<&str>, method: &str) -> &'a str {
    let goes = |c: char| characters.map_or_else(|| python_space(c), |characters| characters.contains(c));
    let text = if method == "rstrip" { text } else { text.trim_start_matches(goes) };
    if method == "lstrip" { text } else { text.trim_end_matches(goes) }
}

fn split(state: &State, text: &str, from_right: bool, arguments: &[Value]) -> Result<Value> {
    let (separator, most, named): (Option<&Value>, Option<i64>, Kwargs) = from_args(arguments)?;
    let named_separator: Option<Value> = named.get("sep")?;
    let most = most.or(named.get("maxsplit")?).unwrap_or(-1);
    named.assert_all_used()?;
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let separator = separator.or(named_separator.as_ref()).filter(|separator| !separator.is_none());
    let Some(separator) = separator else { return Ok(split_at_space(text, most, from_right)) };
    let separator = separator.as_str().ok_or_else(|| invalid("split: the separator must be a string"))?;
    if separator.is_empty() {
        return Err(invalid("split: empty separator"));
    }
    pay_for_bytes(state, text.matches(separator).count().min(most).saturating_mul(32))?;
    let parts = most.saturating_add(1);
    Ok(match from_right {
        false => text.splitn(parts, separator).map(Value::from).collect(),
        true => {
            let mut pieces: Vec<&str> = text.rsplitn(parts, separator).collect();
            pieces.reverse();
            pieces.into_iter().map(Value::from).collect()
        }
    })
}

/// `split()`: cuts at runs of white space, so that no piece begins or ends with any.
fn split_at_space(text: &str, most: usize, from_right: bool) -> Value {
    let mut pieces = Vec::new();
    let mut rest = stripped(text, None, "strip");
    while !rest.is_empty() {
        let cut = match (pieces.len() < most, from_right) {
            (false, _) => None,
            (true, false) => rest.find(python_space),
            (true, true) => {
                rest.char_indices().rev().find(|(_, c)| python_space(*c)).map(|(at, c)| at + c.len_utf8())
            }
        };
        match (cut, from_right) {
            (None, _) => {
                pieces.push(rest);
                break;
            }
            (Some(cut), false) => {
                pieces.push(&rest[..cut]);
                rest = rest[cut..].trim_start_matches(python_space);
            }
            (Some(cut), true) => {
                pieces.push(&rest[cut..]);
                rest = rest[..cut].trim_end_matches(python_space);
            }
        }
    }
    if from_right {
        pieces.reverse();
        // What is left over at the left keeps its leading white space only where the cuts ran out.
        if let (true, Some(first)) = (pieces.len() > most, pieces.first_mut()) {
            let end = text.find(*first).map_or(0, |at| at + first.len());
            *first = &text[..end];
        }
    } else if let (true, Some(last)) = (pieces.len() > most, pieces.last_mut()) {
        let start = text.rfind(*last).unwrap_or(0);
        *last = &text[start..];
    }
    pieces.into_iter().map(Value::from).collect()
}

/// Lines as `str.splitlines` cuts them, at every line boundary of Unicode.
fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_end) {
        let end = match rest[at..].strip_prefix("\r\n") {
            Some(_) => at + 2,
            None => at + rest[at..].chars().next().map_or(0, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn partition(text: &str, separator: &str, from_right: bool) -> Result<Value> {
    if separator.is_empty() {
        return Err(invalid("partition: empty separator"));
    }
    let cut = if from_right { text.rfind(separator) } else { text.find(separator) };
    let parts = match (cut, from_right) {
        (Some(at), _) => [&text[..at], separator, &text[at + separator.len()..]],
        (None, false) => [text, "", ""],
        (None, true) => ["", "", text],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from).to_vec())))
}

/// The characters from `start` to `end`, counted as Python counts them, and the index of the first. `None` where
/// `start` lies beyond the end.
fn window(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    if start.is_none() && end.is_none() {
        return Some((text, 0));
    }
    let length = text.chars().count() as i64;
    let place = |index: i64| if index < 0 { (index.saturating_add(length)).max(0) } else { index };
    let start = place(start.unwrap_or(0));
    let end = place(end.unwrap_or(length)).min(length);
    if start > end {
        return None;
    }
    let offset = |index: i64| text.char_indices().nth(index as usize).map_or(text.len(), |(at, _)| at);
    Some((&text[offset(start)..offset(end)], start as usize))
}

fn has_affix(
    text: &str,
    at_start: bool,
    affixes: &Value,
    start: Option<i64>,
    end: Option<i64>,
) -> Result<bool> {
    let Some((text, _)) = window(text, start, end) else { return Ok(false) };
    let has = |affix: &Value| match (affix.as_str(), at_start) {
        (Some(affix), true) => Ok(text.starts_with(affix)),
        (Some(affix), false) => Ok(text.ends_with(affix)),
        (None, _) => Err(invalid(format!(
            "startswith and endswith take a string or a tuple of strings, not {}",
            affix.kind()
        ))),
    };
    if !affixes.is_tuple() {
        return has(affixes);
    }
    for affix in affixes.try_iter()?.checked() {
        if has(&affix?)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn find(text: &str, method: &str, arguments: &[Value]) -> Result<Value> {
    let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
    let found = window(text, start, end).map(|(within, first)| {
        let at = if method.starts_with('r') { within.rfind(wanted) } else { within.find(wanted) };
        let count = match wanted.is_empty() {
            true => within.chars().count() + 1,
            false => within.matches(wanted).count(),
        };
        (at.map(|at| first + within[..at].chars().count()), count)
    });
    if method == "count" {
        return Ok(Value::from(found.map_or(0, |(_, count)| count)));
    }
    match found.and_then(|(index, _)| index) {
        Some(index) => Ok(Value::from(index)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(invalid("substring not found")),
    }
}

/// `str.title`: a letter is a capital unless a letter stands before it.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        let has_case = c.is_lowercase() || c.is_uppercase();
        match in_word {
            true => titled.extend(c.to_lowercase()),
            false => titled.extend(c.to_uppercase()),
        }
        in_word = has_case;
    }
    titled
}

fn swap_case(text: &str) -> String {
    let mut swapped = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_uppercase() {
            true => swapped.extend(c.to_lowercase()),
            false => swapped.extend(c.to_uppercase()),
        }
    }
    swapped
}

/// `ljust`, `rjust`, `center` and `zfill`.
fn justified(state: &State, text: &str, method: &str, arguments: &[Value]) -> Result<Value> {
    let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
    let mut fill = fill.unwrap_or(" ").chars();
    let (Some(fill), None) = (fill.next(), fill.next()) else {
        return Err(invalid(format!("{method}: the fill is one character")));
    };
    Ok(Value::from(padded(state, text, method, width, fill)?))
}

/// `text` filled up to `width` characters.
pub(super) fn padded(state: &State, text: &str, method: &str, width: i64, fill: char) -> Result<String> {
    let length = text.chars().count();
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
    pay_for_bytes(state, missing.saturating_mul(fill.len_utf8()))?;
    let filling = |count: usize| std::iter::repeat_n(fill, count);
    let mut filled = String::new();
    match method {
        "ljust" => {
            filled.push_str(text);
            filled.extend(filling(missing));
        }
        "rjust" => {
            filled.extend(filling(missing));
            filled.push_str(text);
        }
        "zfill" => {
            let sign = usize::from(text.starts_with(['+', '-']));
            filled.push_str(&text[..sign]);
            filled.extend(std::iter::repeat_n('0', missing));
            filled.push_str(&text[sign..]);
        }
        // CPython gives the odd character to the left where the width is odd.
        _ => {
            let left = missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1);
            filled.extend(filling(left));
            filled.push_str(text);
            filled.extend(filling(missing - left));
        }
    }
    Ok(filled)
}

fn expand_tabs(state: &State, text: &str, size: i64) -> Result<String> {
    let size = usize::try_from(size).unwrap_or(0);
    pay_for_bytes(state, text.matches('\t').count().saturating_mul(size))?;
    let mut expanded = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                expanded.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                expanded.push(c);
                column = 0;
            }
            c => {
                expanded.push(c);
                column += 1;
            }
        }
    }
    Ok(expanded)
}

fn join(state: &State, separator: &str, arguments: &[Value]) -> Result<Value> {
    let (items,): (&Value,) = from_args(arguments)?;
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = item?;
        let Some(text) = item.as_str() else {
            return Err(invalid(format!("join: item {index} is no string but {}", item.kind())));
        };
        state.consume_fuel(1)?;
        let separator = if index > 0 { separator } else { "" };
        pay_for_bytes(state, separator.len() + text.len())?;
        joined.push_str(separator);
        joined.push_str(text);
    }
    Ok(Value::from(joined))
}

/// The sum of the widths and precisions that a format string asks for.
fn asked_width(format: &str) -> usize {
    let mut sum = 0usize;
    for field in format.split('{').skip(1) {
        let field = field.split('}').next().unwrap_or_default();
        for digits in field.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()) {
            sum = sum.saturating_add(digits.parse().unwrap_or(usize::MAX));
        }
    }
    sum
}
