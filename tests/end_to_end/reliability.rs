//! What a machine does to a run: broken standard streams, signals, a second run in the same folder, hostile places and
//! absurd numbers.

use std::fs::OpenOptions;
use std::os::unix::fs::FileTypeExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::harness::{CommandLine, TRAIN, Workplace, ignores_hangup};
use crate::resume::wait_for_lines;

const SCORE: &str =
    "score --model base --data pairs.jsonl --max-length 160 --max-prompt-length 64 --device cpu";

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// A pipe that nobody reads.
fn unread() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

pub fn signal(child: &Child, name: &str) {
    let signal = match name {
        "INT" => Signal::INT,
        "TERM" => Signal::TERM,
        "HUP" => Signal::HUP,
        _ => panic!("SIG{name}"),
    };
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// State, and seconds of processors' time, of a process that nobody has waited for.
fn state_of(child: &Child) -> (String, f64) {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    // The name in brackets may hold anything; the state comes after it, and later the time in user mode and in the system.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    (fields[0].to_string(), ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Sends a signal and waits for the end, before which a process of one thread may work for three seconds: a machine that is busy makes it
/// wait for longer, and not work for longer.
#[track_caller]
fn end_soon(child: &mut Child, name: &str) -> Option<i32> {
    let (_, before) = state_of(child);
    signal(child, name);
    wait_until("the end", || {
        let (state, after) = state_of(child);
        assert!(after - before < 3.0, "{name}: the process still works after {} s", after - before);
        state == "Z"
    });
    child.wait().unwrap().code()
}

/// Waits until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(300), "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until the program has said `part` on standard error, which goes on being read.
fn wait_for_message(child: &mut Child, part: &str) -> std::thread::JoinHandle<String> {
    use std::io::{BufRead, BufReader};
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut seen = String::new();
    for line in lines.by_ref() {
        seen += &(line.unwrap() + "\n");
        if seen.contains(part) {
            return std::thread::spawn(move || {
                lines.for_each(|line| seen += &(line.unwrap_or_default() + "\n"));
                seen
            });
        }
    }
    panic!("the program ended before it said {part:?}: {seen}");
}

impl Workplace {
    /// Pairs enough that the reference takes seconds.
    fn many_pairs(&self, times: usize) {
        let pairs = text(&self.read("pairs.jsonl"));
        self.write("many.jsonl", pairs.repeat(times));
    }
}

#[test]
fn a_standard_error_that_cannot_be_written_changes_nothing() {
    let work = Workplace::new();
    for (run, errors) in [("full", full as fn() -> Stdio), ("unread", unread)] {
        let mut command = work.command(&format!("{TRAIN} --max-steps 2 --output {run}"));
        let output = command.stderr(errors()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{run}: {}", text(&output.stdout));
        assert!(work.path(&format!("{run}/report.html")).is_file());
        let mut command = work.command("train --model absent --data pairs.jsonl --output never");
        assert_eq!(command.stderr(errors()).output().unwrap().status.code(), Some(5), "{run}");
        let mut command = work.command("train --no-such-flag");
        assert_eq!(command.stderr(errors()).output().unwrap().status.code(), Some(2), "{run}");
    }
    // No standard error at all.
    let program = env!("CARGO_BIN_EXE_mmpo-fast");
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec {program} {SCORE} --output s.jsonl 2>&-")]);
    assert!(shell.current_dir(work.path("")).stdout(Stdio::null()).status().unwrap().success());
    assert_eq!(work.lines("s.jsonl").len(), 11);
}

#[test]
fn a_standard_output_that_cannot_be_written_is_an_error_and_one_that_nobody_reads_an_end() {
    let work = Workplace::new();
    let generate = "generate --model base --prompt hello --max-new-tokens 40 --device cpu";
    for arguments in [generate, &format!("{SCORE} --output -"), "--version", "--help"] {
        let output = work.command(arguments).stdout(full()).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{arguments}: {message}");
        assert!(message.contains("cannot write to standard output"), "{arguments}: {message}");
        let output = work.command(arguments).stdout(unread()).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {message}");
        assert!(!message.contains('×') && !message.contains("panicked"), "{arguments}: {message}");
    }
    // All files of a run are there before anything is printed.
    let output =
        work.command(&format!("{TRAIN} --max-steps 1 --output run")).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    assert!(work.path("run/report.html").is_file() && work.path("run/model/config.json").is_file());
}

#[test]
fn two_runs_do_not_share_an_output_folder() {
    let work = Workplace::new();
    work.many_pairs(400);
    let run = format!("{} --max-steps 2 --output run", TRAIN.replace("pairs.jsonl", "many.jsonl"));
    let mut first = work.command(&run).spawn().unwrap();
    // The lock is there before the reference is scored.
    wait_until("the lock", || work.path("run/.run.lock").metadata().is_ok_and(|lock| lock.len() > 0));
    let named = format!("process {}", first.id());
    for second in [run.clone(), format!("{run} --resume")] {
        work.refuse(&second, 2, &["run is being written by another run", &named, "choose another --output"]);
    }
    assert!(first.try_wait().unwrap().is_none(), "the first run ended too early to tell");
    first.kill().unwrap();
    first.wait().unwrap();
    // What the killed run left stops nobody, and a run that ends takes its lock with it.
    assert!(work.path("run/.run.lock").exists());
    work.succeed(&format!("{TRAIN} --max-steps 2 --output run"));
    assert!(!work.path("run/.run.lock").exists());
}

/// A disk that takes no more is an error of the run, although checkpoints are written beside its steps; the checkpoint before stays
/// whole, and the run goes on from it when there is room again.
#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 6 --save-steps 2 --keep-checkpoints 9");
    work.succeed(&format!("{run} --output whole"));
    work.cut_after_step_2("whole", "cut");
    let before = work.contents("cut/checkpoints");
    // No file may be larger than half a MiB, and a checkpoint has two: its write fails as on a full disk.
    let program = env!("CARGO_BIN_EXE_mmpo-fast");
    let output = Command::new("sh")
        .args(["-c", &format!("trap '' XFSZ; ulimit -f 1024; exec {program} {run} --output cut --resume")])
        .current_dir(work.path(""))
        .env("NO_COLOR", "1")
        .env("MMPO_FAST_CACHE", work.path("cache"))
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{message}");
    assert!(message.contains("state.safetensors") && !message.contains("panicked"), "{message}");
    assert!(work.contents("cut/checkpoints") == before, "the checkpoint before, and nothing else");
    work.succeed(&format!("{run} --output cut --resume"));
    work.assert_same_bits("whole", "cut", 6);
}

/// Killed in the middle of whatever it does, a run that saves after every step has a whole checkpoint, from which it goes on to
/// the same bits.
#[test]
fn a_run_killed_at_any_moment_of_its_saves_goes_on() {
    let work = Workplace::new();
    let steps = 60;
    let run = format!("{TRAIN} --max-steps {steps} --save-steps 1");
    work.succeed(&format!("{run} --output whole"));
    for kill in 1..=6 {
        let mut child = work.command(&format!("{run} --output cut --resume")).spawn().unwrap();
        wait_for_lines(&work.path("cut/metrics.jsonl"), 6 * kill, &mut child);
        // At another moment of the save each time.
        std::thread::sleep(Duration::from_millis(3 * kill as u64));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    work.succeed(&format!("{run} --output cut --resume"));
    work.assert_same_bits("whole", "cut", steps);
    let damaged = work.contents("cut").into_keys().find(|path| path.to_string_lossy().contains(".damaged"));
    assert_eq!(damaged, None, "every checkpoint was whole");
}

#[test]
fn a_signal_before_the_first_step_keeps_the_references_that_are_scored() {
    let work = Workplace::new();
    work.many_pairs(400);
    let run = format!("{} --max-steps 2", TRAIN.replace("pairs.jsonl", "many.jsonl"));
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        if name == "HUP" && ignores_hangup() {
            eprintln!("these tests run under nohup, and so would the program: SIGHUP is not tried");
            continue;
        }
        let mut child = work.command(&format!("{run} --output cut")).spawn().unwrap();
        let messages = wait_for_message(&mut child, "reference log-probs ");
        let ended = end_soon(&mut child, name);
        let message = messages.join().unwrap();
        assert_eq!(ended, Some(code), "{name}: {message}");
        assert!(message.contains("of 4400 reference log-probs are kept"), "{name}: {message}");
        assert!(!work.path("cut/metrics.jsonl").exists());
    }
    let finished = work.succeed(&format!("{run} --output cut"));
    assert!(finished.stderr.contains("pairs were scored by an earlier run"), "{}", finished.stderr);
    // To the bit what a run that scores all of them has.
    std::fs::remove_dir_all(work.path("cache")).unwrap();
    work.succeed(&format!("{run} --output whole"));
    work.assert_same_bits("whole", "cut", 2);
}

#[test]
fn a_long_computation_does_not_hold_a_signal_up() {
    let work = Workplace::new();
    work.many_pairs(200);
    // One micro-batch of all pairs: there is nowhere to stop for many seconds.
    let long = "--tokens-per-micro-batch 2000000";
    let train = format!("{} --output run {long}", TRAIN.replace("pairs.jsonl", "many.jsonl"));
    let score = format!("{} --threads 1 --output s.jsonl {long}", SCORE.replace("pairs.jsonl", "many.jsonl"));
    for (arguments, name, code) in [(train, "INT", 130), (score, "TERM", 143)] {
        let mut child = work.command(&arguments).spawn().unwrap();
        let messages = wait_for_message(&mut child, "device: ");
        std::thread::sleep(Duration::from_millis(300));
        let ended = end_soon(&mut child, name);
        assert_eq!(ended, Some(code), "{arguments}: {}", messages.join().unwrap());
    }
    assert!(!work.path("s.jsonl").exists());
}

#[test]
fn a_batch_system_saves_once_and_a_second_signal_kills() {
    let work = Workplace::new();
    let run = format!("{TRAIN} --max-steps 4000");
    let mut child = work.command(&format!("{run} --output one")).spawn().unwrap();
    wait_for_lines(&work.path("one/metrics.jsonl"), 3, &mut child);
    // `timeout` signals the process and then its group. Two signals at the same moment would arrive as one.
    signal(&child, "TERM");
    std::thread::sleep(Duration::from_millis(20));
    signal(&child, "TERM");
    let output = child.wait_with_output().unwrap();
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{message}");
    assert!(message.contains("the run was saved in one and `--resume` continues it"), "{message}");
    assert!(work.path("one/checkpoints").is_dir());
    assert!(!work.path("one/.run.lock").exists());
}

#[test]
fn a_hangup_that_nohup_ignores_stays_ignored() {
    let work = Workplace::new();
    let program = env!("CARGO_BIN_EXE_mmpo-fast");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("trap '' HUP; exec {program} {TRAIN} --max-steps 200 --output run")])
        .current_dir(work.path(""))
        .env("MMPO_FAST_CACHE", work.path("cache"))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = shell.spawn().unwrap();
    wait_for_lines(&work.path("run/metrics.jsonl"), 2, &mut child);
    signal(&child, "HUP");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(work.path("run/report.html").is_file());
}

#[test]
fn generate_stops_at_a_signal() {
    let work = Workplace::new();
    let config = text(&work.read("base/config.json")).replace("\"eos_token_id\": 2", "\"eos_token_id\": 7");
    work.write("base/config.json", config);
    let _ = std::fs::remove_file(work.path("base/generation_config.json"));
    let generate =
        "generate --model base --prompt hello --raw --max-new-tokens 18446744073709551615 --device cpu";
    let mut child = work.command(generate).stdout(Stdio::null()).spawn().unwrap();
    let messages = wait_for_message(&mut child, "device: ");
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "the answer ended: {}", messages.join().unwrap());
    signal(&child, "INT");
    let code = child.wait().unwrap().code();
    let message = messages.join().unwrap();
    assert_eq!(code, Some(130), "{message}");
    assert!(message.contains("the answer ends after 65536 tokens"), "{message}");
}

#[test]
fn scores_overwrite_no_input_and_no_device() {
    let work = Workplace::new();
    let path = |name: &str| work.path(name);
    let before = (work.contents("base"), work.read("pairs.jsonl"));
    std::os::unix::fs::symlink("base/config.json", path("link.jsonl")).unwrap();
    std::fs::hard_link(path("base/model.safetensors"), path("hard.jsonl")).unwrap();
    std::os::unix::fs::symlink("/dev/null", path("null.jsonl")).unwrap();
    std::os::unix::fs::symlink("absent", path("dangling.jsonl")).unwrap();
    assert!(Command::new("mkfifo").arg(path("fifo.jsonl")).status().unwrap().success());
    for (output, part) in [
        ("pairs.jsonl", "which this command reads"),
        ("base/config.json", "which this command reads"),
        ("link.jsonl", "which this command reads"),
        ("hard.jsonl", "which this command reads"),
        ("/dev/null", "is a device"),
        ("/dev/full", "is a device"),
        ("null.jsonl", "is a symbolic link to a device"),
        ("dangling.jsonl", "leads nowhere"),
        ("fifo.jsonl", "is a FIFO"),
        ("base", "is a folder"),
        ("new/", "names a folder"),
    ] {
        work.refuse(&format!("{SCORE} --output {output}"), 2, &[output, part]);
    }
    assert_eq!((work.contents("base"), work.read("pairs.jsonl")), before);
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());

    // A file is replaced whole, also through a link; `-` is standard output, and its summary goes elsewhere.
    work.write("old.jsonl", "old");
    std::os::unix::fs::symlink("old.jsonl", path("current.jsonl")).unwrap();
    work.succeed(&format!("{SCORE} --output current.jsonl"));
    assert!(path("current.jsonl").is_symlink());
    let finished = work.succeed(&format!("{SCORE} --output -"));
    assert_eq!(finished.stdout.as_bytes(), work.read("old.jsonl"));
    assert!(finished.stderr.contains("log-prob a token"), "{}", finished.stderr);
}

#[test]
fn a_run_writes_in_no_folder_that_it_reads() {
    let work = Workplace::new();
    work.write("file", "mine");
    std::fs::create_dir(work.path("page")).unwrap();
    work.write("page/report.html", "mine");
    work.refuse(&format!("{TRAIN} --output file"), 5, &["cannot write in file: it is a file, not a folder"]);
    work.refuse(&format!("{TRAIN} --output /dev/null"), 5, &["/dev/null: it is a device, not a folder"]);
    work.refuse(&format!("{TRAIN} --output base"), 2, &["would write where `--model` = base is read"]);
    work.refuse(&format!("{TRAIN} --output page"), 2, &["page holds a run already"]);
    work.succeed(&format!("{TRAIN} --max-steps 1 --output run"));
    let again = CommandLine::new(TRAIN).set("--model", "run/model");
    work.refuse(&format!("{again} --output run --resume"), 2, &["`--model` = run/model is read"]);
    std::fs::copy(work.path("pairs.jsonl"), work.path("page/metrics.jsonl")).unwrap();
    let data = CommandLine::new(TRAIN).set("--data", "page/metrics.jsonl");
    work.refuse(&format!("{data} --output page --resume"), 2, &["`--data` = page/metrics.jsonl is read"]);
    assert_eq!(work.read("page/report.html"), b"mine");
}

#[test]
fn a_cache_that_is_something_else_costs_time_alone() {
    let work = Workplace::new();
    let run = |output: &str| {
        let finished = work.succeed(&format!("{TRAIN} --max-steps 1 --output {output}"));
        let warned =
            ["computed again", "not kept for the next run"].iter().any(|part| finished.stderr.contains(part));
        (warned, finished.stderr)
    };
    let (warned, message) = run("first");
    assert!(!warned, "{message}");
    let cached = work.references().into_keys().next().unwrap();
    let replace = |what: &str| {
        std::fs::remove_file(&cached).unwrap();
        match what {
            "fifo" => assert!(Command::new("mkfifo").arg(&cached).status().unwrap().success()),
            "device" => std::os::unix::fs::symlink("/dev/zero", &cached).unwrap(),
            _ => std::fs::create_dir(&cached).unwrap(),
        }
    };
    for what in ["fifo", "device", "folder"] {
        replace(what);
        let (warned, message) = run(what);
        assert!(warned && message.contains("computed again"), "{what}: {message}");
    }
    // The whole cache is a file, a FIFO.
    std::fs::remove_dir_all(work.path("cache")).unwrap();
    work.write("cache", "mine");
    assert!(run("in_file").0);
    assert_eq!(work.read("cache"), b"mine");
    std::fs::remove_file(work.path("cache")).unwrap();
    assert!(Command::new("mkfifo").arg(work.path("cache")).status().unwrap().success());
    assert!(run("in_fifo").0);
}

/// Values that hardly any option of numbers takes.
const ABSURD: &[&str] = &[
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0x10",
    "1e",
    "",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "4294967295",
    "1e300",
    "1e-320",
    "1e38",
];

/// Options of `train` that take whole numbers.
const COUNTS: &[&str] = &[
    "max-length",
    "max-prompt-length",
    "pairs-per-step",
    "tokens-per-micro-batch",
    "max-steps",
    "warmup-steps",
    "reward-group",
    "save-steps",
    "eval-steps",
    "keep-checkpoints",
    "head-workspace",
    "threads",
    "seed",
];

/// Options of `train` that take numbers.
const NUMBERS: &[&str] = &[
    "epochs",
    "beta",
    "epsilon",
    "preference-weight",
    "entropy-weight",
    "learning-rate",
    "adam-beta1",
    "adam-beta2",
    "adam-epsilon",
    "weight-decay",
    "max-grad-norm",
    "warmup-ratio",
];

#[test]
fn absurd_numbers_are_refused_by_name() {
    let work = Workplace::new();
    // No data file: only what is wrong with the numbers is found before it.
    let commands = [
        ("train --model base --data absent.jsonl --output new", COUNTS),
        ("train --model base --data absent.jsonl --output new", NUMBERS),
        (
            "score --model base --data absent.jsonl --output s.jsonl --reference base",
            &["max-length", "max-prompt-length", "tokens-per-micro-batch", "threads", "beta"],
        ),
        (
            "generate --model absent --prompt hello",
            &["max-new-tokens", "temperature", "top-p", "seed", "threads"],
        ),
        (
            "bench step --shape tiny --model absent",
            &["layers", "pairs", "tokens", "warmups", "calls", "threads"],
        ),
    ];
    for (command, flags) in commands {
        for flag in flags {
            for value in ABSURD {
                let mut program = work.command(command);
                let output = program.arg(format!("--{flag}={value}")).output().unwrap();
                let message = text(&output.stderr);
                let code = output.status.code();
                assert!(matches!(code, Some(2 | 4 | 5)), "{command} --{flag}={value}: {code:?} {message}");
                assert!(!message.contains("bug in"), "{command} --{flag}={value}: {message}");
            }
        }
    }
}

#[test]
fn numbers_have_limits_that_are_named_and_large_ones_below_them_run() {
    let work = Workplace::new();
    for (flag, part) in [
        ("threads=9223372036854775807", "must be at least 1 and at most 1024"),
        ("tokens-per-micro-batch=9223372036854775808", "at most 2147483647"),
        ("max-length=18446744073709551615", "at most 2147483647"),
        ("epochs=1e300", "at most 1000000"),
        ("max-steps=9223372036854775808", "at most 2147483647"),
        ("adam-beta2=0.99999999999", "less than 1"),
        ("adam-epsilon=1e-300", "greater than 0"),
        ("learning-rate=1e-320", "greater than 0"),
    ] {
        work.refuse(&format!("train --model base --data pairs.jsonl --output new --{flag}"), 2, &[part]);
    }
    // Large, and carried on.
    let large = "--max-length 2147483647 --tokens-per-micro-batch 2147483647 --keep-checkpoints 2147483647 \
                 --save-steps 2147483647 --head-workspace 1073741824 --threads 64 --max-steps 1 --device cpu";
    work.succeed(&format!("train --model base --data pairs.jsonl --output large {large}"));
    work.succeed("train --resume --output large");
    let answer = "generate --model base --prompt hello --device cpu --max-new-tokens";
    let short = work.succeed(&format!("{answer} 256")).stdout;
    for many in ["4294967295", "18446744073709551615"] {
        assert_eq!(work.succeed(&format!("{answer} {many}")).stdout, short);
    }
}

#[test]
fn a_token_beyond_the_vocabulary_is_the_models_fault() {
    let work = Workplace::new();
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&work.read("base/tokenizer.json")).unwrap();
    let added = serde_json::json!({
        "id": 99_999, "content": "<new>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    work.write("base/tokenizer.json", tokenizer.to_string());
    let output = work.command("generate --model base --raw --prompt <new>").output().unwrap();
    let message = text(&output.stderr);
    // The library numbers added tokens anew: whatever the number is, the model has no embedding for it.
    assert_eq!(output.status.code(), Some(4), "{message}");
    assert!(message.contains("base/tokenizer.json") && message.contains("vocab_size"), "{message}");
}

/// What a command prints where its standard output is a terminal; `script` is part of every Linux distribution.
fn on_a_terminal(work: &Workplace, arguments: &str) -> String {
    let program = env!("CARGO_BIN_EXE_mmpo-fast");
    let mut script = Command::new("script");
    script
        .args(["-qec", &format!("{program} {arguments}"), "/dev/null"])
        .current_dir(work.path(""))
        .stdin(Stdio::null());
    let output = script.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stdout));
    text(&output.stdout)
}

#[test]
fn a_terminal_obeys_no_file() {
    let work = Workplace::new();
    let hostile = "a\u{1b}]0;owned\u{7}b\u{202e}c\u{9b}31m";
    let shown = "a\\u{1b}]0;owned\\u{7}b\\u{202e}c\\u{9b}31m";
    let commands = |text: &str| text.contains(['\u{1b}', '\u{7}', '\u{202e}', '\u{9b}']);
    work.write(&format!("{hostile}.jsonl"), "{\"prompt\":\"a\"");
    // An error and a log line, also where they are piped.
    for arguments in [
        ["score", "--model", "base", "--output", "s.jsonl", "--data", &format!("{hostile}.jsonl")],
        ["score", "--model", hostile, "--output", "s.jsonl", "--data", "pairs.jsonl"],
    ] {
        let output = work.command("").args(arguments).output().unwrap();
        let message = text(&output.stderr);
        assert!(message.contains(shown) && !commands(&message), "{message:?}");
    }
    // Usage errors: clap leaves sequences out.
    for arguments in [["bench", hostile], ["train", hostile], [hostile, "--help"]] {
        let message = text(&work.command("").args(arguments).output().unwrap().stderr);
        assert!(message.contains("\\u{202e}c\\u{9b}31m") && !commands(&message), "{message:?}");
    }
    std::fs::copy(work.path("pairs.jsonl"), work.path(&format!("{hostile}.jsonl"))).unwrap();
    let output = work
        .command("score --model base --max-length 160 --max-prompt-length 64 --device cpu --output s.jsonl")
        .args(["--data", &format!("{hostile}.jsonl")])
        .output()
        .unwrap();
    let message = text(&output.stderr);
    assert!(message.contains(&format!("{shown}.jsonl: 12 records")) && !commands(&message), "{message:?}");

    // A template that ends the program with its own words.
    work.write("bad.jinja", format!("{{{{ raise_exception('{hostile}') }}}}"));
    let refused = work.run("generate --model base --prompt hello --chat-template bad.jinja");
    assert!(refused.stderr.contains(shown) && !commands(&refused.stderr), "{:?}", refused.stderr);

    // An answer: as it is where it is piped, escaped on a terminal.
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&work.read("base/tokenizer.json")).unwrap();
    let replace =
        serde_json::json!({ "type": "Replace", "pattern": { "String": "Red" }, "content": hostile });
    let decoders = serde_json::json!([tokenizer["decoder"].take(), replace]);
    tokenizer["decoder"] = serde_json::json!({ "type": "Sequence", "decoders": decoders });
    work.write("base/tokenizer.json", tokenizer.to_string());
    let generate = "generate --model base --device cpu --prompt";
    let piped = work.command(generate).arg("Name three colours.").output().unwrap();
    // Without the first character, which the stream had printed as "R".
    assert!(text(&piped.stdout).contains(&hostile[1..]), "{:?}", text(&piped.stdout));
    let terminal = on_a_terminal(&work, &format!("{generate} 'Name three colours.' 2>/dev/null"));
    assert!(terminal.contains(&shown[1..]) && !commands(&terminal), "{terminal:?}");
}
