//! From the columns of a record to a pair.
//!
//! First the two responses, by the names of [`RESPONSE_COLUMNS`]; then everything that may be a prompt
//! ([`super::prompt`]); then the two are put together. Nothing here looks at another record.

use serde_json::{Map, Value};

use super::columns::{
    CONVERSATION_COLUMNS, Columns, Fault, Parsed, RESPONSE_COLUMNS, SWIFT_REJECTED, wrong_type,
};
use super::message::without_nulls;
use super::prompt::{Prompt, Sources};
use super::scan::{Kind, excerpt, excerpt_of_end};
use super::{Body, FORMATS_HELP, Message, Record, implicit, plausible};
use crate::Result;
use crate::data::Cause;

/// Reads one record.
pub(super) fn read(mut columns: Columns) -> Result<Record> {
    match pair(&mut columns) {
        Ok(body) => {
            let mut notes = std::mem::take(&mut columns.notes);
            notes.extend(plausible::notes(&body));
            // A record counts once for each cause; the first example is the one to show.
            let mut seen = Vec::new();
            notes.retain(|note| {
                !seen.contains(&note.cause) && {
                    seen.push(note.cause);
                    true
                }
            });
            let (index, place, score_gap) = (columns.index, columns.place, columns.scores.gap());
            Ok(Record { index, place, body, notes, score_gap })
        }
        Err(fault) => Err(columns.error(fault)),
    }
}

/// One response as its column has it.
#[derive(Debug)]
pub(super) enum Side {
    Text(String),
    Messages(Vec<Message>),
}

impl Side {
    /// The response's messages; a text is one of the assistant.
    fn messages(self) -> Vec<Message> {
        match self {
            Side::Text(text) => vec![Message::new("assistant", text)],
            Side::Messages(messages) => messages,
        }
    }
}

/// The two responses, with the names of their columns.
#[derive(Debug)]
pub(super) struct Responses {
    pub names: [&'static str; 2],
    pub chosen: Side,
    pub rejected: Side,
    /// The prompt that came with them: ms-swift's `messages` without the last turn.
    pub prompt: Option<(&'static str, Vec<Message>)>,
}

fn pair(columns: &mut Columns) -> Parsed<Body> {
    let responses = responses(columns)?;
    let mut variables = variables(columns)?;
    let mut sources = Sources::take(columns, &mut variables)?;
    if let Some(prompt) = &responses.prompt {
        sources.turns.push(prompt.clone());
    }
    columns.check_names()?;
    let Responses { names, chosen, rejected, .. } = responses;
    let (chosen, rejected) = match (chosen, rejected) {
        (Side::Text(chosen), Side::Text(rejected)) => {
            if sources.is_empty() && variables.is_empty() {
                return implicit_text(columns, chosen, rejected);
            }
            let plain = variables.is_empty() && !sources.asks_for_template;
            if plain && let Some(prompt) = sources.plain_prompt()? {
                return Ok(Body::Text { prompt, chosen, rejected });
            }
            (Side::Text(chosen).messages(), Side::Text(rejected).messages())
        }
        (Side::Messages(chosen), Side::Messages(rejected)) => (chosen, rejected),
        (chosen, rejected) if !sources.turns.is_empty() => (chosen.messages(), rejected.messages()),
        (chosen, _) => {
            let text = if matches!(chosen, Side::Text(_)) { 0 } else { 1 };
            return Err(Fault::new(
                format!(
                    "column `{}` is a string, not a list of messages like the other response",
                    names[text]
                ),
                FORMATS_HELP,
            ));
        }
    };
    let Prompt { prompt, chosen, rejected } = sources.join(columns, names, chosen, rejected)?;
    let chosen = checked_response(chosen, names[0])?;
    let rejected = checked_response(rejected, names[1])?;
    Ok(Body::Conversation { prompt, chosen, rejected, variables })
}

fn responses(columns: &mut Columns) -> Parsed<Responses> {
    for names in RESPONSE_COLUMNS {
        if names.iter().all(|name| columns.get(name).is_some()) {
            let [chosen, rejected] = names;
            let chosen = side(columns, chosen)?;
            return Ok(Responses { names, chosen, rejected: side(columns, rejected)?, prompt: None });
        }
    }
    for rejected in SWIFT_REJECTED {
        let messages = CONVERSATION_COLUMNS.into_iter().find(|name| columns.filled(name).is_some());
        if let Some(name) = messages.filter(|_| columns.get(rejected).is_some()) {
            return last_turn_is_chosen(columns, name, rejected);
        }
    }
    if let Some(fault) = other_layout(columns) {
        return Err(fault);
    }
    let named = RESPONSE_COLUMNS.into_iter().find(|[chosen, _]| columns.get(chosen).is_some());
    Err(match named {
        Some([chosen, rejected]) => match side(columns, chosen) {
            Ok(_) => columns.missing(rejected),
            Err(fault) => fault,
        },
        None => columns.missing("chosen"),
    })
}

fn side(columns: &mut Columns, name: &str) -> Parsed<Side> {
    match columns.get(name) {
        Some(Value::String(_)) => Ok(Side::Text(columns.take_text(name)?)),
        Some(Value::Array(_) | Value::Object(_)) => Ok(Side::Messages(columns.take_messages(name)?)),
        Some(other) => Err(wrong_type(name, other, "a string or a list of messages")),
        None => Err(columns.missing(name)),
    }
}

/// ms-swift's pairs: the last message of a whole conversation is the chosen response.
fn last_turn_is_chosen(
    columns: &mut Columns,
    name: &'static str,
    rejected_name: &'static str,
) -> Parsed<Responses> {
    let mut messages = columns.take_messages(name)?;
    let chosen = match messages.pop() {
        Some(last) if last.role == "assistant" => last,
        _ => {
            return Err(Fault::new(
                format!("column `{name}` does not end with an assistant message, and there is no `chosen`"),
                format!("beside `{rejected_name}`, the chosen response is the last message of `{name}`"),
            ));
        }
    };
    let rejected = side(columns, rejected_name)?;
    Ok(Responses {
        names: [name, rejected_name],
        chosen: Side::Messages(vec![chosen]),
        rejected: Side::Messages(rejected.messages()),
        prompt: Some((name, messages)),
    })
}

/// The layouts of published sets that are no pairs yet, by the columns that tell them.
fn other_layout(columns: &Columns) -> Option<Fault> {
    const LAYOUTS: [(&[&str], &str); 16] = [
        (&["response1", "response2"], "two responses and a preference between them (as HelpSteer3 has them)"),
        (
            &["response_1", "response_2"],
            "two responses and a preference between them (as HelpSteer2 has them)",
        ),
        (
            &["response_0", "response_1"],
            "two responses and the better one's number (as PKU-SafeRLHF has them)",
        ),
        (&["human_ref_A", "human_ref_B"], "two answers with scores (as SHP has them)"),
        (&["answer_0", "answer_1"], "two answers with scores (as WebGPT comparisons have them)"),
        (&["conversation_a", "conversation_b"], "two conversations and a winner (as Chatbot Arena has them)"),
        (&["response_a", "response_b"], "two responses and a winner"),
        (&["answers"], "a list of ranked answers (as Nectar has them)"),
        (&["completions"], "a list of rated completions (as UltraFeedback has them)"),
        (&["generations"], "a list of rated generations (as distilabel has them)"),
        (&["responses"], "a list of responses"),
        (&["summaries"], "two summaries and a choice (as summarize_from_feedback has them)"),
        (&["completion"], "a prompt and one completion (for SFT or KTO)"),
        (&["output"], "one output, or two in a list"),
        (&["messages"], "one conversation (for SFT)"),
        (&["conversations"], "one conversation (for SFT)"),
    ];
    let has = |name: &str| columns.names(name);
    if columns.get("chosen").is_some() || columns.get("rejected").is_some() {
        return None;
    }
    let (names, layout) = LAYOUTS.iter().find(|(names, _)| names.iter().all(|name| has(name)))?;
    Some(Fault::new(
        format!("no column `chosen`; the columns `{}` hold {layout}", names.join("`, `")),
        "a pair needs a better and a worse response to one prompt: write them as `chosen` and `rejected`",
    ))
}

fn implicit_text(columns: &mut Columns, mut chosen: String, mut rejected: String) -> Parsed<Body> {
    if columns.get("prompt").is_some() {
        return Ok(Body::Text { prompt: String::new(), chosen, rejected });
    }
    let cut = implicit::shared_text(&chosen, &rejected);
    if cut == 0 {
        let mut fault = columns.missing("prompt");
        fault.message += ", and the two responses share no beginning that could be one";
        return Err(fault);
    }
    columns.check_resembling_names()?;
    let prompt = chosen[..cut].to_string();
    chosen.drain(..cut);
    rejected.drain(..cut);
    let example = excerpt_of_end(&prompt);
    let beside = columns.unread().find(|(_, kind)| matches!(kind, Kind::Text { empty: false }));
    let (cause, example) = match beside {
        None => (Cause::ImplicitPrompt, example),
        Some((name, _)) => {
            (Cause::ImplicitPromptBesideText, format!("{example}, and column {}", excerpt(name)))
        }
    };
    columns.note(cause, example);
    Ok(Body::Text { prompt, chosen, rejected })
}

/// Template variables a record may bring: `tools` (a list, or JSON text of one) and `chat_template_kwargs`.
fn variables(columns: &mut Columns) -> Parsed<Map<String, Value>> {
    let mut variables = match columns.get("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(other) => return Err(wrong_type("chat_template_kwargs", other, "an object")),
    };
    without_nulls(&mut variables);
    if columns.get("tools").is_none() {
        return Ok(variables);
    }
    let tools = columns.take("tools")?;
    insert_tools(tools, &mut variables)?;
    Ok(variables)
}

/// Sets the variable `tools`. Nulls in JSON text are the author's and stay, as TRL leaves them; those in a list may
/// be Arrow's, which gives each tool the members of all others.
pub(super) fn insert_tools(tools: Value, variables: &mut Map<String, Value>) -> Parsed<()> {
    let tools = match tools {
        Value::String(text) if text.trim().is_empty() => return Ok(()),
        Value::String(text) => serde_json::from_str(&text).map_err(|error| {
            Fault::new(
                format!("column `tools` is not JSON: {error}"),
                "it is a list of tools, or JSON text of one",
            )
        })?,
        Value::Array(mut list) => {
            for tool in &mut list {
                match tool {
                    Value::Object(members) => without_nulls(members),
                    Value::String(text) => {
                        *tool = serde_json::from_str(text).map_err(|error| {
                            Fault::new(
                                format!("column `tools` holds a tool that is not JSON: {error}"),
                                "a tool is an object, or JSON text of one",
                            )
                        })?;
                    }
                    _ => {}
                }
            }
            Value::Array(list)
        }
        other => other,
    };
    match tools {
        // Templates take a tools variable that is there, even empty, as a request for their tools text.
        Value::Array(list) if list.is_empty() => {}
        Value::Array(list) => {
            if let Some(tool) = list.iter().find(|tool| !tool.is_object()) {
                return Err(wrong_type("tools", tool, "a list of objects"));
            }
            variables.insert("tools".to_string(), Value::Array(list));
        }
        Value::Null => {}
        other => return Err(wrong_type("tools", &other, "a list")),
    }
    Ok(())
}

/// A response begins with the assistant's message; anything else means the prompt was not told apart from it.
fn checked_response(messages: Vec<Message>, column: &str) -> Parsed<Vec<Message>> {
    match messages.first() {
        Some(first) if first.role != "assistant" => Err(Fault::new(
            format!("the response in column `{column}` begins with a `{}` message", first.role),
            "after the prompt that both responses share, each goes on with an assistant message; messages before it \
             must be the same in both, or stand in `prompt`",
        )),
        _ => Ok(messages),
    }
}
