//! The command line: one file per command. Parsing only; the commands themselves are `train`, `plan`, `check`, `score`,
//! `generate`, `merge`, `verify`, `runs` (for `report`) and `bench`.

mod arguments;
mod bench;
mod check;
mod doctor;
mod generate;
mod import;
mod merge;
mod plan;
mod report;
mod score;
mod shell;
mod train;
mod verify;
mod version;

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use crate::bench::BenchConfig;
use crate::config::{CheckConfig, GenerateConfig, MergeConfig, ReportConfig, ScoreConfig, suggest};
use crate::doctor::DoctorConfig;
use crate::error::{Error, Result};
use crate::import::ImportConfig;
use crate::plan::PlanConfig;
use crate::ranks::Ranks;
use crate::report::LogFormat;
use crate::verify::VerifyConfig;

/// The flag that says how standard error is written.
const LOG_FORMAT: &str = "log-format";

/// What a command line asks of standard error. It is told before the command line is parsed, for what is wrong with that is
/// said there too.
pub fn log_format(arguments: &[OsString]) -> LogFormat {
    let mut arguments = arguments.iter().map(|argument| argument.to_string_lossy());
    let flag = format!("--{LOG_FORMAT}");
    while let Some(argument) = arguments.next() {
        let value = match argument.strip_prefix(&flag) {
            Some("") => arguments.next().map(|value| value.to_string()),
            Some(rest) => rest.strip_prefix('=').map(str::to_string),
            None => continue,
        };
        if value.as_deref() == Some("json") {
            return LogFormat::Json;
        }
    }
    LogFormat::Text
}

/// How much a command line asks the program to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verbosity {
    /// Warnings and results only.
    pub quiet: bool,
    /// More than the usual messages.
    pub verbose: bool,
}

/// A command line that was parsed.
pub struct Invocation {
    /// How much the program says.
    pub verbosity: Verbosity,
    command: Parsed,
}

enum Parsed {
    Version,
    Train(Box<train::Train>),
    Plan(Box<PlanConfig>),
    Check(CheckConfig),
    Score(ScoreConfig),
    Generate(GenerateConfig),
    Merge(MergeConfig),
    Verify(VerifyConfig),
    Report(ReportConfig),
    Bench(BenchConfig),
    Doctor(DoctorConfig),
    Import(ImportConfig),
    Completions(clap_complete::Shell),
    Man(shell::ManConfig),
}

/// How parsing ends where there is nothing to run.
pub enum Stop {
    /// Help, or a usage error in clap's own words; clap prints it and knows the exit code (0 or 2).
    Clap(clap::Error),
    /// A value that a flag cannot have.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Error(error)
    }
}

/// Parses a command line, whose first argument is the program's name.
///
/// # Errors
/// [`Stop`] for help, for a usage error, and for a value that a flag cannot have.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> std::result::Result<Invocation, Stop> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(arguments).map_err(|error| explain(error, &command))?;
    let verbosity = Verbosity { quiet: matches.get_flag("quiet"), verbose: matches.get_flag("verbose") };
    let parsed = match matches.subcommand() {
        _ if matches.get_flag("version") => Parsed::Version,
        Some(("train", matches)) => Parsed::Train(Box::new(train::parse(matches)?)),
        Some(("plan", matches)) => Parsed::Plan(Box::new(plan::config(matches)?)),
        Some(("check", matches)) => Parsed::Check(check::config(matches)?),
        Some(("score", matches)) => Parsed::Score(score::config(matches)?),
        Some(("generate", matches)) => Parsed::Generate(generate::config(matches)?),
        Some(("merge", matches)) => Parsed::Merge(merge::config(matches)?),
        Some(("verify", matches)) => Parsed::Verify(verify::config(matches)?),
        Some(("report", matches)) => Parsed::Report(report::config(matches)?),
        Some(("bench", matches)) => Parsed::Bench(bench::config(matches)?),
        Some(("doctor", matches)) => Parsed::Doctor(doctor::config(matches)?),
        Some(("import", matches)) => Parsed::Import(import::config(matches)?),
        Some(("completions", matches)) => Parsed::Completions(shell::shell(matches)),
        Some(("man", matches)) => Parsed::Man(shell::man(matches)),
        _ => {
            return Err(Stop::Clap(command.error(
                ErrorKind::MissingSubcommand,
                "a command is missing: train, plan, check, score, generate, merge, verify, report, bench, doctor or import",
            )));
        }
    };
    Ok(Invocation { verbosity, command: parsed })
}

impl Invocation {
    /// Which rank of a run this process is; `None` for a command of one process.
    pub fn ranks(&self) -> Option<&Ranks> {
        match &self.command {
            Parsed::Train(train) => Some(&train.ranks).filter(|ranks| !ranks.is_alone()),
            _ => None,
        }
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Those of the command.
    pub fn run(self) -> Result<()> {
        match self.command {
            Parsed::Version => version::print(self.verbosity.verbose),
            Parsed::Train(train) => train.run(),
            Parsed::Plan(config) => crate::plan::run(&config),
            Parsed::Check(config) => crate::check::run(&config),
            Parsed::Score(config) => crate::score::run(&config),
            Parsed::Generate(config) => crate::generate::run(&config),
            Parsed::Merge(config) => crate::merge::run(&config),
            Parsed::Verify(config) => crate::verify::run(&config),
            Parsed::Report(config) => crate::runs::run(&config),
            Parsed::Bench(config) => crate::bench::run(&config),
            Parsed::Doctor(config) => crate::doctor::run(&config),
            Parsed::Import(config) => crate::import::run(&config),
            Parsed::Completions(shell) => shell::print_completions(shell, command()),
            Parsed::Man(config) => shell::write_man(&config, command()),
        }
    }
}

/// All commands and their flags: for the parser, and for whoever describes them elsewhere (completions, man pages, Python).
pub fn command() -> Command {
    let switch = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new("mmpo-fast")
        .about(
            "Trains Llama-family models on preference pairs: MMPO, and DPO, SimPO and SFT on the same path.",
        )
        .after_help(
            "`mmpo-fast train` with no arguments runs a small built-in demo.\n\
             RUST_LOG sets the log in detail; NO_COLOR switches colours off.",
        )
        .arg_required_else_help(true)
        .args_conflicts_with_subcommands(false)
        .disable_version_flag(true)
        .disable_help_subcommand(true)
        .arg(
            switch("version")
                .short('V')
                .help("Print the version; with --verbose, what is built in and found"),
        )
        .arg(
            switch("quiet")
                .short('q')
                .global(true)
                .help("Print warnings and errors only")
                .conflicts_with("verbose"),
        )
        .arg(switch("verbose").short('v').global(true).help("Print debug messages too"))
        .arg(
            Arg::new(LOG_FORMAT)
                .long(LOG_FORMAT)
                .value_name("text|json")
                .value_parser(["text", "json"])
                .global(true)
                .help("With json, each line on standard error is a JSON object: log, progress, errors; results stay as they are"),
        )
        .subcommand(train::command())
        .subcommand(plan::command())
        .subcommand(check::command())
        .subcommand(score::command())
        .subcommand(generate::command())
        .subcommand(merge::command())
        .subcommand(verify::command())
        .subcommand(report::command())
        .subcommand(bench::command())
        .subcommand(doctor::command())
        .subcommand(import::command())
        .subcommand(shell::completions_command())
        .subcommand(shell::man_command())
}

/// Turns an unknown flag or command into an error that names the nearest known one; everything else stays clap's.
fn explain(error: clap::Error, command: &Command) -> Stop {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let usage = "`mmpo-fast --help` lists the commands, `mmpo-fast train --help` the options of one";
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let unknown = text(ContextKind::InvalidSubcommand).unwrap_or_default();
            let nearest = suggest::nearest(unknown, command.get_subcommands().map(Command::get_name));
            Error::config(
                format!("unknown command `{unknown}`; did you mean `{}`?", nearest.unwrap_or_default()),
                usage,
            )
            .into()
        }
        ErrorKind::UnknownArgument => {
            let unknown = text(ContextKind::InvalidArg).unwrap_or_default();
            if !unknown.starts_with("--") {
                return Error::config(format!("unexpected argument `{unknown}`"), usage).into();
            }
            let usage_text = error.get(ContextKind::Usage).map(ToString::to_string).unwrap_or_default();
            let called = command
                .get_subcommands()
                // Whatever the program's file is called.
                .find(|sub| usage_text.split_whitespace().any(|word| word == sub.get_name()))
                .unwrap_or(command);
            let flags = called.get_arguments().filter_map(Arg::get_long);
            let nearest = suggest::nearest(unknown, flags).unwrap_or_default();
            Error::config(format!("unknown flag `{unknown}`; did you mean `--{nearest}`?"), usage).into()
        }
        _ => Stop::Clap(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of an example up to a pipe or a redirection, as a shell splits them.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(['|', '>']).next().unwrap_or_default();
        let mut words = vec![String::new()];
        let mut quote = None;
        for letter in line.chars() {
            match (quote, letter) {
                (None, '"' | '\'') => quote = Some(letter),
                (Some(open), _) if open == letter => quote = None,
                (None, ' ') => words.push(String::new()),
                _ => words.last_mut().unwrap().push(letter),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn each_command_has_an_example_and_takes_it() {
        let all = command();
        for sub in all.get_subcommands() {
            let name = sub.get_name();
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples: Vec<&str> =
                help.lines().map(str::trim).filter(|line| line.starts_with("mmpo-fast ")).collect();
            assert!(!examples.is_empty(), "no example of {name}: {help}");
            for example in examples {
                assert_eq!(words(example)[1], name, "{example}");
                if let Err(error) = all.clone().try_get_matches_from(words(example)) {
                    panic!("{example}: {error}");
                }
            }
        }
    }
}
