//! Missing waits show in the numbers: on the emulated device a collective is done as late as the program allows.

use mmpo_fast::device::Queue;
use mmpo_fast::device::prelude::*;

use crate::collectives::Worker;
use crate::ranks::{self, DEVICES, On, Rank};

/// The wait of the step that is left out.
const LEFT_OUT: &str = "TEST_WAIT_LEFT_OUT";

/// The waits of a step of two collectives, and of the copy to the host of what the first one gives.
const WAITS: [&str; 5] = [
    "gradient before its sum",
    "sum before its use",
    "sum before its copy to the host",
    "update before its exchange",
    "exchange before its use",
];

#[test]
fn every_wait_of_a_step_is_needed() {
    if !DEVICES.contains(&On::Emulated) {
        return eprintln!("this build has no emulated device");
    }
    ranks::succeed("missing_wait", On::Emulated, 2, &[(LEFT_OUT, "none")]);
    for wait in WAITS {
        ranks::succeed("missing_wait", On::Emulated, 2, &[(LEFT_OUT, wait)]);
    }
}

/// As a sharded run's step: gradients are summed by pieces, a piece is updated, the pieces are exchanged.
pub fn step<D: Device>(device: &D, rank: &Rank) {
    const PIECE: usize = 100;
    let left_out = std::env::var(LEFT_OUT).unwrap();
    assert!(left_out == "none" || WAITS.contains(&left_out.as_str()), "{left_out}");
    let mut worker = Worker::join(device, rank);
    let wait = |worker: &mut Worker<D>, name: &str, before: Queue, after: Queue| {
        if name != left_out {
            worker.order(before, after);
        }
    };
    let mine = rank.place.rank * PIECE..(rank.place.rank + 1) * PIECE;
    let all = 0..PIECE * rank.place.ranks;
    let mut gradient = device.alloc::<f32>(all.end).unwrap();
    let mut weight = device.alloc::<f32>(all.end).unwrap();
    let mut used = device.alloc::<f32>(all.end).unwrap();
    let mut host = device.alloc_host(4 * PIECE).unwrap();
    let values: Vec<f32> = all.clone().map(|index| (index + 1000 * rank.place.rank) as f32).collect();

    device.upload(&mut gradient, 0, &values).unwrap();
    wait(&mut worker, WAITS[0], Queue::Compute, Queue::Collectives);
    device.reduce_scatter(&worker.group, &mut gradient, all.clone()).unwrap();
    wait(&mut worker, WAITS[1], Queue::Collectives, Queue::Compute);
    device.copy(&mut weight, mine.start, &gradient, mine.start, PIECE).unwrap();
    let mut piece = device.alloc::<f32>(PIECE).unwrap();
    device.copy(&mut piece, 0, &gradient, mine.start, PIECE).unwrap();
    wait(&mut worker, WAITS[3], Queue::Compute, Queue::Collectives);
    device.all_gather(&worker.group, &mut weight, all.clone()).unwrap();
    wait(&mut worker, WAITS[4], Queue::Collectives, Queue::Compute);
    device.copy(&mut used, 0, &weight, 0, all.end).unwrap();
    let mut got = vec![0.0; all.end];
    device.download(&mut got, &used, 0).unwrap();

    // The same piece summed over the ranks once more, and stored from there without the computation.
    worker.order(Queue::Compute, Queue::Collectives);
    worker.order(Queue::Compute, Queue::ToHost);
    device.all_reduce(&worker.group, &mut piece, 0..PIECE).unwrap();
    wait(&mut worker, WAITS[2], Queue::Collectives, Queue::ToHost);
    device.store(&mut host, 0, &piece, PIECE).unwrap();
    let mut stored = vec![0_u8; 4 * PIECE];
    device.read_host(&mut stored, &host, 0).unwrap();
    let stored: Vec<f32> = stored.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();

    // The two ranks hold index and index + 1000; then the first rank's piece and the second's.
    let sum = |index: usize| (2 * index + 1000) as f32;
    let sums: Vec<f32> = all.map(sum).collect();
    let both: Vec<f32> = (0..PIECE).map(|index| sum(index) + sum(index + PIECE)).collect();
    let right = (got == sums, stored == both);
    let wanted = match WAITS.iter().position(|wait| *wait == left_out) {
        None => right == (true, true),
        Some(2) => right == (true, false),
        Some(_) => !right.0,
    };
    assert!(wanted, "without `{left_out}`: {right:?}: {:?} {:?}", &got[..4], &stored[..4]);
}
