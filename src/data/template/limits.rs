//! What a template may use: templates come from the internet with their models, and some are hostile or broken.
//!
//! Work and memory are bounded by minijinja's fuel, the stack by running on one of a known size, and time by whoever
//! watches [`overrun`], since a few operations on long strings cost no fuel.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use minijinja::{Error, ErrorKind, State};

/// Steps of one rendering: an instruction, or 64 bytes of text that is made or looked through. A conversation of 200
/// turns and 100 thousand characters takes under 200 thousand with the longest published templates.
pub(super) const STEPS: u64 = 8_000_000;
pub(super) const BYTES_PER_STEP: u64 = 64;
/// Levels of lists and mappings in a value that is kept, printed or written as JSON.
pub(super) const LEVELS: usize = 200;
/// minijinja's count of nested calls, of which a macro's call takes 4.
pub(super) const CALLS: usize = 400;

/// Stack that compiling or rendering within the limits cannot exhaust, and what is made where less is left.
const STACK_NEEDED: usize = 64 << 20;
const STACK: usize = 96 << 20;

/// Runs `work` with enough stack: on the caller's where that has it, else on one made for it.
pub(crate) fn with_deep_stack<R>(work: impl FnOnce() -> R) -> R {
    stacker::maybe_grow(STACK_NEEDED, STACK, work)
}

/// The error for a value that nests too deep.
pub(crate) fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value nests more than {LEVELS} levels deep"))
}

/// Bytes that what is left of the fuel pays for.
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

/// A thread's renderings, numbered from 1, and whether one is under way.
#[derive(Debug, Default)]
struct Renderings {
    number: AtomicU64,
    under_way: AtomicBool,
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

/// Runs one rendering where [`Watch`] sees it.
pub(super) fn watched<R>(render: impl FnOnce() -> R) -> R {
    MINE.with(|mine| {
        mine.number.fetch_add(1, Ordering::Relaxed);
        mine.under_way.store(true, Ordering::Release);
        let result = render();
        mine.under_way.store(false, Ordering::Release);
        result
    })
}

/// Watches for a rendering that does not end. Looks are counted, not seconds, so that a stopped process that goes on
/// has not used up its time.
#[derive(Debug, Default)]
pub struct Watch {
    /// Thread, its rendering's number, and how many looks in a row found it under way.
    seen: Vec<(Weak<Renderings>, u64, u32)>,
}

impl Watch {
    /// Whether some rendering has been under way at each of the last `looks` calls, this one included.
    pub fn overrun(&mut self, looks: u32) -> bool {
        let threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut seen = Vec::with_capacity(threads.len());
        for thread in threads {
            let Some(state) = thread.upgrade() else { continue };
            if !state.under_way.load(Ordering::Acquire) {
                continue;
            }
            let number = state.number.load(Ordering::Relaxed);
            let before = self.seen.iter().find(|(other, known, _)| other.ptr_eq(&thread) && *known == number);
            let count = before.map_or(1, |(_, _, count)| count + 1);
            seen.push((thread, number, count));
        }
        self.seen = seen;
        self.seen.iter().any(|(_, _, count)| *count >= looks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendering_that_does_not_end_is_seen() {
        let mut watch = Watch::default();
        watched(|| {
            assert!(!watch.overrun(3));
            assert!(!watch.overrun(3));
            assert!(watch.overrun(3));
        });
        watched(|| assert!(!watch.overrun(2), "another rendering"));
    }
}
