//! The ranks of a run together, as its stages use them; a run of one process is a team of one, in which nothing is sent.

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::control::{Control, Limits};
use super::messages::Fingerprints;
use super::progress::{self, Stage};
use super::{LauncherKind, Ranks, host};
use crate::device::Abort;
use crate::error::{Error, Result};
use crate::interrupt::{self, Keeper, Signal};

/// How long a file that rank 0 wrote may take until another machine sees it: network file systems keep what they know of a
/// folder for some seconds.
const VISIBLE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });

/// How long to wait for the control line's word on another rank, after a collective has failed because of it.
const HEARSAY: Duration = Duration::from_secs(3);

/// The ranks of a run.
#[derive(Debug)]
pub struct Team {
    ranks: Ranks,
    control: Option<Control>,
    /// All ranks have agreed to stop, so that the end of one is no loss to the others.
    has_agreed_to_stop: AtomicBool,
    /// Tells the others where a signal ends this process before the steps.
    _keeper: Option<Keeper>,
}

/// What signals ask of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// To save and to stop.
    pub stop: Option<Signal>,
    /// To save and to go on.
    pub save: bool,
}

impl Requests {
    /// What was asked of this process since the last call.
    pub fn take() -> Self {
        Requests { stop: interrupt::requested(), save: interrupt::take_save_request() }
    }
}

impl Team {
    /// A run of one process.
    pub fn alone() -> Self {
        Team {
            ranks: Ranks::alone(),
            control: None,
            has_agreed_to_stop: AtomicBool::new(false),
            _keeper: None,
        }
    }

    /// A team whose ranks have found each other.
    #[cfg(test)]
    pub(super) fn of(ranks: &Ranks, control: Control) -> Self {
        Team { ranks: ranks.clone(), control: Some(control), ..Team::alone() }
    }

    /// Finds the other ranks; returns when all are there.
    ///
    /// # Errors
    /// Those of joining the control line; [`Error::Config`] for a variable that is no time.
    pub fn join(ranks: &Ranks) -> Result<Self> {
        progress::enter(Stage::Joining, 0);
        if ranks.is_alone() {
            return Ok(Team::alone());
        }
        let limits = Limits::of_environment()?;
        let control = Control::join(ranks, limits, inherited_listener(ranks))?;
        let stop = control.stopper();
        let keeper = interrupt::keep_before_end(move || {
            stop();
            None
        });
        tracing::info!("{} ranks are there", ranks.place.ranks);
        for (rank, host) in control.hosts().filter(|_| control.is_first()) {
            tracing::debug!("rank {rank} is on {host}");
        }
        let has_agreed_to_stop = AtomicBool::new(false);
        Ok(Team { ranks: ranks.clone(), control: Some(control), has_agreed_to_stop, _keeper: Some(keeper) })
    }

    /// Which rank this is.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Whether this process writes the run's files and messages.
    pub fn is_first(&self) -> bool {
        self.ranks.is_first()
    }

    /// Whether the run has one process.
    pub fn is_alone(&self) -> bool {
        self.control.is_none()
    }

    /// The machine of another rank, where this is rank 0.
    pub fn host_of(&self, rank: usize) -> Option<&str> {
        let mut hosts = self.control.iter().flat_map(Control::hosts).filter(|_| self.is_first());
        hosts.find(|(other, _)| *other == rank).map(|(_, host)| host)
    }

    /// What ends this rank's collectives when another rank is lost.
    pub fn on_loss(&self, abort: Abort) {
        if let Some(control) = &self.control {
            control.on_loss(abort);
        }
    }

    /// Returns on all ranks what `make` returns on rank 0, the only one that calls it. `tag` names the exchange; all ranks come to the
    /// same ones in the same order.
    ///
    /// # Errors
    /// Those of `make`; [`Error::Rank`] where another rank is lost.
    pub fn from_first<T: Serialize + DeserializeOwned>(
        &self,
        tag: &str,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(control) = &self.control else { return make() };
        if control.is_first() {
            let made = make()?;
            control.send(tag, encode(&made)?);
            return Ok(made);
        }
        let received = control.receive(tag)?;
        decode(tag, received.into_iter().next().unwrap_or(Value::Null))
    }

    /// Returns on rank 0 the values of all ranks, in the order of the ranks, and nothing on the others.
    ///
    /// # Errors
    /// [`Error::Rank`] where another rank is lost.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, tag: &str, value: T) -> Result<Vec<T>> {
        let Some(control) = &self.control else { return Ok(vec![value]) };
        if !control.is_first() {
            control.send(tag, encode(&value)?);
            return Ok(Vec::new());
        }
        let others = control.receive(tag)?.into_iter().map(|value| decode(tag, value));
        std::iter::once(Ok(value)).chain(others).collect()
    }

    /// Returns on all ranks what `merge` makes, on rank 0, of the values of all ranks.
    ///
    /// # Errors
    /// Those of `merge`; [`Error::Rank`] where another rank is lost.
    pub fn agree<T: Serialize + DeserializeOwned, M: Serialize + DeserializeOwned>(
        &self,
        tag: &str,
        value: T,
        merge: impl FnOnce(Vec<T>) -> Result<M>,
    ) -> Result<M> {
        let all = self.gather(tag, value)?;
        self.from_first(tag, || merge(all))
    }

    /// Returns when all ranks have come here.
    ///
    /// # Errors
    /// [`Error::Rank`] where another rank is lost.
    pub fn barrier(&self, tag: &str) -> Result<()> {
        self.agree(tag, (), |_| Ok(()))
    }

    /// Fails unless all ranks have the same inputs and options.
    ///
    /// # Errors
    /// [`Error::Config`] on rank 0, naming both ranks and what differs.
    pub fn check_fingerprints(&self, ours: Fingerprints) -> Result<()> {
        self.agree("fingerprints", (host(), ours), |all| {
            let ((first, ours), others) = all.split_first().map_or_else(
                || Err(Error::bug("no rank has fingerprints")),
                |((host, ours), others)| Ok(((host.clone(), ours.clone()), others.to_vec())),
            )?;
            for (rank, (host, theirs)) in others.iter().enumerate() {
                if let Some(difference) = ours.difference(theirs) {
                    return Err(Error::config(
                        format!("rank 0 on {first} and rank {} on {host} {difference}", rank + 1),
                        "give all ranks the same command line, and the same files under the same paths",
                    ));
                }
            }
            Ok(())
        })
    }

    /// Fails unless all ranks see the files that rank 0 writes in `folder`, which exists there.
    ///
    /// # Errors
    /// [`Error::Config`] naming the ranks that do not; [`Error::Io`] where rank 0 cannot write.
    pub fn check_shared(&self, folder: &Path) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let mut file = None;
        let name = self.from_first("shared folder", || {
            let made = tempfile::Builder::new().prefix(".ranks-").tempfile_in(folder);
            let made = made.map_err(|error| Error::io(folder, "write in", error))?;
            let name = made.path().file_name().map(|name| name.to_string_lossy().into_owned());
            file = Some(made);
            Ok(name.unwrap_or_default())
        })?;
        let deadline = Instant::now() + VISIBLE;
        let path = folder.join(name);
        let mut is_there = path.exists();
        while !is_there && Instant::now() < deadline {
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(200));
            // Listing the folder makes network file systems ask again.
            let _ = std::fs::read_dir(folder).map(Iterator::count);
            is_there = path.exists();
        }
        self.agree("seen", (host(), is_there), |all| {
            let blind = all.iter().enumerate().find(|(_, (_, sees))| !sees);
            let Some((rank, (other, _))) = blind else { return Ok(()) };
            Err(Error::config(
                format!(
                    "rank {rank} on {other} does not see the file that rank 0 on {} wrote in {}",
                    host(),
                    folder.display()
                ),
                "give an --output on a file system that all machines see under the same path",
            ))
        })
    }

    /// What was asked of any rank. All ranks call it after a step that said that something was asked.
    ///
    /// # Errors
    /// [`Error::Rank`] where another rank is lost.
    pub fn requests(&self, ours: Requests) -> Result<Requests> {
        if self.is_alone() {
            return Ok(ours);
        }
        let ours = (ours.stop.map_or(0, |signal| signal as i32), ours.save);
        let (stop, save) = self.agree("requests", ours, |all: Vec<(i32, bool)>| {
            let stop = all.iter().map(|(stop, _)| *stop).find(|&stop| stop != 0).unwrap_or(0);
            Ok((stop, all.iter().any(|(_, save)| *save)))
        })?;
        Ok(Requests { stop: Signal::of(stop), save })
    }

    /// Returns when all ranks have come here, to stop because a signal asked one of them to: the end of one is no loss to the
    /// others then.
    ///
    /// # Errors
    /// [`Error::Rank`] where another rank is lost.
    pub fn stop_together(&self) -> Result<()> {
        self.barrier("saved")?;
        self.has_agreed_to_stop.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Ends this rank's part of the run, which had `result`: the others are told of an error, and this rank waits for rank 0 to
    /// have written what it writes. Returns the error that counts here: another rank's where this one only ended with it.
    ///
    /// # Errors
    /// That of `result`, or what happened to another rank.
    pub fn end(self, result: Result<()>) -> Result<()> {
        let Some(control) = self.control else { return result };
        control.begin_end();
        let is_in_steps = progress::now().position.step() > 0;
        if matches!(result, Err(Error::Numerics { .. })) && is_in_steps && !control.is_first() {
            control.wait_for_first();
        }
        let verdict = match &result {
            // A collective notices the death of a rank too, and may do so first.
            Err(Error::Device { .. }) => control.verdict_within(HEARSAY),
            _ => control.verdict(),
        };
        let result = match (result, verdict) {
            (Ok(()), _) => Ok(()),
            (Err(error), None) => {
                let is_agreed = self.has_agreed_to_stop.load(Ordering::SeqCst)
                    && matches!(error, Error::Interrupted { .. });
                if !is_agreed {
                    control.report(&error);
                }
                Err(error)
            }
            // A collective that was ended from outside is no error of the device. What this rank itself told is its own error.
            (Err(Error::Device { .. } | Error::Rank { .. }), Some(verdict))
                if verdict.rank != self.ranks.place.rank || !verdict.is_told_by_itself() =>
            {
                Err(verdict.error())
            }
            (Err(error), Some(_)) => Err(error),
        };
        control.close();
        result
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| Error::bug(format!("cannot be sent to other ranks: {error}")))
}

fn decode<T: DeserializeOwned>(tag: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| Error::bug(format!("`{tag}` of another rank: {error}")))
}

/// The listener that `--gpus` gave rank 0 for its standard input: so that nobody else takes the port in between.
#[cfg(unix)]
fn inherited_listener(ranks: &Ranks) -> Option<TcpListener> {
    use std::os::fd::AsFd;
    if ranks.launcher != Some(LauncherKind::Own) || !ranks.is_first() {
        return None;
    }
    let listener = TcpListener::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
    let port = listener.local_addr().ok()?.port();
    (port == ranks.address.port).then_some(listener)
}

#[cfg(not(unix))]
fn inherited_listener(_: &Ranks) -> Option<TcpListener> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_of_one_agrees_with_itself() {
        let team = Team::alone();
        assert_eq!(team.from_first("a", || Ok(3)).unwrap(), 3);
        assert_eq!(team.gather("b", 4).unwrap(), [4]);
        assert_eq!(team.agree("c", 5, |all: Vec<i32>| Ok(all.len())).unwrap(), 1);
        team.barrier("d").unwrap();
        team.check_shared(Path::new("nowhere")).unwrap();
        let asked = Requests { stop: Some(Signal::Terminate), save: true };
        assert_eq!(team.requests(asked).unwrap(), asked);
        let error = team.end(Err(Error::config("a", "b"))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }
}
