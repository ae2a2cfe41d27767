//! Pairs with a problem are kept, cut, left out or refused as it was asked, and counted; several files, weights, and a
//! share that is held out.

use mmpo_fast::Result;
use mmpo_fast::config::{LengthLimits, PairFile, PairFiles, Policies, Policy};
use mmpo_fast::data::{Cause, PairDataset, PairSource, Part, Treatment, load};
use serde_json::json;

use crate::*;

const LIMITS: LengthLimits = LengthLimits { max_length: 64, max_prompt_length: 32 };

fn turn(role: &str, content: &str) -> Value {
    json!([{"role": role, "content": content}])
}

fn pair(prompt: &str, chosen: &str, rejected: &str) -> String {
    json!({"prompt": turn("user", prompt), "chosen": turn("assistant", chosen),
           "rejected": turn("assistant", rejected)})
    .to_string()
}

fn read(text: &str, policies: Policies, tolerant: bool) -> Result<PairDataset> {
    let (_folder, path) = temporary("pairs.jsonl", text);
    let treatment = Treatment { policies, tolerant, ..Treatment::new(LIMITS) };
    load(&PairSource::file(&path), &encoder("chatml"), treatment, &mut |_| {})
}

/// A file with each kind of problem that a policy is for: the line, the cause, and how the policy is set.
type Setting = fn(&mut Policies, Policy);
fn problems() -> (String, Vec<(usize, Cause, Setting)>) {
    let long = "word ".repeat(100);
    let lines = [
        pair("one", "yes", "no"),
        pair("two", "", "no"),
        pair(&long, "yes", "no"),
        pair("three", &long, "no"),
        pair("four", "same", "same"),
        pair("one", "yes", "no"),
        pair("one", "no", "yes"),
        pair("five", "['a', 'b']", "no"),
        r#"{"prompt": "six", "chosen": 3, "rejected": "no"}"#.to_string(),
    ];
    let found: Vec<(usize, Cause, Setting)> = vec![
        (2, Cause::BlankResponse, |policies, policy| policies.empty = policy),
        (3, Cause::PromptCut, |policies, policy| policies.long_prompt = policy),
        (4, Cause::ChosenCut, |policies, policy| policies.long_response = policy),
        (5, Cause::Identical, |policies, policy| policies.identical = policy),
        (6, Cause::Repeated, |policies, policy| policies.duplicate = policy),
        (7, Cause::Opposite, |policies, policy| policies.contradiction = policy),
        (8, Cause::ListAsText, |policies, policy| policies.suspicious = policy),
        (9, Cause::Refused, |policies, policy| policies.refused = policy),
    ];
    (lines.join("\n"), found)
}

#[test]
fn each_problem_is_kept_left_out_or_an_error_as_asked() {
    let (text, found) = problems();
    let lenient = Policies { refused: Policy::Drop, ..Policies::default() };
    let base = read(&text, lenient, false).unwrap();
    assert_eq!((base.report.records, base.report.pairs), (9, 7), "{}", base.report);
    for (line, cause, set) in found {
        let mut policies = lenient;
        set(&mut policies, Policy::Drop);
        let dataset = read(&text, policies, false).unwrap();
        let tally = dataset.report.tally(cause);
        assert_eq!(
            (tally.count, tally.dropped, tally.first.as_slice()),
            (1, 1, [line].as_slice()),
            "{cause:?}"
        );
        assert!(dataset.pairs.iter().all(|pair| pair.record + 1 != line), "{cause:?} is still there");
        assert_eq!(
            dataset.report.dropped(),
            if base.report.tally(cause).dropped == 1 { 2 } else { 3 },
            "{cause:?}"
        );
        assert!(
            dataset.report.describe(cause).starts_with("dropped: "),
            "{}",
            dataset.report.describe(cause)
        );

        set(&mut policies, Policy::Error);
        let error = read(&text, policies, false).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(&format!("pairs.jsonl:{line}: ")), "{cause:?}: {error}");
        // Reading on after errors finds the same one, and no other.
        let tolerant = read(&text, policies, true).unwrap();
        assert_eq!(tolerant.report.tally(cause).stops, 1, "{cause:?}");
        assert_eq!((tolerant.report.stops(), tolerant.refusals.len()), (1, 1), "{cause:?}");
        assert_eq!(tolerant.refusals[0].message.split(": ").last(), error.to_string().split(": ").last());
    }
}

#[test]
fn tokens_after_the_last_end_token_are_cut_or_counted() {
    let text = pair("one", "yes", "no");
    let encoder = encoder("chatml");
    let ends = encoder.end_tokens().unwrap();
    let kept = read(&text, Policies::default(), false).unwrap();
    assert!(
        !ends.contains(kept.pairs[0].chosen.last().unwrap()),
        "ChatML writes a line end after its end token"
    );
    let cut = read(&text, Policies { after_end: Policy::Cut, ..Policies::default() }, false).unwrap();
    for (cut, kept) in
        [(&cut.pairs[0].chosen, &kept.pairs[0].chosen), (&cut.pairs[0].rejected, &kept.pairs[0].rejected)]
    {
        assert_eq!(cut.as_slice(), &kept[..kept.len() - 1]);
        assert!(ends.contains(cut.last().unwrap()));
    }
    assert_eq!(cut.report.tally(Cause::AfterEnd).count, 1);
    let dropped = read(&text, Policies { after_end: Policy::Drop, ..Policies::default() }, true).unwrap();
    assert_eq!((dropped.pairs.len(), dropped.report.tally(Cause::AfterEnd).dropped), (0, 1));
}

#[test]
fn a_broken_file_ends_its_own_reading_and_what_came_before_is_counted() {
    let text = format!("[{},\n{},\n{{broken", pair("one", "yes", "no"), pair("two", "yes", "no"));
    let dataset = read(&text, Policies::default(), true).unwrap();
    assert_eq!((dataset.report.pairs, dataset.report.stops()), (2, 1));
    assert!(dataset.refusals[0].message.contains("broken JSON"), "{}", dataset.refusals[0].message);
}

fn several() -> (tempfile::TempDir, PairFiles) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.jsonl", "b.jsonl"];
    for name in names {
        let lines: Vec<String> = (0..200)
            .map(|number| pair(&format!("{name} asks {number}"), "yes", &format!("no {number}")))
            .collect();
        std::fs::write(folder.path().join(name), lines.join("\n")).unwrap();
    }
    let files = names.map(|name| PairFile { path: folder.path().join(name), weight: 1.0 });
    (folder, PairFiles(files.to_vec()))
}

fn read_part(files: &PairFiles, part: Part) -> PairDataset {
    let source = PairSource::open(files, &Default::default(), part).unwrap();
    let treatment = Treatment::new(LIMITS);
    load(&source, &encoder("chatml"), treatment, &mut |_| {}).unwrap()
}

#[test]
fn several_files_follow_each_other_and_weights_repeat_or_thin_them() {
    let (folder, mut files) = several();
    let all = read_part(&files, Part::All);
    assert_eq!((all.pairs.len(), all.report.records, all.files.len()), (400, 400, 2));
    let records: Vec<usize> = all.pairs.iter().map(|pair| pair.record).collect();
    assert_eq!(records, (0..400).collect::<Vec<_>>(), "records are counted over all files");
    // A folder stands for its files.
    let whole = read_part(&PairFiles::from(folder.path().to_path_buf()), Part::All);
    assert_eq!(whole.fingerprint, all.fingerprint);
    let source = PairSource::open(&files, &Default::default(), Part::All).unwrap();
    let chosen = mmpo_fast::data::read_chosen_records(&source, &[3, 199, 200, 399]).unwrap();
    let asked: Vec<String> = chosen.iter().map(|record| shown(record)[0].clone()).collect();
    assert_eq!(asked[1..3], ["user: a.jsonl asks 199", "user: b.jsonl asks 0"]);

    files.0[0].weight = 2.5;
    files.0[1].weight = 0.5;
    let weighted = read_part(&files, Part::All);
    let of_first = weighted.pairs.iter().filter(|pair| pair.record < 200).count();
    let of_second = weighted.pairs.len() - of_first;
    assert!((450..=550).contains(&of_first), "{of_first} of about 500");
    assert!((70..=130).contains(&of_second), "{of_second} of about 100");
    let report = &weighted.report;
    assert_eq!(report.pairs + report.copies, weighted.pairs.len());
    assert_eq!(report.left_out_by_weight, 200 - of_second);
    assert!(report.to_string().contains("for the file's weight"), "{report}");
    // The choice follows what a pair says, and not where it stands.
    files.0.reverse();
    let reversed = read_part(&files, Part::All);
    assert_eq!(reversed.pairs.len(), weighted.pairs.len());
}

#[test]
fn a_share_is_held_out_by_what_the_prompts_say() {
    let (_folder, files) = several();
    let all = read_part(&files, Part::All);
    let (training, held_out) =
        (read_part(&files, Part::Training(0.1)), read_part(&files, Part::Evaluation(0.1)));
    assert!((20..=60).contains(&held_out.pairs.len()), "{} of about 40", held_out.pairs.len());
    let mut both: Vec<usize> = training.pairs.iter().chain(&held_out.pairs).map(|pair| pair.record).collect();
    both.sort_unstable();
    assert_eq!(both.len(), all.pairs.len());
    assert!(both.windows(2).all(|pair| pair[0] < pair[1]), "no record is on both sides");
    assert_eq!(training.report.records + held_out.report.records, all.report.records);

    // The same records are held out of one file in another order, with other records between them.
    let text = std::fs::read_to_string(&files.0[0].path).unwrap();
    let mut lines: Vec<&str> = text.lines().rev().collect();
    let other = pair("somebody else asks", "yes", "no");
    lines.insert(50, &other);
    let (_folder, path) = temporary("reversed.jsonl", lines.join("\n"));
    let reversed = read_part(&PairFiles::from(path), Part::Evaluation(0.1));
    let prompts = |dataset: &PairDataset, most: usize| {
        let mut prompts: Vec<Vec<u32>> =
            dataset.pairs.iter().filter(|pair| pair.record < most).map(|pair| pair.prompt.to_vec()).collect();
        prompts.sort();
        prompts
    };
    let again = prompts(&reversed, usize::MAX);
    let first = prompts(&held_out, 200);
    assert!(first.iter().all(|prompt| again.contains(prompt)), "the same prompts are held out");
    assert!(again.len() <= first.len() + 1);

    // Pairs of one prompt stay together.
    let same: Vec<String> =
        (0..50).map(|number| pair("one prompt", &format!("yes {number}"), "no")).collect();
    let (_folder, path) = temporary("same.jsonl", same.join("\n"));
    let sizes = [Part::Training(0.5), Part::Evaluation(0.5)].map(|part| {
        let source = PairSource { part, ..PairSource::file(&path) };
        let treatment = Treatment { tolerant: true, ..Treatment::new(LIMITS) };
        load(&source, &encoder("chatml"), treatment, &mut |_| {}).unwrap().pairs.len()
    });
    assert!(sizes == [50, 0] || sizes == [0, 50], "{sizes:?}");
}

#[test]
fn pairs_with_scores_close_together_are_left_out_where_it_is_asked_for() {
    let scored = |number: usize, names: [&str; 2], scores: [f64; 2]| {
        json!({"prompt": turn("user", &number.to_string()), "chosen": turn("assistant", "yes"),
               "rejected": turn("assistant", "no"), names[0]: scores[0], names[1]: scores[1]})
        .to_string()
    };
    let lines = [
        scored(1, ["score_chosen", "score_rejected"], [8.5, 6.0]),
        scored(2, ["score_chosen", "score_rejected"], [8.0, 7.5]),
        scored(3, ["chosen-rating", "rejected-rating"], [5.0, 5.0]),
        scored(4, ["chosen_rating", "rejected_rating"], [2.0, 3.0]),
        scored(5, ["rating_chosen", "rating_rejected"], [3.0, 2.0]),
        pair("six", "yes", "no"),
    ];
    let (_folder, path) = temporary("pairs.jsonl", lines.join("\n"));
    let read = |gap: Option<f64>, refused: Policy| {
        let mut treatment = Treatment { min_score_gap: gap, ..Treatment::new(LIMITS) };
        treatment.policies.refused = refused;
        load(&PairSource::file(&path), &encoder("chatml"), treatment, &mut |_| {})
    };
    assert_eq!(read(None, Policy::Error).expect("pairs").pairs.len(), 6, "scores are not looked at");
    let message = read(Some(0.0), Policy::Error).expect_err("the last has none").to_string();
    assert!(message.contains("pairs.jsonl:6: no scores"), "{message}");
    for (gap, kept) in [(0.0, vec![0, 1, 2, 4]), (0.6, vec![0, 4]), (2.5, vec![0])] {
        let dataset = read(Some(gap), Policy::Drop).expect("pairs");
        assert_eq!(dataset.pairs.iter().map(|pair| pair.record).collect::<Vec<_>>(), kept, "{gap}");
        let tally = dataset.report.tally(Cause::ScoresTooClose);
        assert_eq!((tally.count, tally.dropped), (5 - kept.len(), 5 - kept.len()), "{gap}");
        assert_eq!(dataset.report.dropped(), 6 - kept.len());
        assert!(dataset.report.to_string().contains("--min-score-gap"), "{}", dataset.report);
    }
}

#[test]
fn scores_under_other_names_are_read_by_the_names_of_columns() {
    let line = json!({"prompt": "p", "chosen": "yes", "rejected": "no", "good": 3, "bad": 1}).to_string();
    let (_folder, path) = temporary("pairs.jsonl", line);
    let columns = mmpo_fast::config::value::OptionValue::from_text("score_chosen=good,score_rejected=bad");
    let source = PairSource { columns: columns.expect("columns"), ..PairSource::file(&path) };
    let treatment = Treatment { min_score_gap: Some(2.5), ..Treatment::new(LIMITS) };
    let message =
        load(&source, &encoder("chatml"), treatment, &mut |_| {}).expect_err("none left").to_string();
    assert!(message.contains("no usable pair"), "{message}");
    let treatment = Treatment { min_score_gap: Some(2.0), ..treatment };
    assert_eq!(load(&source, &encoder("chatml"), treatment, &mut |_| {}).expect("pairs").pairs.len(), 1);
}
