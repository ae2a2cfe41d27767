//! Records that are read without an error but do not look like what their author meant.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::LazyLock;

use aho_corasick::AhoCorasick;

use super::scan::excerpt;
use super::{Body, Message};
use crate::data::Cause;

/// Something seen in a record, with the words that show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What was seen.
    pub cause: Cause,
    /// A short excerpt on one line.
    pub example: String,
}

impl Note {
    pub(super) fn new(cause: Cause, example: impl Into<String>) -> Self {
        Note { cause, example: example.into() }
    }
}

/// Texts that open a turn of the user in the formats in use.
const USER_TURNS: [&str; 12] = [
    "\nHuman:",
    "\nUser:",
    "\nUSER:",
    "\nHUMAN:",
    "### Human:",
    "### Instruction:",
    "<|im_start|>",
    "<|user|>",
    "<|start_header_id|>user",
    "<start_of_turn>user",
    "[INST]",
    "<|User|>",
];

/// Finds all of [`USER_TURNS`] in one pass over a text. Building it cannot fail for fixed words, so it is never `None`.
static USER_TURN: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| AhoCorasick::new(USER_TURNS).ok());

/// Where the first of [`USER_TURNS`] stands.
fn first_user_turn(text: &str) -> Option<usize> {
    USER_TURN.as_ref()?.find(text).map(|found| found.start())
}

/// A shorter prompt is not looked for in an answer, which may well begin with it by chance.
const SHORTEST_REPEATED: usize = 12;

/// What looks wrong in a pair.
pub(super) fn notes(body: &Body) -> Vec<Note> {
    let mut notes = Vec::new();
    match body {
        Body::Text { prompt, chosen, rejected } => {
            look_at_list(prompt, &mut notes);
            look_at_texts(prompt, [chosen, rejected], &mut notes);
        }
        Body::Conversation { prompt, chosen, rejected, .. } => {
            let asked = prompt.iter().rev().find(|message| message.role == "user");
            if let Some(message) = prompt.iter().find(|message| is_list_as_text(&message.content)) {
                look_at_list(&message.content, &mut notes);
            }
            if let Some(last) = prompt.last().filter(|last| last.role == "assistant") {
                notes.push(Note::new(Cause::PromptEndsWithAssistant, excerpt(&last.content)));
            }
            let text =
                |side: &[Message]| side.first().map(|message| message.content.clone()).unwrap_or_default();
            let asked = asked.map_or("", |message| message.content.as_str());
            look_at_texts(asked, [&text(chosen), &text(rejected)], &mut notes);
            let user = chosen.iter().chain(rejected).find(|message| message.role == "user");
            if let Some(user) = user {
                add(&mut notes, Cause::UserTurnInResponse, &user.content);
            }
        }
    }
    notes
}

fn add(notes: &mut Vec<Note>, cause: Cause, example: &str) {
    if notes.iter().all(|note| note.cause != cause) {
        notes.push(Note::new(cause, excerpt(example)));
    }
}

fn look_at_list(text: &str, notes: &mut Vec<Note>) {
    if is_list_as_text(text) {
        add(notes, Cause::ListAsText, text);
    }
}

fn look_at_texts(prompt: &str, responses: [&String; 2], notes: &mut Vec<Note>) {
    let prompt = prompt.trim();
    for response in responses {
        let mut rest = response.trim_start();
        if prompt.len() >= SHORTEST_REPEATED && rest.starts_with(prompt) {
            add(notes, Cause::PromptRepeated, response);
            rest = &rest[prompt.len()..];
        }
        look_at_list(rest, notes);
        if !is_list_as_text(rest)
            && let Some(turn) = first_user_turn(rest)
        {
            add(notes, Cause::UserTurnInResponse, rest[turn..].trim_start());
        }
    }
}

/// The beginning of the response of a pair whose responses are the same.
pub(super) fn same_response(body: &Body) -> Option<String> {
    match body {
        Body::Text { chosen, rejected, .. } => (chosen == rejected).then(|| excerpt(chosen)),
        Body::Conversation { chosen, rejected, .. } => {
            (chosen == rejected).then(|| excerpt(chosen.first().map_or("", |first| &first.content)))
        }
    }
}

/// Whether a text is a list as Python or JSON writes it: of messages, or of strings alone.
fn is_list_as_text(text: &str) -> bool {
    let text = text.trim();
    let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) else { return false };
    let inner = inner.trim();
    let is_messages = inner.starts_with('{')
        && ["role", "from", "content", "value"]
            .iter()
            .any(|key| inner.contains(&format!("'{key}'")) || inner.contains(&format!("\"{key}\"")));
    let is_strings = ['\'', '"']
        .iter()
        .any(|&quote| inner.len() > 1 && inner.starts_with(quote) && inner.ends_with(quote));
    is_messages || is_strings
}

/// Hashes of a pair and of the same pair with its sides exchanged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairDigests {
    pub pair: u64,
    pub exchanged: u64,
    /// Digest of the prompt alone, or of the pair where the prompt is empty.
    pub prompt: u64,
}

/// Hashes a pair's content.
pub(super) fn digests(body: &Body) -> PairDigests {
    let parts: [blake3::Hash; 3] = match body {
        Body::Text { prompt, chosen, rejected } => {
            [prompt, chosen, rejected].map(|text| blake3::hash(text.as_bytes()))
        }
        Body::Conversation { prompt, chosen, rejected, variables } => {
            let hash = |messages: &[Message]| {
                let mut hasher = blake3::Hasher::new();
                for message in messages {
                    for text in [&message.role, &message.content] {
                        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
                    }
                    if !message.other.is_empty() {
                        hasher.update(serde_json::json!(message.other).to_string().as_bytes());
                    }
                }
                hasher
            };
            let mut prompt = hash(prompt);
            if !variables.is_empty() {
                prompt.update(serde_json::json!(variables).to_string().as_bytes());
            }
            [prompt.finalize(), hash(chosen).finalize(), hash(rejected).finalize()]
        }
    };
    let combined = |order: &[usize]| {
        let mut hasher = blake3::Hasher::new();
        for &part in order {
            hasher.update(parts[part].as_bytes());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        u64::from_le_bytes(first)
    };
    let without_prompt = match body {
        Body::Text { prompt, .. } => prompt.is_empty(),
        Body::Conversation { prompt, .. } => prompt.is_empty(),
    };
    let pair = combined(&[0, 1, 2]);
    let prompt = if without_prompt { pair } else { combined(&[0]) };
    PairDigests { pair, exchanged: combined(&[0, 2, 1]), prompt }
}

/// The pairs of a file so far, with which repeated ones are found. Costs about 16 bytes per pair.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    seen: HashSet<u64, BuildHasherDefault<Given>>,
}

impl Digests {
    /// Takes the next pair; returns the cause to report if an earlier pair is the same or its opposite.
    pub fn add(&mut self, digests: PairDigests) -> Option<Cause> {
        let opposite = digests.pair != digests.exchanged && self.seen.contains(&digests.exchanged);
        let repeated = !self.seen.insert(digests.pair);
        if repeated {
            Some(Cause::Repeated)
        } else if opposite {
            Some(Cause::Opposite)
        } else {
            None
        }
    }
}

/// A hasher for keys that are hashes already.
#[derive(Debug, Default)]
struct Given(u64);

impl std::hash::Hasher for Given {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_written_as_text_are_told_from_texts_with_brackets() {
        for text in
            ["[{'role': 'user', 'content': 'a'}]", "['a']", " [\"a\", \"b\"]\n", "[{\"from\": \"human\"}]"]
        {
            assert!(is_list_as_text(text), "{text}");
        }
        for text in ["[1, 2]", "[a]", "a ['b']", "[]", "['a'] and more", "[x for x in 'role']", "[\""] {
            assert!(!is_list_as_text(text), "{text}");
        }
    }
}
