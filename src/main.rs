//! The program: parses the command line, sets up the log, runs the command, and turns an error into a report and an
//! exit code.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use miette::MietteHandlerOpts;
use mmpo_fast::cli::{self, Invocation, Stop, Verbosity};
use mmpo_fast::data::Watch;
use mmpo_fast::report::LogWriter;
use mmpo_fast::{Error, Result};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let invocation = match cli::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(Stop::Clap(error)) => {
            // A closed terminal is the only way this fails, and then nobody is there to be told.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
        Err(Stop::Error(error)) => return fail(error),
    };
    match start_log(invocation.verbosity).and_then(|()| run_watched(invocation)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

/// How often a rendering of a chat template is looked at, and at how many looks in a row it must have ended.
const LOOK: Duration = Duration::from_millis(250);
const LOOKS: u32 = 14;
/// Enough for every chat template within its limits, which then need no stack of their own.
const STACK: usize = 128 << 20;

/// Runs the command in a thread, beside which this one watches for a chat template that does not end: nothing can
/// stop that but the end of the process.
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

/// Colours only for people, and only where NO_COLOR does not forbid them.
fn wants_color() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Prints what went wrong and how to mend it to standard error; lines are wrapped for a terminal alone, so that a
/// script can search them.
fn fail(error: Error) -> ExitCode {
    let code = error.exit_code();
    // The hook can be set once, and this is the one place that sets it.
    let _ = miette::set_hook(Box::new(|_| {
        let wrap = std::io::stderr().is_terminal();
        Box::new(MietteHandlerOpts::new().color(wants_color()).wrap_lines(wrap).build())
    }));
    let _ = writeln!(std::io::stderr(), "{:?}", miette::Report::new(error));
    ExitCode::from(code)
}

/// The log goes to standard error. A flag goes before RUST_LOG, RUST_LOG before the default, `info`.
fn start_log(verbosity: Verbosity) -> Result<()> {
    let directives = match verbosity {
        Verbosity { quiet: true, .. } => "warn".to_string(),
        Verbosity { verbose: true, .. } => "info,mmpo_fast=debug".to_string(),
        _ => std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()),
    };
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        Error::config(
            format!("RUST_LOG = `{directives}` is not a log filter: {error}"),
            "for example RUST_LOG=debug",
        )
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| LogWriter)
        .with_ansi(wants_color())
        .with_target(false)
        .without_time()
        .init();
    Ok(())
}
