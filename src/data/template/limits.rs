//! What a template may use: templates come from the internet with their models, and some are hostile or broken.
//!
//! Work and memory are bounded by minijinja's fuel, the stack by running on one of a known size, and time by the caller
//! that watches ([`Watch`]), since a few operations on long strings cost no fuel.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use minijinja::{Error, ErrorKind, State};

use super::scan::Prepared;

/// Steps of one rendering: an instruction, or 64 bytes of text that is made or looked through. A conversation of 200
/// turns and 100 thousand characters takes under 200 thousand with the longest published templates.
pub(super) const STEPS: u64 = 8_000_000;
pub(super) const BYTES_PER_STEP: u64 = 64;
/// Bytes of text that a conversation may become, beside [`BYTES_PER_BYTE`] for each of its own: room for the words of the
/// longest templates.
const TEXT_BYTES: usize = 1 << 20;
/// Bytes of text for each byte of the conversation: content that is repeated, or written with escapes.
const BYTES_PER_BYTE: usize = 16;
/// Levels of lists and mappings in a value that is kept, printed or written as JSON.
pub(super) const LEVELS: usize = 200;
/// minijinja's count of nested calls, of which a macro's call takes 4.
pub(super) const CALLS: usize = 400;

/// Stack that compiling within the limits cannot exhaust, and that is enough for every rendering too.
pub(super) const DEEP_STACK: usize = 64 << 20;

/// Runs `work` with `bytes` of stack at least: on the caller's where that has them, else on one made for it, which
/// takes longer than most renderings.
pub(crate) fn with_stack<R>(bytes: usize, work: impl FnOnce() -> R) -> R {
    stacker::maybe_grow(bytes, bytes + bytes / 2, work)
}

/// Stack that a rendering of this template cannot exhaust. Calls nest at most [`CALLS`] / 4 deep; values nest
/// [`LEVELS`] deep and, before they are checked, as much deeper as one tag of each call has signs.
pub(super) fn stack_of(template: &Prepared) -> usize {
    let one_call = (8 << 10) + template.largest_tag * (1 << 10);
    let calls = if template.has_calls { CALLS / 4 } else { 1 };
    ((512 << 10) + calls * one_call).min(DEEP_STACK)
}

/// The error for a value that nests too deep.
pub(crate) fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value nests more than {LEVELS} levels deep"))
}

/// Bytes that the rest of the fuel pays for.
pub(super) fn bytes_left(state: &State) -> usize {
    let steps = state.fuel_levels().map_or(u64::MAX, |(_, left)| left);
    usize::try_from(steps.saturating_mul(BYTES_PER_STEP)).unwrap_or(usize::MAX)
}

/// Pays for looking through or making `bytes` bytes before that is done.
pub(super) fn pay_for_bytes(state: &State, bytes: usize) -> Result<(), Error> {
    match bytes as u64 / BYTES_PER_STEP {
        0 => Ok(()),
        steps => state.consume_fuel(steps),
    }
}

/// The text of a conversation as a template writes it, up to what the conversation may become. Pieces of the template itself cost
/// one step each, however long they are, so that steps alone would allow gigabytes.
pub(super) struct BoundedText {
    text: Vec<u8>,
    limit: usize,
}

impl BoundedText {
    /// For a conversation of so many bytes.
    pub fn of_conversation(bytes: usize) -> Self {
        let limit = bytes.saturating_mul(BYTES_PER_BYTE).saturating_add(TEXT_BYTES);
        BoundedText { text: Vec::new(), limit }
    }

    /// What was written.
    pub fn into_text(self) -> Result<String, Error> {
        String::from_utf8(self.text)
            .map_err(|error| Error::new(ErrorKind::WriteFailure, "the text is not UTF-8").with_source(error))
    }
}

impl std::io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.text.len().saturating_add(bytes.len()) > self.limit {
            return Err(std::io::Error::other(TooLong { limit: self.limit }));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A template that writes more than a conversation may become.
#[derive(Debug)]
pub(super) struct TooLong {
    limit: usize,
}

impl std::fmt::Display for TooLong {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mebibytes = self.limit.div_ceil(1 << 20);
        write!(formatter, "makes more than {mebibytes} MiB of text out of one conversation")
    }
}

impl std::error::Error for TooLong {}

/// Bytes of the texts of a value.
pub(super) fn text_bytes(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(values) => values.iter().map(text_bytes).sum(),
        serde_json::Value::Object(members) => members_bytes(members),
        // A number or a word.
        _ => 8,
    }
}

/// As [`text_bytes`], of all members of an object.
pub(super) fn members_bytes(members: &serde_json::Map<String, serde_json::Value>) -> usize {
    members.iter().map(|(name, value)| name.len() + text_bytes(value)).sum()
}

/// The renderings of one thread.
#[derive(Debug, Default)]
struct Renderings {
    /// How many there have been.
    number: AtomicU64,
    /// Where the template of the one under way comes from.
    under_way: Mutex<Option<Arc<Path>>>,
}

impl Renderings {
    fn set(&self, path: Option<Arc<Path>>) {
        *self.under_way.lock().unwrap_or_else(PoisonError::into_inner) = path;
    }
}

static THREADS: Mutex<Vec<Weak<Renderings>>> = Mutex::new(Vec::new());

thread_local! {
    static MINE: Arc<Renderings> = {
        let mine = Arc::new(Renderings::default());
        let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.strong_count() > 0);
        threads.push(Arc::downgrade(&mine));
        mine
    };
}

/// Runs one rendering of the template at `path` where a [`Watch`] sees it.
pub(super) fn watched<R>(path: &Arc<Path>, render: impl FnOnce() -> R) -> R {
    MINE.with(|mine| {
        mine.number.fetch_add(1, Ordering::Relaxed);
        mine.set(Some(path.clone()));
        let result = render();
        mine.set(None);
        result
    })
}

/// Watches for a rendering that does not end. Looks are counted, not seconds, so that a process that was stopped and
/// goes on has not used up its time.
#[derive(Debug, Default)]
pub struct Watch {
    /// Thread, its rendering's number, and how many looks in a row found it under way.
    seen: Vec<(Weak<Renderings>, u64, u32)>,
}

impl Watch {
    /// The template of a rendering that has been under way at each of the last `looks` calls, this one included.
    pub fn overrun(&mut self, looks: u32) -> Option<PathBuf> {
        let threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut seen = Vec::with_capacity(threads.len());
        let mut overrun = None;
        for thread in threads {
            let Some(state) = thread.upgrade() else { continue };
            let under_way = state.under_way.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let Some(path) = under_way else { continue };
            let number = state.number.load(Ordering::Relaxed);
            let before = self.seen.iter().find(|(other, known, _)| other.ptr_eq(&thread) && *known == number);
            let count = before.map_or(1, |(_, _, count)| count + 1);
            if count >= looks {
                overrun = Some(path.to_path_buf());
            }
            seen.push((thread, number, count));
        }
        self.seen = seen;
        overrun
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendering_that_does_not_end_is_seen() {
        let mine: Arc<Path> = Path::new("mine").into();
        let mut watch = Watch::default();
        watched(&mine, || {
            assert_eq!(watch.overrun(3), None);
            assert_eq!(watch.overrun(3), None);
            assert_eq!(watch.overrun(3).as_deref(), Some(&*mine));
        });
        watched(&mine, || assert_eq!(watch.overrun(2), None, "another rendering"));
    }
}
