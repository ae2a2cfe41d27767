//! Every collective, for every type, on ragged ranges, alone and in a group, against sums made here.

use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use mmpo_fast::device::cuda::{self, libraries};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Element, Queue, Summand};
use serde_json::{Value, json};

use crate::ranks::{self, DEVICES, On, Rank};
use crate::support::nccl;

#[test]
fn every_collective_gives_every_rank_its_values() {
    for &on in DEVICES {
        for ranks in 1..=4 {
            ranks::succeed("every_collective", on, ranks, &[]);
        }
    }
}

#[test]
fn no_collective_reads_or_writes_where_the_checked_device_forbids_it() {
    if DEVICES.contains(&On::Emulated) {
        ranks::succeed("every_collective", On::Checked, 2, &[]);
    }
}

/// The GPUs on which collectives can be tested; 0, and a word of why, where there are none or no NCCL.
pub fn gpus() -> usize {
    let gpus = cuda::check_kernels().and_then(|()| cuda::gpus()).map_or(0, |gpus| gpus.len());
    let why = match (gpus, libraries::nccl_version()) {
        (0, _) => "no GPU",
        (_, None) => "no NCCL",
        (gpus, Some(_)) => return gpus,
    };
    assert!(gpus > 0 || std::env::var_os("MMPO_FAST_REQUIRE_GPU").is_none(), "{why}");
    eprintln!("{why}: collectives of GPUs are not tested");
    0
}

/// On NVIDIA's NCCL, whose sums have an order of their own: on integers, which no order rounds.
#[test]
fn every_collective_on_gpus() {
    (1..=gpus().min(4)).for_each(|ranks| ranks::succeed("every_collective", On::Gpu, ranks, &[(EXACT, "1")]));
}

/// Whether values are small integers.
const EXACT: &str = "TEST_EXACT";

/// A number with the sum that the ranks make: rounded at each addition.
pub trait Number: Summand + PartialEq {
    fn of(value: f32) -> Self;
    fn plus(self, other: Self) -> Self;
}

impl Number for f32 {
    fn of(value: f32) -> f32 {
        value
    }
    fn plus(self, other: f32) -> f32 {
        self + other
    }
}

impl Number for bf16 {
    fn of(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    fn plus(self, other: bf16) -> bf16 {
        bf16::from_f32(self.to_f32() + other.to_f32())
    }
}

/// Any value of a rank, such that sums in another order round differently.
fn value<T: Number>(rank: usize, index: usize) -> T {
    let place = (index * 7919 + rank * 104_729) % 10_007;
    static IS_EXACT: LazyLock<bool> = LazyLock::new(|| std::env::var_os(EXACT).is_some());
    if *IS_EXACT {
        return T::of((place % 17) as f32 - 8.0);
    }
    T::of((place as f32 - 5000.0) * 0.001_37 * (1 + rank) as f32)
}

/// The sum over all ranks, from rank `first` on.
fn sum<T: Number>(ranks: usize, first: usize, index: usize) -> T {
    let turn = |turn: usize| value::<T>((first + turn) % ranks, index);
    (1..ranks).map(turn).fold(turn(0), T::plus)
}

/// A rank at its work: what it queues before and after a collective.
pub struct Worker<'a, D: Device> {
    pub device: &'a D,
    pub group: D::Communicator,
    pub event: D::Event,
}

impl<'a, D: Device> Worker<'a, D> {
    pub fn join(device: &'a D, rank: &Rank) -> Self {
        Worker { device, group: rank.join(device), event: device.new_event().unwrap() }
    }

    /// Lets `after` wait for all that `before` was given.
    pub fn order(&mut self, before: Queue, after: Queue) {
        self.device.record(&mut self.event, before).unwrap();
        self.device.wait(after, &self.event).unwrap();
    }

    /// Runs `work` on `values` after the upload, and returns what is there after it.
    fn around<T: Element>(
        &mut self,
        values: &[T],
        work: impl FnOnce(&D, &D::Communicator, &mut D::Buffer<T>),
    ) -> Vec<T> {
        let mut buffer = self.device.alloc::<T>(values.len()).unwrap();
        self.device.upload(&mut buffer, 0, values).unwrap();
        self.order(Queue::Compute, Queue::Collectives);
        work(self.device, &self.group, &mut buffer);
        self.order(Queue::Collectives, Queue::Compute);
        let mut out = vec![T::default(); values.len()];
        self.device.download(&mut out, &buffer, 0).unwrap();
        out
    }
}

/// The largest is several of the pieces that the library moves at once.
const RANGES: [(usize, Range<usize>); 5] =
    [(7, 3..3), (5, 0..5), (1, 0..1), (1000, 3..998), (150_003, 2..150_001)];

pub fn every_collective<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    for (len, range) in RANGES {
        sums::<D, f32>(&mut worker, rank, len, range.clone());
        sums::<D, bf16>(&mut worker, rank, len, range.clone());
        moves(&mut worker, rank, len, range.clone(), |rank, index| (rank * 64 + index % 61) as u8);
        moves(&mut worker, rank, len, range.clone(), |rank, index| (rank * 1_000_003 + index) as u32);
        moves(&mut worker, rank, len, range, value::<f32>);
    }
    in_a_group(&mut worker, rank);
    device.check_group(&worker.group).unwrap();
}

/// As much of the range as can be cut among the ranks.
fn even(range: &Range<usize>, ranks: usize) -> Range<usize> {
    range.start..range.start + range.len() / ranks * ranks
}

fn compare<T: Element + PartialEq>(what: &str, got: &[T], wanted: impl Fn(usize) -> Option<T>) {
    for (index, got) in got.iter().enumerate() {
        if let Some(wanted) = wanted(index) {
            assert!(*got == wanted, "{what}: value {index} of {got:?}, wanted {wanted:?}");
        }
    }
}

fn sums<D: Device, T: Number>(worker: &mut Worker<D>, rank: &Rank, len: usize, range: Range<usize>) {
    let (own, ranks) = (rank.place.rank, rank.place.ranks);
    let values: Vec<T> = (0..len).map(|index| value(own, index)).collect();
    let kept = |index: usize| (!range.contains(&index)).then(|| values[index]);
    // The piece of a ring's all-reduce that value `index` is in.
    let piece = |index: usize| {
        (0..ranks).rfind(|piece| range.len() * piece / ranks <= index - range.start).unwrap_or_default()
    };

    let got = worker.around(&values, |device, group, buffer| {
        device.all_reduce(group, buffer, range.clone()).unwrap();
    });
    compare("all_reduce", &got, |index| {
        kept(index).or_else(|| Some(sum(ranks, (piece(index) + 1) % ranks, index)))
    });

    let cut = even(&range, ranks);
    let mine = cut.start + own * (cut.len() / ranks)..cut.start + (own + 1) * (cut.len() / ranks);
    let got = worker.around(&values, |device, group, buffer| {
        device.reduce_scatter(group, buffer, cut.clone()).unwrap();
    });
    compare("reduce_scatter", &got, |index| match mine.contains(&index) {
        true => Some(sum(ranks, (own + 1) % ranks, index)),
        false => kept(index),
    });

    for root in 0..ranks {
        let got = worker.around(&values, |device, group, buffer| {
            device.reduce(group, buffer, range.clone(), root).unwrap();
        });
        compare("reduce", &got, |index| {
            kept(index).or_else(|| (own == root).then(|| sum(ranks, (root + 1) % ranks, index)))
        });
    }
}

fn moves<D: Device, T: Element + PartialEq>(
    worker: &mut Worker<D>,
    rank: &Rank,
    len: usize,
    range: Range<usize>,
    value: impl Fn(usize, usize) -> T,
) {
    let (own, ranks) = (rank.place.rank, rank.place.ranks);
    let values: Vec<T> = (0..len).map(|index| value(own, index)).collect();
    let cut = even(&range, ranks);
    let got = worker.around(&values, |device, group, buffer| {
        device.all_gather(group, buffer, cut.clone()).unwrap();
    });
    compare("all_gather", &got, |index| match cut.contains(&index) {
        true => Some(value((index - cut.start) / (cut.len() / ranks), index)),
        false => Some(value(own, index)),
    });
    for root in 0..ranks {
        let got = worker.around(&values, |device, group, buffer| {
            device.broadcast(group, buffer, range.clone(), root).unwrap();
        });
        compare("broadcast", &got, |index| {
            Some(value(if range.contains(&index) { root } else { own }, index))
        });
    }
}

/// Body and tail of a tensor, as a sharded run has them: several collectives of several buffers at once.
fn in_a_group<D: Device>(worker: &mut Worker<D>, rank: &Rank) {
    let (own, ranks) = (rank.place.rank, rank.place.ranks);
    let body = 0..256 * ranks;
    let tail = body.end..body.end + 37;
    let values: Vec<f32> = (0..tail.end).map(|index| value(own, index)).collect();
    let device = worker.device;
    let mut other = device.alloc::<bf16>(11).unwrap();
    device.upload(&mut other, 0, &(0..11).map(|index| value(own, index)).collect::<Vec<bf16>>()).unwrap();
    let got = worker.around(&values, |device, group, buffer| {
        device
            .grouped(group, &mut || {
                device.reduce_scatter(group, buffer, body.clone())?;
                // A group inside a group belongs to it.
                device.grouped(group, &mut || device.reduce(group, buffer, tail.clone(), ranks - 1))?;
                device.all_reduce(group, &mut other, 0..11)
            })
            .unwrap();
    });
    compare("a group", &got, |index| match (index < body.end, index / 256 == own, own == ranks - 1) {
        (true, true, _) => Some(sum(ranks, (own + 1) % ranks, index)),
        (false, _, true) => Some(sum(ranks, 0, index)),
        _ => None,
    });
    let mut got = vec![bf16::default(); 11];
    device.download(&mut got, &other, 0).unwrap();
    compare("another buffer of the group", &got, |index| {
        let piece = (0..ranks).rfind(|piece| 11 * piece / ranks <= index).unwrap_or_default();
        Some(sum(ranks, (piece + 1) % ranks, index))
    });
    // Nothing is queued where the work of a group fails.
    let failed = device.grouped(&worker.group, &mut || Err(mmpo_fast::error::Error::bug("planted")));
    assert!(failed.is_err());
}

#[test]
fn calls_and_bytes_of_each_kind_are_counted() {
    for &on in DEVICES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("counts");
        ranks::succeed("counted", on, 2, &[(nccl::COUNTS, path.to_str().unwrap())]);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.sort_by_key(|line| line["rank"].as_u64());
        let line = |rank: usize| {
            json!({
                "rank": rank,
                "ranks": 2,
                "all_reduce": {"calls": 2, "bytes": 400 + 14},
                "reduce_scatter": {"calls": 1, "bytes": 400},
                "all_gather": {"calls": 1, "bytes": 200},
                "reduce": {"calls": 1, "bytes": 12},
                "broadcast": {"calls": 1, "bytes": 0},
            })
        };
        assert_eq!(lines, [line(0), line(1)]);
    }
}

/// One collective of each kind, and two sums.
pub fn counted<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    let mut floats = device.alloc::<f32>(100).unwrap();
    let mut halves = device.alloc::<bf16>(100).unwrap();
    worker.order(Queue::Compute, Queue::Collectives);
    device.all_reduce(&worker.group, &mut floats, 0..100).unwrap();
    device.all_reduce(&worker.group, &mut halves, 0..7).unwrap();
    device.reduce_scatter(&worker.group, &mut floats, 0..100).unwrap();
    device.all_gather(&worker.group, &mut halves, 0..100).unwrap();
    device.reduce(&worker.group, &mut floats, 5..8, 1).unwrap();
    device.broadcast(&worker.group, &mut floats, 3..3, 0).unwrap();
    worker.order(Queue::Collectives, Queue::Compute);
}
