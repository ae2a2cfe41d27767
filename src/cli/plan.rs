//! `mmpo-fast plan`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::bench::shapes::Lengths;
use crate::config::options::{Given, Origin};
use crate::config::value::OptionValue as _;
use crate::config::{self, PairData};
use crate::error::{Error, Result};
use crate::plan::{PlanConfig, no_output};

const ABOUT: &str = "Tell what a training run will take, before it: device memory by part, exactly, at the sizes of the packed \
pairs; the floating-point operations of a step; the time they are expected to take; and with --memory which options bring \
the run below it.

The options are those of `train`. Only the model's config and tokenizer files and the pairs are needed, no weights and no GPU; \
with --largest-pair not even pairs.";

const EXAMPLES: &str = "Examples:
  mmpo-fast plan --model M --data pairs.jsonl --gpu H200
      memory, work and time on an H200
  mmpo-fast plan --model M --data pairs.jsonl --gpu 'RTX 4090' --memory 24GB
      and which options bring it below 24 GB
  mmpo-fast plan --recipe recipes/llama-3-8b-mmpo.toml --model M --largest-pair 1800/512/512 --gpu A100
      the most that any pairs of up to these lengths take";

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("plan")
        .about("Tell what a training run will take: memory, work and time")
        .long_about(ABOUT)
        .after_help(EXAMPLES)
        .arg(own("recipe", "FILE.toml", "Read options from a recipe; flags go before it"))
        .arg(own("gpu", "NAME", "The GPU to plan for, such as H200 or 'RTX 4090'; it need not be here"))
        .arg(own("bandwidth", "NUMBER", "10^9 bytes of device memory per second, in place of the GPU's"))
        .arg(own(
            "largest-pair",
            "P/C/R",
            "Plan for pairs of up to these tokens of prompt, chosen and rejected response, in place of --data",
        ))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object instead"))
        .args(arguments::flags(|_| true))
}

/// What the flags ask for.
///
/// # Errors
/// [`Error::Config`] naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<PlanConfig> {
    let mut flags = arguments::options(matches, |_| true)?;
    let recipe = arguments::text(matches, "recipe").map(PathBuf::from);
    let largest_pair = arguments::text(matches, "largest-pair").map(|text| lengths(&text)).transpose()?;
    let is_bare = recipe.is_none() && flags.model.is_none() && flags.data.is_none() && largest_pair.is_none();
    if largest_pair.is_some() {
        if let Some(data) = &flags.data {
            return Err(Error::config(
                format!("{} cannot be given together with `--largest-pair`", data.origin.name("data")),
                "plan either for these pairs or for the largest that there can be",
            ));
        }
        // The recipe's own pairs, or none, are not looked at.
        flags.data = given(PairData::from_text("builtin:demo").map_err(Error::bug)?);
    }
    // A plan writes nothing.
    if flags.output.is_none() && !is_bare {
        flags.output = given(no_output());
    }
    let positive = |number: &f64| number.is_finite() && *number > 0.0;
    Ok(PlanConfig {
        run: config::resolve(flags, recipe.as_deref(), false)?,
        gpu: arguments::text(matches, "gpu"),
        bandwidth: value(matches, "bandwidth", positive, "must be finite and greater than 0")?,
        largest_pair,
        json: matches.get_flag("json"),
    })
}

fn given<T>(value: T) -> Option<Given<T>> {
    Some(Given { value, origin: Origin::Flag })
}

fn lengths(text: &str) -> Result<Lengths> {
    let wrong = || {
        Error::config(
            format!("`--largest-pair` must be three numbers such as 1800/512/512, not `{text}`"),
            "tokens of the prompt, of the chosen response and of the rejected one; at least one each",
        )
    };
    let numbers: Vec<usize> =
        text.split('/').map(|number| number.trim().parse().map_err(|_| wrong())).collect::<Result<_>>()?;
    // More tokens than any context has would only overflow.
    let [prompt, chosen, rejected] = numbers[..] else { return Err(wrong()) };
    match numbers.iter().all(|number| (1..=1 << 22).contains(number)) {
        true => Ok(Lengths { prompt, chosen, rejected }),
        false => Err(wrong()),
    }
}
