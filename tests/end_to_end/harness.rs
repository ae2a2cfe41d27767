//! A folder of its own for every test, and the program run inside it.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value};

use crate::support::close::{self, Bounds};

/// Trains the golden model on the golden pairs: 11 usable pairs, 3 steps per epoch.
pub const TRAIN: &str = "train --model base --data pairs.jsonl --max-length 160 --max-prompt-length 64 \
                         --pairs-per-step 4 --learning-rate 1e-3 --device cpu --threads 1";

/// The metrics in which two runs of the same bits may differ.
const TIMING: [&str; 4] = ["tokens_per_second", "pairs_per_second", "mfu", "memory/peak_gib"];

/// A folder that holds `base` (the golden model) and `pairs.jsonl`, with a reference cache of its own.
pub struct Workplace {
    folder: tempfile::TempDir,
}

/// How the program ended.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Workplace {
    pub fn new() -> Self {
        let workplace = Workplace { folder: tempfile::tempdir().unwrap() };
        workplace.bring("base");
        std::fs::copy(goldens().join("pairs.jsonl"), workplace.path("pairs.jsonl")).unwrap();
        workplace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Copies the model of golden `name` to a folder of that name.
    pub fn bring(&self, name: &str) {
        self.copy_model(name, name);
    }

    pub fn copy_model(&self, golden: &str, to: &str) {
        std::fs::create_dir(self.path(to)).unwrap();
        for entry in std::fs::read_dir(goldens().join(golden).join("model")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), self.path(to).join(entry.file_name())).unwrap();
        }
    }

    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"));
        command
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .env("NO_COLOR", "1")
            .env("MMPO_FAST_CACHE", self.path("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command line, which is split at spaces.
    pub fn run(&self, arguments: &str) -> Finished {
        finish(self.command(arguments))
    }

    /// Runs what must succeed.
    #[track_caller]
    pub fn succeed(&self, arguments: &str) -> Finished {
        let finished = self.run(arguments);
        assert_eq!(finished.code, Some(0), "{arguments}: {}", finished.stderr);
        finished
    }

    /// Runs what must fail with exit code `code` and one message that contains all `parts`.
    #[track_caller]
    pub fn refuse(&self, arguments: &str, code: i32, parts: &[&str]) -> Finished {
        let finished = self.run(arguments);
        let message = &finished.stderr;
        assert_eq!(finished.code, Some(code), "{arguments}: {message}");
        assert!(!message.contains("panicked"), "{arguments}: {message}");
        assert_eq!(message.matches('×').count(), 1, "not one message: {message}");
        assert!(!message.contains('╰'), "the message has a second part: {message}");
        assert!(message.contains("help: "), "no advice: {message}");
        assert!(finished.stdout.is_empty(), "{arguments} wrote to standard output: {}", finished.stdout);
        for part in parts {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
        finished
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The lines of a JSON Lines file.
    pub fn lines(&self, name: &str) -> Vec<Map<String, Value>> {
        let text = String::from_utf8(self.read(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The lines of a run's metrics but for what is measured with a clock.
    pub fn metrics(&self, run: &str) -> Vec<Map<String, Value>> {
        let mut lines = self.lines(&format!("{run}/metrics.jsonl"));
        for line in &mut lines {
            line.retain(|name, _| !TIMING.contains(&name.as_str()));
        }
        lines
    }

    /// `name` of every line that has it.
    pub fn series(&self, run: &str, name: &str) -> Vec<f64> {
        self.lines(&format!("{run}/metrics.jsonl"))
            .iter()
            .filter_map(|line| line.get(name).map(|value| value.as_f64().unwrap()))
            .collect()
    }

    /// Every file under a folder and its bytes.
    pub fn contents(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        fn add(folder: &Path, contents: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => add(&path, contents),
                    false => _ = contents.insert(path.clone(), std::fs::read(&path).unwrap()),
                }
            }
        }
        let mut contents = BTreeMap::new();
        add(&self.path(name), &mut contents);
        contents
    }

    /// The cached reference log-probs. Tokenised pairs are kept in the same folder.
    pub fn references(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        if !self.path("cache").exists() {
            return BTreeMap::new();
        }
        let mut contents = self.contents("cache");
        contents.retain(|path, _| path.extension().is_some_and(|ending| ending == "logps"));
        contents
    }

    /// Both runs left the same weights, the same optimiser state and the same metrics, to the bit.
    #[track_caller]
    pub fn assert_same_bits(&self, one: &str, other: &str, last_step: usize) {
        let state = format!("checkpoints/step-{last_step:06}/state.safetensors");
        for file in ["model/model.safetensors", &state] {
            let same = self.read(&format!("{one}/{file}")) == self.read(&format!("{other}/{file}"));
            assert!(same, "{file} of {one} and {other} differ");
        }
        let (one, other) = (self.metrics(one), self.metrics(other));
        assert_eq!(one.len(), other.len(), "lines of metrics");
        for (one, other) in one.iter().zip(&other) {
            assert_eq!(one, other);
        }
    }
}

pub fn finish(mut command: Command) -> Finished {
    let output = command.output().unwrap();
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Whether this process, and so the ones that it starts, ignores SIGHUP.
pub fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

pub fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(goldens().join(name).join("golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Asserts that two numbers are equal but for a share of `tolerance`, or that much where they are below 1.
#[track_caller]
pub fn assert_close(ours: f64, theirs: f64, tolerance: f64, what: &str) {
    close::assert_close(what, ours, theirs, Bounds { relative: tolerance, absolute: tolerance });
}

/// A command line of the program, whose options a test changes by name.
#[derive(Clone, Debug)]
pub struct CommandLine(Vec<String>);

impl CommandLine {
    /// The words of `line`, split at spaces.
    pub fn new(line: &str) -> Self {
        CommandLine(line.split_whitespace().map(String::from).collect())
    }

    /// Another value for an option that the line has.
    #[track_caller]
    pub fn set(mut self, option: &str, value: impl ToString) -> Self {
        let at = self.position(option);
        self.0[at + 1] = value.to_string();
        self
    }

    #[track_caller]
    fn position(&self, option: &str) -> usize {
        let found = self.0.iter().position(|word| word == option);
        found.unwrap_or_else(|| panic!("no {option} in {self}"))
    }
}

impl Display for CommandLine {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}
