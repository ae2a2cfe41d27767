//! One message of a conversation, in either of the two spellings in use.

use serde::Serialize;
use serde_json::{Map, Value};

use super::format::{Fault, nearest, type_name};

/// Roles that chat templates know.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "ipython"];

/// ShareGPT's names for them.
const ALIASES: [(&str, &str); 3] = [("human", "user"), ("gpt", "assistant"), ("observation", "tool")];

/// A message as a chat template sees it. Other members (`name`, `tool_calls`, `reasoning_content`, ...) are kept,
/// since templates may read them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Message {
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Message { role: role.to_string(), content: content.into(), other: Map::new() }
    }

    /// Reads `{role, content}` or ShareGPT's `{from, value}`.
    pub(super) fn parse(value: Value, column: &str) -> Result<Self, Fault> {
        let mut members = match value {
            Value::Object(members) => members,
            other => {
                return Err(Fault::new(
                    format!("column `{column}` holds a message that is {}", type_name(&other)),
                    "a message is an object {\"role\": ..., \"content\": ...}",
                ));
            }
        };
        let share_gpt = members.contains_key("from") && !members.contains_key("role");
        let (role_key, content_key) = if share_gpt { ("from", "value") } else { ("role", "content") };
        let role = match members.shift_remove(role_key) {
            Some(Value::String(role)) => known_role(role, column)?,
            found => return Err(bad_member(column, role_key, found.as_ref(), &members)),
        };
        let content = match members.shift_remove(content_key) {
            Some(Value::String(content)) => content,
            Some(Value::Array(_)) => {
                return Err(Fault::new(
                    format!(
                        "a `{role}` message of column `{column}` has a list of parts as its `{content_key}`"
                    ),
                    "only text can be trained on: join the text parts into one string and leave images and audio out",
                ));
            }
            found => return Err(bad_member(column, content_key, found.as_ref(), &members)),
        };
        Ok(Message { role, content, other: members })
    }
}

fn known_role(role: String, column: &str) -> Result<String, Fault> {
    if ROLES.contains(&role.as_str()) {
        return Ok(role);
    }
    if let Some((_, known)) = ALIASES.iter().find(|(alias, _)| *alias == role) {
        return Ok((*known).to_string());
    }
    let names = ROLES.iter().copied().chain(ALIASES.iter().map(|(alias, _)| *alias));
    let hint = match nearest(&role, names) {
        Some(name) => format!("; did you mean `{name}`?"),
        None => String::new(),
    };
    Err(Fault::new(
        format!("column `{column}` has a message with the unknown role `{role}`{hint}"),
        format!("known roles: {}, and ShareGPT's human, gpt, observation", ROLES.join(", ")),
    ))
}

fn bad_member(column: &str, key: &str, found: Option<&Value>, members: &Map<String, Value>) -> Fault {
    let message = match found {
        Some(value) => {
            format!("column `{column}` has a message whose `{key}` is {}, not a string", type_name(value))
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
        "a message is {\"role\": \"user\", \"content\": \"...\"} or {\"from\": \"human\", \"value\": \"...\"}",
    )
}
