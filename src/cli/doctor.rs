//! `mmpo-fast doctor`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config;
use crate::config::ObjectiveKind;
use crate::config::options::Row;
use crate::doctor::DoctorConfig;
use crate::error::Result;

const ABOUT: &str = "Tell what this machine has of what a run can use, and what to do about each lack: kernels, driver, \
GPUs, cuBLASLt, NCCL, processor, memory, the cache of reference log-probs with the speed of its disk, and the Hugging Face \
cache.

Each line is `ok`, `lack` (a run works without it: slower, or with less) or `note`. The exit code is 0, or 6 where the \
device that --device asks for cannot be used; so a job can begin with `mmpo-fast doctor --device cuda`. 64 MiB are written \
to the disk and removed.";

fn shared(row: &Row) -> bool {
    row.name == "device"
}

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("doctor")
        .about("Tell what this machine lacks, and what to do about it")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast doctor\n  mmpo-fast doctor --device cuda --json\n  \
             mmpo-fast doctor --folder /scratch",
        )
        .arg(own("folder", "DIR", "Folder whose disk is timed [default: the cache of reference log-probs]"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object instead"))
        .args(arguments::flags(shared))
}

/// What the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<DoctorConfig> {
    let settled = arguments::options(matches, shared)?.settle(ObjectiveKind::Mmpo);
    let folder: Option<PathBuf> = value(matches, "folder", config::is_path, "must name a folder")?;
    Ok(DoctorConfig { device: settled.device, folder, json: matches.get_flag("json") })
}
