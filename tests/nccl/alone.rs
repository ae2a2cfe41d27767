//! A group of one rank: what a machine with one GPU can show of NVIDIA's NCCL. The same on the library that stands in for it.

use mmpo_fast::device::Queue;
use mmpo_fast::device::prelude::*;

use crate::collectives::{Worker, gpus};
use crate::ranks::{self, DEVICES, On, Rank};

/// Enough that a collective takes longer than the launch of what comes after it.
const VALUES: usize = 1 << 18;
const ROUNDS: usize = 20;

#[test]
fn a_group_of_one_rank_keeps_its_order_and_ends_with_an_abort() {
    for &on in DEVICES {
        ranks::succeed("alone", on, 1, &[]);
    }
}

#[test]
fn a_group_of_one_rank_on_a_gpu() {
    if gpus() > 0 {
        ranks::succeed("alone", On::Gpu, 1, &[]);
    }
}

pub fn alone<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    keep_order(&mut worker);
    let group = &worker.group;
    device.check_group(group).unwrap();
    let abort = device.abort(group);
    std::thread::spawn(move || {
        abort();
        // A second one does nothing.
        abort();
    })
    .join()
    .unwrap();
    let error = device.check_group(group).expect_err("an aborted group");
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains("it was aborted on this rank"), "{error}");
    let mut buffer = device.alloc::<f32>(8).unwrap();
    let again = device.all_reduce(group, &mut buffer, 0..8).expect_err("an aborted group");
    assert_eq!(again.to_string(), error.to_string());
    // The device's downloads fail as long as a failed group is there.
    drop(worker);
    keep_order(&mut Worker::join(device, rank));
}

/// Each round's values go through a collective, which one rank alone does not change, and are added up after it: values that
/// were read or overwritten too early change the sum.
fn keep_order<D: Device>(worker: &mut Worker<D>) {
    let device = worker.device;
    let mut values = device.alloc::<f32>(VALUES).unwrap();
    let mut sums = device.alloc::<f32>(VALUES).unwrap();
    device.zero(&mut sums, 0..VALUES).unwrap();
    for round in 1..=ROUNDS {
        device.upload(&mut values, 0, &vec![round as f32; VALUES]).unwrap();
        worker.order(Queue::Compute, Queue::Collectives);
        match round % 3 {
            0 => device.all_reduce(&worker.group, &mut values, 0..VALUES),
            1 => device.reduce_scatter(&worker.group, &mut values, 0..VALUES),
            _ => device.all_gather(&worker.group, &mut values, 0..VALUES),
        }
        .unwrap();
        worker.order(Queue::Collectives, Queue::Compute);
        device.accumulate(&mut sums, 0, &values, 0, VALUES).unwrap();
    }
    let mut found = vec![0.0; VALUES];
    device.download(&mut found, &sums, 0).unwrap();
    let wanted = (ROUNDS * (ROUNDS + 1) / 2) as f32;
    let wrong = found.iter().position(|&sum| sum != wanted);
    assert!(wrong.is_none(), "value {wrong:?} is {:?}, wanted {wanted}", wrong.map(|index| found[index]));
}
