//! Compares tokenising word by word with the library's ids of the whole text, over random texts.
//!
//!     cargo run --release --example token_pieces -- TEXTS MODEL...
//!
//! TEXTS random texts for each folder with a tokenizer. `tests/reference/check_tokens.py` runs it over real tokenizers.

use std::path::Path;
use std::process::ExitCode;

use mmpo_fast::data::Tokenizer;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((texts, models)) = arguments.split_first() else {
        eprintln!("token_pieces TEXTS MODEL...");
        return ExitCode::FAILURE;
    };
    let cases = texts.parse().unwrap_or_else(|_| panic!("{texts}: no number of texts"));
    let mut failed = false;
    for model in models {
        let tokenizer = match Tokenizer::load(Path::new(model)) {
            Ok((tokenizer, _)) => tokenizer,
            Err(error) => {
                println!("{model}: {error}");
                failed = true;
                continue;
            }
        };
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let outcome = TestRunner::new(config).run(&texts_of_all_kinds(), |text| {
            let ours = tokenizer.encode(&text).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let whole =
                tokenizer.encode_whole(&text).map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(ours, whole);
            Ok(())
        });
        let kind = if tokenizer.is_cut_into_words() { "word by word" } else { "by the library" };
        match outcome {
            Ok(()) => println!("{model}: {kind}, {cases} texts have the ids of the whole"),
            Err(TestError::Fail(why, text)) => {
                failed = true;
                println!("{model}: {kind}, other ids for {text:?}: {why}");
            }
            Err(TestError::Abort(why)) => {
                failed = true;
                println!("{model}: {kind}, stopped: {why}");
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What texts are put together from. A space stands there three times, because words are seldom apart without one.
const PIECES: &[&str] = &[
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{2009}",
    "\u{3000}",
    "▁",
    "▁▁",
    "a",
    "the",
    "The",
    "ing",
    "tion",
    "Saturn",
    "I'm",
    "'S",
    "'ll",
    "'",
    "1",
    "23",
    "4567",
    "٣٤",
    "Ⅷ",
    "½",
    ".",
    ",",
    ":",
    "...",
    "-",
    "--",
    "==",
    "//",
    "\\",
    "{\"a\": ",
    "[1]",
    "_",
    "#",
    "@",
    "é",
    "e\u{301}",
    "\u{301}",
    "ü",
    "ß",
    "ﬁ",
    "月は",
    "大きい",
    "。",
    "カ\u{3099}",
    "가",
    "\u{1112}\u{1161}\u{11ab}",
    "नम\u{93c}",
    "สวัสดี",
    "مرحبا",
    "Привет",
    "🌕",
    "👩\u{200d}🔬",
    "\u{200b}",
    "\u{0}",
    "\u{7f}",
    "\u{fffd}",
    "\u{feff}",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|begin_of_text|>",
    "<|im",
    "|>",
    "[INST]",
    "[/INST]",
    "<think>",
    "</think>",
];

/// Words, marks, numbers and spaces of several scripts, what templates write, and any characters at all.
fn texts_of_all_kinds() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(PIECES);
    prop_oneof![
        6 => prop::collection::vec(pieces, 0..40).prop_map(|pieces| pieces.concat()),
        2 => "\\PC{0,40}",
        2 => "[ a-zA-Z0-9.,'\n]{0,60}",
        1 => ("[a-e]{1,3}", 1usize..3000).prop_map(|(part, times)| part.repeat(times)),
    ]
}
