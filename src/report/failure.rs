//! What a person reads when a command fails: an error with its advice, or a fault of the program itself.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::sync::Mutex;

use miette::{Diagnostic, MietteDiagnostic, MietteHandlerOpts};

use super::escape::escaped;
use super::log;
use crate::error::{BUG_EXIT_CODE, Error};

/// The latest panic: what it said and where.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Colours only for people, and only where NO_COLOR does not forbid them.
pub fn wants_color() -> bool {
    wants_color_on(&std::io::stderr())
}

/// As [`wants_color`], of another place than standard error.
pub fn wants_color_on(place: &impl IsTerminal) -> bool {
    place.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Prints what went wrong and how to mend it to standard error.
pub fn print_error(error: &Error) {
    let text = |part: Option<Box<dyn std::fmt::Display + '_>>| part.map(|part| part.to_string());
    print_diagnostic(&error.to_string(), text(error.code()), text(error.help()), error.exit_code());
}

/// Prints a usage error in clap's words, of which any may come from a file name.
pub fn print_usage(text: &str, exit_code: u8) {
    if log::is_json() {
        let fields =
            [("code", "usage".into()), ("message", text.trim().into()), ("exit_code", exit_code.into())];
        return log::write_json("ERROR", &fields);
    }
    let _ = std::io::stderr().write_all(escaped(text).as_bytes());
}

/// Prints the latest panic as a fault of the program; to be called where a panic has ended the command.
pub fn print_bug() {
    let help = "please report it with this message, the command line and, if you can, the input; RUST_BACKTRACE=1 \
                adds where it happened. Finished checkpoints and models are as they were";
    print_diagnostic(&bug_message(), Some("bug".into()), Some(help.into()), BUG_EXIT_CODE);
}

/// The latest panic in words.
pub fn bug_message() -> String {
    let panic = LAST_PANIC.lock().ok().and_then(|mut last| last.take());
    let panic = panic.unwrap_or_else(|| "a thread panicked".to_string());
    format!("this is a bug in mmpo-fast, not a mistake of yours: {panic}")
}

/// Records panics for [`print_bug`] in place of Rust's own report. A panic that a caller catches and turns into an
/// error is then reported once, as that error.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        if let Ok(mut last) = LAST_PANIC.lock() {
            *last = Some(describe(panic));
        }
    }));
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let payload = panic.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let what = text.or(payload.downcast_ref().copied()).unwrap_or("a value that is no text");
    let place = panic.location().map(|place| format!(" ({}:{})", place.file(), place.line()));
    let trace = Backtrace::capture();
    let trace = match trace.status() {
        BacktraceStatus::Captured => format!("\n{trace}"),
        _ => String::new(),
    };
    format!("{what}{}{trace}", place.unwrap_or_default())
}

/// Prints a message with its code and advice. Lines are wrapped only for a terminal, so that a script can search them.
/// A standard error that cannot be written changes nothing: the exit code says what happened.
fn print_diagnostic(message: &str, code: Option<String>, help: Option<String>, exit_code: u8) {
    if log::is_json() {
        let fields = [
            ("code", code.into()),
            ("message", message.into()),
            ("help", help.into()),
            ("exit_code", exit_code.into()),
        ];
        return log::write_json("ERROR", &fields);
    }
    let mut diagnostic = MietteDiagnostic::new(escaped(message));
    if let Some(code) = code {
        diagnostic = diagnostic.with_code(code);
    }
    if let Some(help) = help {
        diagnostic = diagnostic.with_help(escaped(&help));
    }
    // The hook can be set once; a second call finds the same one.
    let _ = miette::set_hook(Box::new(|_| {
        let wrap = std::io::stderr().is_terminal();
        Box::new(MietteHandlerOpts::new().color(wants_color()).wrap_lines(wrap).build())
    }));
    let text = format!("{:?}\n", miette::Report::new(diagnostic));
    let _ = std::io::stderr().write_all(&log::marked(text.as_bytes()));
}
