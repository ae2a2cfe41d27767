//! `mmpo-fast report`.

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{own, page};
use crate::config::ReportConfig;
use crate::error::Result;

const ABOUT: &str = "Write the report of a run again, or compare several.

The report of one run is made from what its folder holds: metrics.jsonl, resolved.toml and report.json. This also works while \
the run goes on, and after it was killed. The page of several runs has their last metrics side by side with the best marked, \
the options in which they differ, and their charts laid over each other.";

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("report")
        .about("Write the report of a run again, or compare several")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast report run\n      writes run/report.html\n  \
             mmpo-fast report dpo mmpo simpo --output objectives.html\n      compares three runs",
        )
        .arg(
            Arg::new("folders")
                .value_name("DIR")
                .help("Output folders of `mmpo-fast train`")
                .required(true)
                .num_args(1..)
                .value_parser(ValueParser::path_buf())
                .action(ArgAction::Append),
        )
        .arg(own(
            "output",
            "FILE.html",
            "The page [default: report.html in the folder of one run, comparison.html here for several]",
        ))
}

/// What the arguments ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the argument that is wrong.
pub fn config(matches: &ArgMatches) -> Result<ReportConfig> {
    let folders = matches.get_many("folders").map(|folders| folders.cloned().collect()).unwrap_or_default();
    Ok(ReportConfig { folders, output: page(matches, "output")? })
}
