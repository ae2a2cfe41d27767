//! What the parts of a `tokenizer.json` do to a text, for the layouts that are understood.
//!
//! Nearly all Llamas have one of two: words cut by patterns and written as bytes (after GPT-2), or spaces written as
//! `▁` (after SentencePiece). Whatever else a file says is left to the library.

use serde_json::Value;

use super::merges::SPACE;
use super::pattern::Pattern;

/// How GPT-2 cuts text into words.
const GPT2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// From a text between two added tokens to words.
#[derive(Debug)]
pub(super) struct Layout {
    /// Whether the text is brought into Unicode's form C first.
    pub composes: bool,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Words are cut by these steps, one after the other, and written with a character for each byte.
    Bytes(Vec<Step>),
    /// Spaces become `▁`, and one is put in front. `splits` says whether a word begins at each of them; the text is
    /// one word otherwise.
    Spaces { in_front: InFront, splits: bool },
}

/// A step that cuts a piece of text into smaller ones.
#[derive(Debug)]
pub(super) enum Step {
    /// Separates numbers from all else, and each digit from the others if `each`.
    Digits {
        each: bool,
    },
    Words(Pattern),
    /// Cuts nothing: puts a space in front of a piece that does not begin with one.
    SpaceInFront,
}

/// Where a `▁` is put in front of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InFront {
    Never,
    /// In front of every text between added tokens, even of one that begins with a space.
    Always,
    /// In front of every text that does not begin with a space.
    WhereMissing,
    /// As [`InFront::WhereMissing`], but only at the beginning of the whole text.
    AtTheBeginning,
}

impl Layout {
    /// `None` for parts that are not understood.
    pub fn read(tokenizer: &Value) -> Option<Self> {
        let normalizers = parts(tokenizer.get("normalizer"), "normalizers")?;
        let steps = parts(tokenizer.get("pre_tokenizer"), "pretokenizers")?;
        let kinds: Vec<&str> = normalizers.iter().map(|part| part["type"].as_str()).collect::<Option<_>>()?;
        let spaced = |in_front| {
            // Nothing is left for a pre-tokenizer that looks for spaces.
            let cuts_nothing =
                steps.iter().all(|step| step["type"] == "Split" && step["pattern"]["String"] == " ");
            cuts_nothing.then_some(Layout { composes: false, kind: Kind::Spaces { in_front, splits: false } })
        };
        match kinds.as_slice() {
            ["Replace"] if writes_spaces(normalizers[0]) => spaced(InFront::Never),
            ["Prepend", "Replace"] if normalizers[0]["prepend"] == "▁" && writes_spaces(normalizers[1]) => {
                spaced(InFront::Always)
            }
            [] | ["NFC"] => {
                let composes = !kinds.is_empty();
                match steps.as_slice() {
                    [step] if step["type"] == "Metaspace" && !composes => {
                        Some(Layout { composes, kind: metaspace(step)? })
                    }
                    _ => Some(Layout { composes, kind: Kind::Bytes(byte_level(&steps)?) }),
                }
            }
            _ => None,
        }
    }
}

/// The parts of a part that may be a sequence; none if it is null.
fn parts<'a>(part: Option<&'a Value>, list: &str) -> Option<Vec<&'a Value>> {
    let Some(part) = part.filter(|part| !part.is_null()) else { return Some(Vec::new()) };
    if part["type"] != "Sequence" {
        return Some(vec![part]);
    }
    let inner = part[list].as_array()?.iter().map(|inner| parts(Some(inner), list));
    Some(inner.collect::<Option<Vec<_>>>()?.concat())
}

fn writes_spaces(replace: &Value) -> bool {
    replace["pattern"]["String"] == " " && replace["content"] == "▁"
}

fn metaspace(step: &Value) -> Option<Kind> {
    if step["replacement"] != SPACE.to_string() {
        return None;
    }
    let splits = match step.get("split") {
        None | Some(Value::Null) => true,
        Some(splits) => splits.as_bool()?,
    };
    let in_front = match (step.get("add_prefix_space"), step.get("prepend_scheme").map(Value::as_str)) {
        (Some(Value::Bool(false)), _) => InFront::Never,
        (_, None | Some(Some("always"))) => InFront::WhereMissing,
        (_, Some(Some("first"))) => InFront::AtTheBeginning,
        (_, Some(Some("never"))) => InFront::Never,
        _ => return None,
    };
    Some(Kind::Spaces { in_front, splits })
}

fn byte_level(steps: &[&Value]) -> Option<Vec<Step>> {
    let (last, first) = steps.split_last()?;
    if last["type"] != "ByteLevel" {
        return None;
    }
    let mut read = Vec::new();
    for step in first {
        read.push(match step["type"].as_str()? {
            "Digits" => Step::Digits { each: step["individual_digits"].as_bool()? },
            "Split" => {
                let keeps_gaps = match (step["behavior"].as_str()?, step["invert"].as_bool()?) {
                    ("Isolated", _) => true,
                    ("Removed", true) => false,
                    _ => return None,
                };
                Step::Words(Pattern::new(step["pattern"]["Regex"].as_str()?, keeps_gaps)?)
            }
            _ => return None,
        });
    }
    if last["add_prefix_space"].as_bool()? {
        read.push(Step::SpaceInFront);
    }
    match last.get("use_regex") {
        None | Some(Value::Bool(true)) => read.push(Step::Words(Pattern::new(GPT2_WORDS, true)?)),
        Some(Value::Bool(false)) => {}
        Some(_) => return None,
    }
    Some(read)
}
