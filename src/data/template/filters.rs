//! Jinja's filters that minijinja lacks, or has with other results.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::environment::text;
use super::methods;

type Result<T> = std::result::Result<T, Error>;

pub(super) fn add(environment: &mut Environment) {
    environment.add_filter("center", |state: &State, value: &Value, width: Option<i64>| {
        methods::padded(state, &text(state, value)?, "center", width.unwrap_or(80), ' ')
    });
    environment.add_filter("trim", |state: &State, value: &Value, characters: Option<&str>| {
        Ok::<_, Error>(methods::stripped(&text(state, value)?, characters, "strip").to_string())
    });
    environment.add_filter("wordcount", |state: &State, value: &Value| -> Result<usize> {
        let text = text(state, value)?;
        Ok(text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count())
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("dictsort", sorted_items);
    environment.add_filter("indent", indented);
    environment.add_filter("int", int);
    environment.add_filter("float", |value: &Value, default: Option<Value>| {
        float_of(value).map_or(default.unwrap_or(Value::from(0.0)), Value::from)
    });
    environment.add_filter("urlencode", |state: &State, value: &Value| {
        text(state, value).map(|text| percent_encoded(&text))
    });
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("forceescape", |state: &State, value: &Value| {
        text(state, value).map(|text| escaped(&text))
    });
    environment.add_filter("escape", |state: &State, value: &Value| escape(state, value));
    environment.add_filter("e", |state: &State, value: &Value| escape(state, value));
    environment.add_filter("join", join);
}

/// The positional argument, or the one of that name.
fn given(positional: Option<&Value>, named: &Kwargs, name: &str) -> Result<Option<Value>> {
    let named: Option<Value> = named.get(name)?;
    Ok(positional.cloned().or(named))
}

fn flag(positional: Option<&Value>, named: &Kwargs, name: &str) -> Result<bool> {
    Ok(given(positional, named, name)?.is_some_and(|value| value.is_true()))
}

fn default(value: &Value, other: Option<&Value>, boolean: Option<&Value>, named: Kwargs) -> Result<Value> {
    let other = given(other, &named, "default_value")?.unwrap_or_else(|| Value::from(""));
    let boolean = flag(boolean, &named, "boolean")?;
    named.assert_all_used()?;
    Ok(match value.is_undefined() || (boolean && !value.is_true()) {
        true => other,
        false => value.clone(),
    })
}

/// `dictsort(case_sensitive=False, by='key', reverse=False)`.
fn sorted_items(
    state: &mut State,
    value: &Value,
    case_sensitive: Option<&Value>,
    by: Option<&Value>,
    named: Kwargs,
) -> Result<Value> {
    let case_sensitive = flag(case_sensitive, &named, "case_sensitive")?;
    let by = given(by, &named, "by")?;
    let reverse = flag(None, &named, "reverse")?;
    named.assert_all_used()?;
    let attribute = if by.as_ref().and_then(Value::as_str) == Some("value") { 1 } else { 0 };
    let mut keyed = Vec::new();
    for key in value.try_iter()?.checked() {
        state.consume_fuel(8)?;
        let key = key?;
        let pair = [key.clone(), value.get_item(&key)?];
        let sort_key = match pair[attribute].as_str() {
            Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
            _ => pair[attribute].clone(),
        };
        keyed.push((sort_key, Value::from(Tuple::from(pair.to_vec()))));
    }
    keyed.sort_by(|(one, _), (other, _)| if reverse { other.cmp(one) } else { one.cmp(other) });
    Ok(keyed.into_iter().map(|(_, pair)| pair).collect())
}

/// `indent(width=4, first=False, blank=False)`, where the width may be a text.
fn indented(
    state: &State,
    value: &Value,
    width: Option<&Value>,
    first: Option<&Value>,
    named: Kwargs,
) -> Result<String> {
    let width = given(width, &named, "width")?.unwrap_or(Value::from(4));
    let first = flag(first, &named, "first")?;
    let blank = flag(None, &named, "blank")?;
    named.assert_all_used()?;
    let text = text(state, value)?;
    let indent_bytes = match width.as_str() {
        Some(indent) => indent.len(),
        None => usize::try_from(i64::try_from(width.clone())?.max(0)).unwrap_or(usize::MAX),
    };
    let lines = text.matches('\n').count() + 1;
    super::limits::pay_for_bytes(state, indent_bytes.saturating_mul(lines))?;
    let indent = width.as_str().map_or_else(|| " ".repeat(indent_bytes), str::to_string);
    let mut indented = String::with_capacity(text.len());
    // Jinja adds a line end before it cuts the text into lines, so a last empty line is one.
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            indented.push('\n');
        }
        if (index > 0 || first) && (blank || !line.is_empty()) {
            indented.push_str(&indent);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

/// `int(default=0, base=10)`.
fn int(value: &Value, default: Option<&Value>, base: Option<u32>, named: Kwargs) -> Result<Value> {
    let default = given(default, &named, "default")?.unwrap_or(Value::from(0));
    let base = base.or(named.get("base")?).unwrap_or(10);
    named.assert_all_used()?;
    if let Some(text) = value.as_str() {
        let text = text.trim().replace('_', "").to_lowercase();
        let (sign, digits) = text.strip_prefix('-').map_or((1, text.as_str()), |digits| (-1, digits));
        let prefix = match base {
            16 => "0x",
            8 => "0o",
            2 => "0b",
            _ => "",
        };
        let digits = digits.strip_prefix(prefix).unwrap_or(digits);
        if (2..=36).contains(&base)
            && let Ok(integer) = i128::from_str_radix(digits, base)
        {
            return Ok(Value::from(sign * integer));
        }
    } else if value.is_integer() {
        return Ok(value.clone());
    }
    let whole = float_of(value).map(f64::trunc).filter(|float| float.is_finite() && float.abs() < 1e38);
    Ok(whole.map_or(default, |float| Value::from(float as i128)))
}

fn float_of(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
fn truncate(
    state: &State,
    value: &Value,
    length: Option<&Value>,
    kill_words: Option<&Value>,
    named: Kwargs,
) -> Result<String> {
    let count = |value: Option<Value>, default: usize| value.map_or(Ok(default), usize::try_from);
    let length = count(given(length, &named, "length")?, 255)?;
    let kill_words = flag(kill_words, &named, "killwords")?;
    let leeway = count(named.get("leeway")?, 5)?;
    let end: Option<String> = named.get("end")?;
    let end = end.unwrap_or_else(|| "...".to_string());
    named.assert_all_used()?;
    let text = text(state, value)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let kept = match kill_words {
        true => kept.as_str(),
        false => kept.rsplit_once(' ').map_or(kept.as_str(), |(kept, _)| kept),
    };
    Ok(kept.to_string() + &end)
}

fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Markup is left as it is, all else is escaped as MarkupSafe does it.
fn escape(state: &State, value: &Value) -> Result<Value> {
    match value.is_safe() {
        true => Ok(value.clone()),
        false => Ok(Value::from_safe_string(escaped(&text(state, value)?))),
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Jinja's `join(d='', attribute=None)`: every item as `str` writes it.
fn join(
    state: &State,
    value: &Value,
    between: Option<&Value>,
    attribute: Option<&Value>,
    named: Kwargs,
) -> Result<String> {
    let named_between: Option<Value> = named.get("d")?;
    let named_attribute: Option<Value> = named.get("attribute")?;
    named.assert_all_used()?;
    let between =
        between.or(named_between.as_ref()).map_or(Ok(String::new()), |between| text(state, between))?;
    let attribute = attribute.or(named_attribute.as_ref()).filter(|attribute| !attribute.is_none());
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut joined = String::new();
    for (index, item) in value.try_iter()?.checked().enumerate() {
        let mut item = item?;
        if let Some(attribute) = attribute {
            item = attribute_of(&item, attribute)?;
        }
        let item = text(state, &item)?;
        let separator = if index > 0 { between.as_str() } else { "" };
        state.consume_fuel(1)?;
        super::limits::pay_for_bytes(state, separator.len() + item.len())?;
        joined.push_str(separator);
        joined.push_str(&item);
    }
    Ok(joined)
}

/// `a.b.0` of a value, or an integer index.
fn attribute_of(value: &Value, attribute: &Value) -> Result<Value> {
    if attribute.kind() == ValueKind::Number {
        return value.get_item(attribute);
    }
    let Some(path) = attribute.as_str() else {
        return Err(Error::new(ErrorKind::InvalidOperation, "an attribute is a name or an index"));
    };
    path.split('.').try_fold(value.clone(), |value, part| match part.parse::<usize>() {
        Ok(index) => value.get_item(&Value::from(index)),
        Err(_) => value.get_attr(part),
    })
}
