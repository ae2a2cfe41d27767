//! `mmpo-fast plan`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::bench::shapes::Lengths;
use crate::config::options::{Given, Origin};
use crate::config::value::OptionValue as _;
use crate::config::{self, PairData};
use crate::error::{Error, Result};
use crate::plan::{Links, PlanConfig, no_output};

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
      the most that any pairs of up to these lengths take
  mmpo-fast plan --model M --data pairs.jsonl --gpu H100 --ranks 64
      and what 64 GPUs send each other";

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("plan")
        .about("Tell what a training run will take: memory, work and time")
        .long_about(ABOUT)
        .after_help(EXAMPLES)
        .arg(own("recipe", "FILE.toml", "Read options from a recipe; flags go before it"))
        .arg(own("gpu", "NAME", "The GPU to plan for, such as H200 or 'RTX 4090'; it need not be here"))
        .arg(own("bandwidth", "NUMBER", "10^9 bytes of device memory per second, in place of the GPU's"))
        .arg(own("bus-bandwidth", "NUMBER", "10^9 bytes per second and direction between host and GPU, in place of the GPU's"))
        .arg(own(
            "largest-pair",
            "P/C/R",
            "Plan for pairs of up to these tokens of prompt, chosen and rejected response, in place of --data",
        ))
        .arg(own("ranks", "N", "Tell also what N GPUs, a process each, send each other with each --shard"))
        .arg(own("ranks-per-machine", "N", "GPUs of a machine (default: 8)"))
        .arg(own("link-bandwidth", "NUMBER", "10^9 bytes per second and direction of a GPU inside its machine (default: 450, NVLink of H100)"))
        .arg(own("network-bandwidth", "NUMBER", "10^9 bytes per second and direction of a GPU between machines (default: 50, 400 Gb/s)"))
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
        bus: value(matches, "bus-bandwidth", positive, "must be finite and greater than 0")?,
        largest_pair,
        links: links(matches)?,
        json: matches.get_flag("json"),
    })
}

/// How ranks are connected, where `--ranks` asks for several.
fn links(matches: &ArgMatches) -> Result<Option<Links>> {
    let count = |number: &usize| (1..=1 << 20).contains(number);
    let rate = |number: &f64| number.is_finite() && *number > 0.0;
    let (counts, rates) = ("must be between 1 and 1048576", "must be finite and greater than 0");
    let ranks = value(matches, "ranks", count, counts)?;
    let per_machine = value(matches, "ranks-per-machine", count, counts)?;
    let inside = value(matches, "link-bandwidth", rate, rates)?;
    let between = value(matches, "network-bandwidth", rate, rates)?;
    let Some(ranks) = ranks else {
        return match per_machine.is_some() || inside.is_some() || between.is_some() {
            true => Err(Error::config(
                "the links of ranks are described, and `--ranks` is not given",
                "say how many GPUs there are, such as --ranks 8",
            )),
            false => Ok(None),
        };
    };
    Ok(Some(Links {
        ranks,
        ranks_per_machine: per_machine.unwrap_or(Links::PER_MACHINE),
        inside: inside.unwrap_or(Links::NVLINK),
        between: between.unwrap_or(Links::NETWORK),
    }))
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
