//! Ranks that disagree, abort, die or fail: every other rank comes back with an error that says why.

use std::time::{Duration, Instant};

use half::bf16;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Element, Queue};
use mmpo_fast::error::{Error, Result};

use crate::collectives::Worker;
use crate::ranks::{self, DEVICES, Ended, Rank};
use crate::support::nccl;

/// The library notices a rank that died within a second; the rest is for a busy machine.
const NOTICED: Duration = Duration::from_secs(30);

fn all_succeed(what: &str, ended: &[Ended]) {
    for (rank, ended) in ended.iter().enumerate() {
        assert!(ended.success, "{what}, rank {rank}:\n{}", ended.output);
    }
}

/// One collective from the upload to the download, which must fail on this rank.
fn failure<D: Device, T: Element>(
    worker: &mut Worker<D>,
    len: usize,
    work: impl FnOnce(&D, &D::Communicator, &mut D::Buffer<T>) -> Result<()>,
) -> Error {
    let mut buffer = worker.device.alloc::<T>(len).unwrap();
    worker.order(Queue::Compute, Queue::Collectives);
    let result = work(worker.device, &worker.group, &mut buffer).and_then(|()| {
        worker.order(Queue::Collectives, Queue::Compute);
        worker.device.download(&mut vec![T::default(); len], &buffer, 0)
    });
    let error = result.expect_err("an error");
    assert_eq!(error.exit_code(), 6, "{error}");
    // It stays the group's error.
    let again = worker.device.all_reduce(&worker.group, &mut worker.device.alloc::<f32>(1).unwrap(), 0..1);
    assert_eq!(again.expect_err("a failed group").to_string(), error.to_string());
    error
}

#[track_caller]
fn assert_says(error: &Error, words: &str) {
    assert!(error.to_string().contains(words), "`{error}` does not say `{words}`");
}

#[test]
fn ranks_that_disagree_fail_and_do_not_hang() {
    for &on in DEVICES {
        ranks::succeed("disagreement", on, 2, &[]);
    }
}

pub fn disagreement<D: Device>(device: &D, rank: &Rank) {
    let odd = rank.place.rank == 1;
    let says = |error: &Error| assert_says(error, "ranks disagree: rank ");
    let mut worker = Worker::join(device, rank);
    let len = if odd { 10 } else { 9 };
    says(&failure::<D, f32>(&mut worker, 10, |device, group, buffer| {
        device.all_reduce(group, buffer, 0..len)
    }));
    // The device's downloads fail as long as a failed group is there.
    drop(worker);
    let mut worker = Worker::join(device, rank);
    says(&match odd {
        true => failure::<D, bf16>(&mut worker, 10, |device, group, buffer| {
            device.all_reduce(group, buffer, 0..10)
        }),
        false => failure::<D, f32>(&mut worker, 10, |device, group, buffer| {
            device.all_reduce(group, buffer, 0..10)
        }),
    });
    drop(worker);
    let mut worker = Worker::join(device, rank);
    says(&failure::<D, f32>(&mut worker, 10, |device, group, buffer| match odd {
        true => device.all_gather(group, buffer, 0..10),
        false => device.reduce_scatter(group, buffer, 0..10),
    }));
    drop(worker);
    let mut worker = Worker::join(device, rank);
    says(&failure::<D, f32>(&mut worker, 0, |device, group, buffer| {
        device.broadcast(group, buffer, 0..0, rank.place.rank)
    }));
}

#[test]
fn an_abort_from_another_thread_ends_a_wait() {
    for &on in DEVICES {
        ranks::succeed("aborted", on, 2, &[]);
        ranks::succeed("aborted", on, 2, &[(nccl::DEAF, "1")]);
    }
}

pub fn aborted<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    let deaf = std::env::var_os(nccl::DEAF).is_some();
    if rank.place.rank == 1 {
        // Never calls anything; it hears of the abort, or does not.
        rank.wait_for(0, "back");
        let started = Instant::now();
        let mut heard = device.check_group(&worker.group);
        while heard.is_ok() && started.elapsed() < if deaf { Duration::from_millis(300) } else { NOTICED } {
            std::thread::sleep(Duration::from_millis(10));
            heard = device.check_group(&worker.group);
        }
        match (heard, deaf) {
            (Ok(()), true) => device.abort(&worker.group)(),
            (Err(error), false) => assert_says(&error, "rank 0 aborted the communicator"),
            other => panic!("{other:?}"),
        }
        return;
    }
    let abort = device.abort(&worker.group);
    let aborter = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        let at = Instant::now();
        abort();
        // A second one does nothing.
        abort();
        at
    });
    let error =
        failure::<D, f32>(&mut worker, 10, |device, group, buffer| device.all_reduce(group, buffer, 0..10));
    assert_says(&error, "it was aborted on this rank");
    assert!(aborter.join().unwrap().elapsed() < NOTICED);
    rank.reach("back");
}

#[test]
fn the_others_notice_a_rank_that_was_killed() {
    for &on in DEVICES {
        let mut started = ranks::start("killed", on, 3, &[]);
        (0..3).for_each(|rank| started.wait_for(rank, "loop"));
        std::thread::sleep(Duration::from_millis(50));
        let at = Instant::now();
        started.kill(1);
        let ended = started.finish();
        for rank in [0, 2] {
            assert!(ended[rank].success, "{on:?}, rank {rank}:\n{}", ended[rank].output);
            let took = ended[rank].at - at;
            assert!(took < NOTICED, "{on:?}, rank {rank}: {took:?}");
        }
        assert!(!ended[1].success);
        // The first to notice aborts, which may be what the other one notices.
        assert!(ended.iter().any(|ended| ended.output.contains("rank 1 died")), "{on:?}: no one says why");
        let left: Vec<_> = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten().collect();
        assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().contains("nccl")), "{left:?}");
    }
}

/// Rank 0 waits in a collective when rank 1 dies, rank 2 only asks how the group is.
pub fn killed<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    let mut buffer = device.alloc::<f32>(1000).unwrap();
    worker.order(Queue::Compute, Queue::Collectives);
    device.all_reduce(&worker.group, &mut buffer, 0..1000).unwrap();
    worker.order(Queue::Collectives, Queue::Compute);
    rank.reach("loop");
    if rank.place.rank == 2 {
        let error = loop {
            if let Err(error) = device.check_group(&worker.group) {
                break error;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        return noticed(&error, 0);
    }
    let error =
        failure::<D, f32>(&mut worker, 10, |device, group, buffer| device.all_reduce(group, buffer, 0..10));
    noticed(&error, 2);
}

fn noticed(error: &Error, other: usize) {
    let text = error.to_string();
    println!("{text}");
    assert!(text.contains("rank 1 died") || text.contains(&format!("rank {other} aborted")), "{text}");
}

#[test]
fn a_failure_in_the_background_ends_the_group_on_every_rank() {
    for &on in DEVICES {
        ranks::succeed("injected", on, 2, &[(nccl::FAIL, "1:2")]);
    }
}

pub fn injected<D: Device>(device: &D, rank: &Rank) {
    let mut worker = Worker::join(device, rank);
    let mut buffer = device.alloc::<f32>(10).unwrap();
    worker.order(Queue::Compute, Queue::Collectives);
    device.all_reduce(&worker.group, &mut buffer, 0..10).unwrap();
    worker.order(Queue::Collectives, Queue::Compute);
    device.check_group(&worker.group).unwrap();
    // No rank aborts before the other one has the first sum.
    rank.reach("summed");
    rank.wait_for(1 - rank.place.rank, "summed");
    let error =
        failure::<D, f32>(&mut worker, 10, |device, group, buffer| device.all_reduce(group, buffer, 0..10));
    let wanted = ["rank 1 aborted the communicator", "FAKE_NCCL_FAIL asked for this failure"];
    assert_says(&error, wanted[rank.place.rank]);
}

#[test]
fn a_rank_that_dies_before_all_have_joined_is_noticed() {
    for &on in DEVICES {
        let mut started = ranks::start("never_joined", on, 3, &[]);
        started.wait_for(1, "joining");
        // It says that it joins before it does: a busy machine takes its time in between.
        std::thread::sleep(Duration::from_secs(1));
        started.kill(1);
        let ended = started.finish();
        all_succeed(
            "never joined",
            &[&ended[0], &ended[2]].map(|ended| Ended { output: ended.output.clone(), ..*ended }),
        );
    }
}

/// Rank 2 never joins, and rank 1 is killed while it waits for that.
pub fn never_joined<D: Device>(device: &D, rank: &Rank) {
    let id = rank.id(|| device.new_group().unwrap());
    if rank.place.rank == 2 {
        return;
    }
    rank.reach("joining");
    let error = device.join_group(&id, rank.place).map(|_| ()).expect_err("not all ranks come");
    assert_says(&error, "joining the group");
    assert_says(&error, "rank 1 died");
}
