//! `mmpo-fast generate`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::config::options::Row;
use crate::config::{self, GenerateConfig, ObjectiveKind};
use crate::error::{Error, Result};

const MAX_NEW_TOKENS: usize = 256;

/// The options of `train` that mean the same here.
fn shared(row: &Row) -> bool {
    ["chat_template", "template_date", "device", "precision", "threads"].contains(&row.name)
}

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("generate")
        .about("Answer a prompt")
        .after_help("Example:\n  mmpo-fast generate --model run/model --prompt \"Name three colours.\"")
        .long_about("Answer a prompt. The answer goes to standard output, everything else to standard error.")
        .arg(own("model", "DIR", "Hugging Face folder of the model").required(true))
        .arg(own("adapter", "DIR", "Folder of an adapter of that model, as PEFT has it"))
        .arg(own("prompt", "TEXT", "What the user says").required(true).allow_hyphen_values(true))
        .arg(own("system", "TEXT", "What the system message says").allow_hyphen_values(true).conflicts_with("raw"))
        .arg(
            Arg::new("raw")
                .long("raw")
                .action(ArgAction::SetTrue)
                .conflicts_with("chat_template")
                .help("Continue the prompt as it stands, with no chat template around it"),
        )
        .arg(own("max_new_tokens", "COUNT", format!("Most tokens of the answer [default: {MAX_NEW_TOKENS}]")))
        .arg(own("temperature", "NUMBER", "0 is greedy, 1 samples from the model as it is [default: 0]"))
        .arg(own(
            "top_p",
            "NUMBER",
            "Sample from the likeliest tokens whose probabilities add up to this; needs a temperature [default: 1]",
        ))
        .arg(own("seed", "COUNT", "Seed of the sampling; needs a temperature [default: 42]"))
        .args(arguments::flags(shared))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<GenerateConfig> {
    let settled = arguments::options(matches, shared)?.settle(ObjectiveKind::Mmpo);
    let not_negative = |temperature: &f64| temperature.is_finite() && *temperature >= 0.0;
    let temperature =
        value(matches, "temperature", not_negative, "must be finite and at least 0")?.unwrap_or(0.0);
    let top_p = |share: &f64| *share > 0.0 && *share <= 1.0;
    let top_p = value(matches, "top_p", top_p, "must be greater than 0 and at most 1")?;
    let seed = value(matches, "seed", |_: &u64| true, "")?;
    for (name, given) in [("--top-p", top_p.is_some()), ("--seed", seed.is_some())] {
        if given && temperature == 0.0 {
            return Err(Error::config(
                format!("`{name}` has no effect on greedy decoding"),
                "sample with --temperature 1, or leave the flag out",
            ));
        }
    }
    let model = value(matches, "model", config::is_path, "must name a folder")?;
    Ok(GenerateConfig {
        model: model.ok_or_else(|| missing("model"))?,
        adapter: value(matches, "adapter", config::is_path, "must name a folder")?,
        prompt: arguments::text(matches, "prompt").ok_or_else(|| missing("prompt"))?,
        system: arguments::text(matches, "system"),
        raw: matches.get_flag("raw"),
        chat_template: settled.chat_template,
        template_date: settled.template_date,
        max_new_tokens: value(matches, "max_new_tokens", |count: &usize| *count >= 1, "must be at least 1")?
            .unwrap_or(MAX_NEW_TOKENS),
        temperature,
        top_p: top_p.unwrap_or(1.0),
        seed: seed.unwrap_or(settled.seed),
        device: settled.device,
        precision: settled.precision,
        threads: settled.threads,
    })
}

fn missing(name: &str) -> Error {
    Error::config(format!("--{name} is missing"), "`mmpo-fast generate --help` lists what is needed")
}
