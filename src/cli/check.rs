//! `mmpo-fast check`.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config::options::{PROBLEMS_HEADING, Row};
use crate::config::value::OptionValue;
use crate::config::{self, CheckConfig, ObjectiveKind, PairFiles};
use crate::error::{Error, Result};

const ABOUT: &str = "Tell what a model's tokenizer makes of preference pairs, before anything is trained: records kept, \
left out and why, lengths beside the limits, begin and end tokens, and some pairs as the model sees them.

Only the model's config and tokenizer files are needed, no weights and no GPU. The options that say what is done with \
pairs that have a problem are those of `train`; an error does not end the account, which counts them all.

The exit code is 0 where a training run would take the pairs, 3 where it would not.";

/// Pairs that are shown.
const SHOWN: usize = 2;
/// More pairs than anybody reads.
const MOST_SHOWN: usize = 1000;

/// The options of `train` that mean the same here.
fn shared(row: &Row) -> bool {
    let names = [
        "chat_template",
        "template_date",
        "columns",
        "data_cache",
        "min_score_gap",
        "max_prompt_length",
        "max_length",
        "tokens_per_micro_batch",
        "threads",
    ];
    names.contains(&row.name) || row.heading == PROBLEMS_HEADING
}

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("check")
        .about("Tell what becomes of preference pairs, before training")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast check --model M --data pairs.jsonl\n  \
             mmpo-fast check --model M --data pairs.parquet --on-identical drop --html check.html",
        )
        .arg(
            own("model", "DIR", "Hugging Face folder of the model, or its name in the Hub's cache")
                .required(true),
        )
        .arg(own("data", PairFiles::PLACEHOLDER, "Preference pairs, named as with `train`").required(true))
        .arg(own("html", "FILE", "Write the same as one page, which fetches nothing"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print one JSON object instead"))
        .arg(own("show", "COUNT", format!("Pairs that are shown whole [default: {SHOWN}]")))
        .arg(
            own("color", "WHEN", "Colours: auto (on a terminal, unless NO_COLOR is set), always or never")
                .value_parser(PossibleValuesParser::new(["auto", "always", "never"])),
        )
        .args(arguments::flags(shared))
}

/// What the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<CheckConfig> {
    let settled = arguments::options(matches, shared)?.settle(ObjectiveKind::Mmpo);
    let path = |name| value(matches, name, config::is_path, "must name a file or folder");
    let few = |count: &usize| *count <= MOST_SHOWN;
    Ok(CheckConfig {
        model: path("model")?.ok_or_else(|| missing("model"))?,
        data: value(matches, "data", |_: &PairFiles| true, "")?.ok_or_else(|| missing("data"))?,
        columns: settled.columns.clone().unwrap_or_default(),
        template_date: settled.template_date,
        asked_lengths: config::asked_lengths(&settled)?,
        policies: settled.policies(),
        min_score_gap: settled.min_score_gap,
        data_cache: settled.data_cache.clone(),
        tokens_per_micro_batch: settled.tokens_per_micro_batch,
        shown: value(matches, "show", few, "must be at most 1000")?.unwrap_or(SHOWN),
        html: arguments::page(matches, "html")?,
        json: matches.get_flag("json"),
        color: match arguments::text(matches, "color").as_deref() {
            Some("always") => Some(true),
            Some("never") => Some(false),
            _ => None,
        },
        threads: settled.threads,
        chat_template: settled.chat_template,
    })
}

fn missing(name: &str) -> Error {
    Error::config(format!("--{name} is missing"), "`mmpo-fast check --help` lists what is needed")
}
