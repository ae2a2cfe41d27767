//! The copies beside the computation, as the emulated device has them: each lands as late as the program allows.
//!
//! A copy stays in its lane until something waits for it. One that is not ordered after every launch that came before it
//! could meet those launches in their middle on a GPU: it moves bytes that mean nothing ([`RACED`]).

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;

use super::backend::{EventHandle, Lane};
use crate::device::Queue;

/// The byte that a copy moves which races with a launch: NaN in every format of numbers.
const RACED: u8 = 0xff;

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

/// A moment in the work of a queue.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    /// Launches that are over.
    launches: u64,
    /// Entries of each lane that are done.
    done: [u64; 2],
}

#[derive(Debug)]
enum Entry {
    Copy(PendingCopy),
    /// Everything after it comes after this moment.
    After(Moment),
}

/// Both lanes, and the events.
#[derive(Debug, Default)]
pub(super) struct Queues {
    lanes: [VecDeque<Entry>; 2],
    /// Entries that each lane was given, and those that are done.
    given: [u64; 2],
    done: [u64; 2],
    /// Launches that what a lane is given next is ordered after.
    seen: [u64; 2],
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

    pub fn copy(&mut self, lane: Lane, out: *mut c_void, source: *const c_void, bytes: usize) {
        let races = self.seen[lane as usize] < self.launches;
        self.give(lane, Entry::Copy(PendingCopy { lane, out, source, bytes, races }));
    }

    pub fn new_event(&mut self) -> EventHandle {
        self.next_event += 1;
        EventHandle(self.next_event)
    }

    pub fn free_event(&mut self, event: EventHandle) {
        self.events.remove(&event.0);
    }

    pub fn record(&mut self, event: EventHandle, queue: Queue) {
        let mut moment = Moment::default();
        match lane_of(queue) {
            None => moment.launches = self.launches,
            Some(lane) => {
                moment.launches = self.seen[lane as usize];
                moment.done[lane as usize] = self.given[lane as usize];
            }
        }
        self.events.insert(event.0, moment);
    }

    /// Makes `queue` wait; the copies that land now, because the compute queue is not held up.
    pub fn wait(&mut self, queue: Queue, event: EventHandle) -> Vec<PendingCopy> {
        let Some(&moment) = self.events.get(&event.0) else { return Vec::new() };
        let mut landed = Vec::new();
        match lane_of(queue) {
            None => self.land_until(moment, &mut landed),
            Some(lane) => {
                self.seen[lane as usize] = self.seen[lane as usize].max(moment.launches);
                self.give(lane, Entry::After(moment));
            }
        }
        landed
    }

    /// All copies that are left, in an order that the waits allow.
    pub fn finish(&mut self) -> Vec<PendingCopy> {
        let mut landed = Vec::new();
        self.land_until(Moment { launches: 0, done: self.given }, &mut landed);
        landed
    }

    fn give(&mut self, lane: Lane, entry: Entry) {
        self.lanes[lane as usize].push_back(entry);
        self.given[lane as usize] += 1;
    }

    /// Lanes wait for moments that were recorded before, so that this ends.
    fn land_until(&mut self, moment: Moment, landed: &mut Vec<PendingCopy>) {
        for lane in [Lane::ToDevice, Lane::ToHost] {
            let lane = lane as usize;
            while self.done[lane] < moment.done[lane] {
                let Some(entry) = self.lanes[lane].pop_front() else { return };
                self.done[lane] += 1;
                match entry {
                    Entry::Copy(copy) => landed.push(copy),
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
fn lane_of(queue: Queue) -> Option<Lane> {
    match queue {
        Queue::Compute => None,
        Queue::ToDevice => Some(Lane::ToDevice),
        Queue::ToHost => Some(Lane::ToHost),
        // Collectives are not there yet.
        Queue::Collectives => None,
    }
}
