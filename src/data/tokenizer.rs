//! The tokenizer of a Hugging Face model folder, with the ids that transformers gives.
//!
//! `tokenizer.json` holds the tokenizer; `tokenizer_config.json` (and, in older folders, `special_tokens_map.json`)
//! say which tokens begin and end a sequence, and which [class](class) of transformers reads the file.

mod added;
mod class;
mod layout;
mod merges;
mod normal_form;
mod pattern;
mod special;
mod stream;
mod words;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use foldhash::fast::RandomState;
use serde_json::{Map, Value};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use self::class::Class;
use self::special::SpecialTokens;
pub use self::stream::StreamDecoder;
use self::words::{Understood, Words};
use super::panics::catch;
use crate::foreign::{self, Foreign};
use crate::{Error, Result};

/// Text to token ids and back. Encoding never cuts or pads anything by itself.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokenises word by word; `None` where that cannot be known to give the same ids.
    words: Option<Words>,
    path: PathBuf,
    special_tokens: BTreeMap<String, String>,
    special_ids: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Tokens that the post-processor puts before and after plain text.
    around_text: [Vec<u32>; 2],
    cleans_up_spaces: bool,
    fingerprint: [u8; 32],
}

/// Token ids of the segments of texts that share much, such as a prompt alone and with each of its responses. A
/// segment is what lies between two added tokens; nothing outside decides its ids.
#[derive(Debug, Default)]
pub struct SegmentCache {
    /// By whether the segment begins its text, which some tokenizers treat differently, and by its normalised text.
    ids: [HashMap<String, Vec<u32>, RandomState>; 2],
}

/// Most bytes of text that the library is given at once; it takes about 120 times as much memory.
const MOST_UNCUT: usize = 4 << 20;

/// The error of a text, or of a part of one, that cannot be cut and is too long as a whole; holds its bytes.
#[derive(Debug)]
struct Uncut(usize);

impl fmt::Display for Uncut {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        let Uncut(bytes) = self;
        write!(
            formatter,
            "the text has {bytes} bytes that this tokenizer takes as one piece, more than {} MiB",
            MOST_UNCUT >> 20
        )
    }
}

impl std::error::Error for Uncut {}

impl Tokenizer {
    /// Loads the tokenizer of `folder`; also gives its `tokenizer_config.json`, where chat templates may stand.
    ///
    /// # Errors
    /// [`Error::Model`] where a file is missing, broken or something else, or where the named tokens are not the
    /// tokenizer's.
    pub fn load(folder: &Path) -> Result<(Self, Map<String, Value>)> {
        let path = folder.join("tokenizer.json");
        let bytes = read_tokenizer_file(folder, &path)?;
        foreign::refuse(&path, &bytes, "the tokenizer")?;
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let mut json: Value = serde_json::from_slice(&bytes)
            .map_err(|error| not_a_tokenizer(&path, format!("broken JSON: {error}")))?;
        let class = class_of(folder, &config, &json)?;
        let tokens = SpecialTokens::read(folder, &config, &json, class)?;
        class.rebuild(&mut json, &config);
        let understood = Understood::read(&json);
        let (inner, bos, eos) = catch(|| build(json, &config, class, &tokens, folder))
            .unwrap_or_else(|panic| Err(not_a_tokenizer(&path, panic)))?;
        let inner = without_lasting_cache(inner);
        // What panics or fails here does so again for a text, where it is an error that names the text.
        let words = understood.and_then(|parts| catch(|| Words::new(parts, &inner)).ok().flatten());

        let special_tokens = tokens.named();
        let special_ids = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .chain(bos)
            .chain(eos)
            .collect();
        let is_bpe = matches!(inner.get_model(), ModelWrapper::BPE(_));
        let says = |name: &str| config.get(name).is_some_and(|value| class::truthy(value, false));
        let cleans_up_spaces = says("clean_up_tokenization_spaces")
            && (!is_bpe || says("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"));
        let fingerprint = fingerprint(&bytes, &config, class, &special_tokens);
        let mut tokenizer = Tokenizer {
            inner,
            words,
            path,
            special_tokens,
            special_ids,
            bos,
            eos,
            around_text: [Vec::new(), Vec::new()],
            cleans_up_spaces,
            fingerprint,
        };
        tokenizer.around_text = tokenizer.tokens_around_text()?;
        Ok((tokenizer, config))
    }

    /// Token ids of `text`; special tokens written in it become their ids, none is added.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, &mut SegmentCache::default())
    }

    /// As [`Tokenizer::encode`], with the ids that earlier texts have left in `cache`.
    ///
    /// # Errors
    /// [`Error::Data`] for a text that is too long to be tokenised, [`Error::Model`] for whatever else the tokenizer
    /// does not take.
    pub fn encode_with(&self, text: &str, cache: &mut SegmentCache) -> Result<Vec<u32>> {
        self.ids(|| match &self.words {
            Some(words) => words.encode(&self.inner, text, cache),
            None => self.segments(text, cache),
        })
    }

    /// The ids that the library gives the text as a whole, which [`Tokenizer::encode`] must equal. It takes far more
    /// time and memory.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(|| Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec()))
    }

    /// Whether texts are tokenised word by word, in little time and memory.
    pub fn is_cut_into_words(&self) -> bool {
        self.words.is_some()
    }

    fn ids(&self, encode: impl FnOnce() -> tokenizers::Result<Vec<u32>>) -> Result<Vec<u32>> {
        match catch(encode) {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) => Err(match error.downcast_ref::<Uncut>() {
                Some(uncut) => Error::data(
                    &self.path,
                    None,
                    uncut.to_string(),
                    "no model of this program reads so long a text: cut it or leave the record out",
                ),
                None => self.cannot_tokenise(error.as_ref()),
            }),
            Err(panic) => Err(self.cannot_tokenise(&panic)),
        }
    }

    /// Token ids of `text` as plain text, which is what calling the tokenizer in transformers gives: with the tokens
    /// that the post-processor adds, a BOS in most.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_with`].
    pub fn encode_plain(&self, text: &str, cache: &mut SegmentCache) -> Result<Vec<u32>> {
        let [before, after] = &self.around_text;
        Ok([before.as_slice(), &self.encode_with(text, cache)?, after].concat())
    }

    /// Text of `ids`, without special tokens if `skip_special_tokens`.
    ///
    /// # Errors
    /// [`Error::Model`] for ids that the tokenizer cannot decode.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let failed = |error: &dyn std::fmt::Display| {
            Error::model(&self.path, format!("cannot decode {} tokens: {error}", ids.len()), COPY_HELP)
        };
        let text = catch(|| self.inner.decode(ids, skip_special_tokens))
            .map_err(|panic| failed(&panic))?
            .map_err(|error| failed(&error))?;
        Ok(if self.cleans_up_spaces { without_spaces_before_marks(text) } else { text })
    }

    /// Decodes tokens as they are generated.
    pub fn stream(&self, skip_special_tokens: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special_tokens)
    }

    /// The text of `ids` from token `start` on, with the spaces that it has in the text as a whole.
    pub(crate) fn tail_text(&self, ids: &[u32], start: usize) -> Result<String> {
        let context = start.saturating_sub(4);
        let before = self.decode(&ids[context..start], false)?;
        let all = self.decode(&ids[context..], false)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }

    /// `bos_token`, whether or not the tokenizer puts it in front by itself.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// `eos_token`. A model may end on others too: its generation config lists those.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that this tokenizer puts in front of plain text.
    pub fn prepended(&self) -> Option<u32> {
        self.around_text[0].first().copied()
    }

    /// How many tokens this tokenizer puts after plain text.
    pub(super) fn appended(&self) -> usize {
        self.around_text[1].len()
    }

    /// Whether `id` is a special token (an end-of-turn marker, not a word).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The id of a token of the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Special tokens by their names in the config, for chat templates.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// One more than the largest id this tokenizer gives.
    pub fn vocabulary(&self) -> usize {
        let largest = self.inner.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
    }

    /// `tokenizer.json`, for errors.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Hash of everything that decides which ids a text gets.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn cannot_tokenise(&self, error: &dyn std::fmt::Display) -> Error {
        Error::model(&self.path, format!("cannot tokenise a text: {error}"), COPY_HELP)
    }

    /// The ids of `text`, segment by segment. These are the library's own steps, but each segment is tokenised only
    /// once for all texts that share `cache`.
    fn segments(&self, text: &str, cache: &mut SegmentCache) -> tokenizers::Result<Vec<u32>> {
        if text.len() > MOST_UNCUT {
            return Err(Box::new(Uncut(text.len())));
        }
        let added = self.inner.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
        let known: Vec<Option<u32>> = pieces
            .get_splits(OffsetReferential::Normalized, OffsetType::None)
            .into_iter()
            .map(|(_, _, tokens)| tokens.as_ref().and_then(|tokens| tokens.first()).map(|token| token.id))
            .collect();
        let mut segments = Vec::new();
        pieces.split(|_, segment| {
            segments.push(segment);
            Ok(Vec::<NormalizedString>::new())
        })?;
        let mut segments = segments.into_iter();
        let mut ids = Vec::new();
        for token in known {
            match token {
                Some(id) => ids.push(id),
                None => ids.extend(self.segment(segments.next().ok_or("a segment is lost")?, cache)?),
            }
        }
        Ok(ids)
    }

    fn segment<'a>(
        &self,
        segment: NormalizedString,
        cache: &'a mut SegmentCache,
    ) -> tokenizers::Result<&'a [u32]> {
        let begins = segment.offsets_original().0 == 0;
        let cache = &mut cache.ids[usize::from(begins)];
        // Looked up twice, because a reference that is returned early would keep the cache borrowed.
        if !cache.contains_key(segment.get()) {
            let text = segment.get().to_string();
            let mut words = PreTokenizedString::from(segment);
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut words)?;
            }
            self.inner.get_model().tokenize_in_pretokenized(&mut words, None)?;
            let words = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
            let tokens = words.iter().flat_map(|(_, _, tokens)| tokens.iter().flatten());
            return Ok(cache.entry(text).or_insert(tokens.map(|token| token.id).collect()));
        }
        Ok(&cache[segment.get()])
    }

    fn tokens_around_text(&self) -> Result<[Vec<u32>; 2]> {
        let encode = |added: bool| -> Result<Vec<u32>> {
            match catch(|| self.inner.encode_fast("a", added)) {
                Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
                Ok(Err(error)) => Err(self.cannot_tokenise(error.as_ref())),
                Err(panic) => Err(self.cannot_tokenise(&panic)),
            }
        };
        let (with, without) = (encode(true)?, encode(false)?);
        let before = (0..=with.len().saturating_sub(without.len()))
            .find(|&start| with.get(start..start + without.len()) == Some(without.as_slice()));
        Ok(match before {
            Some(before) => [with[..before].to_vec(), with[before + without.len()..].to_vec()],
            None => [Vec::new(), Vec::new()],
        })
    }
}

/// The tokenizer of (rebuilt) `json`, with all its tokens, and the ids of BOS and EOS.
fn build(
    mut json: Value,
    config: &Map<String, Value>,
    class: Class,
    tokens: &SpecialTokens,
    folder: &Path,
) -> Result<(tokenizers::Tokenizer, Option<u32>, Option<u32>)> {
    let path = folder.join("tokenizer.json");
    if let Some(parts) = json.as_object_mut() {
        // The file may carry the settings of the run that saved it; they would cut and pad in silence.
        parts.insert("truncation".to_string(), Value::Null);
        parts.insert("padding".to_string(), Value::Null);
    }
    let mut inner: tokenizers::Tokenizer =
        serde_json::from_value(json).map_err(|error| not_a_tokenizer(&path, error.to_string()))?;
    refuse_dropout(&inner, &path)?;
    tokens.add_to(&mut inner, folder)?;
    let split = config.get("split_special_tokens").is_some_and(|split| class::truthy(split, false));
    inner.set_encode_special_tokens(split);
    let named = tokens.named();
    let id_of = |name: &str| named.get(name).and_then(|token| inner.token_to_id(token));
    let (bos, eos) = (id_of("bos_token"), id_of("eos_token"));
    if let (true, Some(id), Some(token)) = (class.forces_bos(), bos, named.get("bos_token")) {
        let processor = TemplateProcessing::builder()
            .try_single(vec![token.clone(), "$A".to_string()])
            .map_err(|error| error.to_string())
            .and_then(|builder| {
                builder.special_tokens(vec![(token.clone(), id)]).build().map_err(|error| error.to_string())
            })
            .map_err(|error| config_error(folder, format!("`bos_token`: {error}")))?;
        inner.with_post_processor(Some(processor));
    }
    Ok((inner, bos, eos))
}

/// The tokenizer without the library's cache of words: each thread keeps it for as long as it lives, also when the
/// tokenizer is gone. What a record repeats is kept by [`SegmentCache`], as long as that lives.
fn without_lasting_cache(mut inner: tokenizers::Tokenizer) -> tokenizers::Tokenizer {
    if let ModelWrapper::BPE(model) = inner.get_model() {
        let mut model = model.clone();
        model.resize_cache(0);
        inner.with_model(model);
    }
    inner
}

/// The class that the configs name for this tokenizer.
fn class_of(folder: &Path, config: &Map<String, Value>, tokenizer: &Value) -> Result<Class> {
    let text =
        |config: &Map<String, Value>, key: &str| config.get(key).and_then(Value::as_str).map(str::to_string);
    // A broken config.json is the model loader's to report.
    let model = read_object(&folder.join("config.json")).unwrap_or_default();
    let name = match class::of_family(text(&model, "model_type").as_deref()) {
        Some(name) => Some(name.to_string()),
        None => text(config, "tokenizer_class").or_else(|| text(&model, "tokenizer_class")),
    };
    let (class, known) = Class::of(name.as_deref(), tokenizer);
    if !known {
        tracing::warn!(
            "{}: `tokenizer_class` {} is not known here: tokenizer.json is taken as it stands",
            folder.join("tokenizer_config.json").display(),
            name.unwrap_or_default().escape_debug(),
        );
    }
    Ok(class)
}

fn fingerprint(
    bytes: &[u8],
    config: &Map<String, Value>,
    class: Class,
    special_tokens: &BTreeMap<String, String>,
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes);
    hasher.update(format!("{class:?}").as_bytes()).update(&[0]);
    for part in [
        "added_tokens_decoder",
        "additional_special_tokens",
        "extra_special_tokens",
        "legacy",
        "add_prefix_space",
        "split_special_tokens",
    ] {
        hasher.update(config.get(part).unwrap_or(&Value::Null).to_string().as_bytes()).update(&[0]);
    }
    for (name, token) in special_tokens {
        hasher.update(name.as_bytes()).update(&[0]).update(token.as_bytes()).update(&[0]);
    }
    *hasher.finalize().as_bytes()
}

/// What transformers' `clean_up_tokenization` does.
fn without_spaces_before_marks(text: String) -> String {
    const MARKS: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    MARKS.iter().fold(text, |text, (from, to)| text.replace(from, to))
}

const COPY_HELP: &str =
    "check that tokenizer.json belongs to this model and is whole; copy it again if in doubt";

fn not_a_tokenizer(path: &Path, message: String) -> Error {
    Error::model(path, format!("not a tokenizer: {message}"), COPY_HELP)
}

fn read_tokenizer_file(folder: &Path, path: &Path) -> Result<Vec<u8>> {
    if path.is_file() {
        return fs::read(path).map_err(|error| Error::io(path, "read", error));
    }
    let sentencepiece = folder.join("tokenizer.model");
    let help = if foreign::recognise_file(&sentencepiece) == Some(Foreign::LfsPointer) {
        "tokenizer.model, of which transformers could make it, is a git-lfs pointer: run `git lfs pull` in the folder"
    } else if sentencepiece.is_file() {
        "this folder has a sentencepiece tokenizer.model only; make a tokenizer.json from it with transformers: \
         `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`"
    } else if folder.is_dir() {
        "copy the model's tokenizer.json into the folder"
    } else {
        "check the path of the model folder"
    };
    Err(Error::model(path, "no tokenizer.json in the model folder", help))
}

/// A JSON object file, empty if there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = match foreign::read_text(path, "the tokenizer's config") {
        Ok(text) => text,
        Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(error),
    };
    let broken =
        |message: &str| Error::model(path, format!("broken JSON: {message}"), "copy the model's file again");
    match foreign::json::parse(&text).map_err(|error| broken(&error.to_string()))? {
        Value::Object(members) => Ok(members),
        _ => Err(broken("it is not an object")),
    }
}

/// BPE dropout tokenises the same text differently each time, which no cache or resumed run survives.
fn refuse_dropout(inner: &tokenizers::Tokenizer, path: &Path) -> Result<()> {
    match inner.get_model() {
        ModelWrapper::BPE(model) if model.dropout.is_some_and(|rate| rate > 0.0) => {
            Err(Error::model(path, "BPE dropout is on", "set `dropout` to null in tokenizer.json"))
        }
        _ => Ok(()),
    }
}

fn config_error(folder: &Path, message: String) -> Error {
    Error::model(
        &folder.join("tokenizer_config.json"),
        message,
        "use the tokenizer.json and tokenizer_config.json of the same model",
    )
}
