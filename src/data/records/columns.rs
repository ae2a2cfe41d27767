//! The columns of a record: which names mean something, and their values.

use std::path::Path;

use serde_json::{Map, Value};

use super::FORMATS_HELP;
use super::message::{Message, take_turns};
use super::plausible::Note;
use super::renamed::Renamed;
use super::scan::{Kind, Scanner, Span, excerpt};
use super::scores::{RATINGS, SCORE_COLUMNS, Scores};
use super::source::{Start, broken};
use crate::data::Cause;
use crate::{Error, Result};

/// Columns that hold a prompt's messages. Their order here, not that in a record, decides between equals.
pub(super) const CONVERSATION_COLUMNS: [&str; 7] =
    ["messages", "conversations", "conversation", "dialogue", "dialog", "chat", "context"];

/// Columns that hold a prompt's text. A message list is read in these too, and a text in the ones above.
pub(super) const TEXT_COLUMNS: [&str; 9] =
    ["prompt", "instruction", "question", "query", "input", "problem", "post", "user", "human"];

/// Earlier turns, to stand before the prompt.
pub(super) const HISTORY: &str = "history";

/// Names of the system message's text.
pub(super) const SYSTEM_COLUMNS: [&str; 3] = ["system", "system_prompt", "system_message"];

/// Names of the better and the worse response, in the order in which they are looked for.
pub(super) const RESPONSE_COLUMNS: [[&str; 2]; 9] = [
    ["chosen", "rejected"],
    ["chosen_response", "rejected_response"],
    ["response_chosen", "response_rejected"],
    ["chosen_messages", "rejected_messages"],
    ["chosen_answer", "rejected_answer"],
    ["answer_chosen", "answer_rejected"],
    ["preferred_output", "non_preferred_output"],
    ["response_j", "response_k"],
    ["response", "rejected_response"],
];

/// The worse response of ms-swift, whose better one is the last turn of `messages`.
pub(super) const SWIFT_REJECTED: [&str; 2] = ["rejected_response", "rejected_messages"];

/// Columns of pictures, films and sound, which no text model sees.
const MEDIA_COLUMNS: [&str; 7] = ["images", "image", "videos", "video", "audios", "audio", "objects"];

/// Columns of one record; no table has as many.
const MAX_COLUMNS: usize = 10_000;

/// What to say of a name that no column with a meaning has.
pub(crate) fn unknown_column(name: &str) -> Option<String> {
    if is_known(name) || name == RATINGS || SCORE_COLUMNS.iter().flatten().any(|known| *known == name) {
        return None;
    }
    let known = prompt_columns().chain(RESPONSE_COLUMNS.into_iter().flatten());
    let known = known.chain(["tools", "chat_template_kwargs"]);
    let nearest = nearest(name, known).unwrap_or("chosen");
    Some(format!("names `{name}`, which is no column with a meaning here; did you mean `{nearest}`?"))
}

/// What is wrong with a value, when its place in the file is not yet known.
#[derive(Debug)]
pub(super) struct Fault {
    pub message: String,
    pub help: String,
}

impl Fault {
    /// A fault with what is wrong and how to mend it.
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Fault { message: message.into(), help: help.into() }
    }
}

pub(super) type Parsed<T> = std::result::Result<T, Fault>;

/// The columns of one record, and its place in the file.
#[derive(Debug)]
pub(crate) struct Columns<'a> {
    path: &'a Path,
    renamed: &'a Renamed<'a>,
    pub(super) index: usize,
    pub(super) place: usize,
    start: Start,
    /// The columns whose names mean something, but those that are null.
    members: Map<String, Value>,
    /// The names of those that were taken out, for messages.
    taken: Vec<String>,
    /// All other columns.
    unread: Vec<(String, Kind)>,
    pub(super) notes: Vec<Note>,
    pub(super) scores: Scores,
}

/// Whether a column may hold a prompt or a part of one.
pub(super) fn is_prompt_column(name: &str) -> bool {
    CONVERSATION_COLUMNS.contains(&name)
        || TEXT_COLUMNS.contains(&name)
        || SYSTEM_COLUMNS.contains(&name)
        || name == HISTORY
}

/// Whether a column may hold the better response.
pub(super) fn is_chosen(name: &str) -> bool {
    RESPONSE_COLUMNS.iter().any(|[chosen, _]| *chosen == name)
}

/// Whether a column's name means something.
pub(super) fn is_known(name: &str) -> bool {
    is_prompt_column(name)
        || RESPONSE_COLUMNS.iter().flatten().any(|known| *known == name)
        || SWIFT_REJECTED.contains(&name)
        || ["tools", "chat_template_kwargs"].contains(&name)
}

impl<'a> Columns<'a> {
    /// Reads the record's text, which is UTF-8. Columns without a meaning are passed over.
    pub fn parse(
        path: &'a Path,
        renamed: &'a Renamed<'a>,
        index: usize,
        place: usize,
        text: &[u8],
        start: Start,
    ) -> Result<Self> {
        let mut columns = Columns {
            path,
            renamed,
            index,
            place,
            start,
            members: Map::new(),
            taken: Vec::new(),
            unread: Vec::new(),
            notes: Vec::new(),
            scores: Scores::default(),
        };
        let mut known: Vec<(String, Span)> = Vec::new();
        let mut scanner = Scanner::new(text, 0);
        if !matches!(scanner.peek(), Some(b'{')) {
            let value = scanner.value().and_then(|value| scanner.end().map(|()| value));
            let value = value.map_err(|fault| broken(path, text, start, &fault, &columns.inside()))?;
            let message = format!("the record is {}, not an object", type_name(value.kind));
            return Err(columns.error(Fault::new(message, FORMATS_HELP)));
        }
        let (unread, notes, scores) = (&mut columns.unread, &mut columns.notes, &mut columns.scores);
        let read = scanner.members(|name, span| {
            let Some(ours) = renamed.read_as(&name) else { return Ok(()) };
            let name = ours.to_string();
            if !is_known(&name) {
                scores.take(&name, &text[span.range.clone()]);
                if unread.len() <= MAX_COLUMNS {
                    unread.push((name, span.kind));
                }
                return Ok(());
            }
            // The last of several counts, as in Python.
            if let Some(earlier) = known.iter().position(|(other, _)| *other == name) {
                known.remove(earlier);
                notes.push(Note::new(Cause::RepeatedKey, name.clone()));
            }
            known.push((name, span));
            Ok(())
        });
        let read = read.and_then(|()| scanner.end());
        read.map_err(|fault| broken(path, text, start, &fault, &columns.inside()))?;
        if columns.unread.len() > MAX_COLUMNS {
            let message = format!("the record has more than {MAX_COLUMNS} columns");
            return Err(columns.error(Fault::new(message, FORMATS_HELP)));
        }
        columns.take_values(text, known).map_err(|fault| columns.error(fault))?;
        Ok(columns)
    }

    fn take_values(&mut self, text: &[u8], known: Vec<(String, Span)>) -> Parsed<()> {
        for (name, span) in known {
            if span.kind == Kind::Null {
                self.unread.push((name, Kind::Null));
                continue;
            }
            if let Some(number) = span.not_finite {
                return Err(Fault::new(
                    format!("column `{name}` holds {number}, which is no value of JSON"),
                    "write `null` or leave the column out where a value is missing (pandas: `df.astype(object).where(df.notna(), None)`)",
                ));
            }
            if let Some(half) = span.surrogate {
                return Err(Fault::new(
                    format!(
                        "column `{name}` holds `{half}`, one half of a character (a lone surrogate), which is no text"
                    ),
                    "the text was cut within an emoji or the like: write the whole character or leave the half out \
                     (Python: `text.encode(\"utf-8\", \"ignore\").decode()`)",
                ));
            }
            let value = serde_json::from_slice(&text[span.range]).map_err(|error| {
                let words = error.to_string();
                let message = words.split(" at line ").next().unwrap_or_default();
                Fault::new(
                    format!("column `{name}` cannot be read: {message}"),
                    "numbers have up to 64 bits here, and lists stand up to 128 deep inside one another",
                )
            })?;
            self.members.insert(name, value);
        }
        Ok(())
    }

    fn inside(&self) -> String {
        if self.start.is_line { String::new() } else { format!(" (in record {})", self.place) }
    }

    /// The error of a fault in this record, with the record's place.
    pub fn error(&self, fault: Fault) -> Error {
        let place = if self.start.is_line {
            String::new()
        } else if self.start.line == 0 {
            format!(" (row {})", self.place)
        } else {
            format!(" (record {}, which begins in line {})", self.place, self.start.line)
        };
        Error::data(self.path, Some(self.place), fault.message + &place, fault.help)
    }

    /// A column's value; `null` counts as absent, since table formats write it for missing values.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.members.get(name)
    }

    /// A column's value, unless there is nothing in it.
    pub fn filled(&self, name: &str) -> Option<&Value> {
        self.get(name).filter(|value| match value {
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(members) => !members.is_empty(),
            _ => true,
        })
    }

    /// Whether the record has the column at all, be it null.
    pub fn names(&self, name: &str) -> bool {
        self.members.contains_key(name) || self.unread.iter().any(|(other, _)| other == name)
    }

    /// The columns without a meaning that are not null.
    pub fn unread(&self) -> impl Iterator<Item = (&str, Kind)> {
        self.unread.iter().map(|(name, kind)| (name.as_str(), *kind))
    }

    /// Adds a note for the report of the data.
    pub fn note(&mut self, cause: Cause, example: impl Into<String>) {
        self.notes.push(Note::new(cause, example));
    }

    /// The fault of a column that the record lacks, with the nearest name that it has.
    pub fn missing(&self, name: &str) -> Fault {
        if let Some(theirs) = self.renamed.of(name) {
            return Fault::new(
                format!("no column `{theirs}`, which `--columns` reads as `{name}`"),
                FORMATS_HELP,
            );
        }
        if self.unread.iter().any(|(other, kind)| other == name && *kind == Kind::Null) {
            return Fault::new(format!("column `{name}` is null"), FORMATS_HELP);
        }
        let others = || {
            let known = self.taken.iter().chain(self.members.keys()).map(String::as_str);
            known.chain(self.unread.iter().map(|(name, _)| name.as_str())).filter(|key| *key != name)
        };
        // A better response is no slip of the pen for what is missing beside it.
        let message = match nearest(name, others().filter(|key| !is_chosen(key))) {
            Some(near) => {
                format!("no column `{name}`; the nearest present column is `{}`", excerpt(near))
            }
            None if others().next().is_none() => {
                format!("no column `{name}`: the record is empty")
            }
            None => {
                let names: Vec<String> = others().take(12).map(excerpt).collect();
                format!("no column `{name}` among `{}`", names.join("`, `"))
            }
        };
        Fault::new(message, FORMATS_HELP)
    }

    /// Takes a column's value, which must be there.
    pub fn take(&mut self, name: &str) -> Parsed<Value> {
        let (name, value) = self.members.shift_remove_entry(name).ok_or_else(|| self.missing(name))?;
        self.taken.push(name);
        Ok(value)
    }

    /// As [`Columns::take`], of a column that must be a string.
    pub fn take_text(&mut self, name: &str) -> Parsed<String> {
        match self.take(name)? {
            Value::String(text) => Ok(text),
            other => Err(wrong_type(name, &other, "a string")),
        }
    }

    /// A message list, or a single message object standing for a list of one.
    pub fn take_messages(&mut self, name: &str) -> Parsed<Vec<Message>> {
        take_turns(self.take(name)?, name)
    }

    /// Refuses pictures and the like, and columns with the name of a prompt in other letters.
    pub fn check_names(&self) -> Parsed<()> {
        for name in self.filled_unread() {
            if MEDIA_COLUMNS.contains(&name) {
                return Err(Fault::new(
                    format!("column `{name}` is filled: the record has more than text"),
                    "only text can be trained on: leave such records out, or remove the column where it does not matter",
                ));
            }
            if let Some(known) = known_spelling(name) {
                return Err(prompt_under_another_name(name, known));
            }
        }
        Ok(())
    }

    /// For a record without any prompt: refuses columns whose name resembles that of one.
    pub fn check_resembling_names(&self) -> Parsed<()> {
        match self.filled_unread().find_map(|name| Some((name, resembled(name)?))) {
            Some((name, known)) => Err(prompt_under_another_name(name, known)),
            None => Ok(()),
        }
    }

    /// The columns without a meaning that hold a text, a list or an object with something in it.
    fn filled_unread(&self) -> impl Iterator<Item = &str> {
        let filled = |kind| {
            matches!(
                kind,
                Kind::Text { empty: false } | Kind::List { empty: false } | Kind::Object { empty: false }
            )
        };
        self.unread().filter(move |(_, kind)| filled(*kind)).map(|(name, _)| name)
    }
}

fn prompt_under_another_name(name: &str, known: &str) -> Fault {
    let name = excerpt(name);
    Fault::new(
        format!("column `{name}` is not known and seems to hold a prompt; did you mean `{known}`?"),
        format!("rename it to `{known}`, or remove it if the pair is complete without it"),
    )
}

/// The name with a prompt that this one is in other letters: `Prompt`, `SYSTEM`, `system-prompt`, `questions`.
fn known_spelling(name: &str) -> Option<&'static str> {
    let plain = |name: &str| -> String {
        let letters = name.chars().filter(|c| c.is_alphanumeric());
        letters.flat_map(char::to_lowercase).collect::<String>().trim_end_matches('s').to_string()
    };
    let mut known = prompt_columns();
    known.find(|known| plain(known) == plain(name))
}

/// The name with a prompt that this one resembles: one letter away (`promt`), or a word of it (`user_prompt`). Only
/// asked where a record has no prompt otherwise, since `prompt_id` and its like are common.
fn resembled(name: &str) -> Option<&'static str> {
    let lower = name.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).collect();
    // Words after which a column says something about a prompt, and is not it.
    const ABOUT: [&str; 16] = [
        "id", "ids", "idx", "index", "hash", "length", "len", "count", "tokens", "type", "source", "lang",
        "language", "category", "name", "model",
    ];
    if words.last().is_some_and(|last| ABOUT.contains(last)) {
        return None;
    }
    prompt_columns()
        .find(|known| known.len() > 4 && strsim::damerau_levenshtein(known, &lower) == 1)
        .or_else(|| prompt_columns().find(|known| words.contains(known)))
}

fn prompt_columns() -> impl Iterator<Item = &'static str> {
    let lists = [&TEXT_COLUMNS[..], &CONVERSATION_COLUMNS, &SYSTEM_COLUMNS, &[HISTORY]];
    lists.into_iter().flatten().copied()
}

pub(super) fn wrong_type(column: &str, found: &Value, wanted: &str) -> Fault {
    Fault::new(format!("column `{column}` is {}, not {wanted}", value_type(found)), FORMATS_HELP)
}

/// A JSON value's type, with its article.
pub(super) fn value_type(value: &Value) -> &'static str {
    type_name(match value {
        Value::Null => Kind::Null,
        Value::Bool(_) => Kind::Bool,
        Value::Number(_) => Kind::Number,
        Value::String(_) => Kind::Text { empty: false },
        Value::Array(_) => Kind::List { empty: false },
        Value::Object(_) => Kind::Object { empty: false },
    })
}

fn type_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Null => "null",
        Kind::Bool => "a boolean",
        Kind::Number => "a number",
        Kind::Text { .. } => "a string",
        Kind::List { .. } => "a list",
        Kind::Object { .. } => "an object",
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
