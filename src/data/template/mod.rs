//! Chat templates: Hugging Face's Jinja dialect on minijinja.
//!
//! What `apply_chat_template` gives a template is there: `trim_blocks` and `lstrip_blocks`, loop controls,
//! Python's string and mapping methods, `raise_exception`, `strftime_now`, `tojson` with `json.dumps`' layout,
//! `{% generation %}` blocks, special tokens by name, and `tools` and `documents` (none unless a record brings them).
//! `docs/templates.md` says which template is used, what a template may use, and what is not supported.

mod end_of_turn;
mod environment;
mod filters;
mod limits;
mod methods;
mod refusal;
mod scan;
mod sources;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::Environment;
use minijinja::value::{Serde, Value};
use serde_json::{Map, Value as Json};

use super::Message;
use crate::{Error, Result};

use limits::BoundedText;
pub use limits::Watch;
pub(crate) use limits::too_deep;
pub use refusal::TemplateRefusal;
use sources::{DEFAULT, Sources, TOOL_USE};
pub(crate) use sources::{TEMPLATE_FILE, TEMPLATE_FOLDER};

/// A compiled chat template with the special tokens it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    sources: Sources,
    path: Arc<Path>,
    special_tokens: BTreeMap<String, String>,
    has_tool_use: bool,
    /// Bytes of stack that a rendering needs.
    stack: usize,
    fingerprint: [u8; 32],
    time: Arc<OnceLock<Timestamp>>,
    /// Whether the time was given, and is not that of the first use.
    time_is_fixed: AtomicBool,
}

impl ChatTemplate {
    /// Compiles the template of a model folder, with `chosen` (a name of the folder's templates, or a Jinja file) in
    /// its place if given. `None` if there is no template.
    ///
    /// # Errors
    /// [`Error::Config`] for a `chosen` that names nothing, [`Error::Model`] for templates without a default and for one
    /// that does not compile.
    pub fn load(
        folder: &Path,
        tokenizer_config: &Map<String, Json>,
        special_tokens: BTreeMap<String, String>,
        chosen: Option<&Path>,
    ) -> Result<Option<Self>> {
        let Some(sources) = Sources::read(folder, tokenizer_config, chosen)? else { return Ok(None) };
        if !sources.templates.contains_key(DEFAULT) {
            let names: Vec<&str> = sources.templates.keys().map(String::as_str).collect();
            return Err(Error::model(
                folder,
                format!("no chat template is named `default` (there are: {})", names.join(", ")),
                "choose one of them with --chat-template NAME",
            ));
        }
        Self::compile(sources, special_tokens).map(Some)
    }

    /// Compiles one template from its source; `path` is what errors name.
    ///
    /// # Errors
    /// [`Error::Model`] for a template that does not compile.
    pub fn from_source(path: &Path, source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        Self::compile(Sources::single(path, source), special_tokens)
    }

    fn compile(sources: Sources, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        let time = Arc::new(OnceLock::new());
        let mut environment = environment::environment(time.clone())
            .map_err(|error| Error::model(Path::new("minijinja"), error.to_string(), "report this"))?;
        let mut hasher = blake3::Hasher::new();
        let mut stack = 0;
        for name in [DEFAULT, TOOL_USE] {
            let Some(source) = sources.templates.get(name) else { continue };
            hasher.update(name.as_bytes()).update(&[0]).update(source.text.as_bytes()).update(&[0]);
            let does_not_compile = |line: &str, why: &str| {
                Error::model(
                    &source.path,
                    format!("the chat template `{name}` does not compile{line}: {why}"),
                    "mend it, or pass --chat-template FILE",
                )
            };
            let prepared = scan::prepare(&unix_line_ends(&source.text)).map_err(|too_large| {
                does_not_compile(&format!(" (line {} of the template)", too_large.line), &too_large.message)
            })?;
            stack = stack.max(limits::stack_of(&prepared));
            limits::with_stack(limits::DEEP_STACK, || environment.add_template_owned(name, prepared.text))
                .map_err(|error| does_not_compile(&refusal::line(&error), &refusal::describe(&error)))?;
        }
        for (name, token) in &special_tokens {
            hasher.update(name.as_bytes()).update(&[0]).update(token.as_bytes()).update(&[0]);
        }
        let path = sources.templates.get(DEFAULT).map_or(Path::new(""), |source| &source.path).into();
        let has_tool_use = sources.templates.contains_key(TOOL_USE);
        let fingerprint = *hasher.finalize().as_bytes();
        Ok(ChatTemplate {
            environment,
            sources,
            path,
            special_tokens,
            has_tool_use,
            stack,
            fingerprint,
            time,
            time_is_fixed: AtomicBool::new(false),
        })
    }

    /// Fixes what `strftime_now` calls now, so that a resumed run sees the texts of the run it continues. Without it,
    /// now is the first moment at which a template asks, for the life of this template. The first call wins.
    ///
    /// # Errors
    /// [`Error::Config`] for a time that no calendar has.
    pub fn fix_time(&self, unix_seconds: i64) -> Result<()> {
        let time = Timestamp::from_second(unix_seconds)
            .map_err(|error| Error::config(format!("no such time: {error}"), "give seconds since 1970"))?;
        self.time.get_or_init(|| time);
        self.time_is_fixed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The time `strftime_now` was asked for, if a template asked: what [`Self::fix_time`] takes on resuming.
    pub fn time_used(&self) -> Option<i64> {
        self.time.get().map(|time| time.as_second())
    }

    /// The given time as `strftime_now` sees it, with its time zone; `None` where no time was given.
    pub(super) fn fixed_moment(&self) -> Option<String> {
        let time = self.time.get().filter(|_| self.time_is_fixed.load(Ordering::Relaxed))?;
        Some(time.to_zoned(TimeZone::system()).to_string())
    }

    /// Whether texts depend on the moment at which the program runs: the template asked for a time that nobody gave.
    pub(super) fn depends_on_now(&self) -> bool {
        self.time.get().is_some() && !self.time_is_fixed.load(Ordering::Relaxed)
    }

    /// Where the template was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The templates that a saved folder must hold where --chat-template replaced the model's: names and texts.
    /// `None` where the model's own templates are used, which are kept as they are.
    pub fn replaced(&self) -> Option<BTreeMap<&str, &str>> {
        let texts = self.sources.templates.iter().map(|(name, source)| (name.as_str(), source.text.as_str()));
        self.sources.overridden.then(|| texts.collect())
    }

    /// Hash of the template's sources and special tokens.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The text of `messages`, followed by the opening of the assistant's turn if `add_generation_prompt`. `variables`
    /// take precedence over special tokens of the same name.
    ///
    /// # Errors
    /// [`TemplateRefusal`] that says why there is no text.
    pub fn render(
        &self,
        messages: &[&Message],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, TemplateRefusal> {
        let bytes = |message: &&Message| message.content.len() + limits::members_bytes(&message.other);
        let bytes = messages.iter().map(bytes).sum();
        let messages: Value = messages.iter().map(|message| message_value(message)).collect();
        self.render_value((messages, bytes), variables, add_generation_prompt)
    }

    /// As [`Self::render`], for messages with content of any kind.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_json(
        &self,
        messages: &[Json],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> std::result::Result<String, TemplateRefusal> {
        let bytes = messages.iter().map(limits::text_bytes).sum();
        self.render_value((Value::from(Serde(messages)), bytes), variables, add_generation_prompt)
    }

    /// `bytes` are those of the messages' texts.
    fn render_value(
        &self,
        (messages, bytes): (Value, usize),
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
        context.insert("messages", messages);
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        let with_tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        let name = if self.has_tool_use && with_tools { TOOL_USE } else { DEFAULT };
        let template = self.environment.get_template(name).map_err(|error| refusal::refusal(&error))?;
        let mut text = BoundedText::of_conversation(bytes + limits::members_bytes(variables));
        limits::watched(&self.path, || {
            limits::with_stack(self.stack, || template.render_captured_to(context, &mut text).map(drop))
        })
        .and_then(|()| text.into_text())
        .map_err(|error| refusal::refusal(&error))
    }
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
