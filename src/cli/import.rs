//! `mmpo-fast import`.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config::value::OptionValue;
use crate::config::{self, PairData, PairFiles};
use crate::error::{Error, Result};
use crate::import::{Dialect, ImportConfig};

const ABOUT: &str = "Turn the YAML file of another trainer into a recipe: TRL (`trl dpo --config`), the alignment handbook, \
LLaMA-Factory and Axolotl.

A table on standard error says what became of each key: kept, mapped to something else, without effect on what is trained, \
or refused with a reason; and which defaults of the other program were written out. Where a key is refused there is no \
recipe and the exit code is 2.";

/// More devices than any run has.
const MOST_DEVICES: usize = 1 << 20;

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("import")
        .about("Turn the configuration file of another trainer into a recipe")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast import dpo.yaml --output recipe.toml\n  \
             mmpo-fast import llama3_lora_dpo.yaml --data pairs.jsonl --without max_samples > recipe.toml\n  \
             mmpo-fast import config_full.yaml --devices 8 --without dataset_mixture.test_split_size",
        )
        .arg(Arg::new("file").value_name("FILE").help("The YAML file").required(true))
        .arg(
            own("from", "PROGRAM", "The program that the file is for [default: told by its keys]")
                .value_parser(PossibleValuesParser::new(Dialect::ALL.map(Dialect::word))),
        )
        .arg(own("output", "FILE", "File that receives the recipe [default: standard output]"))
        .arg(own(
            "data",
            PairFiles::PLACEHOLDER,
            "Pairs in place of those that the file names, named as with `train`",
        ))
        .arg(own("devices", "COUNT", "Devices that the other program trained on [default: 1]"))
        .arg(own("without", "KEY,KEY", "Keys to leave out where they would be refused"))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<ImportConfig> {
    let path = |name| value(matches, name, config::is_path, "must name a file");
    let from = arguments::text(matches, "from");
    let without = arguments::text(matches, "without").unwrap_or_default();
    let names = without.split(',').map(str::trim).filter(|name| !name.is_empty());
    let devices = |count: &usize| (1..=MOST_DEVICES).contains(count);
    Ok(ImportConfig {
        file: path("file")?.ok_or_else(|| {
            Error::config("the file is missing", "`mmpo-fast import --help` lists what is needed")
        })?,
        from: Dialect::ALL.into_iter().find(|dialect| Some(dialect.word()) == from.as_deref()),
        output: path("output")?,
        data: value(matches, "data", |_: &PairData| true, "")?,
        devices: value(matches, "devices", devices, "must be at least 1 and at most 1048576")?.unwrap_or(1),
        without: names.map(str::to_string).collect(),
    })
}
