//! The copies and collectives beside the computation, as the emulated device has them: each is done as late as the program allows.
//!
//! Work stays in its lane until something waits for it. Work that is not ordered after every launch that came before it
//! could meet those launches in their middle on a GPU: it moves bytes that mean nothing ([`RACED`]).
//!
//! A collective is done when something on its rank waits for it, and waits itself until the other ranks do theirs. So, on the emulated
//! device, a rank must not wait for another one in any other way while it has collectives that nothing has waited for. (On a GPU they
//! would run by themselves.)

use std::collections::{HashMap, VecDeque};
use std::ffi::{c_int, c_void};

use super::backend::{EventHandle, Lane};
use crate::device::Queue;

/// The byte that work moves which races with a launch: NaN in every format of numbers.
const RACED: u8 = 0xff;

/// Copies in both directions, and collectives.
const LANES: usize = 3;
const COLLECTIVES: usize = 2;

/// A copy that waits in its lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingCopy {
    pub lane: Lane,
    pub out: *mut c_void,
    pub source: *const c_void,
    pub bytes: usize,
    /// Whether a launch may be under way that the copy is not ordered after.
    pub races: bool,
}

/// What does a collective; its second argument is 1 where the collective races.
pub(super) type Run = unsafe extern "C" fn(*mut c_void, c_int);

/// A collective that waits in its lane.
#[derive(Debug)]
pub(super) struct PendingCollective {
    pub run: Run,
    pub argument: *mut c_void,
    /// As [`PendingCopy::races`].
    pub races: bool,
}

/// What waits in a lane.
#[derive(Debug)]
pub(super) enum Pending {
    Copy(PendingCopy),
    Collective(PendingCollective),
}

/// A moment in the work of a queue.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    /// Launches that are over.
    launches: u64,
    /// Entries of each lane that are done.
    done: [u64; LANES],
}

#[derive(Debug)]
enum Entry {
    Work(Pending),
    /// Everything after it comes after this moment.
    After(Moment),
}

/// All lanes, and the events.
#[derive(Debug, Default)]
pub(super) struct Queues {
    lanes: [VecDeque<Entry>; LANES],
    /// Entries that each lane was given, and those that are done.
    given: [u64; LANES],
    done: [u64; LANES],
    /// Launches that what a lane is given next is ordered after.
    seen: [u64; LANES],
    launches: u64,
    events: HashMap<usize, Moment>,
    next_event: usize,
}

// SAFETY: the addresses are used by the backend alone, under its lock.
unsafe impl Send for Queues {}

impl Queues {
    /// Notes that the compute queue was given work, which is over at once on the emulated device.
    pub fn launched(&mut self) {
        self.launches += 1;
    }

    /// Queues a copy of `bytes` bytes, which is done when something waits for it.
    pub fn copy(&mut self, lane: Lane, out: *mut c_void, source: *const c_void, bytes: usize) {
        let races = self.races(lane as usize);
        self.give(lane as usize, Entry::Work(Pending::Copy(PendingCopy { lane, out, source, bytes, races })));
    }

    /// Queues a collective, likewise.
    pub fn collective(&mut self, run: Run, argument: *mut c_void) {
        let races = self.races(COLLECTIVES);
        let pending = Pending::Collective(PendingCollective { run, argument, races });
        self.give(COLLECTIVES, Entry::Work(pending));
    }

    /// Whether work given to `lane` now is not ordered after all launches so far.
    fn races(&self, lane: usize) -> bool {
        self.seen[lane] < self.launches
    }

    /// A new event, which is recorded nowhere.
    pub fn new_event(&mut self) -> EventHandle {
        self.next_event += 1;
        EventHandle(self.next_event)
    }

    /// Forgets an event.
    pub fn free_event(&mut self, event: EventHandle) {
        self.events.remove(&event.0);
    }

    /// Records an event after all work that `queue` was given so far.
    pub fn record(&mut self, event: EventHandle, queue: Queue) {
        let mut moment = Moment::default();
        match lane_of(queue) {
            None => moment.launches = self.launches,
            Some(lane) => {
                moment.launches = self.seen[lane];
                moment.done[lane] = self.given[lane];
            }
        }
        self.events.insert(event.0, moment);
    }

    /// Makes `queue` wait; the work that is done now, because the compute queue is not held up.
    pub fn wait(&mut self, queue: Queue, event: EventHandle) -> Vec<Pending> {
        let Some(&moment) = self.events.get(&event.0) else { return Vec::new() };
        let mut landed = Vec::new();
        match lane_of(queue) {
            None => self.land_until(moment, &mut landed),
            Some(lane) => {
                self.seen[lane] = self.seen[lane].max(moment.launches);
                self.give(lane, Entry::After(moment));
            }
        }
        landed
    }

    /// All work that is left, in an order that the waits allow.
    pub fn finish(&mut self) -> Vec<Pending> {
        let mut landed = Vec::new();
        self.land_until(Moment { launches: 0, done: self.given }, &mut landed);
        landed
    }

    fn give(&mut self, lane: usize, entry: Entry) {
        self.lanes[lane].push_back(entry);
        self.given[lane] += 1;
    }

    /// Lanes wait for moments that were recorded before, so that this ends.
    fn land_until(&mut self, moment: Moment, landed: &mut Vec<Pending>) {
        for lane in 0..LANES {
            while self.done[lane] < moment.done[lane] {
                let Some(entry) = self.lanes[lane].pop_front() else { return };
                self.done[lane] += 1;
                match entry {
                    Entry::Work(work) => landed.push(work),
                    Entry::After(before) => self.land_until(before, landed),
                }
            }
        }
    }
}

impl PendingCopy {
    /// What the copy moves in place of its source where it races.
    pub fn raced_bytes(&self) -> Option<Vec<u8>> {
        self.races.then(|| vec![RACED; self.bytes])
    }
}

/// The lane that a queue is; `None` for the computation.
fn lane_of(queue: Queue) -> Option<usize> {
    match queue {
        Queue::Compute => None,
        Queue::ToDevice => Some(Lane::ToDevice as usize),
        Queue::ToHost => Some(Lane::ToHost as usize),
        Queue::Collectives => Some(COLLECTIVES),
    }
}
