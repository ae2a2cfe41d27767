//! `mmpo-fast verify`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::error::{Error, Result};
use crate::verify::VerifyConfig;

const ABOUT: &str = "Compare the files of a run, a model or an adapter with their checksums.

Checksums are in B3SUMS: a run has them of its model or adapter, its metrics and its resolved recipe, and each checkpoint of \
its state. A safetensors or JSON file without a checksum, as in a folder from elsewhere, is checked in its structure: whether its \
header fits its length, and whether each shard of an index is there with its tensors. Values are not looked at.

The exit code is 0 where nothing is damaged, 8 where a file is altered, missing or damaged.";

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("verify")
        .about("Compare a run, a model or an adapter with its checksums")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast verify run\n      a run: its model, its records and every checkpoint\n  \
             mmpo-fast verify run/model\n      the model alone, by the run's checksums\n  \
             mmpo-fast verify run --json | jq '.files[] | select(.status == \"altered\")'",
        )
        .arg(
            Arg::new("folder")
                .value_name("DIR")
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .help("Folder of a run, a checkpoint, a model or an adapter"),
        )
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object instead"))
}

/// The configuration that the arguments ask for.
///
/// # Errors
/// [`Error::Config`] where no folder is named.
pub fn config(matches: &ArgMatches) -> Result<VerifyConfig> {
    let folder = matches.get_one::<PathBuf>("folder").filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.cloned().ok_or_else(|| {
        Error::config("DIR must name a folder, and is empty", "for example: mmpo-fast verify run")
    })?;
    Ok(VerifyConfig { folder, json: matches.get_flag("json") })
}
