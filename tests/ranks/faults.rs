//! Ranks that die, hang or fail: the run ends, says which, and goes on from its last checkpoint.

use std::time::Duration;

use crate::harness::{Finished, TRAIN, Workplace};
use crate::processes::{LONG, Run, SOON, command, is_there, send, succeed};
use crate::support::nccl;

/// The message names the rank and where it was.
#[track_caller]
fn assert_names(finished: &Finished, rank: usize, what: &str) {
    let text = &finished.stderr;
    assert!(text.contains(&format!("rank {rank} on ")), "rank {rank} is not named: {text}");
    assert!(text.contains(what), "no {what:?} in: {text}");
    assert!(text.contains("step "), "no step in: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

/// Whichever rank is killed: the run ends with exit code 9, and resumed it comes to the same bits.
#[test]
fn a_rank_that_is_killed_ends_the_run_which_goes_on_from_its_last_checkpoint() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 120 --save-steps 7 --shard states --gpus 3");
    succeed(&work, &format!("{run} --output whole"));
    let moment = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let ranks = [0, 1 + moment as usize % 2];
    println!("killed ranks: {ranks:?}");
    for (kill, rank) in ranks.into_iter().enumerate() {
        let resumed = format!("{run} --output cut --resume");
        let mut resumed = command(&work, &resumed);
        // Over a network the collectives notice a death themselves; over NVLink only the control line does.
        resumed.env(nccl::DEAF, kill.to_string());
        let mut running = Run::start(&work, resumed, "cut");
        running.wait_for_lines(9 + 12 * kill + moment as usize % 5);
        send("-KILL", running.rank(rank));
        let finished = running.finish(SOON);
        assert_eq!(finished.code, Some(9), "{}", finished.stderr);
        assert_names(&finished, rank, "died ");
        assert!(
            finished.stderr.contains(&format!("rank {rank} was killed by signal 9")),
            "{}",
            finished.stderr
        );
    }
    let finished = succeed(&work, &format!("{run} --output cut --resume"));
    assert!(finished.stderr.contains("resuming after step"), "{}", finished.stderr);
    assert!(work.read("whole/model/model.safetensors") == work.read("cut/model/model.safetensors"));
    assert_eq!(work.series("whole", "loss"), work.series("cut", "loss"));
}

#[test]
fn a_rank_that_is_stopped_ends_the_run_within_the_stated_time() {
    for rank in [0, 1] {
        let work = Workplace::new();
        let mut stopped = command(&work, &format!("{TRAIN} {LONG} --gpus 2 --output run"));
        stopped.env("MMPO_FAST_HANG_SECONDS", "15");
        let mut running = Run::start(&work, stopped, "run");
        running.wait_for_lines(5);
        send("-STOP", running.rank(rank));
        let finished = running.finish(SOON);
        assert_eq!(finished.code, Some(9), "{}", finished.stderr);
        assert_names(&finished, rank, "no sign of life");
    }
}

/// A collective that fails on one rank, as one of NCCL's does where the network breaks.
#[test]
fn a_collective_that_fails_on_one_rank_ends_all() {
    let work = Workplace::new();
    let mut broken = command(&work, &format!("{TRAIN} {LONG} --gpus 3 --output run"));
    broken.env(nccl::FAIL, "2:40");
    let finished = Run::start(&work, broken, "run").finish(SOON);
    assert!(matches!(finished.code, Some(6 | 9)), "{:?}: {}", finished.code, finished.stderr);
    assert!(finished.stderr.contains("rank 2"), "{}", finished.stderr);
}

/// The sum of all ranks is not finite as soon as one part is: all see it, and rank 0 tells it with the record.
#[test]
fn a_number_that_is_not_finite_ends_all_ranks_alike() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 5 --gpus 2 --output run --warmup-steps 0").replace("1e-3", "1e8");
    let finished = Run::start(&work, command(&work, &run), "run").finish(SOON);
    assert_eq!(finished.code, Some(7), "{}", finished.stderr);
    assert_eq!(finished.stderr.matches("not a number to train on").count(), 1, "{}", finished.stderr);
    assert!(work.path("run/capsules").is_dir(), "{}", finished.stderr);
    assert!(work.path("run/report.html").exists());
}

#[test]
fn ranks_end_with_their_launcher() {
    let work = Workplace::new();
    let run = command(&work, &format!("{TRAIN} {LONG} --gpus 2 --output run"));
    let mut running = Run::start(&work, run, "run");
    running.wait_for_lines(5);
    let ranks = running.ranks();
    assert_eq!(ranks.len(), 2);
    running.launcher.kill().unwrap();
    running.launcher.wait().unwrap();
    let started = std::time::Instant::now();
    // They become children of another process, which waits for them.
    while ranks.iter().any(|&rank| is_there(rank) && !is_zombie(rank)) {
        assert!(started.elapsed() < SOON, "{ranks:?} are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_zombie(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}
