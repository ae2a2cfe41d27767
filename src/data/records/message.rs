//! One message of a conversation, in the spellings in use.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::columns::{Fault, Parsed, nearest, value_type, wrong_type};
use super::scan::excerpt;

/// Roles that chat templates know, each with the other names that people write for it; capitals do not matter.
const ROLES: [(&str, &[&str]); 6] = [
    ("system", &["sys"]),
    ("developer", &[]),
    ("user", &["human", "prompter", "customer"]),
    (
        "assistant",
        &[
            "gpt",
            "bot",
            "model",
            "chatgpt",
            "chatbot",
            "ai",
            "agent",
            "bing",
            "bard",
            "claude",
            "function_call",
            "tool_call",
        ],
    ),
    ("tool", &["observation", "function", "function_response", "tool_response", "tool_result"]),
    ("ipython", &[]),
];

/// Names under which the assistant's message is one call of a function, or several, as JSON text.
const CALL_ROLES: [&str; 2] = ["function_call", "tool_call"];

/// Members that name the role, and members that hold the text.
const ROLE_KEYS: [&str; 3] = ["role", "from", "speaker"];
const CONTENT_KEYS: [&str; 3] = ["content", "value", "text"];

/// Two members that make a turn of the user and one of the assistant.
const TURN_KEYS: [[&str; 2]; 8] = [
    ["input", "output"],
    ["user", "assistant"],
    ["human", "assistant"],
    ["human", "gpt"],
    ["prompt", "response"],
    ["instruction", "output"],
    ["query", "response"],
    ["question", "answer"],
];

/// Whether a value of a table's cell is a message, rather than text that happens to be JSON: it has a role, and a content
/// or calls of tools.
pub(super) fn is_message_like(value: &Value) -> bool {
    let has = |keys: &[&str]| keys.iter().any(|key| value.get(*key).is_some_and(|member| !member.is_null()));
    has(&ROLE_KEYS) && (has(&CONTENT_KEYS) || has(&["tool_calls"]))
}

/// A message as a chat template sees it. Other members (`name`, `tool_calls`, `reasoning_content`, ...) are kept,
/// since templates may read them; those that are null are left out at every depth, since Arrow writes a null for
/// every member that another message has.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    /// Who speaks, as templates name it.
    pub role: String,
    /// What is said.
    pub content: String,
    /// All other members.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Message {
    /// A message of a role and a text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Message { role: role.to_string(), content: content.into(), other: Map::new() }
    }

    /// Whether the message says nothing: neither text nor a call of a tool.
    pub fn is_blank(&self) -> bool {
        self.content.trim().is_empty() && !self.has_tool_calls()
    }

    fn has_tool_calls(&self) -> bool {
        matches!(self.other.get("tool_calls"), Some(Value::Array(calls)) if !calls.is_empty())
    }

    /// Reads `{role, content}`, ShareGPT's `{from, value}`, or their like. A message without any content is read as
    /// an empty one where it is the assistant's; `blank` says whether that is allowed though it calls no tool.
    pub(super) fn parse(value: Value, column: &str, blank: bool) -> Parsed<Self> {
        let mut members = match value {
            Value::Object(members) => members,
            other => {
                return Err(Fault::new(
                    format!("column `{column}` holds a message that is {}", value_type(&other)),
                    "a message is an object {\"role\": ..., \"content\": ...}",
                ));
            }
        };
        let nulls: Vec<String> =
            members.iter().filter(|(_, value)| value.is_null()).map(|(name, _)| name.clone()).collect();
        without_nulls(&mut members);
        let key = |keys: [&'static str; 3], members: &Map<String, Value>| {
            keys.into_iter().find(|key| members.contains_key(*key))
        };
        let role_key = key(ROLE_KEYS, &members).unwrap_or("role");
        let written = match members.shift_remove(role_key) {
            Some(Value::String(role)) => role,
            found => return Err(bad_member(column, role_key, found.as_ref(), &members, &nulls)),
        };
        let role = known_role(&written, column)?;
        let content_key = key(CONTENT_KEYS, &members);
        let content = match content_key.and_then(|key| members.shift_remove(key)) {
            Some(Value::String(content)) => Some(content),
            Some(Value::Array(parts)) => {
                Some(join_parts(parts, &written, column, content_key.unwrap_or("content"))?)
            }
            None => None,
            found => {
                let key = content_key.unwrap_or("content");
                return Err(bad_member(column, key, found.as_ref(), &members, &nulls));
            }
        };
        let mut message = Message { role: role.to_string(), content: String::new(), other: members };
        match content {
            Some(content) if CALL_ROLES.contains(&written.trim().to_lowercase().as_str()) => {
                message.other.insert("tool_calls".to_string(), calls(&content, &written, column)?);
            }
            Some(content) => message.content = content,
            None if message.has_tool_calls() => {}
            None if blank
                && role == "assistant"
                && CONTENT_KEYS.iter().any(|key| nulls.iter().any(|null| null == key)) => {}
            None => return Err(bad_member(column, "content", None, &message.other, &nulls)),
        }
        Ok(message)
    }
}

/// The turns of a conversation: a list of messages, of pairs (the user's text and the assistant's, as in `history`),
/// or of objects with both (`{"input": ..., "output": ...}`); a single message stands for a list of one.
pub(super) fn take_turns(value: Value, column: &str) -> Parsed<Vec<Message>> {
    let items = match value {
        Value::Array(items) => items,
        message @ Value::Object(_) => vec![message],
        other => return Err(wrong_type(column, &other, "a list of messages")),
    };
    let last = items.len().saturating_sub(1);
    let mut messages = Vec::with_capacity(items.len());
    for (position, item) in items.into_iter().enumerate() {
        match both_turns(&item) {
            Some([user, assistant]) => {
                for (role, text) in [("user", user), ("assistant", assistant)] {
                    match text {
                        Value::String(text) if text.is_empty() && role == "assistant" => {}
                        Value::String(text) => messages.push(Message::new(role, text)),
                        Value::Null => {}
                        other => {
                            return Err(Fault::new(
                                format!(
                                    "column `{column}` has a turn whose {role} text is {}",
                                    value_type(&other)
                                ),
                                "a turn is [\"the user's text\", \"the assistant's text\"]",
                            ));
                        }
                    }
                }
            }
            // Only a response may be blank, and that stands at the end.
            None => messages.push(Message::parse(item, column, is_response(column) && position == last)?),
        }
    }
    Ok(messages)
}

fn is_response(column: &str) -> bool {
    super::columns::RESPONSE_COLUMNS.iter().flatten().any(|name| *name == column)
        || super::columns::SWIFT_REJECTED.contains(&column)
}

fn both_turns(item: &Value) -> Option<[Value; 2]> {
    match item {
        Value::Array(pair) => match pair.as_slice() {
            [user, assistant] => Some([user.clone(), assistant.clone()]),
            _ => None,
        },
        Value::Object(members) if !ROLE_KEYS.iter().any(|key| members.contains_key(*key)) => {
            let keys =
                TURN_KEYS.into_iter().find(|keys| keys.iter().all(|key| members.contains_key(*key)))?;
            Some(keys.map(|key| members[key].clone()))
        }
        _ => None,
    }
}

fn known_role(written: &str, column: &str) -> Parsed<&'static str> {
    let lower = written.trim().to_lowercase();
    let is_role =
        |(role, others): &&(&'static str, &[&str])| *role == lower || others.contains(&lower.as_str());
    if let Some((role, _)) = ROLES.iter().find(is_role) {
        return Ok(role);
    }
    let names = ROLES.iter().flat_map(|(role, others)| std::iter::once(*role).chain(others.iter().copied()));
    let hint = match nearest(&lower, names) {
        Some(name) => format!("; did you mean `{name}`?"),
        None => String::new(),
    };
    let known: Vec<String> = ROLES
        .iter()
        .map(|(role, others)| match others {
            [] => (*role).to_string(),
            others => format!("{role} (also {})", others.join(", ")),
        })
        .collect();
    Err(Fault::new(
        format!("column `{column}` has a message with the unknown role `{}`{hint}", excerpt(written)),
        format!("known roles: {}", known.join("; ")),
    ))
}

/// The texts of a content that is a list of parts, one after the other, as templates that know parts write them.
fn join_parts(parts: Vec<Value>, role: &str, column: &str, key: &str) -> Parsed<String> {
    let place =
        format!("a `{}` message of column `{column}` has a list of parts as its `{key}`", excerpt(role));
    let mut text = String::new();
    for (position, part) in parts.into_iter().enumerate() {
        let number = position + 1;
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text").to_string();
        let part_text = match &part {
            Value::String(text) => Some(text.as_str()),
            Value::Object(members) if kind == "text" => {
                ["text", "content"].into_iter().find_map(|key| members.get(key)?.as_str())
            }
            _ => None,
        };
        match part_text {
            Some(part_text) => text.push_str(part_text),
            None if kind == "text" => {
                return Err(Fault::new(
                    format!("{place}, and part {number} has no `text`"),
                    "a part is {\"type\": \"text\", \"text\": \"...\"}",
                ));
            }
            None => {
                return Err(Fault::new(
                    format!("{place}, and part {number} is of type `{}`", excerpt(&kind)),
                    "only text can be trained on: leave images, sound and the like out",
                ));
            }
        }
    }
    Ok(text)
}

/// The calls that a `function_call` message writes as JSON text: `{"name": ..., "arguments": ...}` or a list.
fn calls(text: &str, role: &str, column: &str) -> Parsed<Value> {
    let bad = |what: &str| {
        Fault::new(
            format!("a `{role}` message of column `{column}` {what}: `{}`", excerpt(text)),
            "it holds {\"name\": \"...\", \"arguments\": {...}}, or a list of such calls, as JSON text",
        )
    };
    let value: Value = serde_json::from_str(text).map_err(|_| bad("is not JSON"))?;
    let list = match value {
        Value::Array(list) => list,
        one => vec![one],
    };
    let call = |call: Value| match call.get("name") {
        Some(Value::String(_)) => Ok(json!({"type": "function", "function": call})),
        _ => Err(bad("names no function")),
    };
    list.into_iter().map(call).collect::<Parsed<Vec<Value>>>().map(Value::Array)
}

/// Leaves out members that are null, at every depth.
pub(super) fn without_nulls(members: &mut Map<String, Value>) {
    members.retain(|_, value| !value.is_null());
    members.values_mut().for_each(strip);
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(members) => without_nulls(members),
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

fn bad_member(
    column: &str,
    key: &str,
    found: Option<&Value>,
    members: &Map<String, Value>,
    nulls: &[String],
) -> Fault {
    let message = match found {
        Some(value) => {
            format!("column `{column}` has a message whose `{key}` is {}, not a string", value_type(value))
        }
        None if nulls.iter().any(|null| null == key) => {
            format!("column `{column}` has a message whose `{key}` is null, not a string")
        }
        None => match nearest(key, members.keys().map(String::as_str)) {
            Some(name) => {
                format!("column `{column}` has a message without `{key}`; the nearest it has is `{name}`")
            }
            None => format!("column `{column}` has a message without `{key}`"),
        },
    };
    Fault::new(
        message,
        "a message is {\"role\": \"user\", \"content\": \"...\"} or {\"from\": \"human\", \"value\": \"...\"}; only an \
         assistant's with `tool_calls` may have no content",
    )
}
