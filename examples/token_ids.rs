//! The token ids of every pair of a file, as training and scoring see them: one JSON object per line.
//!
//!     cargo run --release --example token_ids -- MODEL PAIRS.jsonl [TEMPLATE.jinja [PAIRS TEMPLATE]...] > ids.jsonl
//!     cargo run --release --example token_ids -- --count MODEL PAIRS.jsonl
//!
//! A small user of the library, and one side of `tests/reference/check_tokens.py`; TRL is the other. Several files may
//! follow one another, each with the chat template to use (`-` for the model's own). Nothing is cut: the limits are as
//! wide as they go. The account of each file goes to standard error. `--count` prints no ids, but how long reading took.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{ChatTemplate, TextEncoder, load_pairs};
use mmpo_fast::device::LargeBlocks;
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
    let (model, files) = match arguments.split_first() {
        Some((model, files)) if !files.is_empty() => (model, files),
        _ => {
            return Err(Error::config(
                "a model and a file are needed",
                "token_ids MODEL PAIRS.jsonl [TEMPLATE]",
            ));
        }
    };
    let mut encoder = TextEncoder::load(model, None)?;
    for (number, file) in files.chunks(2).enumerate() {
        if let Some(template) = file.get(1).filter(|path| path.as_os_str() != "-") {
            let special_tokens = encoder.tokenizer.special_tokens().clone();
            encoder.template =
                ChatTemplate::load(model, &Default::default(), special_tokens, Some(template))?;
        }
        print_file(&encoder, number, &file[0], count)?;
    }
    Ok(())
}

fn print_file(encoder: &TextEncoder, number: usize, data: &Path, count: bool) -> Result<()> {
    let started = Instant::now();
    let _memory = LargeBlocks::give_back();
    let dataset = load_pairs(data, encoder, LIMITS)?;
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
            "file": number, "record": pair.record,
            "prompt": pair.prompt[..], "chosen": pair.chosen[..], "rejected": pair.rejected[..],
        });
        writeln!(out, "{ids}").map_err(failed)?;
    }
    out.flush().map_err(failed)
}
