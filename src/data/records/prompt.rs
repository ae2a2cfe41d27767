//! Everything of a record that may be its prompt, and how the parts are put together.
//!
//! A prompt is the system message, earlier turns (`history`), and then messages or one text of the user. Two columns
//! that say the same are one. Where one contains the other, the longer one counts. Where neither does, the record is
//! refused with both names, because only its author knows in which order they belong together.

use serde_json::{Map, Value};

use super::columns::{
    CONVERSATION_COLUMNS, Columns, Fault, HISTORY, Parsed, SYSTEM_COLUMNS, TEXT_COLUMNS, wrong_type,
};
use super::format::insert_tools;
use super::implicit;
use super::message::{Message, take_turns};
use super::scan::excerpt;
use crate::data::Cause;

/// A column's text; `parts` are what it was joined from.
#[derive(Clone, Debug)]
struct Text {
    name: &'static str,
    text: String,
    parts: Vec<String>,
}

/// The prompt-bearing columns of a record that are filled.
#[derive(Debug, Default)]
pub(super) struct Sources {
    system: Option<(&'static str, String)>,
    history: Vec<Message>,
    pub turns: Vec<(&'static str, Vec<Message>)>,
    texts: Vec<Text>,
    /// Whether a column for the system message or for earlier turns is there, though it may be empty: this is a
    /// conversation.
    pub asks_for_template: bool,
    /// A column of messages that holds none.
    empty: Option<&'static str>,
}

/// A pair whose prompt is apart from its responses.
pub(super) struct Prompt {
    pub prompt: Vec<Message>,
    pub chosen: Vec<Message>,
    pub rejected: Vec<Message>,
}

impl Sources {
    pub fn take(columns: &mut Columns, variables: &mut Map<String, Value>) -> Parsed<Self> {
        let mut sources = Sources::default();
        let template_columns = SYSTEM_COLUMNS.into_iter().chain([HISTORY]);
        sources.asks_for_template = template_columns.into_iter().any(|name| columns.names(name));
        sources.take_system(columns)?;
        for name in TEXT_COLUMNS.into_iter().chain(CONVERSATION_COLUMNS).chain([HISTORY]) {
            if columns.filled(name).is_none() {
                if matches!(columns.get(name), Some(Value::Array(_))) {
                    sources.empty = Some(name);
                }
                continue;
            }
            match columns.take(name)? {
                Value::String(_) if ["messages", "conversations"].contains(&name) => {
                    return Err(Fault::new(
                        format!("column `{name}` is a string, not a list of messages"),
                        "if it is JSON text, parse it before writing the file (Python: `json.loads`)",
                    ));
                }
                Value::String(text) => {
                    sources.texts.push(Text { name, parts: vec![text.trim().to_string()], text });
                }
                Value::Object(mut request) if request.contains_key("messages") => {
                    // OpenAI's preference format: the request that was sent.
                    if let Some(tools) = request.shift_remove("tools") {
                        insert_tools(tools, variables)?;
                    }
                    let messages = request.shift_remove("messages").unwrap_or_default();
                    sources.turns.push((name, take_turns(messages, name)?));
                }
                Value::Array(items) if items.first().is_some_and(Value::is_string) => {
                    return Err(Fault::new(
                        format!(
                            "column `{name}` is a list, not a string or a list of messages: it holds a message that is a string"
                        ),
                        "a message is an object {\"role\": ..., \"content\": ...}; a turn of `history` is a pair in a list",
                    ));
                }
                turns @ (Value::Array(_) | Value::Object(_)) if name == HISTORY => {
                    sources.history = take_turns(turns, name)?;
                }
                turns @ (Value::Array(_) | Value::Object(_)) => {
                    sources.turns.push((name, take_turns(turns, name)?));
                }
                other => return Err(wrong_type(name, &other, "a string or a list of messages")),
            }
        }
        sources.join_instruction();
        sources.take_blank_prompt(columns)?;
        Ok(sources)
    }

    fn take_system(&mut self, columns: &mut Columns) -> Parsed<()> {
        for name in SYSTEM_COLUMNS {
            if columns.filled(name).is_none() {
                continue;
            }
            let text = columns.take_text(name)?;
            match &self.system {
                Some((other, earlier)) if earlier.trim() != text.trim() => {
                    return Err(two_prompts(other, name));
                }
                _ => self.system = Some((name, text)),
            }
        }
        Ok(())
    }

    /// A `prompt` of white space is one where there is no other: TRL trains on it.
    fn take_blank_prompt(&mut self, columns: &mut Columns) -> Parsed<()> {
        let is_alone = self.history.is_empty() && self.turns.is_empty() && self.texts.is_empty();
        let is_blank = matches!(columns.get("prompt"), Some(Value::String(text)) if !text.is_empty());
        if is_alone && is_blank {
            let text = columns.take_text("prompt")?;
            self.texts.push(Text { name: "prompt", parts: vec![String::new()], text });
        }
        Ok(())
    }

    /// `instruction` and `input` are one text, with a line break between them, as LLaMA-Factory has it.
    fn join_instruction(&mut self) {
        let place = |name: &str, texts: &[Text]| texts.iter().position(|text| text.name == name);
        let Some(input) = place("input", &self.texts) else { return };
        let Some(instruction) = place("instruction", &self.texts) else { return };
        let input = self.texts[input].clone();
        let joined = &mut self.texts[instruction];
        joined.text = format!("{}\n{}", joined.text, input.text);
        joined.parts.extend(input.parts);
        self.texts.retain(|text| text.name != "input");
    }

    /// Whether no column holds a prompt or a part of one.
    pub fn is_empty(&self) -> bool {
        self.system.is_none() && self.history.is_empty() && self.turns.is_empty() && self.texts.is_empty()
    }

    /// The column `prompt`, if it is all there is: text to be used as it is, without a template.
    pub fn plain_prompt(&mut self) -> Parsed<Option<String>> {
        if !self.turns.is_empty() {
            return Ok(None);
        }
        Ok(self.main_text()?.filter(|text| text.name == "prompt").map(|text| text.text.clone()))
    }

    /// The text that contains all others.
    fn main_text(&self) -> Parsed<Option<&Text>> {
        let contains = |text: &Text| {
            self.texts.iter().flat_map(|other| &other.parts).all(|part| text.text.contains(part.as_str()))
        };
        match (self.texts.iter().find(|text| contains(text)), self.texts.as_slice()) {
            (Some(text), _) => Ok(Some(text)),
            (None, [first, second, ..]) => {
                let apart = self.texts[1..].iter().find(|text| !first.text.contains(text.text.trim()));
                Err(two_prompts(first.name, apart.unwrap_or(second).name))
            }
            (None, _) => Ok(None),
        }
    }

    /// Puts the prompt together and takes it off the responses that begin with it.
    pub fn join(
        mut self,
        columns: &mut Columns,
        names: [&'static str; 2],
        mut chosen: Vec<Message>,
        mut rejected: Vec<Message>,
    ) -> Parsed<Prompt> {
        let shared = implicit::shared_messages(&chosen, &rejected);
        let holds_user = chosen[..shared].iter().any(|message| message.role == "user");
        let turns = self.main_turns(holds_user, &chosen, &rejected)?;
        let mut prompt = match turns {
            Some(turns) => {
                for (side, name) in [(&mut chosen, names[0]), (&mut rejected, names[1])] {
                    if side.starts_with(&turns) {
                        side.drain(..turns.len());
                        columns.note(Cause::PromptTakenOff, name);
                    }
                }
                turns
            }
            // Messages that both begin with are a prompt if one of them is the user's, or if there is no other.
            None if holds_user || (shared > 0 && self.texts.is_empty() && self.history.is_empty()) => {
                rejected.drain(..shared);
                chosen.drain(..shared).collect()
            }
            None => Vec::new(),
        };
        if prompt.is_empty() {
            prompt = self.prompt_of_text(columns, &mut chosen, &mut rejected)?;
        } else {
            self.compare_texts(columns, &prompt, &chosen, &rejected)?;
            self.put_history_before(&mut prompt);
        }
        self.put_system_before(&mut prompt)?;
        Ok(Prompt { prompt, chosen, rejected })
    }

    /// The messages of the one column that holds the prompt. A column that says what the responses already say, as
    /// UltraFeedback's `messages`, is no prompt.
    fn main_turns(
        &mut self,
        holds_user: bool,
        chosen: &[Message],
        rejected: &[Message],
    ) -> Parsed<Option<Vec<Message>>> {
        let mut main: Option<(&'static str, Vec<Message>)> = None;
        for (name, turns) in std::mem::take(&mut self.turns) {
            let begins = chosen.starts_with(&turns) && rejected.starts_with(&turns);
            let is_whole = turns.len() >= chosen.len() || turns.len() >= rejected.len();
            if holds_user && (!begins || is_whole) && says_no_more(&turns, &[chosen, rejected]) {
                continue;
            }
            main = match main {
                None => Some((name, turns)),
                Some((_, earlier)) if says_no_more(&earlier, &[&turns]) => Some((name, turns)),
                Some((other, earlier)) if says_no_more(&turns, &[&earlier]) => Some((other, earlier)),
                Some((other, _)) => return Err(two_prompts(other, name)),
            };
        }
        Ok(main.map(|(_, turns)| turns))
    }

    /// The prompt of a record whose messages hold none: earlier turns, and a text of the user.
    fn prompt_of_text(
        &mut self,
        columns: &Columns,
        chosen: &mut Vec<Message>,
        rejected: &mut Vec<Message>,
    ) -> Parsed<Vec<Message>> {
        let text = self.main_text()?.map(|text| text.text.clone());
        if text.is_none() && self.history.is_empty() {
            return Err(match self.empty {
                Some(name) => {
                    Fault::new(format!("column `{name}` is an empty list"), "it holds the prompt's messages")
                }
                None => {
                    let mut fault = columns.missing("prompt");
                    fault.message += ", and the two responses share no message that could be one";
                    fault
                }
            });
        }
        // A system message that both responses begin with stands before the text.
        let shared = implicit::shared_messages(chosen, rejected);
        let system = chosen[..shared].iter().take_while(|message| message.role == "system").count();
        rejected.drain(..system);
        let mut prompt: Vec<Message> = chosen.drain(..system).collect();
        prompt.append(&mut self.history);
        prompt.extend(text.map(|text| Message::new("user", text)));
        Ok(prompt)
    }

    /// Compares texts beside a prompt of messages: each must be among them.
    fn compare_texts(
        &self,
        columns: &mut Columns,
        prompt: &[Message],
        chosen: &[Message],
        rejected: &[Message],
    ) -> Parsed<()> {
        for Text { name, text, parts } in &self.texts {
            let all = || prompt.iter().chain(chosen).chain(rejected);
            let among = parts.iter().all(|part| all().any(|message| message.content.contains(part.as_str())));
            // A prompt that was rendered already contains every message.
            let rendered = prompt
                .iter()
                .filter(|message| message.role == "user")
                .all(|message| text.contains(message.content.trim()));
            if among || rendered {
                continue;
            }
            if *name != "prompt" {
                return Err(Fault::new(
                    format!("column `{name}` holds text that is not among the messages: `{}`", excerpt(text)),
                    format!("put it into the messages where it belongs, or remove the column `{name}`"),
                ));
            }
            columns.note(Cause::PromptColumnDiffers, excerpt(text));
        }
        Ok(())
    }

    fn put_history_before(&mut self, prompt: &mut Vec<Message>) {
        if self.history.is_empty() || says_no_more(&self.history, &[prompt]) {
            return;
        }
        let system = prompt.iter().take_while(|message| message.role == "system").count();
        prompt.splice(system..system, self.history.drain(..));
    }

    fn put_system_before(&mut self, prompt: &mut Vec<Message>) -> Parsed<()> {
        let Some((name, text)) = self.system.take() else { return Ok(()) };
        match prompt.iter().find(|message| message.role == "system") {
            None => prompt.insert(0, Message::new("system", text)),
            Some(message) if message.content.trim() == text.trim() => {}
            Some(message) => {
                return Err(Fault::new(
                    format!(
                        "column `{name}` (`{}`) and the conversation's system message (`{}`) differ",
                        excerpt(&text),
                        excerpt(&message.content)
                    ),
                    "a conversation has one system message: remove one of the two",
                ));
            }
        }
        Ok(())
    }
}

/// Whether every text of `turns` is in one of the other messages.
fn says_no_more(turns: &[Message], others: &[&[Message]]) -> bool {
    turns.iter().all(|turn| {
        let text = turn.content.trim();
        others.iter().any(|messages| messages.iter().any(|message| message.content.contains(text)))
    })
}

fn two_prompts(first: &str, second: &str) -> Fault {
    Fault::new(
        format!("columns `{first}` and `{second}` both hold a prompt, and neither contains the other"),
        format!(
            "write the whole prompt to one column (such as `{first}`) as the model shall see it, and remove the other"
        ),
    )
}
