//! `mmpo-fast score`.

use clap::{ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config::options::{PROBLEMS_HEADING, Row};
use crate::config::value::OptionValue;
use crate::config::{self, ObjectiveKind, PairFiles, ScoreConfig};
use crate::error::{Error, Result};

/// Factor of the rewards: DPO's own default.
const BETA: f64 = 0.1;

/// The options of `train` that mean the same here.
fn shared(row: &Row) -> bool {
    let names = [
        "chat_template",
        "template_date",
        "columns",
        "max_prompt_length",
        "max_length",
        "tokens_per_micro_batch",
        "device",
        "precision",
        "threads",
    ];
    names.contains(&row.name) || row.heading == PROBLEMS_HEADING
}

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("score")
        .about("Write the log-probs of preference pairs under a model")
        .after_help(
            "Examples:\n  mmpo-fast score --model M --data pairs.jsonl --output scores.jsonl\n  \
             mmpo-fast score --model run/model --reference M --data held-out.jsonl --output - | head -n 3",
        )
        .arg(own("model", "DIR", "Hugging Face folder of the model").required(true))
        .arg(own(
            "adapter",
            "DIR",
            "Folder of an adapter of that model, as PEFT has it: the adapted model is scored",
        ))
        .arg(own("data", PairFiles::PLACEHOLDER, "Preference pairs, named as with `train`").required(true))
        .arg(
            own(
                "output",
                "FILE.jsonl",
                "File that receives one line per pair, in the order of the data; `-` is standard output",
            )
            .required(true),
        )
        .arg(own(
            "reference",
            "DIR",
            "Hugging Face folder of a reference model: writes rewards and margins too",
        ))
        .arg(
            own(
                "beta",
                "NUMBER",
                format!("Factor of the rewards, beta * (logp - reference logp) [default: {BETA}]"),
            )
            .requires("reference"),
        )
        .args(arguments::flags(shared))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<ScoreConfig> {
    let settled = arguments::options(matches, shared)?.settle(ObjectiveKind::Mmpo);
    let path = |name| value(matches, name, config::is_path, "must name a file or folder");
    let required = |name| path(name)?.ok_or_else(|| missing(name));
    let positive = |beta: &f64| beta.is_finite() && *beta > 0.0;
    Ok(ScoreConfig {
        model: required("model")?,
        adapter: path("adapter")?,
        data: value(matches, "data", |_: &PairFiles| true, "")?.ok_or_else(|| missing("data"))?,
        columns: settled.columns.clone().unwrap_or_default(),
        template_date: settled.template_date,
        policies: settled.policies(),
        output: required("output")?,
        reference: path("reference")?,
        beta: value(matches, "beta", positive, "must be finite and greater than 0")?.unwrap_or(BETA),
        asked_lengths: config::asked_lengths(&settled)?,
        chat_template: settled.chat_template,
        tokens_per_micro_batch: settled.tokens_per_micro_batch,
        device: settled.device,
        precision: settled.precision,
        threads: settled.threads,
    })
}

fn missing(name: &str) -> Error {
    Error::config(format!("--{name} is missing"), "`mmpo-fast score --help` lists what is needed")
}
