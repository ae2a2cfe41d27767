//! Signals that ask the program to end (Ctrl-C, a batch system's SIGTERM, a terminal that closes), and SIGUSR1, which asks
//! a run to save and to go on.
//!
//! A command is *stoppable* unless it says otherwise: the nearest [`check`] ends it with an error. Where none is
//! reached within `GRACE` (in a large matrix product, or a large file), the command keeps what is worth keeping, and
//! the process ends there. While optimiser steps run ([`steps`]), the loop asks [`requested`] after each step, saves
//! and stops. A second signal ends the process at once.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::report::{print_error, print_notice};

/// How long a stoppable command may take to reach a [`check`].
const GRACE: Duration = Duration::from_millis(1000);

/// Signals of one kind that arrive this soon after the first are one request: `timeout` and batch systems send theirs
/// to a process and to its group.
const SAME_REQUEST: Duration = Duration::from_millis(1000);
/// As [`SAME_REQUEST`], for Ctrl-C, which people press twice on purpose.
const SAME_KEY: Duration = Duration::from_millis(100);

/// A signal that ends the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGHUP: the terminal is gone.
    Hangup = 1,
    /// SIGINT: Ctrl-C.
    Interrupt = 2,
    /// SIGTERM: somebody asked the process to end.
    Terminate = 15,
}

impl Signal {
    /// The signal of this number.
    pub fn of(number: i32) -> Option<Self> {
        [Signal::Hangup, Signal::Interrupt, Signal::Terminate]
            .into_iter()
            .find(|signal| *signal as i32 == number)
    }

    /// 128 plus the signal's number, as shells have it.
    pub fn exit_code(self) -> u8 {
        128 + self as u8
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Signal::Hangup => "SIGHUP",
            Signal::Interrupt => "Ctrl-C (SIGINT)",
            Signal::Terminate => "SIGTERM",
        })
    }
}

/// What is done before a stoppable command ends: it says in a sentence what it kept, if anything.
type KeepFn = Box<dyn FnOnce() -> Option<String> + Send>;

struct State {
    /// Whether the command may end wherever it is.
    is_stoppable: bool,
    /// Whether the command is ending because of a signal.
    is_ending: bool,
    next_keeper: u64,
    keepers: Vec<(u64, KeepFn)>,
}

static REQUESTED: AtomicI32 = AtomicI32::new(0);
/// Set by SIGUSR1; `None` before [`install`], and where there are no Unix signals.
static SAVE_REQUESTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
static INSTALLED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
static STATE: Mutex<State> =
    Mutex::new(State { is_stoppable: true, is_ending: false, next_keeper: 0, keepers: Vec::new() });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT, SIGTERM and SIGUSR1 are requests, and SIGHUP unless it was ignored from the start, as under
/// `nohup`.
///
/// # Errors
/// [`Error::Device`] where the system does not allow that.
pub fn install() -> Result<()> {
    let installed = INSTALLED.get_or_init(|| watch().map_err(|error| error.to_string()));
    installed.clone().map_err(|error| {
        Error::device(
            format!("cannot watch for Ctrl-C: {error}"),
            "run outside a sandbox that forbids signals",
        )
    })
}

/// The signal that asked this process to end.
pub fn requested() -> Option<Signal> {
    Signal::of(REQUESTED.load(Ordering::SeqCst))
}

/// Whether SIGUSR1 has come since the last call: batch systems send it some time before they end a job.
pub fn take_save_request() -> bool {
    SAVE_REQUESTED.get().is_some_and(|requested| requested.swap(false, Ordering::SeqCst))
}

/// Whether a signal asks this process to end or to save, and was not answered yet.
pub fn is_anything_asked() -> bool {
    requested().is_some() || SAVE_REQUESTED.get().is_some_and(|requested| requested.load(Ordering::SeqCst))
}

/// As if `signal` had come: another rank of the run got it.
pub fn request(signal: Signal) {
    let none = REQUESTED.compare_exchange(0, signal as i32, Ordering::SeqCst, Ordering::SeqCst);
    if none.is_ok() {
        // Without the thread the command still ends at its next check.
        let _ = std::thread::Builder::new().name("grace".into()).spawn(move || end_after_grace(signal));
    }
}

/// Ends a stoppable command that a signal asked to end; does nothing while [`steps`] run.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn check() -> Result<()> {
    let Some(signal) = requested() else { return Ok(()) };
    let mut state = state();
    match state.is_stoppable {
        true => Err(state.end(signal)),
        false => Ok(()),
    }
}

/// The error that ends the command, for a loop that saved what it had: `kept` says in a sentence where.
pub fn stopped(signal: Signal, kept: impl Into<String>) -> Error {
    state().is_ending = true;
    Error::Interrupted { signal, kept: kept.into() }
}

/// As long as this lives, a signal ends nothing: the loop that asks [`requested`] finds it.
#[derive(Debug)]
#[must_use]
pub struct Steps(());

/// Begins work that must not be interrupted.
///
/// # Errors
/// As [`check`]: a signal that came before ends the command here.
pub fn steps() -> Result<Steps> {
    let mut state = state();
    if let (Some(signal), true) = (requested(), state.is_stoppable) {
        return Err(state.end(signal));
    }
    state.is_stoppable = false;
    Ok(Steps(()))
}

impl Drop for Steps {
    fn drop(&mut self) {
        state().is_stoppable = true;
    }
}

/// As long as this lives, its function is called before a stoppable command ends.
#[derive(Debug)]
#[must_use]
pub struct Keeper(u64);

/// Registers `keep`, which stores what was computed so far and says so in a sentence.
pub fn keep_before_end(keep: impl FnOnce() -> Option<String> + Send + 'static) -> Keeper {
    let mut state = state();
    state.next_keeper += 1;
    let id = state.next_keeper;
    state.keepers.push((id, Box::new(keep)));
    Keeper(id)
}

impl Drop for Keeper {
    fn drop(&mut self) {
        state().keepers.retain(|(id, _)| *id != self.0);
    }
}

impl State {
    fn end(&mut self, signal: Signal) -> Error {
        self.is_ending = true;
        let kept: Vec<String> = self.keepers.drain(..).filter_map(|(_, keep)| keep()).collect();
        let kept = match kept.is_empty() {
            true => "nothing was lost: run the same command again".to_string(),
            false => kept.join("; "),
        };
        Error::Interrupted { signal, kept }
    }
}

#[cfg(not(windows))]
fn watch() -> std::io::Result<()> {
    let mut numbers = vec![Signal::Interrupt as i32, Signal::Terminate as i32];
    if hangup_is_heard() {
        numbers.push(Signal::Hangup as i32);
    }
    let save = SAVE_REQUESTED.get_or_init(Arc::default);
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(save))?;
    let mut signals = signal_hook::iterator::Signals::new(numbers)?;
    let listen = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever().filter_map(Signal::of) {
            match first {
                None => {
                    first = Some(Instant::now());
                    first_request(signal);
                }
                Some(at) if at.elapsed() >= same_request(signal) => {
                    signal_hook::low_level::exit(signal.exit_code().into())
                }
                Some(_) => {}
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map(|_| ())
}

/// Without Unix signals Ctrl-C ends the process as the system does it.
#[cfg(windows)]
fn watch() -> std::io::Result<()> {
    Ok(())
}

fn same_request(signal: Signal) -> Duration {
    match signal {
        Signal::Interrupt => SAME_KEY,
        Signal::Hangup | Signal::Terminate => SAME_REQUEST,
    }
}

fn first_request(signal: Signal) {
    // Before the request is visible: the command may end as soon as it sees it.
    let notice = match state().is_stoppable {
        true => "stopping; once more stops at once",
        false => "stopping after this step; once more stops at once, without saving",
    };
    print_notice(&format!("\n{signal}: {notice}"));
    REQUESTED.store(signal as i32, Ordering::SeqCst);
    // Without the thread the command still ends at its next check.
    let _ = std::thread::Builder::new().name("grace".into()).spawn(move || end_after_grace(signal));
}

/// Ends the process from outside where a stoppable command does not come to a [`check`].
fn end_after_grace(signal: Signal) {
    loop {
        std::thread::sleep(GRACE);
        let mut state = state();
        if state.is_ending {
            return;
        }
        if state.is_stoppable {
            print_error(&state.end(signal));
            // The main thread is in the middle of something: no destructor may run beside it.
            signal_hook::low_level::exit(signal.exit_code().into());
        }
    }
}

/// Whether SIGHUP has any effect yet. Linux says so in /proc; where that cannot be read, SIGHUP keeps its effect.
#[cfg(not(windows))]
pub(crate) fn hangup_is_heard() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (Signal::Hangup as u64 - 1) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_shells() {
        let codes = [Signal::Hangup, Signal::Interrupt, Signal::Terminate].map(Signal::exit_code);
        assert_eq!(codes, [129, 130, 143]);
        assert_eq!(Signal::of(15), Some(Signal::Terminate));
        assert_eq!(Signal::of(9), None);
    }

    #[test]
    fn nothing_is_asked_nothing_ends() {
        assert_eq!(requested(), None);
        check().unwrap();
        drop(steps().unwrap());
        let keeper = keep_before_end(|| Some("kept".into()));
        drop(keeper);
        assert!(state().keepers.is_empty());
    }
}
