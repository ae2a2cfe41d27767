//! Valid inputs of every format with seeded changes: the program answers each with a result or an error. A panic, an
//! abort, more than [`TIME`] or more than [`MEMORY`] is a fault.
//!
//! Other programs on the machine make an input slower but cost it no processor time. So an input that has taken [`TIME`]
//! on the clock is a fault only where its process was also busy that long, or where it has not ended after [`WAIT`].
//!
//! `cargo test --release --test fuzz` tries a few inputs of each format. More, by hand:
//!
//! ```text
//! cargo test --release --test fuzz -- --inputs 1000000 --seed 7 --log fuzz.log
//! cargo test --release --test fuzz -- --format template --first 5123 --inputs 1 --keep FILE
//! ```
//!
//! `--prepare FOLDER` fills an empty folder with what coverage-guided fuzzing (`fuzz/`) begins with.
//!
//! Inputs run in worker processes of this same program, many one after the other; when one dies or hangs, the fault is
//! noted with its index and a new worker goes on with the next. `--keep` writes the input of a fault to a file.

mod formats;
mod mutate;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use formats::Place;
use rustix::process::{Resource, Rlimit, setrlimit};

/// How long one input may take.
const TIME: Duration = Duration::from_secs(5);
/// After this time an input hangs, however little it computes.
const WAIT: Duration = Duration::from_secs(60);
/// Bytes of private writable memory that a worker may have.
const MEMORY: u64 = 1 << 30;
/// Inputs per format where no number is given.
const FEW: u64 = 200;
/// Inputs that a worker tries before another takes its place.
const PER_WORKER: u64 = 100_000;
/// A format with more faults than this is not tried further.
const MOST_FAULTS: usize = 50;
/// Says to a process of this program that it is a worker, and in which folder.
const WORKER: &str = "MMPO_FAST_FUZZ_WORKER";

#[derive(Clone)]
struct Options {
    formats: Vec<String>,
    inputs: u64,
    first: u64,
    seed: u64,
    log: Option<PathBuf>,
    keep: Option<PathBuf>,
    prepare: Option<PathBuf>,
}

/// Flags that are meant for Rust's own test harness, which this program replaces, are ignored.
fn options() -> Options {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1).cloned()
    };
    let number = |flag: &str, default: u64| {
        value(flag)
            .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{flag} {text}: no number")))
    };
    Options {
        formats: match value("--format") {
            Some(format) => vec![format],
            None => formats::ALL.map(str::to_string).to_vec(),
        },
        inputs: number("--inputs", FEW),
        first: number("--first", 0),
        seed: number("--seed", 1),
        log: value("--log").map(PathBuf::from),
        keep: value("--keep").map(PathBuf::from),
        prepare: value("--prepare").map(PathBuf::from),
    }
}

fn main() -> ExitCode {
    let options = options();
    if let Some(folder) = std::env::var_os(WORKER) {
        work(&options, Path::new(&folder));
        return ExitCode::SUCCESS;
    }
    if let Some(folder) = &options.prepare {
        prepare(folder);
        return ExitCode::SUCCESS;
    }
    let started = Instant::now();
    let waiting = Mutex::new(options.formats.clone());
    let results = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let next = || waiting.lock().unwrap().pop();
                while let Some(format) = next() {
                    let result = fuzz(&Options { formats: vec![format], ..options.clone() });
                    eprintln!("{}", result.summary);
                    results.lock().unwrap().push(result);
                }
            });
        }
    });
    report(&options, results.into_inner().unwrap(), started)
}

/// A folder for `fuzz/`: a place for each format, and its valid inputs.
fn prepare(folder: &Path) {
    let place = folder.join("place");
    std::fs::create_dir_all(&place).unwrap();
    let place = Place::prepare(&place, Path::new(env!("CARGO_BIN_EXE_mmpo-fast")), &formats::ALL);
    for format in formats::ALL {
        let corpus = folder.join("corpus").join(format);
        std::fs::create_dir_all(&corpus).unwrap();
        for (number, seed) in place.seeds(format).iter().enumerate() {
            std::fs::write(corpus.join(format!("{number:03}")), seed).unwrap();
        }
    }
}

fn report(options: &Options, mut results: Vec<Outcome>, started: Instant) -> ExitCode {
    results.sort_by(|one, other| one.summary.cmp(&other.summary));
    let mut log =
        format!("seed {}, {} inputs a format, from {}\n", options.seed, options.inputs, options.first);
    for result in &results {
        log.push_str(&format!("{}\n", result.summary));
    }
    for fault in results.iter().flat_map(|result| &result.faults) {
        log.push_str(&format!("{fault}\n"));
    }
    let faults: usize = results.iter().map(|result| result.faults.len()).sum();
    let _ = writeln!(log, "{faults} faults in {:.0} s", started.elapsed().as_secs_f64());
    if let Some(path) = &options.log {
        std::fs::write(path, &log).unwrap();
    }
    println!("{log}");
    if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Results of one format's inputs.
struct Outcome {
    summary: String,
    faults: Vec<String>,
}

/// Tries the inputs of one format, in as many workers as it takes.
fn fuzz(options: &Options) -> Outcome {
    let format = &options.formats[0];
    let folder = tempfile::tempdir().unwrap();
    let place = Place::prepare(folder.path(), Path::new(env!("CARGO_BIN_EXE_mmpo-fast")), &[format]);
    let end = options.first + options.inputs;
    let (mut next, mut faults) = (options.first, Vec::new());
    let (mut accepted, mut slowest) = (0, Duration::ZERO);
    let started = Instant::now();
    while next < end && faults.len() < MOST_FAULTS {
        let inputs = PER_WORKER.min(end - next);
        let mut worker = Worker::start(options, folder.path(), next, inputs);
        let last = worker.follow(&mut accepted, &mut slowest, &mut faults);
        let Some((index, fault)) = last else {
            next += inputs;
            continue;
        };
        let path = options.keep.clone();
        if let Some(path) = path {
            std::fs::write(path, make_input(&place, options, index)).unwrap();
        }
        faults.push(format!("{format} {index}: {fault}"));
        next = index + 1;
    }
    let count = options.inputs;
    let summary = format!(
        "{format:<18} {count:>9} inputs, {accepted:>9} accepted, {:>3} faults, slowest {:>5} ms, {:.0} s",
        faults.len(),
        slowest.as_millis(),
        started.elapsed().as_secs_f64()
    );
    Outcome { summary, faults }
}

fn make_input(place: &Place, options: &Options, index: u64) -> Vec<u8> {
    let format = &options.formats[0];
    // A worker has changed the files that seeds come from: those of a new folder are valid again.
    let fresh = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_mmpo-fast"));
    let seeds = Place::prepare(fresh.path(), program, &[format]).seeds(format);
    place.mend(format, index, mutate::input(format, &seeds, options.seed, index))
}

/// A process that tries inputs, and says which it is at.
struct Worker {
    process: Child,
    lines: Receiver<String>,
    errors: std::thread::JoinHandle<String>,
}

impl Worker {
    /// A worker for `inputs` inputs from `first` on.
    fn start(options: &Options, folder: &Path, first: u64, inputs: u64) -> Self {
        let (first, inputs, seed) = (first.to_string(), inputs.to_string(), options.seed.to_string());
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--format", &options.formats[0], "--seed", &seed, "--first", &first, "--inputs", &inputs])
            .env(WORKER, folder)
            .env("RAYON_NUM_THREADS", "2")
            .env("HF_HUB_CACHE", folder.join("hub"))
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let errors = BufReader::new(process.stderr.take().unwrap());
        let errors = std::thread::spawn(move || {
            let lines = errors.lines().map_while(Result::ok);
            lines.fold(String::new(), |all, line| if all.len() < 2000 { all + &line + " " } else { all })
        });
        Worker { process, lines, errors }
    }

    /// The processor time that the worker has used, all threads together.
    fn busy(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap_or_default();
        // proc_pid_stat(5): after the name in parentheses come the fields from number 3 on; 14 and 15 are the time in
        // user and in kernel mode, in ticks.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
        Duration::from_millis(ticks.sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Follows the worker to its end; returns the input that ended it before its time, and how.
    fn follow(
        &mut self,
        accepted: &mut u64,
        slowest: &mut Duration,
        faults: &mut Vec<String>,
    ) -> Option<(u64, String)> {
        let mut at = None;
        let (mut since, mut busy_before) = (Instant::now(), Duration::ZERO);
        loop {
            match self.lines.recv_timeout(TIME) {
                Ok(line) => {
                    if at.is_some() {
                        *slowest = (*slowest).max(since.elapsed());
                    }
                    since = Instant::now();
                    busy_before = self.busy();
                    match line.split_once(' ') {
                        Some(("try", index)) => at = index.parse().ok(),
                        Some(("fault", what)) => faults.push(what.to_string()),
                        Some(("done", count)) => {
                            *accepted += count.parse::<u64>().unwrap_or(0);
                            let _ = self.process.wait();
                            return None;
                        }
                        _ => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let computes = at.is_some() && self.busy().saturating_sub(busy_before) >= TIME;
                    if !computes && since.elapsed() < WAIT {
                        continue;
                    }
                    let _ = self.process.kill();
                    let _ = self.process.wait();
                    return Some((at?, format!("took more than {TIME:?}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.process.wait().unwrap();
                    let errors = std::mem::replace(&mut self.errors, std::thread::spawn(String::new));
                    let errors = errors.join().unwrap_or_default();
                    return Some((at.unwrap_or(0), format!("{status}: {errors}")));
                }
            }
        }
    }
}

/// The worker: prints `try INDEX` before each input, `fault ...` after a panic, and `done ACCEPTED` at the end.
fn work(options: &Options, folder: &Path) {
    let most = Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    setrlimit(Resource::Data, most).unwrap();
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).unwrap();
    let format = &options.formats[0];
    let seeds = seeds(folder, format);
    let place = Place::open(folder);
    mmpo_fast::report::note_panics();
    let mut out = std::io::stdout();
    let mut accepted = 0;
    for index in options.first..options.first + options.inputs {
        writeln!(out, "try {index}").unwrap();
        let input = place.mend(format, index, mutate::input(format, &seeds, options.seed, index));
        match catch_unwind(AssertUnwindSafe(|| place.try_input(format, &input))) {
            Ok(result) => accepted += u64::from(result.is_ok()),
            Err(_) => {
                let message = mmpo_fast::report::bug_message().replace('\n', " ");
                writeln!(out, "fault {format} {index}: {message}").unwrap();
            }
        }
    }
    writeln!(out, "done {accepted}").unwrap();
}

/// The valid inputs, kept beside the folder's files, which inputs replace.
fn seeds(folder: &Path, format: &str) -> Vec<Vec<u8>> {
    let kept = folder.join("seeds");
    if !kept.exists() {
        std::fs::create_dir(&kept).unwrap();
        for (number, seed) in Place::open(folder).seeds(format).iter().enumerate() {
            std::fs::write(kept.join(format!("{number:03}")), seed).unwrap();
        }
    }
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(kept).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}
