//! Ranks that die, hang or fail: the run ends, says which, and goes on from its last checkpoint.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Finished, TRAIN, Workplace};
use crate::joining;
use crate::processes::{LONG, Run, SOON, command, free_port, is_there, send, succeed};
use crate::support::nccl;

/// `MMPO_FAST_HANG_SECONDS` of the runs in which a rank hangs.
const HANG: Duration = Duration::from_secs(15);
/// Of the run that is frozen: a rank that is alive gives signs of life several times as often, on a busy machine too.
const SHORT_HANG: Duration = Duration::from_secs(5);
/// After the first rank has ended, those that are still there are ended by force within this time, as the page on several GPUs says.
const FORCE: Duration = Duration::from_secs(30);
/// What a busy machine may take longer.
const BUSY: Duration = Duration::from_secs(60);

/// The message names the rank, its machine and the step in which it was: one from `first` on, and not after the step that the run
/// was in when it ended.
#[track_caller]
fn assert_names(work: &Workplace, finished: &Finished, (rank, what): (usize, &str), first: usize) {
    let text = &finished.stderr;
    let name = format!("rank {rank} on {}", mmpo_fast::ranks::host());
    assert!(text.contains(&name), "no {name:?} in: {text}");
    assert!(text.contains(what), "no {what:?} in: {text}");
    assert!(!text.contains("panicked"), "{text}");
    let told = text.lines().find(|line| line.contains(&name)).unwrap();
    let number = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse();
    // What comes after "step " may be a path too.
    let step: usize = told.split("step ").skip(1).find_map(|rest| number(rest).ok()).expect(text);
    let done = work.series("cut", "loss").len();
    assert!((first..=done + 1).contains(&step), "step {step}, and {first} to {done} were done: {text}");
}

/// The run in `cut` was ended: its last checkpoint is whole, and the run goes on from it to the bits of the one in `whole`.
#[track_caller]
fn assert_goes_on(work: &Workplace, run: &str) {
    let checkpoints = std::fs::read_dir(work.path("cut/checkpoints")).unwrap().flatten();
    let last = checkpoints.map(|entry| entry.file_name().into_string().unwrap()).max().unwrap();
    work.succeed(&format!("verify cut/checkpoints/{last}"));
    let finished = succeed(work, &format!("{run} --output cut --resume"));
    assert!(finished.stderr.contains("resuming after step"), "{}", finished.stderr);
    assert!(work.read("whole/model/model.safetensors") == work.read("cut/model/model.safetensors"));
    assert_eq!(work.series("whole", "loss"), work.series("cut", "loss"));
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
        let lines = 9 + 12 * kill + moment as usize % 5;
        running.wait_for_lines(lines);
        send("-KILL", running.rank(rank));
        let finished = running.finish(SOON);
        assert_eq!(finished.code, Some(9), "{}", finished.stderr);
        assert_names(&work, &finished, (rank, "died "), lines);
        assert!(
            finished.stderr.contains(&format!("rank {rank} was killed by signal 9")),
            "{}",
            finished.stderr
        );
    }
    assert_goes_on(&work, &run);
}

/// Stops a rank without an end, as a machine does that swaps, or a debugger.
fn stop(rank: usize) {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 40 --save-steps 2 --shard states --gpus 2");
    succeed(&work, &format!("{run} --output whole"));
    let mut stopped = command(&work, &format!("{run} --output cut"));
    stopped.env("MMPO_FAST_HANG_SECONDS", HANG.as_secs().to_string());
    let mut running = Run::start(&work, stopped, "cut");
    running.wait_for_lines(5);
    send("-STOP", running.rank(rank));
    let finished = running.finish(HANG + FORCE + BUSY);
    assert_eq!(finished.code, Some(9), "{}", finished.stderr);
    assert_names(&work, &finished, (rank, "no sign of life"), 5);
    // The launcher ends it by force at the end, which is not what happened to it.
    assert!(!finished.stderr.contains("killed by signal"), "{}", finished.stderr);
    assert_goes_on(&work, &run);
}

#[test]
fn a_rank_that_is_stopped_ends_the_run_within_the_stated_time() {
    std::thread::scope(|scope| {
        [0, 1].map(|rank| scope.spawn(move || stop(rank))).map(|thread| thread.join().unwrap())
    });
}

/// A whole job that is frozen for longer than a rank may hang, as schedulers and laptops do it, goes on as if nothing had happened.
/// Its processes do not wake at the same moment: the first one finds that nothing was heard of the other, and must not judge it.
#[test]
fn a_job_that_is_frozen_as_a_whole_goes_on() {
    let (work, steps) = (Workplace::new(), 100);
    let run = format!("{TRAIN} --max-steps {steps} --shard states --gpus 2");
    succeed(&work, &format!("{run} --output whole"));
    let mut frozen = command(&work, &format!("{run} --output cut"));
    frozen.env("MMPO_FAST_HANG_SECONDS", SHORT_HANG.as_secs().to_string());
    let mut running = Run::start(&work, frozen, "cut");
    running.wait_for_lines(1);
    let processes = [running.launcher.id(), running.rank(0), running.rank(1)];
    running.wait_for_lines(5);
    processes.iter().for_each(|&process| send("-STOP", process));
    std::thread::sleep(SHORT_HANG + Duration::from_secs(2));
    assert!(running.lines() < steps, "the run ended before it could be frozen");
    for process in processes {
        send("-CONT", process);
        std::thread::sleep(Duration::from_millis(500));
    }
    let finished = running.finish(SOON);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(work.read("whole/model/model.safetensors") == work.read("cut/model/model.safetensors"));
    assert_eq!(work.series("whole", "loss"), work.series("cut", "loss"));
}

/// A collective that never ends, as where a GPU or a link hangs: every rank gives signs of life, and none does anything.
#[test]
fn a_collective_that_never_ends_ends_the_run_within_the_stated_time() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 40 --save-steps 2 --shard states --gpus 2");
    succeed(&work, &format!("{run} --output whole"));
    let mut hanging = command(&work, &format!("{run} --output cut"));
    hanging.env("MMPO_FAST_HANG_SECONDS", HANG.as_secs().to_string());
    // In the update of the eighth step.
    hanging.env(nccl::DEAF, "1").env(nccl::HANG, "1:395");
    let finished = Run::start(&work, hanging, "cut").finish(HANG + FORCE + BUSY);
    assert_eq!(finished.code, Some(9), "{}", finished.stderr);
    let text = &finished.stderr;
    assert!(text.contains("no rank has done anything for"), "{text}");
    assert!(text.contains(&format!(" on {} among them", mmpo_fast::ranks::host())), "{text}");
    let done = work.series("cut", "loss").len();
    assert!(done > 2 && text.contains(&format!("step {}", done + 1)), "{done} steps: {text}");
    assert_goes_on(&work, &run);
}

/// A rank that gives signs of life and gets nowhere, as on a file system that hangs, while the other waits for it. Files may take
/// six times as long as other work. Its own process ends too, although nothing brings its main thread back.
#[test]
fn a_rank_that_hangs_alone_is_named_and_ended() {
    let (places, port) = ([Workplace::new(), Workplace::new()], free_port());
    // Whoever reads it waits for a writer.
    let file = places[1].path("base/generation_config.json");
    std::fs::remove_file(&file).unwrap();
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    let limit = Duration::from_secs(3);
    let started = [0, 1].map(|number| {
        let mut rank = joining::rank(&places[number], number, port, &format!("{TRAIN} --output run"));
        rank.env("MMPO_FAST_HANG_SECONDS", limit.as_secs().to_string()).spawn().unwrap()
    });
    let since = Instant::now();
    let finished = joining::ended(started);
    assert!(since.elapsed() <= 6 * limit + FORCE + BUSY, "{:?}", since.elapsed());
    assert_eq!([finished[0].code, finished[1].code], [Some(9), Some(9)], "{}", finished[0].stderr);
    let text = &finished[0].stderr;
    assert!(text.contains(&format!("rank 1 on {} hangs", mmpo_fast::ranks::host())), "{text}");
    assert!(text.contains("while model and pairs were read, while others wait for it"), "{text}");
}

/// One rank gets numbers that mean nothing, as from memory that fails: from then on its pairs have no loss, or its part of the
/// gradients no norm. All ranks see that in the same step, and end with the rank that had it first.
#[test]
fn a_rank_that_gets_a_nan_is_named_and_ends_all() {
    for (kind, what) in [("all_gather", "loss NaN"), ("reduce_scatter", "gradient norm NaN")] {
        let work = Workplace::new();
        let run = format!("{TRAIN} --max-steps 40 --save-steps 2 --shard states --gpus 2");
        succeed(&work, &format!("{run} --output whole"));
        let mut spoiled = command(&work, &format!("{run} --output cut"));
        spoiled.env(nccl::SPOIL, format!("1:{kind}:100"));
        let finished = Run::start(&work, spoiled, "cut").finish(SOON);
        assert_eq!(finished.code, Some(7), "{}", finished.stderr);
        assert_names(&work, &finished, (1, what), 3);
        assert_eq!(finished.stderr.matches("not a number to train on").count(), 1, "{}", finished.stderr);
        assert_eq!(finished.stderr.contains("loss NaN"), kind == "all_gather", "{}", finished.stderr);
        assert_goes_on(&work, &run);
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
    let started = Instant::now();
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
