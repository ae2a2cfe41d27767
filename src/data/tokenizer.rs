//! The tokenizer of a Hugging Face model folder.
//!
//! `tokenizer.json` holds the tokenizer; `tokenizer_config.json` (and, in older folders, `special_tokens_map.json`)
//! say which tokens begin and end a sequence.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, ModelWrapper};

use crate::foreign::{self, Foreign};
use crate::{Error, Result};

/// The named special tokens that configs and chat templates know.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Text to token ids and back. Encoding never adds, cuts or pads anything by itself.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    special_tokens: BTreeMap<String, String>,
    special_ids: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    prepended: Option<u32>,
    fingerprint: [u8; 32],
}

impl Tokenizer {
    /// Loads the tokenizer of `folder`; also gives its `tokenizer_config.json`, where chat templates may stand.
    pub fn load(folder: &Path) -> Result<(Self, Map<String, Value>)> {
        let path = folder.join("tokenizer.json");
        let bytes = read_tokenizer_file(folder, &path)?;
        foreign::refuse(&path, &bytes, "the tokenizer")?;
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let legacy_map = read_object(&folder.join("special_tokens_map.json"))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| {
            Error::model(&path, format!("not a tokenizer: {error}"), "copy the model's tokenizer.json again")
        })?;
        // The file may carry the settings of the run that saved it; they would cut and pad in silence.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::model(&path, error.to_string(), REPORT_HELP))?;
        refuse_dropout(&inner, &path)?;
        add_missing_tokens(&mut inner, &config, folder)?;

        let mut special_tokens = BTreeMap::new();
        for name in SPECIAL_NAMES {
            let value = config.get(name).filter(|value| !value.is_null()).or_else(|| legacy_map.get(name));
            if let Some(token) = special_token(name, value, folder)? {
                special_tokens.insert(name.to_string(), token);
            }
        }
        let id_of = |name: &str| match special_tokens.get(name) {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(Error::model(
                    &path,
                    format!("`{name}` is {token:?}, which is no token of this tokenizer"),
                    "use the tokenizer.json and tokenizer_config.json of the same model",
                )),
            },
        };
        let (bos, eos) = (id_of("bos_token")?, id_of("eos_token")?);
        let special_ids = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .chain(bos)
            .chain(eos)
            .collect();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        for part in ["added_tokens_decoder", "add_bos_token"] {
            hasher.update(config.get(part).unwrap_or(&Value::Null).to_string().as_bytes()).update(&[0]);
        }
        for (name, token) in &special_tokens {
            hasher.update(name.as_bytes()).update(&[0]).update(token.as_bytes()).update(&[0]);
        }
        let fingerprint = *hasher.finalize().as_bytes();
        let mut tokenizer =
            Tokenizer { inner, path, special_tokens, special_ids, bos, eos, prepended: None, fingerprint };
        tokenizer.prepended = match config.get("add_bos_token") {
            Some(Value::Bool(true)) => bos,
            Some(Value::Bool(false)) => None,
            _ => tokenizer.prepended_by_post_processor()?,
        };
        Ok((tokenizer, config))
    }

    /// Token ids of `text`; special tokens written in it become their ids, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    /// Text of `ids`, without special tokens if `skip_special_tokens`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner.decode(ids, skip_special_tokens).map_err(|error| {
            Error::model(&self.path, format!("cannot decode {} tokens: {error}", ids.len()), REPORT_HELP)
        })
    }

    /// Decodes tokens as they are generated.
    pub fn stream(&self, skip_special_tokens: bool) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, skip_special_tokens, ids: Vec::new(), context: 0, shown: 0 }
    }

    /// `bos_token`, whether or not the tokenizer puts it in front by itself.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// `eos_token`. A model may end on others too: its generation config lists those.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token this tokenizer puts in front of every sequence: by `add_bos_token` if the config has it, else by
    /// its post-processor.
    pub fn prepended(&self) -> Option<u32> {
        self.prepended
    }

    /// Whether `id` is a special token (an end-of-turn marker, not a word).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

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

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match self.inner.encode_fast(text, add_special_tokens) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => {
                Err(Error::model(&self.path, format!("cannot tokenise a text: {error}"), REPORT_HELP))
            }
        }
    }

    fn prepended_by_post_processor(&self) -> Result<Option<u32>> {
        let (with, without) = (self.encode_with("a", true)?, self.encode_with("a", false)?);
        Ok(with.first().copied().filter(|first| with.len() > without.len() && without.first() != Some(first)))
    }
}

/// Gives out the text of a growing token list as soon as it is certain: a character whose bytes are spread over
/// several tokens appears when its last one is there, and spaces come out as in the text as a whole.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Tokens from here on are decoded together with new ones: decoders treat the first token of a text specially.
    context: usize,
    /// Tokens before this one have been given out.
    shown: usize,
}

impl StreamDecoder<'_> {
    /// Takes the next token; the text that it makes certain, perhaps none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        (self.context, self.shown) = (self.shown, self.ids.len());
        Ok(text)
    }

    /// The text still held back, complete or not.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.shown], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.ids[self.context..], self.skip_special_tokens)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}

const REPORT_HELP: &str = "check that tokenizer.json belongs to this model and is whole";

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
    serde_json::from_str(&text)
        .map_err(|error| Error::model(path, format!("broken JSON: {error}"), "copy the model's file again"))
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

/// Adds the tokens that only `added_tokens_decoder` of the config lists, under the ids it gives them.
fn add_missing_tokens(
    inner: &mut tokenizers::Tokenizer,
    config: &Map<String, Value>,
    folder: &Path,
) -> Result<()> {
    let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut missing: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in listed {
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        let (Ok(id), Some(content)) = (id.parse(), token.get("content").and_then(Value::as_str)) else {
            return Err(config_error(folder, format!("`added_tokens_decoder` has a broken entry `{id}`")));
        };
        if inner.token_to_id(content) == Some(id) {
            continue;
        }
        let added = AddedToken::from(content, flag("special"))
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(flag("normalized"));
        missing.push((id, added));
    }
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let content = token.content.clone();
        let given = inner.add_tokens([token]).ok().and_then(|_| inner.token_to_id(&content));
        if given != Some(id) {
            let found = given.map_or_else(|| "none".to_string(), |given| given.to_string());
            return Err(config_error(
                folder,
                format!(
                    "`added_tokens_decoder` gives {content:?} the id {id}, tokenizer.json gives it {found}"
                ),
            ));
        }
    }
    Ok(())
}

/// A special token as older and newer configs write it: a string, or an object with its `content`.
fn special_token(name: &str, value: Option<&Value>, folder: &Path) -> Result<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(token)) => Ok(Some(token.clone())),
        Some(Value::Object(token)) if token.get("content").is_some_and(Value::is_string) => {
            Ok(token.get("content").and_then(Value::as_str).map(str::to_string))
        }
        Some(_) => {
            Err(config_error(folder, format!("`{name}` is neither a string nor an object with `content`")))
        }
    }
}

fn config_error(folder: &Path, message: String) -> Error {
    Error::model(
        &folder.join("tokenizer_config.json"),
        message,
        "use the tokenizer.json and tokenizer_config.json of the same model",
    )
}
