//! The control line: a TCP connection of every rank to rank 0, for who is there, who died, and small agreements.
//!
//! No tensor travels on it. A thread of each rank says once a second how far it is; rank 0 looks at that and tells all when one
//! is lost. A process that closes its connection without a goodbye has died.

mod join;
mod watch;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::BufReader;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::messages::{self, Message};
use super::progress::{self, Progress};
use super::verdict::{Verdict, What};
use super::{Ranks, host, variable};
use crate::device::Abort;
use crate::error::{Error, Result};
use crate::interrupt::{self, Signal};

/// How long a rank that was told to end may take before its process is ended from outside of its work.
const GRACE: Duration = Duration::from_secs(10);
/// How long rank 0 waits at its end for the others to close their lines.
const FAREWELL: Duration = Duration::from_secs(5);
/// A rank that failed in a step concludes that rank 0 did not fail alike when rank 0 has waited for it this long.
const UNAWARE: Duration = Duration::from_secs(5);
/// How often a thread that waits looks for a signal.
const LOOK: Duration = Duration::from_millis(50);
/// A rank that gives no sign of life for this long is lost, however long [`Limits::hang`] is.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest time that users can set: eleven days.
const MOST_SECONDS: u64 = 1_000_000;

/// The times that users can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Within which all ranks must be there.
    pub join: Duration,
    /// After which a rank that does nothing, and that others wait for, counts as hanging.
    pub hang: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { join: Duration::from_secs(120), hang: Duration::from_secs(600) }
    }
}

impl Limits {
    /// The times that the environment names, and the defaults for the rest.
    ///
    /// # Errors
    /// [`Error::Config`] for a variable that is no number of seconds.
    pub fn of_environment() -> Result<Self> {
        let limits = Limits::default();
        Ok(Limits {
            join: seconds(variable::JOIN, std::env::var_os(variable::JOIN), limits.join)?,
            hang: seconds(variable::HANG, std::env::var_os(variable::HANG), limits.hang)?,
        })
    }

    fn silence(&self) -> Duration {
        self.hang.min(SILENCE)
    }
}

/// The time that a variable holds; `default` where it is absent or empty.
fn seconds(name: &str, value: Option<OsString>, default: Duration) -> Result<Duration> {
    let Some(text) = value.filter(|value| !value.is_empty()) else { return Ok(default) };
    let text = text.to_string_lossy();
    let seconds = text.trim().parse().ok().filter(|seconds: &u64| (1..=MOST_SECONDS).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| {
        Error::config(
            format!("{name} = {text} is not a time"),
            format!("give whole seconds from 1 to {MOST_SECONDS}, or unset it for {}", default.as_secs()),
        )
    })
}

/// This rank's end of the control line.
#[derive(Debug)]
pub struct Control {
    shared: Arc<Shared>,
}

/// What the threads of a control line share.
struct Shared {
    rank: usize,
    limits: Limits,
    /// On rank 0 the other ranks, in order; elsewhere rank 0 alone.
    peers: Vec<Peer>,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "rank {} with {} connections", self.rank, self.peers.len())
    }
}

/// Another rank that this one has a connection with.
struct Peer {
    rank: usize,
    host: String,
    /// For writing; a thread of its own reads.
    stream: Mutex<TcpStream>,
}

#[derive(Default)]
struct State {
    verdict: Option<Verdict>,
    /// Rank 0 is sending the verdict to the others.
    is_telling: bool,
    /// What came from each peer and was not asked for yet: tags and values, oldest first.
    inbox: Vec<VecDeque<(String, Value)>>,
    seen: Vec<Seen>,
    /// Ends the collectives of this rank.
    abort: Option<Abort>,
    /// The main thread is on its way out, and nothing needs to bring it there.
    is_ending: bool,
}

/// What is known of a peer.
struct Seen {
    heard: Instant,
    progress: Progress,
    advanced: Instant,
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Open,
    /// The peer said goodbye; its process may still be there.
    Farewell,
    Closed,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends to a peer. Where that fails the peer is gone, which the reading thread notices.
    fn send(&self, peer: usize, message: &Message) {
        let mut stream = self.peers[peer].stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = messages::send(&mut stream, message) {
            tracing::debug!("rank {}: {error}", self.peers[peer].rank);
        }
    }

    fn send_to_all(&self, message: &Message) {
        (0..self.peers.len()).for_each(|peer| self.send(peer, message));
    }

    /// Accepts a verdict unless there is one already; rank 0 tells it to all others. Then ends this rank's collectives, and after a grace
    /// this process.
    fn judge(self: &Arc<Self>, verdict: Verdict) {
        let abort = {
            let mut state = self.lock();
            if state.verdict.is_some() {
                return;
            }
            state.verdict = Some(verdict.clone());
            state.is_telling = self.rank == 0;
            state.abort.clone()
        };
        self.changed.notify_all();
        if self.rank == 0 {
            self.send_to_all(&Message::Verdict(verdict.clone()));
            self.lock().is_telling = false;
            self.changed.notify_all();
        }
        if let What::Stopped(number) = verdict.what
            && let Some(signal) = Signal::of(number)
        {
            interrupt::request(signal);
        }
        abort.iter().for_each(|abort| abort());
        let shared = Arc::clone(self);
        let end = move || shared.end_after_grace(&verdict);
        // Without the thread the process still ends where it looks at the verdict.
        let _ = std::thread::Builder::new().name("verdict".into()).spawn(end);
    }

    /// Ends the process where its main thread does not come back from its work, for instance from a kernel without an end.
    fn end_after_grace(&self, verdict: &Verdict) {
        // The ranks of unit tests are threads of a process that has more to do.
        if cfg!(test) {
            return;
        }
        let deadline = Instant::now() + GRACE;
        let mut state = self.lock();
        while !state.is_ending {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let error = verdict.error();
                crate::report::print_error(&error);
                // The main thread is in the middle of something: no destructor may run beside it.
                signal_hook::low_level::exit(error.exit_code().into());
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn verdict_of(&self, peer: usize, what: What) -> Verdict {
        let Peer { rank, host, .. } = &self.peers[peer];
        let heard = self.lock().seen[peer].progress.position;
        let position = match what {
            // What was heard of it is up to a second old, and ranks go through the steps together.
            What::Died | What::Silent(_) => heard.max(progress::now().position),
            _ => heard,
        };
        Verdict { rank: *rank, host: host.clone(), position, what }
    }

    /// Reads what `peer` says until its line is closed.
    fn listen(self: &Arc<Self>, peer: usize, stream: TcpStream) {
        let mut reader = BufReader::new(stream);
        loop {
            let message = match messages::receive(&mut reader) {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!("rank {}: {error}", self.peers[peer].rank);
                    break;
                }
            };
            self.heard(peer, message);
        }
        let said_goodbye = {
            let mut state = self.lock();
            let line = std::mem::replace(&mut state.seen[peer].line, Line::Closed);
            line == Line::Farewell
        };
        self.changed.notify_all();
        if !said_goodbye {
            self.judge(self.verdict_of(peer, What::Died));
        }
    }

    fn heard(self: &Arc<Self>, peer: usize, message: Message) {
        let now = Instant::now();
        let mut state = self.lock();
        let seen = &mut state.seen[peer];
        seen.heard = now;
        match message {
            Message::Part { tag, value } => state.inbox[peer].push_back((tag, value)),
            Message::Alive(progress) => {
                if progress != seen.progress {
                    seen.advanced = now;
                }
                seen.progress = progress;
                return;
            }
            Message::Goodbye => seen.line = Line::Farewell,
            Message::Verdict(verdict) => {
                drop(state);
                return self.judge(verdict);
            }
            Message::Hello(_) | Message::Welcome(_) | Message::Refused(_) => return,
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Control {
    /// Finds the other ranks; returns when all are there. `listener` is rank 0's, where its launcher made one.
    ///
    /// # Errors
    /// [`Error::Rank`] naming who is missing, or that rank 0 cannot be reached; [`Error::Config`] for ranks of different
    /// versions; [`Error::Io`] where rank 0 cannot listen; [`Error::Interrupted`].
    pub fn join(ranks: &Ranks, limits: Limits, listener: Option<TcpListener>) -> Result<Self> {
        let deadline = Instant::now() + limits.join;
        let rank = ranks.place.rank;
        let connected = match ranks.is_first() {
            true => join::gather(ranks, limits, deadline, listener)?,
            false => vec![join::connect(ranks, limits, deadline)?],
        };
        let mut peers = Vec::new();
        let mut readers = Vec::new();
        for join::Connected { rank, host, stream, reader } in connected {
            peers.push(Peer { rank, host, stream: Mutex::new(stream) });
            readers.push(reader);
        }
        let now = Instant::now();
        let new = || Seen { heard: now, progress: Progress::default(), advanced: now, line: Line::Open };
        let state = State {
            inbox: peers.iter().map(|_| VecDeque::new()).collect(),
            seen: peers.iter().map(|_| new()).collect(),
            ..State::default()
        };
        let shared =
            Arc::new(Shared { rank, limits, peers, state: Mutex::new(state), changed: Condvar::new() });
        let mut work: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
        for (peer, stream) in readers.into_iter().enumerate() {
            let shared = Arc::clone(&shared);
            work.push(Box::new(move || shared.listen(peer, stream)));
        }
        let watched = Arc::downgrade(&shared);
        work.push(Box::new(move || watch::run(&watched)));
        for work in work {
            // Half of the usual stack, because rank 0 of a job may have a thousand of these threads. Not less, because the abort of a
            // group, which calls NCCL and the driver, runs on them.
            let thread = std::thread::Builder::new().name("control".into()).stack_size(1 << 20);
            thread.spawn(work).map_err(|error| {
                Error::device(format!("cannot start a thread: {error}"), "raise the limit on processes")
            })?;
        }
        Ok(Control { shared })
    }

    /// Whether this is rank 0.
    pub fn is_first(&self) -> bool {
        self.shared.rank == 0
    }

    /// The machines of the other ranks, on rank 0.
    pub fn hosts(&self) -> impl Iterator<Item = (usize, &str)> {
        self.shared.peers.iter().map(|peer| (peer.rank, peer.host.as_str()))
    }

    /// What ends this rank's collectives when another rank is lost.
    pub fn on_loss(&self, abort: Abort) {
        let is_lost = {
            let mut state = self.shared.lock();
            state.abort = Some(Arc::clone(&abort));
            state.verdict.is_some()
        };
        if is_lost {
            abort();
        }
    }

    /// What happened to a rank, if something did.
    pub fn verdict(&self) -> Option<Verdict> {
        self.shared.lock().verdict.clone()
    }

    /// As [`Control::verdict`], waiting up to `limit` for one.
    pub fn verdict_within(&self, limit: Duration) -> Option<Verdict> {
        let state = self.shared.lock();
        let waits = |state: &mut State| state.verdict.is_none();
        let waited = self.shared.changed.wait_timeout_while(state, limit, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.verdict.clone()
    }

    /// Waits until rank 0 has told its own end, for a rank whose step failed in a way that must fail on rank 0 too, which first writes
    /// down what it found. Returns as well where rank 0 waits for this rank, and so has not failed, and where it gives no sign of life
    /// any more.
    pub fn wait_for_first(&self) {
        let mut state = self.shared.lock();
        loop {
            let first = &state.seen[0];
            let waits_for_us = first.progress.position.is_waiting() && first.advanced.elapsed() > UNAWARE;
            // The thread that watches judges nobody once this rank is ending.
            let is_silent = first.heard.elapsed() > self.shared.limits.silence();
            if state.verdict.is_some() || first.line != Line::Open || waits_for_us || is_silent {
                return;
            }
            state = self.shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends to rank 0, or from rank 0 to all.
    pub fn send(&self, tag: &str, value: Value) {
        self.shared.send_to_all(&Message::Part { tag: tag.to_string(), value });
    }

    /// What rank 0 sent under `tag`; on rank 0 what all others sent, in the order of the ranks. Waits as long as the others work: only
    /// a rank that does nothing is lost.
    ///
    /// # Errors
    /// Those of [`Verdict::error`]; [`Error::Interrupted`] where a signal ends the command.
    pub fn receive(&self, tag: &str) -> Result<Vec<Value>> {
        let _waiting = progress::wait();
        (0..self.shared.peers.len()).map(|peer| self.receive_from(peer, tag)).collect()
    }

    fn receive_from(&self, peer: usize, tag: &str) -> Result<Value> {
        let mut state = self.shared.lock();
        loop {
            if let Some((theirs, value)) = state.inbox[peer].pop_front() {
                if theirs == tag {
                    return Ok(value);
                }
                let rank = self.shared.peers[peer].rank;
                return Err(Error::bug(format!("rank {rank} is at `{theirs}`, and this one at `{tag}`")));
            }
            if let Some(verdict) = &state.verdict {
                return Err(verdict.error());
            }
            if state.seen[peer].line != Line::Open {
                drop(state);
                return Err(self.shared.verdict_of(peer, What::Died).error());
            }
            state = self.shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            drop(state);
            interrupt::check()?;
            state = self.shared.lock();
        }
    }

    /// From here on the main thread ends by itself.
    pub fn begin_end(&self) {
        self.shared.lock().is_ending = true;
        self.shared.changed.notify_all();
    }

    /// Tells all why this rank fails.
    pub fn report(&self, error: &Error) {
        let what = match error {
            Error::Interrupted { signal, .. } => What::Stopped(*signal as i32),
            error => What::Failed {
                message: error.to_string(),
                help: miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default(),
            },
        };
        let position = progress::now().position;
        let verdict = Verdict { rank: self.shared.rank, host: host(), position, what };
        match self.is_first() {
            true => self.shared.judge(verdict),
            false => self.shared.send_to_all(&Message::Verdict(verdict)),
        }
    }

    /// A function that tells all ranks that a signal ends this process. It may be called when this value is gone.
    pub fn stopper(&self) -> impl FnOnce() + Send + 'static {
        let control = Control { shared: Arc::clone(&self.shared) };
        move || {
            if let Some(signal) = interrupt::requested() {
                control.report(&Error::Interrupted { signal, kept: String::new() });
            }
        }
    }

    /// Says goodbye. The other ranks wait for the goodbye of rank 0 before they end: a launcher that sees one process end may end all,
    /// and rank 0 may still be writing.
    pub fn close(self) {
        let shared = &self.shared;
        let is_telling = |state: &mut State| state.is_telling;
        // A verdict that came after the goodbye would be lost, and this rank would be taken for dead.
        drop(shared.changed.wait_while(shared.lock(), is_telling));
        shared.send_to_all(&Message::Goodbye);
        let started = Instant::now();
        let mut state = shared.lock();
        loop {
            let is_over = match shared.rank {
                0 => state.seen.iter().all(|seen| seen.line == Line::Closed) || started.elapsed() > FAREWELL,
                // Rank 0 may write for long; that it is alive is watched meanwhile.
                _ => {
                    let rank_0 = &state.seen[0];
                    rank_0.line != Line::Open || rank_0.heard.elapsed() > shared.limits.silence()
                }
            };
            if is_over {
                break;
            }
            state = shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        for peer in &shared.peers {
            let stream = peer.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[cfg(test)]
mod tests;
