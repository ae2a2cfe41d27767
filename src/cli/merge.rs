//! `mmpo-fast merge`.

use clap::{ArgMatches, Command};

use super::arguments::{own, value};
use crate::config::{self, MergeConfig};
use crate::error::{Error, Result};

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("merge")
        .about("Write a model with an adapter merged into its weights")
        .after_help("Example:\n  mmpo-fast merge --model M --adapter run/adapter --output merged")
        .arg(
            own("model", "DIR", "Hugging Face folder of the model that the adapter was trained on")
                .required(true),
        )
        .arg(own("adapter", "DIR", "Folder of the adapter, as PEFT has it").required(true))
        .arg(own("output", "DIR", "Folder that receives the merged model, in bf16").required(true))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<MergeConfig> {
    let required = |name| {
        value(matches, name, config::is_path, "must name a folder")?.ok_or_else(|| {
            Error::config(format!("--{name} is missing"), "`mmpo-fast merge --help` lists what is needed")
        })
    };
    Ok(MergeConfig { model: required("model")?, adapter: required("adapter")?, output: required("output")? })
}
