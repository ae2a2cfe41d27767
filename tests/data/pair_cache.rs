//! Tokenised pairs kept on disk: the same pairs and reports with and without them, whatever happens to the file.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mmpo_fast::config::{DataCache, LengthLimits, PairFile, PairFiles, Policy, TemplateDate};
use mmpo_fast::data::{
    EncodedRecord, PairCache, PairSource, Part, TokenizedPair, Treatment, load, load_cached,
};

use crate::*;

const LIMITS: LengthLimits = LengthLimits { max_length: 96, max_prompt_length: 48 };

/// What is known of a data set, pairs and reports and all, and what an observer saw of each record.
#[derive(Debug, PartialEq)]
struct Seen {
    pairs: Vec<TokenizedPair>,
    reports: Vec<mmpo_fast::data::FileReport>,
    report: mmpo_fast::data::EncodingReport,
    fingerprint: [u8; 32],
    largest_token: u32,
    records: Vec<EncodedRecord>,
}

fn seen(source: &PairSource, encoder: &TextEncoder, treatment: Treatment, cache: Option<&PairCache>) -> Seen {
    let mut records = Vec::new();
    let mut observe = |record: &EncodedRecord| {
        let mut record = EncodedRecord { examples: Vec::new(), ..record.clone() };
        record.causes.sort();
        records.push(record);
    };
    let dataset = load_cached(source, encoder, treatment, cache, Some(&mut observe)).expect("pairs");
    Seen {
        pairs: dataset.pairs,
        reports: dataset.files,
        report: dataset.report,
        fingerprint: dataset.fingerprint,
        largest_token: dataset.largest_token,
        records,
    }
}

fn kept(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    files
}

fn treatment() -> Treatment {
    let mut treatment = Treatment::new(LIMITS);
    treatment.policies.refused = Policy::Drop;
    treatment
}

/// A cache in a folder of its own, and a file of pairs with long, repeated, identical and broken records.
struct Workplace {
    folder: tempfile::TempDir,
    cache: PairCache,
    source: PairSource,
}

fn workplace() -> Workplace {
    let folder = tempfile::tempdir().expect("a folder");
    let turn = |role: &str, content: &str| serde_json::json!([{"role": role, "content": content}]);
    let mut lines: Vec<String> = (0..40)
        .map(|number| {
            let words = "some words ".repeat(number);
            serde_json::json!({"prompt": turn("user", &format!("{words}{}", number % 36)),
                               "chosen": turn("assistant", &format!("{number} yes")),
                               "rejected": turn("assistant", if number == 7 { "7 yes" } else { "no" }),
                               "score_chosen": 5 + number % 3, "score_rejected": 5})
            .to_string()
        })
        .collect();
    lines.push(r#"{"prompt": "six", "chosen": 3, "rejected": "no"}"#.to_string());
    fs::write(folder.path().join("pairs.jsonl"), lines.join("\n")).expect("written");
    let source = PairSource::file(&folder.path().join("pairs.jsonl"));
    let cache = PairCache::new(&folder.path().join("cache"));
    Workplace { folder, cache, source }
}

#[test]
fn pairs_and_reports_are_the_same_with_and_without_the_cache_in_every_format() {
    let encoder = encoder("chatml");
    let folder = tempfile::tempdir().expect("a folder");
    let cache = PairCache::new(folder.path());
    let files = fs::read_dir(file("pairs")).expect("pairs").map(|entry| entry.expect("entry").path());
    let tables = fs::read_dir(file("tables")).expect("tables").map(|entry| entry.expect("entry").path());
    let mut read = 0;
    for path in files.chain(tables) {
        let source = PairSource::file(&path);
        if load(&source, &encoder, treatment(), &mut |_| {}).is_err() {
            continue;
        }
        read += 1;
        let without = seen(&source, &encoder, treatment(), None);
        let before = kept(folder.path()).len();
        assert_eq!(
            seen(&source, &encoder, treatment(), Some(&cache)),
            without,
            "{} is written",
            path.display()
        );
        assert!(kept(folder.path()).len() >= before, "{} is kept", path.display());
        assert_eq!(seen(&source, &encoder, treatment(), Some(&cache)), without, "{} is read", path.display());
    }
    assert!(read >= 15, "{read} files");
    assert!(kept(folder.path()).len() >= 15, "files of the same content share one");
}

#[test]
fn weights_parts_policies_and_scores_have_pairs_of_their_own() {
    let workplace = workplace();
    let encoder = encoder("chatml");
    let path = workplace.folder.path().join("pairs.jsonl");
    let weighted = |weight| {
        let files = PairFiles(vec![PairFile { path: path.clone(), weight }]);
        PairSource::open(&files, &Default::default(), Part::All).expect("a source")
    };
    let part = |part| PairSource { part, ..workplace.source.clone() };
    let mut cut = treatment();
    cut.policies.identical = Policy::Drop;
    let cases = [
        (workplace.source.clone(), treatment()),
        (weighted(2.5), treatment()),
        (weighted(0.5), treatment()),
        (part(Part::Training(0.3)), treatment()),
        (part(Part::Evaluation(0.3)), treatment()),
        (workplace.source.clone(), cut),
        (workplace.source.clone(), Treatment { min_score_gap: Some(1.0), ..treatment() }),
        (
            workplace.source.clone(),
            Treatment { limits: LengthLimits { max_length: 40, ..LIMITS }, ..treatment() },
        ),
    ];
    for (number, (source, treatment)) in cases.iter().enumerate() {
        let without = seen(source, &encoder, *treatment, None);
        for _ in 0..2 {
            assert_eq!(seen(source, &encoder, *treatment, Some(&workplace.cache)), without, "case {number}");
            assert_eq!(kept(&workplace.folder.path().join("cache")).len(), number + 1, "case {number}");
        }
    }
    // Other columns of the same file.
    let named = workplace.folder.path().join("named.jsonl");
    let record = r#"{"prompt": "six", "chosen": "yes", "rejected": "no", "better": "surely"}"#;
    fs::write(&named, record).expect("written");
    let renamed = mmpo_fast::config::ColumnNames(vec![("chosen".into(), "better".into())]);
    let own = PairCache::new(&workplace.folder.path().join("named"));
    for columns in [Default::default(), renamed] {
        let source = PairSource { columns, ..PairSource::file(&named) };
        let without = seen(&source, &encoder, treatment(), None);
        assert_eq!(seen(&source, &encoder, treatment(), Some(&own)), without);
    }
    assert_eq!(kept(&workplace.folder.path().join("named")).len(), 2);
    let texts: Vec<u8> = fs::read(&path).expect("pairs");
    let other = workplace.folder.path().join("elsewhere.jsonl");
    fs::write(&other, &texts).expect("written");
    seen(&PairSource::file(&other), &encoder, treatment(), Some(&workplace.cache));
    assert_eq!(kept(&workplace.folder.path().join("cache")).len(), cases.len(), "the name does not matter");
    fs::write(&other, [texts.as_slice(), b"\n"].concat()).expect("written");
    seen(&PairSource::file(&other), &encoder, treatment(), Some(&workplace.cache));
    assert_eq!(kept(&workplace.folder.path().join("cache")).len(), cases.len() + 1, "each byte does");
}

#[test]
fn a_damaged_file_is_found_and_made_again() {
    let workplace = workplace();
    let encoder = encoder("chatml");
    let read = || seen(&workplace.source, &encoder, treatment(), Some(&workplace.cache));
    let right = read();
    let path = kept(&workplace.folder.path().join("cache")).pop().expect("a file");
    let whole = fs::read(&path).expect("its bytes");
    let places = (0..whole.len()).step_by(97).chain(whole.len() - 60..whole.len());
    let mut damaged: Vec<Vec<u8>> = places
        .map(|place| {
            let mut bytes = whole.clone();
            bytes[place] ^= 4;
            bytes
        })
        .collect();
    damaged.extend([0, 1, 40, whole.len() / 2, whole.len() - 1].map(|length| whole[..length].to_vec()));
    damaged.push([whole.as_slice(), b"more"].concat());
    // A file with a right hash that says something else.
    let mut other = whole[..whole.len() - 32].to_vec();
    let length = other.len();
    other[length - 24] ^= 1;
    other.extend_from_slice(blake3::hash(&other.clone()).as_bytes());
    damaged.push(other);
    // One whose first pair claims a token more than the file has: lengths stand 36 bytes from an entry's start, after the ids.
    let mut claims = whole[..whole.len() - 32].to_vec();
    let count = claims.len() - 24;
    let tokens = u64::from_ne_bytes(claims[count..count + 8].try_into().expect("8 bytes")) as usize;
    claims[16 + 4 * tokens + 36] ^= 1;
    claims.extend_from_slice(blake3::hash(&claims.clone()).as_bytes());
    damaged.push(claims);
    // The whole and sound file of other pairs.
    let cut = Treatment { limits: LengthLimits { max_length: 40, ..LIMITS }, ..treatment() };
    seen(&workplace.source, &encoder, cut, Some(&workplace.cache));
    let files = kept(&workplace.folder.path().join("cache"));
    let other = files.iter().find(|file| **file != path).expect("the other pairs");
    damaged.push(fs::read(other).expect("its bytes"));
    for bytes in damaged {
        fs::write(&path, &bytes).expect("damaged");
        assert_eq!(read(), right);
        assert_eq!(fs::read(&path).expect("its bytes"), whole, "it is made again");
    }
}

/// Somebody else's file, or one that somebody else could have written, may say anything under a right hash.
#[cfg(unix)]
#[test]
fn a_file_that_others_could_have_written_is_not_believed() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let workplace = workplace();
    let encoder = encoder("chatml");
    let read = || seen(&workplace.source, &encoder, treatment(), Some(&workplace.cache));
    let right = read();
    let path = kept(&workplace.folder.path().join("cache")).pop().expect("a file");
    let number = || path.metadata().expect("a file").ino();
    let before = number();
    assert_eq!(read(), right);
    assert_eq!(number(), before, "one's own file is read");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("its mode");
    assert_eq!(read(), right);
    assert_ne!(number(), before, "one that everybody may write is made again");
    // Only root can give a file away.
    if chown(&path, Some(65534), None).is_ok() {
        let before = number();
        assert_eq!(read(), right);
        assert_ne!(number(), before, "another user's file is made again");
    }
}

#[test]
fn several_at_once_see_whole_files_alone() {
    let workplace = workplace();
    let encoder = encoder("chatml");
    let right = seen(&workplace.source, &encoder, treatment(), None);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..4 {
                    let found = seen(&workplace.source, &encoder, treatment(), Some(&workplace.cache));
                    assert_eq!(found, right);
                    for file in kept(&workplace.folder.path().join("cache")) {
                        let _ = fs::remove_file(file);
                    }
                }
            });
        }
    });
}

#[test]
fn a_folder_that_cannot_be_written_costs_nothing_but_the_cache() {
    let workplace = workplace();
    let encoder = encoder("chatml");
    let right = seen(&workplace.source, &encoder, treatment(), None);
    let under_a_file = PairCache::new(&workplace.folder.path().join("pairs.jsonl/cache"));
    assert_eq!(seen(&workplace.source, &encoder, treatment(), Some(&under_a_file)), right);
    assert!(PairCache::of(Some(&DataCache::Off)).expect("no limit is asked for").is_none());
}

#[test]
fn what_a_later_run_would_not_find_again_is_not_kept() {
    let workplace = workplace();
    let cache = workplace.folder.path().join("cache");
    let strict = Treatment { tolerant: true, ..Treatment::new(LIMITS) };
    let encoder = encoder("chatml");
    assert_eq!(seen(&workplace.source, &encoder, strict, Some(&workplace.cache)).report.stops(), 1);
    assert!(kept(&cache).is_empty(), "a record at which training would end is an error each time");

    let template = workplace.folder.path().join("dated.jinja");
    let text = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\
                {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}";
    fs::write(&template, text).expect("a template");
    let dated = |date: Option<&str>| {
        let date = date.map(<TemplateDate as mmpo_fast::config::value::OptionValue>::from_text);
        let encoder = TextEncoder::load(&file("chatml"), Some(&template)).expect("an encoder");
        encoder.at(date.transpose().expect("a date")).expect("a calendar's date")
    };
    let now = seen(&workplace.source, &dated(None), treatment(), Some(&workplace.cache));
    assert!(!now.pairs.is_empty());
    assert!(kept(&cache).is_empty(), "tomorrow's texts are others");
    let days = ["2024-07-26", "2024-07-27"].map(|day| {
        let without = seen(&workplace.source, &dated(Some(day)), treatment(), None);
        for _ in 0..2 {
            assert_eq!(
                seen(&workplace.source, &dated(Some(day)), treatment(), Some(&workplace.cache)),
                without
            );
        }
        without
    });
    assert_ne!(days[0].fingerprint, days[1].fingerprint);
    assert_eq!(kept(&cache).len(), 2, "one for each date");
}

#[test]
fn what_a_killed_process_left_is_removed_after_a_day() {
    let workplace = workplace();
    let cache = workplace.folder.path().join("cache");
    fs::create_dir(&cache).expect("a folder");
    let hours = |hours: u64| SystemTime::now() - Duration::from_secs(hours * 3600);
    for (name, age) in [(".partial-old", 25), (".partial-new", 1), ("mine", 100)] {
        let file = fs::File::create(cache.join(name)).expect("a file");
        file.set_modified(hours(age)).expect("its time");
    }
    seen(&workplace.source, &encoder("chatml"), treatment(), Some(&workplace.cache));
    let names: Vec<String> = kept(&cache)
        .iter()
        .map(|path| path.file_name().expect("name").to_string_lossy().into_owned())
        .collect();
    assert!(names.contains(&".partial-new".to_string()) && names.contains(&"mine".to_string()), "{names:?}");
    assert!(!names.contains(&".partial-old".to_string()), "{names:?}");
    assert_eq!(names.len(), 3, "and the pairs: {names:?}");
}

#[test]
fn above_its_limit_the_cache_removes_what_nobody_uses() {
    let workplace = workplace();
    let encoder = encoder("chatml");
    let folder = workplace.folder.path().join("cache");
    let lengths = |max_length| LengthLimits { max_length, ..LIMITS };
    let load = |max_length: usize, cache: &PairCache| {
        let treatment = Treatment { limits: lengths(max_length), ..treatment() };
        load_cached(&workplace.source, &encoder, treatment, Some(cache), None).expect("pairs")
    };
    let names = || -> Vec<PathBuf> {
        let kept = kept(&folder).into_iter();
        kept.filter(|path| path.extension().is_some_and(|end| end == "pairs")).collect()
    };
    let new =
        |before: &[PathBuf]| names().into_iter().find(|path| !before.contains(path)).expect("a new file");
    let used = load(90, &workplace.cache);
    let in_use = new(&[]);
    drop(load(91, &workplace.cache));
    let unused = new(std::slice::from_ref(&in_use));
    let file = fs::File::options().write(true).open(&in_use).expect("a file");
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("its time");
    drop(file);
    let strange = folder.join("mine.pairs");
    fs::write(&strange, vec![0; 1 << 20]).expect("written");
    let small = workplace.cache.clone().with_limit(Some(1));
    // What was asked for last stays, whatever the limit, and so does what another data set reads.
    let last = load(92, &small);
    let newest = new(&[in_use.clone(), unused.clone(), strange.clone()]);
    let mut left = vec![in_use.clone(), newest.clone(), strange.clone()];
    left.sort();
    assert_eq!(names(), left);
    assert_eq!(used.pairs, load(90, &small).pairs);
    drop((used, last));
    let another = load(93, &small);
    assert!(!another.pairs.is_empty());
    assert!(!in_use.exists() && !newest.exists() && strange.exists());
    // Removed or not, its pairs are the same.
    assert_eq!(load(90, &small).pairs, load(90, &PairCache::new(&folder)).pairs);
}

/// What the committed pairs become under the version of the cache's key. Where a change to reading, rendering,
/// tokenising or cutting changes it on purpose, raise `VERSION` in src/data/pair_cache/key.rs, so that no run reads what
/// an earlier program kept, and write the new hash here.
#[test]
fn the_version_belongs_to_what_the_pairs_become() {
    const VERSION_1: &str = "c8ebfbbe02f8fd29c30fc99c45aec7dea7ea2aeb93ab4b086666dab9a91a798b";
    let mut hasher = blake3::Hasher::new();
    for name in
        ["conversational.jsonl", "hh.jsonl", "orca.jsonl", "sharegpt_system.jsonl", "ultrafeedback.jsonl"]
    {
        for tokenizer in ["chatml", "llama3"] {
            let source = PairSource::file(&file("pairs").join(name));
            let dataset = load(&source, &encoder(tokenizer), treatment(), &mut |_| {}).expect("pairs");
            hasher.update(&dataset.fingerprint);
        }
    }
    assert_eq!(hasher.finalize().to_hex().as_str(), VERSION_1);
}
