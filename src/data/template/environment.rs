//! The Jinja environment of transformers: `ImmutableSandboxedEnvironment` with its additions, on minijinja.

use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use minijinja_contrib::globals::{cycler, joiner};

use super::filters;
use super::limits::{self, LEVELS, bytes_left};
use super::methods;
use super::refusal::Raised;
use super::scan::{KEEP, KEEP_IN_NAMESPACE};
use crate::data::python::{self, Bounds};

type Result<T> = std::result::Result<T, Error>;

/// An environment whose `strftime_now` gives `time`, which is set at its first use.
pub(super) fn environment(time: Arc<OnceLock<Timestamp>>) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(limits::STEPS));
    environment.set_recursion_limit(limits::CALLS);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out: &mut Output, state: &mut State, value: &Value| {
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&text(state, value)?),
        }
        .map_err(Error::from)
    });
    add_tests(&mut environment);
    filters::add(&mut environment);
    environment.add_filter("string", |state: &State, value: &Value| text(state, value));
    environment.add_filter("tojson", to_json);
    environment.add_function("cycler", |items: Rest<Value>| cycler(items.to_vec()));
    environment.add_function("joiner", joiner);
    environment.add_function("raise_exception", |state: &State, message: Option<&Value>| -> Result<Value> {
        let message = message.map_or(Ok(String::new()), |message| text(state, message))?;
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: &str| {
        let now = time.get_or_init(whole_second).to_zoned(TimeZone::system());
        jiff::fmt::strtime::format(of_python(format), &now).map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
        })
    });
    environment.add_function(KEEP, |state: &State, value: Value| {
        check_levels(state, &value, 0, true)?;
        Ok(value)
    });
    environment.add_function(KEEP_IN_NAMESPACE, |state: &State, value: Value, is_new: Option<bool>| {
        match is_new.unwrap_or(false) {
            true => {
                for key in value.try_iter()?.checked() {
                    check_levels(state, &value.get_item(&key?)?, 1, false)?;
                }
            }
            false => check_levels(state, &value, 0, false)?,
        }
        Ok(value)
    });
    Ok(environment)
}

/// Now, without the part of a second: a resumed run is given whole seconds.
fn whole_second() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// A format of Python's `strftime` in jiff's words. transformers gives templates a time without a time zone, which writes
/// nothing for `%z` and `%Z`; and `%f` has six digits there, here of a whole second.
fn of_python(format: &str) -> String {
    let mut ours = String::with_capacity(format.len());
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        ours.push_str(&rest[..at]);
        let directive = &rest[at..];
        let length = 1 + directive[1..].chars().next().map_or(0, char::len_utf8);
        ours.push_str(match &directive[..length] {
            "%f" => "000000",
            "%z" | "%Z" => "",
            other => other,
        });
        rest = &directive[length..];
    }
    ours + rest
}

/// A value as `str` writes it, within what the fuel pays for.
pub(super) fn text(state: &State, value: &Value) -> Result<String> {
    python::text(value, Bounds { levels: LEVELS, bytes: bytes_left(state) })
}

fn add_tests(environment: &mut Environment) {
    environment.add_test("iterable", |value: &Value| {
        // As Python has it: strings are iterable, None is not.
        match value.kind() {
            ValueKind::String | ValueKind::Undefined => true,
            ValueKind::None => false,
            _ => value.try_iter().is_ok(),
        }
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map | ValueKind::Undefined
        )
    });
}

/// Refuses a value of too many levels, and a namespace unless `namespaces` allows them: a namespace that holds itself
/// could be neither compared nor written.
fn check_levels(state: &State, value: &Value, level: usize, namespaces: bool) -> Result<()> {
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(());
    }
    if level >= LEVELS {
        return Err(limits::too_deep());
    }
    if is_namespace(value) {
        return match namespaces {
            // What it holds was checked when it was put there.
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::InvalidOperation,
                "a namespace can hold another namespace only where it is made: `set a.b = namespace(...)`",
            )),
        };
    }
    for item in value.try_iter()?.checked() {
        state.consume_fuel(1)?;
        let item = item?;
        let member = if kind == ValueKind::Map { value.get_item(&item)? } else { item };
        check_levels(state, &member, level + 1, namespaces)?;
    }
    Ok(())
}

/// minijinja has no public type for what `namespace(...)` makes; its objects do say what they are.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as transformers has it.
fn to_json(
    state: &State,
    value: &Value,
    ensure_ascii: Option<&Value>,
    indent: Option<&Value>,
    arguments: Kwargs,
) -> Result<String> {
    let invalid = |message: &str| Error::new(ErrorKind::InvalidOperation, message.to_string());
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let named_indent: Option<Value> = arguments.get("indent")?;
    let named_ascii: Option<Value> = arguments.get("ensure_ascii")?;
    let sort_keys: Option<Value> = arguments.get("sort_keys")?;
    arguments.assert_all_used()?;
    let is_true = |value: Option<&Value>| value.is_some_and(Value::is_true);
    let layout = python::Layout {
        ensure_ascii: is_true(ensure_ascii.or(named_ascii.as_ref())),
        indent: match indent.or(named_indent.as_ref()).filter(|indent| !indent.is_none()) {
            None => None,
            Some(indent) => Some(match indent.as_str() {
                Some(text) => text.to_string(),
                None => {
                    let width = i64::try_from(indent.clone())
                        .map_err(|_| invalid("tojson: indent is a number or a string"))?;
                    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
                    if width > bytes_left(state) {
                        return Err(Error::from(ErrorKind::OutOfFuel));
                    }
                    " ".repeat(width)
                }
            }),
        },
        separators: match separators.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => return Err(invalid("tojson: separators are two strings")),
        },
        sort_keys: is_true(sort_keys.as_ref()),
    };
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined"));
    }
    python::dumps(value, &layout, Bounds { levels: LEVELS, bytes: bytes_left(state) })
}
