//! Signals: whichever rank gets one, all save once and stop.

use crate::harness::{TRAIN, Workplace, ignores_hangup};
use crate::processes::{LONG, Run, SOON, command, send, succeed};

/// The launcher passes its signals on once; a signal to one rank alone stops all too.
#[test]
fn a_signal_on_any_process_saves_once_and_stops_all() {
    for (signal, code, rank) in [("-INT", 130, Some(1)), ("-TERM", 143, None), ("-HUP", 129, None)] {
        if signal == "-HUP" && ignores_hangup() {
            eprintln!("these tests run under nohup, and so would the program: SIGHUP is not tried");
            continue;
        }
        let work = Workplace::new();
        let run = format!("{TRAIN} {LONG} --gpus 2").replace("--save-steps 10", "");
        let mut running = Run::start(&work, command(&work, &format!("{run} --output run")), "run");
        running.wait_for_lines(5);
        let target = rank.map_or(running.launcher.id(), |rank| running.rank(rank));
        send(signal, target);
        let finished = running.finish(SOON);
        assert_eq!(finished.code, Some(code), "{}", finished.stderr);
        let text = &finished.stderr;
        assert_eq!(text.matches("the run was saved in run").count(), 1, "{text}");
        assert!(!text.contains("died") && !text.contains("panicked"), "{text}");
        let saved: Vec<_> = std::fs::read_dir(work.path("run/checkpoints")).unwrap().flatten().collect();
        assert_eq!(saved.len(), 1, "{saved:?}");
        let lines = work.series("run", "loss").len();
        let step = format!("step-{lines:06}");
        assert_eq!(saved[0].file_name().to_str(), Some(step.as_str()), "the last step is the saved one");
    }
}

#[test]
fn sigusr1_on_the_launcher_saves_and_the_run_goes_on() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 120 --gpus 2 --output run");
    let mut running = Run::start(&work, command(&work, &run), "run");
    running.wait_for_lines(5);
    send("-USR1", running.launcher.id());
    let finished = running.finish(SOON);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert_eq!(finished.stderr.matches("SIGUSR1: saved after step").count(), 1, "{}", finished.stderr);
}

#[test]
fn a_run_that_was_stopped_goes_on_to_the_same_bits() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 120 --gpus 2");
    succeed(&work, &format!("{run} --output whole"));
    let mut running = Run::start(&work, command(&work, &format!("{run} --output cut")), "cut");
    running.wait_for_lines(8);
    send("-TERM", running.rank(0));
    assert_eq!(running.finish(SOON).code, Some(143));
    succeed(&work, &format!("{run} --output cut --resume"));
    assert!(work.read("whole/model/model.safetensors") == work.read("cut/model/model.safetensors"));
}
