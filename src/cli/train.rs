//! `mmpo-fast train`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments;
use crate::config::{self, RunConfig};
use crate::error::{Error, Result};
use crate::ranks::{LauncherKind, Ranks};

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
  mmpo-fast train --resume --output run --epochs 5
      make a run longer
  mmpo-fast train --model M --data pairs.jsonl --eval-split 0.05 --output run --eval-steps 50 --keep-best loss --early-stopping 5
      end when the held-out loss stays where it is, and keep the best checkpoint
  mmpo-fast train --model M --data pairs.jsonl --output run --gpus 4
      on four GPUs of this machine; torchrun, srun and mpirun start runs on several machines
  mmpo-fast train --replay run/capsules/step-000123
      look at a step whose loss or gradient was not finite
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
        .arg(
            arguments::own(
                "replay",
                "CAPSULE",
                "Repeat the step that left this capsule (a folder capsules/step-N of a run) and show where the first number \
                 appears that is not finite; only --device and --threads may be given with it",
            )
            .conflicts_with_all(["recipe", "resume"]),
        )
        .arg(Arg::new("live").long("live").action(ArgAction::SetTrue).help(
            "Write report.html again every few seconds while the run goes on; an open page loads itself again",
        ))
        .arg(
            arguments::own(
                "gpus",
                "COUNT",
                "Run on this many GPUs of this machine, a process for each; with --device cpu or emulated, in as many processes",
            )
            .conflicts_with("replay"),
        )
        .args(arguments::flags(|_| true))
}

/// What a command line asks for.
pub struct Train {
    config: RunConfig,
    /// Which rank this process is.
    pub ranks: Ranks,
    /// How many ranks this process starts in place of being one.
    started: Option<usize>,
}

impl Train {
    /// Runs the command.
    ///
    /// # Errors
    /// Those of training, or of the ranks that are started.
    pub fn run(&self) -> Result<()> {
        match self.started {
            None => crate::train::run(&self.config, &self.ranks),
            #[cfg(unix)]
            Some(count) => crate::ranks::launcher::run(&self.config, count),
            #[cfg(not(unix))]
            Some(_) => Err(Error::config("`--gpus` needs Linux", "leave it out")),
        }
    }
}

/// What the flags and the environment ask for.
///
/// # Errors
/// [`Error::Config`] naming the flag or the variables that are wrong.
pub fn parse(matches: &ArgMatches) -> Result<Train> {
    let ranks = Ranks::of_this_process()?;
    let gpus = arguments::value(matches, "gpus", |&count: &usize| count > 0, "must be at least 1")?;
    let started = match (gpus, ranks.launcher) {
        (Some(count), Some(launcher)) if launcher != LauncherKind::Own => {
            return Err(Error::config(
                format!(
                    "`--gpus` = {count} starts ranks itself, and {launcher} has started this one already"
                ),
                format!("leave --gpus out: {launcher} says how many ranks there are"),
            ));
        }
        (Some(count), None) if count > 1 => Some(count),
        _ => None,
    };
    let config = config(matches)?;
    if config.replay.is_some() && !ranks.is_alone() {
        return Err(Error::config(
            format!("`--replay` is a command of one process, and there are {} ranks", ranks.place.ranks),
            "run it without torchrun, srun or mpirun",
        ));
    }
    Ok(Train { config, ranks, started })
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
fn config(matches: &ArgMatches) -> Result<RunConfig> {
    let flags = arguments::options(matches, |_| true)?;
    if let Some(capsule) = arguments::value(matches, "replay", config::is_path, "must name a folder")? {
        return config::resolve_replay(flags, capsule);
    }
    let recipe = arguments::text(matches, "recipe").map(PathBuf::from);
    let config = config::resolve(flags, recipe.as_deref(), matches.get_flag("resume"))?;
    Ok(RunConfig { live: matches.get_flag("live"), ..config })
}
