//! `mmpo-fast bench`.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::arguments::{self, own, value};
use crate::bench::{BenchCase, BenchConfig, ModelChoice, Part};
use crate::config::options::Row;
use crate::config::{self, ObjectiveKind};
use crate::error::{Error, Result};

const ABOUT: &str = "Measure this machine: `kernels` times every kernel beside the machine's own ceilings (a large copy, a large \
gemm), `step` a whole training step and its parts. `products` times the linear layers by this program and by \
cuBLASLt, one call after the other. `load` times how the weights of a model folder come onto the device, beside what \
disk and bus give. `counts` needs no GPU: it counts on the emulated device what each kernel computes and moves, beside the least \
that its operation needs.

Kernels are checked before they are timed. Weights and pairs are made up; shapes have names (benches/shapes.json) or come from \
a model folder.";

/// Most layers, pairs, tokens or calls: more than any measurement needs, and few enough to count in 32 bits.
const MOST: usize = 1 << 24;

/// The options of `train` that mean the same here.
fn shared(row: &Row) -> bool {
    ["device", "precision", "threads"].contains(&row.name)
}

/// The subcommand and its flags.
pub fn command() -> Command {
    Command::new("bench")
        .about("Measure kernels and training steps on this machine")
        .long_about(ABOUT)
        .after_help(
            "Examples:\n  mmpo-fast bench\n      kernels and a training step of SmolLM2-135M\n  \
             mmpo-fast bench step --shape llama-3.2-1b --profile ultrafeedback --csv steps.csv\n      a step of a larger model, \
             also as rows of a table\n  mmpo-fast bench kernels --only attention --json",
        )
        .arg(
            Arg::new("part")
                .value_parser(PossibleValuesParser::new(["kernels", "step", "products", "load", "counts"]))
                .help("What to measure [default: kernels and step]"),
        )
        .arg(own(
            "shape",
            "NAME",
            "Model shapes: smollm2-135m, smollm2-360m, llama-3.2-1b, llama-3-8b, tiny-5m, tiny [default: smollm2-135m; tiny on the emulated device]",
        ))
        .arg(own("model", "DIR", "Hugging Face folder instead: its shapes, and the step's weights").conflicts_with("shape"))
        .arg(own("layers", "COUNT", "Layers of the named model, where all are too many").conflicts_with("model"))
        .arg(own(
            "profile",
            "NAME|P/C/R",
            "Tokens of prompt, chosen and rejected: hh-rlhf, ultrafeedback, long, tiny, or numbers",
        ))
        .arg(
            own("case", "MODEL:PROFILE[:PAIRS]", "Several shapes of `bench kernels` beside the same ceilings; may be repeated")
                .action(ArgAction::Append)
                .conflicts_with_all(["shape", "model", "profile"]),
        )
        .arg(own("pairs", "COUNT", "Pairs of a batch [default: as many as the tokens hold]"))
        .arg(own("tokens", "COUNT", "Tokens of a batch, and of a step's micro-batch"))
        .arg(own("only", "TEXT", "Kernels whose names contain TEXT; may be repeated").action(ArgAction::Append))
        .arg(own("warmups", "COUNT", "Calls before the timed ones"))
        .arg(own("calls", "COUNT", "Timed calls"))
        .arg(own("seconds", "SECONDS", "Begin nothing more when these are over, and report what was measured"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON, one object per part"))
        .arg(own("csv", "FILE", "Also add one row per result to FILE"))
        .args(arguments::flags(shared))
}

/// The configuration that the flags ask for.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the flag that is wrong.
pub fn config(matches: &ArgMatches) -> Result<BenchConfig> {
    let settled = arguments::options(matches, shared)?.settle(ObjectiveKind::Mmpo);
    let in_range = |count: &usize| (1..=MOST).contains(count);
    let count = |name| value(matches, name, in_range, "must be at least 1 and at most 16777216");
    let path = |name| value(matches, name, config::is_path, "must name a file or folder");
    let parts = match arguments::text(matches, "part").as_deref() {
        Some("kernels") => vec![Part::Kernels],
        Some("step") => vec![Part::Step],
        Some("products") => vec![Part::Gemm],
        Some("load") => vec![Part::Load],
        Some("counts") => vec![Part::Counts],
        _ => vec![Part::Kernels, Part::Step],
    };
    refuse_unused(matches, &parts)?;
    let cases = cases(matches, &parts)?;
    let model = match (path("model")?, arguments::text(matches, "shape")) {
        (Some(folder), _) => Some(ModelChoice::Folder(folder)),
        (None, Some(name)) => Some(ModelChoice::Named(name)),
        (None, None) => None,
    };
    Ok(BenchConfig {
        parts,
        cases,
        model,
        layers: count("layers")?,
        profile: arguments::text(matches, "profile"),
        pairs: count("pairs")?,
        tokens: count("tokens")?,
        only: matches.get_many("only").into_iter().flatten().cloned().collect(),
        warmups: value(matches, "warmups", |count: &usize| *count <= MOST, "must be at most 16777216")?,
        calls: count("calls")?,
        seconds: value(
            matches,
            "seconds",
            |seconds: &f64| (0.0..=1e6).contains(seconds),
            "must be 0 to 1000000",
        )?,
        json: matches.get_flag("json"),
        csv: path("csv")?,
        device: settled.device,
        precision: settled.precision,
        threads: settled.threads,
    })
}

fn cases(matches: &ArgMatches, parts: &[Part]) -> Result<Vec<BenchCase>> {
    let texts = matches.get_many::<String>("case").into_iter().flatten();
    let parse = |text: &String| {
        let wrong = || {
            let message = format!("`--case` = {text} is not MODEL:PROFILE or MODEL:PROFILE:PAIRS");
            Error::config(message, "for instance `--case llama-3-8b:hh-rlhf:20`")
        };
        BenchCase::parse(text).ok_or_else(wrong)
    };
    let cases = texts.map(parse).collect::<Result<Vec<_>>>()?;
    if !cases.is_empty() && parts != [Part::Kernels] {
        return Err(Error::config(
            "`--case` is for `bench kernels` alone",
            "elsewhere `--shape` and `--profile` name one shape",
        ));
    }
    Ok(cases)
}

/// Refuses flags that a part would ignore.
fn refuse_unused(matches: &ArgMatches, parts: &[Part]) -> Result<()> {
    let (part, flags, why): (_, &[&str], _) = match parts {
        [Part::Step] => ("step", &["only"], "it chooses kernels, and a step has none to choose"),
        [Part::Gemm] => (
            "products",
            &["shape", "model", "layers", "profile", "pairs", "tokens", "precision", "threads"],
            "the layers and batches that it times are fixed",
        ),
        [Part::Load] => (
            "load",
            &["shape", "layers", "profile", "pairs", "tokens", "only", "warmups", "calls", "seconds", "csv"],
            "it reads the weights of `--model` from the disk, once cold and once warm",
        ),
        [Part::Counts] => (
            "counts",
            &["device", "precision", "threads", "warmups", "calls", "seconds", "csv"],
            "it counts on the emulated device, and times nothing",
        ),
        _ => return Ok(()),
    };
    match flags.iter().find(|flag| arguments::text(matches, flag).is_some()) {
        Some(flag) => {
            Err(Error::config(format!("`--{flag}` does nothing in `bench {part}`: {why}"), "leave it out"))
        }
        None => Ok(()),
    }
}
