//! The formats of a pairs file: which columns hold the pair, and how they are read.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Body, FORMATS_HELP, Message, Record, implicit};
use crate::{Error, Result};

/// How the records of a file spell a pair; found from the first record, binding for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `chosen` and `rejected` are message lists. The prompt is a message list in `prompt`, or the messages with
    /// which both begin, or (where they share none) the user's message in a `prompt` string.
    Conversation,
    /// A message list in `prompt`, and strings in `chosen` and `rejected`.
    ConversationWithTextResponses,
    /// `conversations` is the prompt, `chosen` and `rejected` a message each (or a list, or a string);
    /// optionally `system`.
    ShareGpt,
    /// Strings in the named column, `chosen`, `rejected`, and optionally `system`: a conversation of one turn.
    /// The column is `question` (Orca-DPO-pairs), or `prompt` where there is a `system` column.
    Question { column: &'static str },
    /// Strings in `prompt`, `chosen` and `rejected`, to be used as they are.
    Text,
    /// Strings in `chosen` and `rejected` with a shared beginning, as in hh-rlhf.
    ImplicitText,
}

/// What is wrong with a value, before it is known where the value stands.
pub(super) struct Fault {
    pub message: String,
    pub help: String,
}

impl Fault {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Fault { message: message.into(), help: help.into() }
    }
}

/// The members of one record and where it stands.
pub(crate) struct Columns<'a> {
    pub path: &'a Path,
    pub index: usize,
    pub place: usize,
    pub members: Map<String, Value>,
}

type Parsed<T> = std::result::Result<T, Fault>;

impl Format {
    pub(crate) fn detect(columns: &Columns) -> Result<Format> {
        Self::detect_format(columns).map_err(|fault| columns.error(fault))
    }

    fn detect_format(columns: &Columns) -> Parsed<Format> {
        let chosen = columns.present("chosen")?;
        columns.present("rejected")?;
        let text_responses = match chosen {
            Value::String(_) => true,
            Value::Array(_) | Value::Object(_) => false,
            other => return Err(wrong_type("chosen", other, "a string or a list of messages")),
        };
        if columns.get("conversations").is_some() {
            return Ok(Format::ShareGpt);
        }
        if !text_responses {
            return Ok(Format::Conversation);
        }
        match columns.get("prompt") {
            Some(Value::String(_)) if columns.members.contains_key("system") => {
                Ok(Format::Question { column: "prompt" })
            }
            Some(Value::String(_)) => Ok(Format::Text),
            Some(Value::Array(_) | Value::Object(_)) => Ok(Format::ConversationWithTextResponses),
            Some(other) => Err(wrong_type("prompt", other, "a string or a list of messages")),
            None if columns.get("question").is_some() => Ok(Format::Question { column: "question" }),
            None => Ok(Format::ImplicitText),
        }
    }

    /// Reads one record in this format.
    pub(crate) fn read(self, mut columns: Columns) -> Result<Record> {
        let mut prompt_column_differs = false;
        let body = match self {
            Format::Text => columns.text_pair(),
            Format::ImplicitText => columns.implicit_text_pair(),
            Format::Question { column } => columns.question(column),
            Format::ShareGpt => columns.share_gpt(),
            Format::Conversation => columns.conversation(&mut prompt_column_differs),
            Format::ConversationWithTextResponses => columns.conversation_with_text_responses(),
        };
        match body {
            Ok(body) => {
                Ok(Record { index: columns.index, place: columns.place, body, prompt_column_differs })
            }
            Err(fault) => Err(columns.error(fault)),
        }
    }
}

impl Columns<'_> {
    fn error(&self, fault: Fault) -> Error {
        Error::data(self.path, Some(self.place), fault.message, fault.help)
    }

    /// A column's value; `null` counts as absent, since table formats write it for missing values.
    fn get(&self, name: &str) -> Option<&Value> {
        self.members.get(name).filter(|value| !value.is_null())
    }

    fn present(&self, name: &str) -> Parsed<&Value> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Fault {
        if self.members.get(name).is_some_and(Value::is_null) {
            return Fault::new(format!("column `{name}` is null"), FORMATS_HELP);
        }
        let others = || self.members.keys().map(String::as_str).filter(|key| *key != name);
        let message = match nearest(name, others()) {
            Some(near) => format!("no column `{name}`; the nearest present column is `{near}`"),
            None if self.members.is_empty() => format!("no column `{name}`: the record is empty"),
            None => {
                let names: Vec<&str> = others().take(12).collect();
                format!("no column `{name}` among `{}`", names.join("`, `"))
            }
        };
        Fault::new(message, FORMATS_HELP)
    }

    fn take(&mut self, name: &str) -> Parsed<Value> {
        match self.members.get_mut(name).filter(|value| !value.is_null()) {
            Some(value) => Ok(value.take()),
            None => Err(self.missing(name)),
        }
    }

    fn take_text(&mut self, name: &str) -> Parsed<String> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(name, &other, "a string")),
        }
    }

    /// A message list, or a single message object standing for a list of one.
    fn take_messages(&mut self, name: &str) -> Parsed<Vec<Message>> {
        match self.take(name)? {
            Value::Array(messages) => {
                messages.into_iter().map(|message| Message::parse(message, name)).collect()
            }
            message @ Value::Object(_) => Ok(vec![Message::parse(message, name)?]),
            other => Err(wrong_type(name, &other, "a list of messages")),
        }
    }

    fn text_pair(&mut self) -> Parsed<Body> {
        let prompt = self.take_text("prompt")?;
        let (chosen, rejected) = (self.take_text("chosen")?, self.take_text("rejected")?);
        Ok(Body::Text { prompt, chosen, rejected })
    }

    fn implicit_text_pair(&mut self) -> Parsed<Body> {
        let (mut chosen, mut rejected) = (self.take_text("chosen")?, self.take_text("rejected")?);
        let cut = implicit::shared_text(&chosen, &rejected);
        if cut == 0 {
            let mut fault = self.missing("prompt");
            fault.message += ", and `chosen` and `rejected` share no beginning that could be one";
            return Err(fault);
        }
        let prompt = chosen[..cut].to_string();
        chosen.drain(..cut);
        rejected.drain(..cut);
        Ok(Body::Text { prompt, chosen, rejected })
    }

    fn question(&mut self, column: &str) -> Parsed<Body> {
        let mut prompt = self.system_message()?;
        prompt.push(Message::new("user", self.take_text(column)?));
        self.one_turn(prompt)
    }

    fn conversation_with_text_responses(&mut self) -> Parsed<Body> {
        let prompt = self.take_messages("prompt")?;
        self.one_turn(prompt)
    }

    /// The pair of a prompt and the strings in `chosen` and `rejected`.
    fn one_turn(&mut self, prompt: Vec<Message>) -> Parsed<Body> {
        let chosen = vec![Message::new("assistant", self.take_text("chosen")?)];
        let rejected = vec![Message::new("assistant", self.take_text("rejected")?)];
        Ok(Body::Conversation { prompt, chosen, rejected, variables: self.variables()? })
    }

    fn share_gpt(&mut self) -> Parsed<Body> {
        let mut prompt = self.system_message()?;
        prompt.extend(self.take_messages("conversations")?);
        if prompt.is_empty() {
            return Err(Fault::new(
                "column `conversations` is an empty list",
                "it holds the prompt's messages",
            ));
        }
        let chosen = self.share_gpt_response("chosen")?;
        let rejected = self.share_gpt_response("rejected")?;
        Ok(Body::Conversation { prompt, chosen, rejected, variables: self.variables()? })
    }

    fn share_gpt_response(&mut self, name: &str) -> Parsed<Vec<Message>> {
        let messages = match self.present(name)? {
            Value::String(text) => vec![Message::new("assistant", text.as_str())],
            _ => self.take_messages(name)?,
        };
        checked_response(messages, name)
    }

    fn conversation(&mut self, prompt_column_differs: &mut bool) -> Parsed<Body> {
        let mut chosen = self.take_messages("chosen")?;
        let mut rejected = self.take_messages("rejected")?;
        let prompt = match self.get("prompt") {
            Some(Value::Array(_) | Value::Object(_)) => {
                let prompt = self.take_messages("prompt")?;
                for side in [&mut chosen, &mut rejected] {
                    if side.starts_with(&prompt) {
                        side.drain(..prompt.len());
                    }
                }
                prompt
            }
            Some(Value::String(_)) | None => {
                let shared = implicit::shared_messages(&chosen, &rejected);
                let prompt: Vec<Message> = chosen.drain(..shared).collect();
                rejected.drain(..shared);
                self.checked_prompt(prompt, prompt_column_differs)?
            }
            Some(other) => return Err(wrong_type("prompt", other, "a string or a list of messages")),
        };
        let chosen = checked_response(chosen, "chosen")?;
        let rejected = checked_response(rejected, "rejected")?;
        Ok(Body::Conversation { prompt, chosen, rejected, variables: self.variables()? })
    }

    /// The prompt messages that both responses share, beside the `prompt` string, if there is one: it is the
    /// prompt where nothing is shared, and merely compared where something is.
    fn checked_prompt(&mut self, shared: Vec<Message>, differs: &mut bool) -> Parsed<Vec<Message>> {
        let column = match self.get("prompt") {
            Some(_) => Some(self.take_text("prompt")?),
            None => None,
        };
        match column {
            Some(text) if shared.is_empty() => Ok(vec![Message::new("user", text)]),
            Some(text) => {
                *differs = !shared.iter().any(|message| message.content.trim() == text.trim());
                Ok(shared)
            }
            None if shared.is_empty() => {
                let mut fault = self.missing("prompt");
                fault.message += ", and `chosen` and `rejected` share no message that could be one";
                Err(fault)
            }
            None => Ok(shared),
        }
    }

    /// The `system` column as a message; none if it is absent, null or empty.
    fn system_message(&mut self) -> Parsed<Vec<Message>> {
        if self.get("system").is_none() {
            return Ok(Vec::new());
        }
        let text = self.take_text("system")?;
        Ok(if text.is_empty() { Vec::new() } else { vec![Message::new("system", text)] })
    }

    /// Template variables a record may bring: `tools` (a list, or JSON text of one) and `chat_template_kwargs`.
    fn variables(&mut self) -> Parsed<Map<String, Value>> {
        let mut variables = match self.get("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(variables)) => variables.clone(),
            Some(other) => return Err(wrong_type("chat_template_kwargs", other, "an object")),
        };
        let tools = match self.get("tools") {
            None => return Ok(variables),
            Some(Value::String(text)) if text.trim().is_empty() => return Ok(variables),
            Some(Value::String(text)) => serde_json::from_str(text).map_err(|error| {
                Fault::new(
                    format!("column `tools` is not JSON: {error}"),
                    "it is a list of tools, or JSON text of one",
                )
            })?,
            Some(other) => other.clone(),
        };
        match tools {
            // Templates take a tools variable that is there, even empty, as a request for their tools text.
            Value::Array(list) if list.is_empty() => {}
            tools @ Value::Array(_) => {
                variables.insert("tools".to_string(), tools);
            }
            Value::Null => {}
            other => return Err(wrong_type("tools", &other, "a list")),
        }
        Ok(variables)
    }
}

/// A response begins with the assistant's message; anything else means the prompt was not told apart from it.
fn checked_response(messages: Vec<Message>, column: &str) -> Parsed<Vec<Message>> {
    match messages.first() {
        Some(first) if first.role != "assistant" => Err(Fault::new(
            format!("the response in column `{column}` begins with a `{}` message", first.role),
            "behind the prompt that `chosen` and `rejected` share, each goes on with an assistant message; \
             messages before it must be the same in both, or stand in `prompt`",
        )),
        _ => Ok(messages),
    }
}

fn wrong_type(column: &str, found: &Value, wanted: &str) -> Fault {
    Fault::new(
        format!("column `{column}` is {}, not {wanted}", type_name(found)),
        "every record of a file has the types of its first record; ".to_string() + FORMATS_HELP,
    )
}

/// A JSON value's type, with its article.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The name most like `wanted`, if any is alike enough to be a slip.
pub(super) fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(wanted, &name.to_lowercase()), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|(left, _), (right, _)| left.total_cmp(right))
        .map(|(_, name)| name)
}
