//! One rank's end of a group: calls that never block, the wait for them, failures and aborts.
//!
//! The communicator is non-blocking: every call of NCCL returns at once, and `ncclCommGetAsyncError` tells when it is done. A lock is
//! held during each call of NCCL and never between two of them, so that another thread can abort at any time.

use std::ffi::{c_int, c_void};
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Nccl;
use super::library::{Code, Config, Handle, IN_PROGRESS, SUCCESS, SUM, UniqueId};
use crate::device::{Abort, Collective, GroupId, GroupPlace, StorageType};
use crate::error::{Error, Result};

/// How long to wait until all ranks have joined a group.
const JOIN_LIMIT: Duration = Duration::from_secs(180);
/// How long the proper end of a communicator may take; it is aborted after that.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often the state of a call is asked for without a pause in between.
const BUSY_POLLS: u32 = 64;
const LONGEST_PAUSE: Duration = Duration::from_micros(500);

const HELP: &str = "the first rank to fail says why: look at the messages of all ranks; NCCL_DEBUG=INFO makes NCCL tell more, and \
     NCCL_SOCKET_IFNAME names the network interface that it should use";

/// One collective, in place.
#[derive(Clone, Copy, Debug)]
pub(in crate::device) struct Call {
    pub kind: Collective,
    /// The first value of the range, in the device's memory.
    pub values: *mut c_void,
    /// Values of the whole range.
    pub len: usize,
    /// What is summed; `None` for bytes that are only moved.
    pub numbers: Option<StorageType>,
}

// SAFETY: the address is only handed to NCCL, by the one thread that runs the group's calls.
unsafe impl Send for Call {}

impl Call {
    /// Bytes of a value, and its type's number in `nccl.h`.
    fn value(&self) -> (usize, c_int) {
        match self.numbers {
            None => (1, 1),
            Some(StorageType::F32) => (4, 7),
            Some(StorageType::F16) => (2, 6),
            Some(StorageType::Bf16) => (2, 9),
        }
    }

    /// # Safety
    /// The communicator is live, and the range stays valid until the stream is done with it.
    unsafe fn issue(
        &self,
        nccl: &Nccl,
        place: GroupPlace,
        communicator: Handle,
        stream: *mut c_void,
    ) -> Code {
        let (size, kind) = self.value();
        let (whole, all, piece) = (self.values, self.len, self.len / place.ranks);
        let own = whole.wrapping_byte_add(place.rank * piece * size);
        let functions = &nccl.functions;
        // SAFETY: the caller's promise. The in-place forms: one buffer for both, or the rank's own piece of the other.
        unsafe {
            match self.kind {
                Collective::AllReduce => {
                    (functions.all_reduce)(whole, whole, all, kind, SUM, communicator, stream)
                }
                Collective::ReduceScatter => {
                    (functions.reduce_scatter)(whole, own, piece, kind, SUM, communicator, stream)
                }
                Collective::AllGather => {
                    (functions.all_gather)(own, whole, piece, kind, communicator, stream)
                }
                Collective::Reduce(root) => {
                    (functions.reduce)(whole, whole, all, kind, SUM, root as c_int, communicator, stream)
                }
                Collective::Broadcast(root) => {
                    (functions.broadcast)(whole, whole, all, kind, root as c_int, communicator, stream)
                }
            }
        }
    }
}

/// A communicator, or what became of it.
struct End {
    /// Null when it was ended.
    communicator: Handle,
    failure: Option<String>,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time; the lock around this keeps to that.
unsafe impl Send for End {}

/// This rank among those that joined.
pub(in crate::device) struct Group {
    nccl: &'static Nccl,
    place: GroupPlace,
    end: Mutex<End>,
}

impl Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({:?})", self.place)
    }
}

impl Group {
    /// Names a new group.
    pub(in crate::device) fn name() -> Result<GroupId> {
        let nccl = Nccl::get()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: the call writes the id.
        let code = unsafe { (nccl.functions.unique_id)(&mut id) };
        if code == SUCCESS {
            return Ok(GroupId(id.0));
        }
        Err(Error::device(
            format!("NCCL cannot name a group: {}", nccl.explain(code, std::ptr::null_mut())),
            HELP,
        ))
    }

    /// Joins the group on the device that is current on this thread; returns when all ranks have joined.
    pub(in crate::device) fn join(id: &GroupId, place: GroupPlace) -> Result<Arc<Group>> {
        let nccl = Nccl::get()?;
        let [ranks, rank] = [place.ranks, place.rank]
            .map(|number| c_int::try_from(number).map_err(|_| Error::bug(format!("{place:?} of a group"))));
        let mut config = Config::non_blocking();
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the call writes the communicator and reads the configuration.
        let code =
            unsafe { (nccl.functions.join)(&mut communicator, ranks?, UniqueId(id.0), rank?, &mut config) };
        let group = Group { nccl, place, end: Mutex::new(End { communicator, failure: None }) };
        let what = "joining the group";
        if code != SUCCESS && code != IN_PROGRESS {
            return Err(group.fail(&mut group.end(), what, code));
        }
        group.settle(what, Some(JOIN_LIMIT))?;
        Ok(Arc::new(group))
    }

    fn end(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the collectives to NCCL together, and returns when they are on the stream; where it is null, when they are done.
    ///
    /// # Safety
    /// The ranges stay valid until the stream is done with them, and the stream is one of the group's device.
    pub(in crate::device) unsafe fn issue(&self, calls: &[Call], stream: *mut c_void) -> Result<()> {
        let what = match calls {
            [] => return Ok(()),
            [call] => format!("{:?} of {} values", call.kind, call.len),
            several => format!("{} collectives, the first {:?}", several.len(), several[0].kind),
        };
        {
            let mut end = self.end();
            let communicator = self.live(&end)?;
            // SAFETY: a group has its end below, whatever happens between.
            let mut code = unsafe { (self.nccl.functions.group_start)() };
            for call in calls {
                if code == SUCCESS || code == IN_PROGRESS {
                    // SAFETY: the communicator is live, and the rest is the caller's promise.
                    code = unsafe { call.issue(self.nccl, self.place, communicator, stream) };
                }
            }
            // SAFETY: it was started above.
            let ended = unsafe { (self.nccl.functions.group_end)() };
            let failed = [code, ended].into_iter().find(|&code| code != SUCCESS && code != IN_PROGRESS);
            if let Some(code) = failed {
                return Err(self.fail(&mut end, &what, code));
            }
        }
        self.settle(&what, None)
    }

    /// Fails where the group did.
    pub(in crate::device) fn check(&self) -> Result<()> {
        let mut end = self.end();
        self.live(&end)?;
        self.state(&mut end, "a collective in the background").map(|_| ())
    }

    /// Ends the group at once: whoever waits in one of its calls, or for its stream, comes back.
    pub(in crate::device) fn abort(&self, why: &str) {
        let mut end = self.end();
        if end.communicator.is_null() {
            return;
        }
        end.failure = Some(why.to_owned());
        self.abandon(&mut end);
    }

    /// What calls [`Group::abort`], as long as the group is there.
    fn aborter(self: &Arc<Self>) -> Abort {
        let group: Weak<Group> = Arc::downgrade(self);
        Arc::new(move || {
            if let Some(group) = group.upgrade() {
                group.abort("it was aborted on this rank");
            }
        })
    }

    /// Waits until the last call is over.
    fn settle(&self, what: &str, limit: Option<Duration>) -> Result<()> {
        let started = Instant::now();
        let mut polls = 0_u32;
        loop {
            {
                let mut end = self.end();
                self.live(&end)?;
                if self.state(&mut end, what)? == SUCCESS {
                    return Ok(());
                }
                if limit.is_some_and(|limit| started.elapsed() > limit) {
                    let late = format!("{what}: not done after {} s", started.elapsed().as_secs());
                    end.failure = Some(late);
                    self.abandon(&mut end);
                }
            }
            pause(polls);
            polls = polls.saturating_add(1);
        }
    }

    /// The communicator, unless the group failed.
    fn live(&self, end: &End) -> Result<Handle> {
        match &end.failure {
            Some(failure) => Err(self.error(failure)),
            None => Ok(end.communicator),
        }
    }

    /// `ncclSuccess` or `ncclInProgress`; anything else is a failure, and the end of the group.
    fn state(&self, end: &mut End, what: &str) -> Result<Code> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live, and the call writes the state.
        let code = unsafe { (self.nccl.functions.state)(end.communicator, &mut state) };
        match if code == SUCCESS { state } else { code } {
            fine @ (SUCCESS | IN_PROGRESS) => Ok(fine),
            failed => Err(self.fail(end, what, failed)),
        }
    }

    /// Notes the failure and ends the group, as NCCL asks for after any error.
    fn fail(&self, end: &mut End, what: &str, code: Code) -> Error {
        let failure = format!("{what}: {}", self.nccl.explain(code, end.communicator));
        end.failure = Some(failure.clone());
        self.abandon(end);
        self.error(&failure)
    }

    fn abandon(&self, end: &mut End) {
        let communicator = std::mem::replace(&mut end.communicator, std::ptr::null_mut());
        if !communicator.is_null() {
            // SAFETY: it is live, and no one can name it any more. A failed abort leaves nothing to do.
            unsafe { (self.nccl.functions.abort)(communicator) };
        }
    }

    fn error(&self, failure: &str) -> Error {
        let GroupPlace { rank, ranks } = self.place;
        Error::device(format!("NCCL failed on rank {rank} of {ranks}: {failure}"), HELP)
    }

    /// Waits for what is on its way; `false` where that fails or takes too long.
    fn finalize(&self, communicator: Handle) -> bool {
        let started = Instant::now();
        // SAFETY: the communicator is live.
        let mut code = unsafe { (self.nccl.functions.finalize)(communicator) };
        let mut polls = 0;
        while code == IN_PROGRESS && started.elapsed() < END_LIMIT {
            pause(polls);
            polls += 1;
            // SAFETY: the communicator is live, and the call writes the state.
            let asked = unsafe { (self.nccl.functions.state)(communicator, &mut code) };
            if asked != SUCCESS {
                code = asked;
            }
        }
        code == SUCCESS
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let communicator = self.end().communicator;
        if communicator.is_null() {
            return;
        }
        if self.finalize(communicator) {
            // SAFETY: it is live, nothing is on its way, and no one can name it any more.
            unsafe { (self.nccl.functions.destroy)(communicator) };
        } else {
            self.abandon(&mut self.end());
        }
    }
}

fn pause(polls: u32) {
    match polls.checked_sub(BUSY_POLLS) {
        None => std::thread::yield_now(),
        Some(longer) => std::thread::sleep(
            Duration::from_micros(20).saturating_mul(longer.saturating_add(1)).min(LONGEST_PAUSE),
        ),
    }
}

/// A rank's end of a group, of either device.
#[derive(Debug)]
pub(in crate::device) struct Communicator {
    place: GroupPlace,
    /// None on a device that is only planned for, where nothing is joined.
    group: Option<Arc<Group>>,
    /// What [`Communicator::grouped`] collects.
    collected: Mutex<Option<Vec<Call>>>,
}

impl Communicator {
    /// `group` of `None`: on a device that is only planned for.
    pub(in crate::device) fn new(place: GroupPlace, group: Option<Arc<Group>>) -> Self {
        Communicator { place, group, collected: Mutex::default() }
    }

    pub(in crate::device) fn place(&self) -> GroupPlace {
        self.place
    }

    pub(in crate::device) fn abort(&self) -> Abort {
        self.group.as_ref().map_or_else(|| Arc::new(|| ()) as Abort, Group::aborter)
    }

    pub(in crate::device) fn check(&self) -> Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.check())
    }

    fn collected(&self) -> MutexGuard<'_, Option<Vec<Call>>> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives one collective to NCCL; inside [`Communicator::grouped`] at the group's end.
    ///
    /// # Safety
    /// As [`Group::issue`]; the range also stays valid until the end of the group of calls.
    pub(in crate::device) unsafe fn run(
        &self,
        call: Call,
        stream: impl FnOnce() -> Result<*mut c_void>,
    ) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        if let Some(calls) = &mut *self.collected() {
            calls.push(call);
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { group.issue(&[call], stream()?) }
    }

    /// Collects the collectives that `work` asks for, and gives them to NCCL together. A group inside another one belongs to it.
    ///
    /// # Safety
    /// As [`Group::issue`], for the ranges of all of them.
    pub(in crate::device) unsafe fn grouped(
        &self,
        work: &mut dyn FnMut() -> Result<()>,
        stream: impl FnOnce() -> Result<*mut c_void>,
    ) -> Result<()> {
        let Some(group) = &self.group else { return work() };
        if self.collected().is_some() {
            return work();
        }
        *self.collected() = Some(Vec::new());
        let result = work();
        let calls = self.collected().take().unwrap_or_default();
        result?;
        // SAFETY: the caller's promise.
        unsafe { group.issue(&calls, stream()?) }
    }
}

/// A collective over `range` of values at `values`, in place.
pub(in crate::device) fn call<T>(
    kind: Collective,
    values: *mut T,
    range: &Range<usize>,
    numbers: Option<StorageType>,
) -> Call {
    let first = values.wrapping_add(range.start).cast();
    let len = if numbers.is_some() { range.len() } else { range.len() * size_of::<T>() };
    Call { kind, values: first, len, numbers }
}
