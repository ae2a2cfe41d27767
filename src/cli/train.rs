//! `mmpo-fast train`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments;
use crate::config::{self, RunConfig};
use crate::error::Result;

const ABOUT: &str = "Train a model on preference pairs.

With no arguments a small built-in demo runs. Options can also stand in a recipe, a TOML file whose keys are the flags' \
names with underscores; a flag goes before the recipe, the recipe before the defaults.";

const EXAMPLES: &str = "Examples:
  mmpo-fast train
      the built-in demo, in mmpo-fast-demo
  mmpo-fast train --model SmolLM2-135M-Instruct --data pairs.jsonl --output run
      MMPO with the defaults
  mmpo-fast train --model M --data pairs.jsonl --eval-data held-out.jsonl --output run --objective dpo --beta 0.1
      DPO, evaluated before, once per epoch and after
  mmpo-fast train --resume --output run
      go on where a run was stopped
  mmpo-fast train --model M --data pairs.jsonl --output run --live
      watch run/report.html in a browser while it trains";

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("train")
        .about("Train a model on preference pairs")
        .long_about(ABOUT)
        .after_help(EXAMPLES)
        .arg(arguments::own("recipe", "FILE.toml", "Read options from a recipe; flags go before it"))
        .arg(Arg::new("resume").long("resume").action(ArgAction::SetTrue).help(
            "Go on from the newest checkpoint in the output folder; with --output alone, that run's options hold too",
        ))
        .arg(Arg::new("live").long("live").action(ArgAction::SetTrue).help(
            "Write report.html again every few seconds while the run goes on; an open page loads itself again",
        ))
        .args(arguments::flags(|_| true))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<RunConfig> {
    let flags = arguments::options(matches, |_| true)?;
    let recipe = arguments::text(matches, "recipe").map(PathBuf::from);
    let config = config::resolve(flags, recipe.as_deref(), matches.get_flag("resume"))?;
    Ok(RunConfig { live: matches.get_flag("live"), ..config })
}
