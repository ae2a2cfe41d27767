//! A run that is cut gives the same bits as one in one piece.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::harness::{TRAIN, Workplace};

/// Enough that a run is still under way when a busy machine comes to cut it.
const STEPS: usize = 400;

/// Waits until the run of `child` has written `lines` lines of metrics.
pub fn wait_for_lines(metrics: &Path, lines: usize, child: &mut Child) {
    let started = Instant::now();
    loop {
        let written = std::fs::read(metrics).unwrap_or_default();
        if written.iter().filter(|&&byte| byte == b'\n').count() >= lines {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be cut");
        assert!(started.elapsed() < Duration::from_secs(300), "no {lines} lines of metrics");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn interrupt(child: &Child) {
    send("-INT", child);
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "{sent}");
}

#[test]
fn sigusr1_saves_and_the_run_goes_on() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps {STEPS}");
    work.succeed(&format!("{run} --output whole"));

    let mut child = work.command(&format!("{run} --output cut")).spawn().unwrap();
    let metrics = work.path("cut/metrics.jsonl");
    wait_for_lines(&metrics, 5, &mut child);
    send("-USR1", &child);
    // It has no other checkpoints before its end.
    let saved =
        || std::fs::read_dir(work.path("cut/checkpoints")).is_ok_and(|mut folder| folder.next().is_some());
    let started = Instant::now();
    while !saved() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended");
        assert!(started.elapsed() < Duration::from_secs(300), "nothing was saved");
        std::thread::sleep(Duration::from_millis(2));
    }
    let lines = std::fs::read_to_string(&metrics).unwrap().lines().count();
    wait_for_lines(&metrics, lines + 3, &mut child);
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("SIGUSR1: saved after step"), "{message}");
    assert!(!work.path("cut/model").exists(), "the run was over");

    let finished = work.succeed(&format!("{run} --output cut --resume"));
    assert!(finished.stderr.contains("resuming after step"), "{}", finished.stderr);
    work.assert_same_bits("whole", "cut", STEPS);
}

#[test]
fn a_run_cut_in_pieces_gives_the_bits_of_one_in_one_piece() {
    let work = Workplace::new();
    let run = format!(
        "{TRAIN} --max-steps {STEPS} --save-steps 20 --eval-data pairs.jsonl --eval-steps 50 --weight-decay 0.01"
    );
    work.succeed(&format!("{run} --output whole"));

    // Killed with no time to save: it goes on from the last checkpoint.
    let mut child = work.command(&format!("{run} --output cut")).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 50, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!work.path("cut/model").exists(), "the run was over");

    // Interrupted: it saves where it is, and says how to go on.
    let mut child = work.command(&format!("{run} --output cut --resume")).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 110, &mut child);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("the run was saved in cut and `--resume` continues it"), "{message}");
    assert!(message.contains("resuming after step"), "{message}");
    let interrupted_at = work.series("cut", "loss").len();
    let state = work.path(&format!("cut/checkpoints/step-{interrupted_at:06}/state.safetensors"));
    assert!(state.is_file(), "no checkpoint of step {interrupted_at}, where the run stopped");
    assert!(!work.path("cut/model").exists(), "the run was over");

    // The folder alone says what run it is.
    work.succeed("train --resume --output cut");
    work.assert_same_bits("whole", "cut", STEPS);
    let left_over = |path: &Path| path.to_string_lossy().contains(".partial-");
    assert!(!work.contents("cut").keys().any(|path| left_over(path)), "partial files are left");

    // A finished run that is resumed stays what it is, and says so.
    let before = work.contents("cut");
    let finished = work.succeed("train --resume --output cut");
    assert!(
        finished.stderr.contains("the run in cut is finished, all 400 steps of it"),
        "{}",
        finished.stderr
    );
    assert!(finished.stdout.contains("cut/model"), "{}", finished.stdout);
    assert!(!finished.stderr.contains("reference log-probs"), "{}", finished.stderr);
    assert!(work.contents("cut") == before, "a finished run was changed");
}

#[test]
fn a_run_cut_before_its_first_checkpoint_begins_again() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps {STEPS} --eval-data pairs.jsonl");
    work.succeed(&format!("{run} --output whole"));
    let mut child = work.command(&format!("{run} --output cut")).spawn().unwrap();
    wait_for_lines(&work.path("cut/metrics.jsonl"), 5, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!work.path("cut/model").exists(), "the run was over");
    work.refuse(&format!("{run} --output cut"), 2, &["cut holds a run already"]);
    let finished = work.succeed(&format!("{run} --output cut --resume"));
    assert!(finished.stderr.contains("has no checkpoint yet: the run begins again"), "{}", finished.stderr);
    work.assert_same_bits("whole", "cut", STEPS);
}
