//! Chat templates: Hugging Face's Jinja dialect on minijinja.
//!
//! What `apply_chat_template` gives a template is there: `trim_blocks` and `lstrip_blocks`, loop controls,
//! Python's string and mapping methods, `raise_exception`, `strftime_now`, `tojson` with `json.dumps`' layout,
//! `{% generation %}` blocks, special tokens by name, and `tools` and `documents` (none unless a record brings them).

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind, Output, State};
use serde_json::{Map, Value as Json};

use super::Message;
use super::python;
use crate::{Error, Result};

const DEFAULT: &str = "default";
/// The named template that Hugging Face picks for conversations with tools, where there is one.
const TOOL_USE: &str = "tool_use";

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    has_tool_use: bool,
    path: PathBuf,
    fingerprint: [u8; 32],
    time: Arc<OnceLock<Timestamp>>,
}

/// Why a template gave no text for a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRefusal {
    /// What the template itself said through `raise_exception`, or what went wrong in it.
    pub message: String,
    /// Whether the template raised on purpose.
    pub raised: bool,
}

impl fmt::Display for TemplateRefusal {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self.raised {
            true => write!(formatter, "the chat template refuses this conversation: {}", self.message),
            false => write!(formatter, "the chat template fails on this conversation: {}", self.message),
        }
    }
}

/// A `raise_exception` on its way out of minijinja.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl StdError for Raised {}

impl ChatTemplate {
    /// Compiles the template of a model folder: the file `overriding` if given, else the folder's
    /// `chat_template.jinja`, else `chat_template` of its `tokenizer_config.json` (a string, or a list of named
    /// templates with one named `default`). `None` if the folder has none.
    pub fn load(
        folder: &Path,
        tokenizer_config: &Map<String, Json>,
        special_tokens: BTreeMap<String, String>,
        overriding: Option<&Path>,
    ) -> Result<Option<Self>> {
        let file = folder.join("chat_template.jinja");
        let path = match overriding {
            Some(path) => Some(path),
            None if file.is_file() => Some(file.as_path()),
            None => None,
        };
        if let Some(path) = path {
            let source = fs::read_to_string(path).map_err(|error| Error::io(path, "read", error))?;
            return Self::compile(path, [(DEFAULT.to_string(), source)], special_tokens).map(Some);
        }
        let path = folder.join("tokenizer_config.json");
        match tokenizer_config.get("chat_template") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::String(source)) => {
                Self::compile(&path, [(DEFAULT.to_string(), source.clone())], special_tokens).map(Some)
            }
            Some(Json::Array(named)) => {
                Self::compile(&path, named_templates(&path, named)?, special_tokens).map(Some)
            }
            Some(_) => Err(Error::model(
                &path,
                "`chat_template` is neither a string nor a list of named templates",
                "mend it, or pass --chat-template FILE",
            )),
        }
    }

    /// Compiles one template from its source; `path` is what errors name.
    pub fn from_source(path: &Path, source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        Self::compile(path, [(DEFAULT.to_string(), source.to_string())], special_tokens)
    }

    fn compile(
        path: &Path,
        sources: impl IntoIterator<Item = (String, String)>,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<Self> {
        let time = Arc::new(OnceLock::new());
        let does_not_compile = |name: &str, error: minijinja::Error| {
            let line =
                error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
            Error::model(
                path,
                format!("the chat template `{name}` does not compile{line}: {}", describe(&error)),
                "mend it, or pass --chat-template FILE",
            )
        };
        let mut environment = environment(time.clone()).map_err(|error| does_not_compile(DEFAULT, error))?;
        let mut hasher = blake3::Hasher::new();
        let mut has_tool_use = false;
        for (name, source) in sources {
            hasher.update(name.as_bytes()).update(&[0]).update(source.as_bytes()).update(&[0]);
            has_tool_use |= name == TOOL_USE;
            environment
                .add_template_owned(name.clone(), without_generation_tags(&unix_line_ends(&source)))
                .map_err(|error| does_not_compile(&name, error))?;
        }
        for (name, token) in &special_tokens {
            hasher.update(name.as_bytes()).update(&[0]).update(token.as_bytes()).update(&[0]);
        }
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(ChatTemplate {
            environment,
            special_tokens,
            has_tool_use,
            path: path.to_path_buf(),
            fingerprint,
            time,
        })
    }

    /// Fixes what `strftime_now` calls now, so that a resumed run sees the texts of the run it continues. Without
    /// it, now is the first moment a template asks, for the life of this template. The first call wins.
    pub fn fix_time(&self, unix_seconds: i64) -> Result<()> {
        let time = Timestamp::from_second(unix_seconds)
            .map_err(|error| Error::config(format!("no such time: {error}"), "give seconds since 1970"))?;
        self.time.get_or_init(|| time);
        Ok(())
    }

    /// The time `strftime_now` was asked for, if a template asked: what [`Self::fix_time`] takes on resuming.
    pub fn time_used(&self) -> Option<i64> {
        self.time.get().map(|time| time.as_second())
    }

    /// Where the template was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hash of the template's sources and special tokens.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The text of `messages`, with the opening of the assistant's turn behind it if `add_generation_prompt`.
    /// `variables` come in front of the special tokens of the same name.
    pub fn render(
        &self,
        messages: &[&Message],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, TemplateRefusal> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        for (name, token) in &self.special_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        for (name, value) in variables {
            context.insert(name, Value::from(Serde(value)));
        }
        context.insert("messages", messages.iter().map(|message| message_value(message)).collect());
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        let with_tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        let name = if self.has_tool_use && with_tools { TOOL_USE } else { DEFAULT };
        let template = self.environment.get_template(name).map_err(refusal)?;
        template.render(context).map_err(refusal)
    }
}

/// The templates of a `[{"name": ..., "template": ...}, ...]` list; one of them must be the default.
fn named_templates(path: &Path, named: &[Json]) -> Result<Vec<(String, String)>> {
    let mut templates = Vec::with_capacity(named.len());
    for entry in named {
        match (entry.get("name").and_then(Json::as_str), entry.get("template").and_then(Json::as_str)) {
            (Some(name), Some(source)) => templates.push((name.to_string(), source.to_string())),
            _ => {
                return Err(Error::model(
                    path,
                    "an entry of the list `chat_template` lacks a `name` or a `template` string",
                    "mend it, or pass --chat-template FILE",
                ));
            }
        }
    }
    if !templates.iter().any(|(name, _)| name == DEFAULT) {
        let names: Vec<&str> = templates.iter().map(|(name, _)| name.as_str()).collect();
        return Err(Error::model(
            path,
            format!("no chat template is named `default` (there are: {})", names.join(", ")),
            "write the one you want to a file and pass --chat-template FILE",
        ));
    }
    templates.retain(|(name, _)| name == DEFAULT || name == TOOL_USE);
    Ok(templates)
}

fn environment(
    time: Arc<OnceLock<Timestamp>>,
) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out: &mut Output, _: &mut State, value: &Value| {
        out.write_str(&python::text(value)).map_err(minijinja::Error::from)
    });
    environment.add_filter("string", |value: &Value| python::text(value));
    environment.add_filter("tojson", to_json);
    environment.add_test("iterable", |value: &Value| {
        // As Python has it: strings are iterable, None is not.
        match value.kind() {
            ValueKind::String => true,
            ValueKind::None => false,
            _ => value.try_iter().is_ok(),
        }
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_function("raise_exception", |message: String| -> std::result::Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: &str| {
        let now = time.get_or_init(Timestamp::now).to_zoned(TimeZone::system());
        jiff::fmt::strtime::format(format, &now).map_err(|error| {
            minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {error}"))
        })
    });
    Ok(environment)
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Value, arguments: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let invalid = |message: String| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let layout = python::Layout {
        ensure_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: arguments.get("indent")?,
        separators: match separators.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => return Err(invalid("tojson: separators are two strings".to_string())),
        },
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined".to_string()));
    }
    let json = serde_json::to_value(value).map_err(|error| invalid(format!("tojson: {error}")))?;
    Ok(python::dumps(&json, &layout))
}

/// A message for the template; reasoning goes by the names transformers gives it.
fn message_value(message: &Message) -> Value {
    const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = NAMES.iter().find_map(|&name| message.other.get(name).filter(|value| !value.is_null()));
    let Some(reasoning) = reasoning.cloned() else { return Value::from(Serde(message)) };
    let mut message = message.clone();
    message.other.entry("thinking").or_insert_with(|| reasoning.clone());
    message.other.insert("reasoning_content".to_string(), reasoning);
    Value::from(Serde(&message))
}

/// Jinja turns every kind of line end in a template into `\n`.
fn unix_line_ends(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's tokens and print nothing, by
/// `with` blocks: these keep the tags' white space control, and names set inside stay inside, as they do there.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}").map(|end| end + 2) else { break };
        let tag = &rest[start..start + length];
        let inner = tag[2..tag.len() - 2].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        text.push_str(&rest[..start]);
        match inner {
            "generation" => text.push_str(&tag.replace("generation", "with")),
            "endgeneration" => text.push_str(&tag.replace("endgeneration", "endwith")),
            _ => {
                // Only the opening goes: a `{%` inside a string of this tag may open the next candidate.
                text.push_str("{%");
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = &rest[start + length..];
    }
    text.push_str(rest);
    text
}

fn refusal(error: minijinja::Error) -> TemplateRefusal {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return TemplateRefusal { message: message.clone(), raised: true };
        }
        cause = current.source();
    }
    let line = error.line().map_or_else(String::new, |line| format!(" (line {line} of the template)"));
    TemplateRefusal { message: describe(&error) + &line, raised: false }
}

fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_with_tags_and_nothing_else_changes() {
        let source = "{%- generation -%}a{% endgeneration %}{% if '{% generation %}' %}{{ generation }}{%+endgeneration+%}";
        assert_eq!(
            without_generation_tags(source),
            "{%- with -%}a{% endwith %}{% if '{% with %}' %}{{ generation }}{%+endwith+%}"
        );
        assert_eq!(without_generation_tags("{% unfinished"), "{% unfinished");
    }
}
