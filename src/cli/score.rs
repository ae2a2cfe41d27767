//! `mmpo-fast score`.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config::options::{PROBLEMS_HEADING, Row};
use crate::config::value::OptionValue;
use crate::config::{self, ExplainConfig, ObjectiveKind, PairFiles, ScoreConfig};
use crate::error::{Error, Result};

/// Factor of the rewards: DPO's own default.
const BETA: f64 = 0.1;

/// Pairs that are explained.
const SHOWN: usize = 3;
/// More pairs than anybody reads.
const MOST_SHOWN: usize = 1000;

const EXPLAIN_HEADING: &str = "Explaining pairs";

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
             mmpo-fast score --model run/model --reference M --data held-out.jsonl --output - | head -n 3\n  \
             mmpo-fast score --model run/model --reference M --data held-out.jsonl --explain --html tokens.html",
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
            .required_unless_present("explain"),
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
        .args(explain_flags())
        .args(arguments::flags(shared))
}

fn explain_flags() -> [Arg; 4] {
    let page = own("html", "FILE", "Write the explained pairs as one page, which fetches nothing");
    let count =
        own("show", "COUNT", format!("Pairs that are explained, the first of the data [default: {SHOWN}]"));
    let color =
        own("color", "WHEN", "Colours: auto (on a terminal, unless NO_COLOR is set), always or never")
            .value_parser(PossibleValuesParser::new(["auto", "always", "never"]));
    let explain = Arg::new("explain").long("explain").action(ArgAction::SetTrue).help(
        "Show how much likelier than under the reference each token of the responses is; the reference is --reference, or \
         the model without its --adapter",
    );
    let needs_explain = |flag: Arg| flag.requires("explain").help_heading(EXPLAIN_HEADING);
    [explain.help_heading(EXPLAIN_HEADING), needs_explain(count), needs_explain(page), needs_explain(color)]
}

/// What `--explain` and its companions ask for.
fn explain_config(matches: &ArgMatches) -> Result<Option<ExplainConfig>> {
    if !matches.get_flag("explain") {
        return Ok(None);
    }
    let path = |name| value(matches, name, config::is_path, "must name a file");
    let few = |count: &usize| (1..=MOST_SHOWN).contains(count);
    let explain = ExplainConfig {
        pairs: value(matches, "show", few, "must be from 1 to 1000")?.unwrap_or(SHOWN),
        html: arguments::page(matches, "html")?,
        color: match arguments::text(matches, "color").as_deref() {
            Some("always") => Some(true),
            Some("never") => Some(false),
            _ => None,
        },
    };
    if path("reference")?.is_none() && path("adapter")?.is_none() {
        return Err(Error::config(
            "`--explain` needs a reference to compare the model with",
            "give --reference DIR, or --adapter DIR, whose model without it is the reference then",
        ));
    }
    if explain.html.is_none() && path("output")?.is_some_and(|output| output.as_os_str() == "-") {
        return Err(Error::config(
            "`--output -` and `--explain` would both write to standard output",
            "add --html FILE for the explained pairs, or name a file for the scores",
        ));
    }
    Ok(Some(explain))
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
        min_score_gap: settled.min_score_gap,
        data_cache: settled.data_cache.clone(),
        output: path("output")?,
        explain: explain_config(matches)?,
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
