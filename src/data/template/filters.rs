//! Jinja's filters that minijinja lacks, or has with other results.

use minijinja::value::{Kwargs, Value, ValueKind};
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
    environment.add_filter("truncate", minijinja_contrib::filters::truncate);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_filter("forceescape", |state: &State, value: &Value| {
        text(state, value).map(|text| escaped(&text))
    });
    environment.add_filter("escape", |state: &State, value: &Value| escape(state, value));
    environment.add_filter("e", |state: &State, value: &Value| escape(state, value));
    environment.add_filter("join", join);
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
