//! The program: parses the command line, sets up the log, runs the command, and turns an error into a report and an
//! exit code.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use mmpo_fast::cli::{self, Invocation, Stop, Verbosity};
use mmpo_fast::data::Watch;
use mmpo_fast::error::BUG_EXIT_CODE;
use mmpo_fast::ranks::{self, Ranks};
use mmpo_fast::report::{self, LogFormat, LogWriter};
use mmpo_fast::{Error, Result};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::debug_fn;

fn main() -> ExitCode {
    guarded(command)
}

/// Turns a panic of any thread that `command` waits for into a message and an exit code of its own.
fn guarded(command: impl FnOnce() -> ExitCode) -> ExitCode {
    report::note_panics();
    // After a panic nothing is used but the record of it: the program ends.
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(code) => code,
        Err(_) => {
            report::print_bug();
            ExitCode::from(BUG_EXIT_CODE)
        }
    }
}

fn command() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let format = cli::log_format(&arguments);
    report::set_log_format(format);
    let invocation = match cli::parse(arguments) {
        Ok(invocation) => invocation,
        Err(Stop::Clap(error)) => return usage(&error),
        Err(Stop::Error(error)) => return fail(&error),
    };
    let ranks = invocation.ranks().cloned();
    let verbosity =
        Verbosity { quiet: invocation.verbosity.quiet || !speaks(&ranks), ..invocation.verbosity };
    if let Some(ranks) = ranks.as_ref().filter(|ranks| !ranks.is_first()) {
        report::set_rank(ranks.place.rank, &ranks::host());
    }
    match start_log(verbosity, format).and_then(|()| run_watched(invocation)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_told_by_another(&error, &ranks) => ExitCode::from(error.exit_code()),
        Err(error) => fail(&error),
    }
}

/// Whether this process says more than warnings and errors: of a run on several GPUs, rank 0 alone does.
fn speaks(ranks: &Option<Ranks>) -> bool {
    ranks.as_ref().is_none_or(Ranks::is_first)
}

/// Whether another process prints this error: of what happened to another rank, one process on each machine tells; rank 0 tells
/// what ends all ranks alike, a signal or a number, and what it learns of such an end of a single one.
fn is_told_by_another(error: &Error, ranks: &Option<Ranks>) -> bool {
    match (error, ranks) {
        (Error::RankEnded { exit_code, .. }, _) => *exit_code > 128,
        (Error::Rank { lost, .. }, Some(ranks)) => {
            // The next one, where the first of the machine is the one that was lost.
            let first = ranks.place.rank.saturating_sub(ranks.local_rank);
            ranks.local_rank > usize::from(*lost == Some(first))
        }
        (Error::Interrupted { .. } | Error::Numerics { .. }, Some(ranks)) => !ranks.is_first(),
        _ => false,
    }
}

/// Time between two looks at the renderings of chat templates, and the number of looks in a row at which a rendering
/// counts as endless.
const LOOK: Duration = Duration::from_millis(250);
const LOOKS: u32 = 14;
/// Stack that is enough for every chat template within its limits, so that renderings need no stack of their own.
const STACK: usize = 128 << 20;

/// Runs the command in a thread of its own, while this one watches for a chat template that does not end: nothing can
/// stop such a template but the end of the process.
fn run_watched(invocation: Invocation) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    let command = move || {
        // The receiver is gone only where the process is about to end.
        let _ = sender.send(invocation.run());
    };
    let worker = thread::Builder::new().name("main".to_string()).stack_size(STACK).spawn(command).map_err(
        |error| {
            Error::device(
                format!("cannot start a thread: {error}"),
                "raise the limits on memory or processes",
            )
        },
    )?;
    let mut watch = Watch::default();
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => {
                if let Some(path) = watch.overrun(LOOKS) {
                    return Err(Error::model(
                        &path,
                        format!("the chat template takes more than {:?} for one conversation", LOOK * LOOKS),
                        "mend the template, or pass another --chat-template FILE",
                    ));
                }
            }
            // The command panicked, and its message is out.
            Err(RecvTimeoutError::Disconnected) => match worker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Ok(()),
            },
        }
    }
}

fn fail(error: &Error) -> ExitCode {
    report::print_error(error);
    ExitCode::from(error.exit_code())
}

/// Prints help or a usage error. Help that was asked for goes to standard output as clap prints it. A usage error shows
/// what the user typed, which may come from a file name, so it goes through the same escaping as all other errors.
fn usage(error: &clap::Error) -> ExitCode {
    let exit_code = u8::try_from(error.exit_code()).unwrap_or(2);
    if error.use_stderr() {
        report::print_usage(&error.render().to_string(), exit_code);
    } else if let Err(cause) = error.print()
        && cause.kind() != ErrorKind::BrokenPipe
    {
        return fail(&Error::io("standard output".as_ref(), "write to", cause));
    }
    ExitCode::from(exit_code)
}

/// The log goes to standard error. A flag goes before RUST_LOG, RUST_LOG before the default, `info`.
fn start_log(verbosity: Verbosity, format: LogFormat) -> Result<()> {
    let directives = match verbosity {
        // A rank that is not the first is quiet and may be verbose too: then it is asked for all.
        Verbosity { quiet: true, verbose: false } => "warn".to_string(),
        Verbosity { verbose: true, .. } => "info,mmpo_fast=debug".to_string(),
        _ => std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()),
    };
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        Error::config(
            format!("RUST_LOG = `{directives}` is not a log filter: {error}"),
            "for example RUST_LOG=debug",
        )
    })?;
    if format == LogFormat::Json {
        tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_env_filter(filter)
            .with_writer(|| LogWriter)
            .log_internal_errors(false)
            .with_target(false)
            .init();
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| LogWriter)
        // Without this a line that cannot be written is reported by a print to the same place, which panics.
        .log_internal_errors(false)
        .with_ansi(report::wants_color())
        .fmt_fields(debug_fn(|writer, field, value| match field.name() {
            "message" => write!(writer, "{}", report::escaped(&format!("{value:?}"))),
            name => write!(writer, " {name}={}", report::escaped(&format!("{value:?}"))),
        }))
        .with_target(false)
        .without_time()
        .init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_has_an_exit_code_of_its_own_and_says_where_it_was() {
        let ends = |command: fn()| {
            let code = guarded(|| {
                command();
                ExitCode::SUCCESS
            });
            assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(70)));
        };
        ends(|| panic!("planted"));
        // A worker of rayon's hands its panic to the thread that waits.
        ends(|| _ = rayon::join(|| panic!("planted in a worker"), || ()));
        report::note_panics();
        let _ = catch_unwind(|| panic!("planted again"));
        let message = report::bug_message();
        assert!(message.contains("this is a bug in mmpo-fast"), "{message}");
        assert!(message.contains("planted again (src/main.rs:"), "{message}");
    }
}
