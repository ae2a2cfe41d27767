//! Progress on standard error: a bar on a terminal, else a plain line now and then; nothing under `--quiet`.

use std::borrow::Cow;
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::escape::escaped;
use super::log;
use crate::error::{Error, Result};

/// Seconds between plain lines, so that a log file is not flooded.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// All bars of the program: a log line hides them while it is written.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Standard error for the log: a line goes above the bars, never through them. A line that cannot be written (a full
/// disk, a closed pipe) is lost: a log that nobody can read ends no run.
#[derive(Debug)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = BARS.suspend(|| std::io::stderr().write_all(&log::marked(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = std::io::stderr().flush();
        Ok(())
    }
}

/// Whether anybody still reads standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Somebody does.
    Listening,
    /// The reader has seen enough, as `head` does: no error, and nothing is left to print.
    Gone,
}

/// Writes a command's result to standard output. A terminal gets it with its commands escaped, a file or pipe as it is.
///
/// # Errors
/// [`Error::Io`] where standard output takes no more, for instance on a full disk.
pub fn print_result(text: &str) -> Result<Reader> {
    let mut out = std::io::stdout();
    let shown = match out.is_terminal() {
        true => escaped(text),
        false => Cow::Borrowed(text),
    };
    write_out(&mut out, &shown)
}

/// As [`print_result`], of text with colours whose other parts were escaped already.
pub fn print_styled(text: &str) -> Result<Reader> {
    write_out(&mut std::io::stdout(), text)
}

fn write_out(out: &mut std::io::Stdout, text: &str) -> Result<Reader> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listening),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Error::io(Path::new("standard output"), "write to", error)),
    }
}

/// Writes a line for a person to standard error, above the bars.
pub fn print_notice(line: &str) {
    if log::is_json() {
        return log::write_json("INFO", &[("message", line.trim().into())]);
    }
    let _ = LogWriter.write_all(format!("{}\n", escaped(line)).as_bytes());
}

/// How far a piece of work of known length has come.
#[derive(Debug)]
pub struct Progress {
    label: String,
    unit: &'static str,
    total: u64,
    done: u64,
    /// Units done before this process, by the run that is resumed; they do not count in the speed.
    already_done: u64,
    started: Instant,
    view: View,
}

#[derive(Debug)]
enum View {
    Bar(ProgressBar),
    Lines {
        last: Option<Instant>,
    },
    /// As `Lines`, as events of the log, which has a format for machines.
    Events {
        last: Option<Instant>,
    },
    Silent,
}

impl Progress {
    /// Begins work of `total` units, of which an earlier run did `done`.
    pub fn start(label: impl Into<String>, unit: &'static str, total: usize, done: usize) -> Self {
        let label = label.into();
        let view = if !tracing::enabled!(tracing::Level::INFO) {
            View::Silent
        } else if log::is_json() {
            View::Events { last: None }
        } else if std::io::stderr().is_terminal() {
            View::Bar(bar(&label, unit, total as u64, done as u64))
        } else {
            View::Lines { last: None }
        };
        let done = done as u64;
        Progress { label, unit, total: total as u64, done, already_done: done, started: Instant::now(), view }
    }

    /// Adds `units` finished units; `message` says in a few words how the work goes.
    pub fn advance(&mut self, units: usize, message: impl FnOnce() -> String) {
        self.done += units as u64;
        crate::ranks::progress::tick();
        match &mut self.view {
            View::Silent => {}
            View::Bar(bar) => {
                bar.set_message(message());
                bar.set_position(self.done);
            }
            View::Lines { last } => {
                if is_due(last, self.done >= self.total) {
                    print(&self.line(&message()));
                }
            }
            View::Events { last } => {
                if is_due(last, self.done >= self.total) {
                    self.log(&message());
                }
            }
        }
    }

    /// The same as an event of the log, with a field for each number.
    fn log(&self, message: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        tracing::info!(
            task = self.label.as_str(),
            unit = self.unit,
            done = self.done,
            total = self.total,
            seconds,
            seconds_left = self.seconds_left(seconds),
            "{message}"
        );
    }

    /// Seconds that the rest takes at the speed of this process.
    fn seconds_left(&self, elapsed: f64) -> f64 {
        let fresh = self.done.saturating_sub(self.already_done).max(1);
        elapsed * self.total.saturating_sub(self.done) as f64 / fresh as f64
    }

    /// The plain line: `train 30/120 steps (25 %), 12 s, 36 s left: loss 1.2`.
    fn line(&self, message: &str) -> String {
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = self.seconds_left(elapsed);
        let percent = 100 * self.done / self.total.max(1);
        format!(
            "{} {}/{} {} ({percent} %), {}, {} left: {message}",
            self.label,
            self.done,
            self.total,
            self.unit,
            duration(elapsed),
            duration(left),
        )
    }
}

/// Whether a line is due, after which the next one waits.
fn is_due(last: &mut Option<Instant>, is_end: bool) -> bool {
    let due = is_end || last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
    if due {
        *last = Some(Instant::now());
    }
    due
}

impl Drop for Progress {
    /// Removes a finished bar; what is to stay is printed by whoever did the work.
    fn drop(&mut self) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
            BARS.remove(bar);
        }
    }
}

fn bar(label: &str, unit: &str, total: u64, done: u64) -> ProgressBar {
    let template =
        format!("{{prefix}} [{{bar:24}}] {{pos}}/{{len}} {unit} {{elapsed}} eta {{eta}} {{wide_msg}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = BARS.add(ProgressBar::new(total).with_position(done).with_style(style.progress_chars("=> ")));
    bar.set_prefix(label.to_string());
    bar.reset_eta();
    bar
}

/// Prints a line; a closed standard error stops no training.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// `42 s`, `3 min 5 s`, `2 h 10 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round().max(0.0) as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_for_people() {
        for (seconds, text) in
            [(0.4, "0 s"), (59.6, "1 min 0 s"), (185.0, "3 min 5 s"), (7800.0, "2 h 10 min")]
        {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn a_line_says_how_far_and_does_not_count_what_an_earlier_run_did() {
        let started = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
        let progress = Progress {
            label: "train".into(),
            unit: "steps",
            total: 100,
            done: 60,
            already_done: 50,
            started,
            view: View::Silent,
        };
        assert_eq!(progress.line("loss 1"), "train 60/100 steps (60 %), 10 s, 40 s left: loss 1");
    }

    #[test]
    fn no_work_is_no_division_by_zero() {
        let mut progress = Progress::start("nothing", "pairs", 0, 0);
        progress.advance(0, String::new);
        assert!(progress.line("").starts_with("nothing 0/0 pairs (0 %)"), "{}", progress.line(""));
    }
}
