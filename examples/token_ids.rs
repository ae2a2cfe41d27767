//! The token ids of every pair of a file, as training and scoring see them: one JSON object a line.
//!
//!     cargo run --release --example token_ids -- MODEL PAIRS.jsonl [CHAT_TEMPLATE.jinja] > ids.jsonl
//!     cargo run --release --example token_ids -- --count MODEL PAIRS.jsonl [CHAT_TEMPLATE.jinja]
//!
//! A small user of the library, and one side of `tests/reference/check_tokens.py`; TRL is the other. Nothing is cut:
//! the limits are as wide as they go. The account of the file goes to standard error. `--count` prints no ids, but how
//! long reading took.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{TextEncoder, load_pairs};
use mmpo_fast::{Error, Result};
use serde_json::json;

const LIMITS: LengthLimits = LengthLimits { max_length: 1 << 30, max_prompt_length: 1 << 29 };

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{:?}", miette::Report::new(error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let count = arguments.first().is_some_and(|first| first.as_os_str() == "--count");
    if count {
        arguments.remove(0);
    }
    let (model, data, template) = match arguments.as_slice() {
        [model, data] => (model, data, None),
        [model, data, template] => (model, data, Some(template.as_path())),
        _ => {
            return Err(Error::config("two arguments are needed", "token_ids MODEL PAIRS.jsonl [TEMPLATE]"));
        }
    };
    let encoder = TextEncoder::load(model, template)?;
    let started = Instant::now();
    let dataset = load_pairs(data, &encoder, LIMITS)?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{}", dataset.report);
    if count {
        println!("{} pairs, {} tokens, {seconds:.2} s", dataset.pairs.len(), dataset.report.tokens);
        return Ok(());
    }
    let mut out = BufWriter::new(std::io::stdout().lock());
    let failed = |error| Error::io("standard output".as_ref(), "write", error);
    for pair in &dataset.pairs {
        let ids = json!({
            "record": pair.record, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
        });
        writeln!(out, "{ids}").map_err(failed)?;
    }
    out.flush().map_err(failed)
}
