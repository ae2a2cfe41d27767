//! Cuts and drops: what remains, and that each is counted.

use mmpo_fast::config::LengthLimits;
use mmpo_fast::data::{Cause, PairDataset, load_pairs};
use proptest::prelude::*;

use crate::*;

fn load(lines: &str, max_length: usize, max_prompt_length: usize) -> mmpo_fast::Result<PairDataset> {
    let (_folder, path) = temporary("pairs.jsonl", lines);
    load_pairs(&path, &encoder("llama3"), LengthLimits { max_length, max_prompt_length })
}

fn pair(prompt: &str, chosen: &str, rejected: &str) -> String {
    serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string() + "\n"
}

#[test]
fn the_prompt_loses_its_beginning_but_not_the_bos_and_responses_their_end() {
    let lines = pair("one two three four five six", " a b c d e f g h", " no");
    let whole = &load(&lines, 1000, 1000).unwrap().pairs[0];
    let cut = load(&lines, 12, 6).unwrap();
    let pair = &cut.pairs[0];
    assert_eq!(pair.prompt.len(), 6);
    assert_eq!(pair.prompt[0], whole.prompt[0], "the BOS stays");
    assert_eq!(pair.prompt[1..], whole.prompt[whole.prompt.len() - 5..]);
    assert_eq!(pair.chosen, whole.chosen[..6]);
    assert_eq!(pair.rejected, whole.rejected);
    let report = &cut.report;
    let counts =
        [Cause::PromptCut, Cause::ChosenCut, Cause::RejectedCut].map(|cause| report.tally(cause).count);
    assert_eq!(counts, [1, 1, 0]);
    assert_eq!(report.tokens, 12 + pair.rejected.len());
}

#[test]
fn every_drop_is_counted_with_its_places_and_shown() {
    let lines = pair("x", " yes", " no")
        + &pair("x", "  ", " no")
        + &pair("a long prompt of many words and more words and more", " yes", " no")
        + &pair("x", " same", " same")
        + &pair("x", " yes", "");
    let dataset = load(&lines, 8, 8).unwrap();
    let records: Vec<usize> = dataset.pairs.iter().map(|pair| pair.record).collect();
    assert_eq!(records, [0, 3], "positions in the file, dropped records counted");
    assert_eq!(dataset.report.tally(Cause::BlankResponse).first, [2, 5]);
    assert_eq!(dataset.report.tally(Cause::NoRoom).first, [3]);
    assert_eq!(dataset.report.tally(Cause::Identical).first, [4]);
    assert_eq!((dataset.report.records, dataset.report.pairs, dataset.report.dropped()), (5, 2, 3));
    let text = dataset.report.to_string();
    for line in [
        "5 records, 2 pairs",
        "2 dropped: a response is empty (at 2, 5)",
        "1 dropped: no room for a response after the prompt within max_length 8 (at 3)",
        "1 prompts cut on the left to max_prompt_length 8 (at 3)",
        "1 kept with identical chosen and rejected responses (at 4)",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    assert!(!text.contains("rejected responses cut"), "{text}");
}

#[test]
fn long_lists_of_places_are_cut_short() {
    let dataset = load(&pair("x", " same", " same").repeat(9), 100, 50).unwrap();
    assert!(
        dataset
            .report
            .to_string()
            .contains("9 kept with identical chosen and rejected responses (at 1, 2, 3, 4, 5, ...)")
    );
}

#[test]
fn without_a_prompt_a_response_needs_two_tokens() {
    let lines = pair("", "yes yes", "no no") + &pair("", "yes", "no");
    let (_folder, path) = temporary("pairs.jsonl", lines);
    // This tokenizer prepends no BOS, so the prompt is truly empty.
    let limits = LengthLimits { max_length: 2, max_prompt_length: 1 };
    let dataset = load_pairs(&path, &encoder("chatml"), limits).unwrap();
    assert_eq!(dataset.report.tally(Cause::NothingToScore).count, 0);
    assert!(dataset.pairs.iter().all(|pair| pair.prompt.is_empty() && pair.chosen.len() == 2));
    let limits = LengthLimits { max_length: 1, max_prompt_length: 1 };
    let error = load_pairs(&path, &encoder("chatml"), limits).unwrap_err();
    assert!(
        error.to_string().contains("2 dropped: an empty prompt and a response of one token (at 1, 2)"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the limits: both are kept to, what remains are ends and beginnings of the whole, and nothing
    /// without a scored token is kept.
    #[test]
    fn cuts_keep_to_the_limits(max_length in 1usize..40, max_prompt_length in 0usize..40, words in 0usize..20) {
        let lines = pair(&"word ".repeat(words), " a b c d e f", " the quick brown fox jumps");
        let whole = load(&lines, 10_000, 10_000).unwrap().pairs[0].clone();
        let Ok(dataset) = load(&lines, max_length, max_prompt_length) else {
            let room = max_length.saturating_sub(whole.prompt.len().min(max_prompt_length));
            prop_assert!(room == 0 || (max_prompt_length == 0 && room < 2), "dropped with room {}", room);
            return Ok(());
        };
        let pair = &dataset.pairs[0];
        prop_assert_eq!(pair.prompt.len(), whole.prompt.len().min(max_prompt_length));
        if let Some((first, rest)) = pair.prompt.split_first() {
            prop_assert_eq!(*first, whole.prompt[0]);
            prop_assert!(whole.prompt.ends_with(rest));
        }
        for (cut, whole) in [(&pair.chosen, &whole.chosen), (&pair.rejected, &whole.rejected)] {
            prop_assert_eq!(cut.len(), whole.len().min(max_length - pair.prompt.len()));
            prop_assert!(whole.starts_with(cut) && !cut.is_empty());
        }
    }
}
