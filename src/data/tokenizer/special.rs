//! Special and added tokens of a model folder, in the order and with the flags with which transformers adds them.
//!
//! They stand in several files: `added_tokens` of `tokenizer.json`; `added_tokens_decoder`, the named tokens and lists
//! of more of `tokenizer_config.json`; and, in older folders, `special_tokens_map.json` and `added_tokens.json`, which
//! count only where the config has no `added_tokens_decoder`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::class::Class;
use super::{config_error, read_object};
use crate::{Error, Result};

/// The named special tokens that every tokenizer may have. A config may name more, as `..._token`.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The tokens that the files of a folder list.
pub(super) struct SpecialTokens {
    /// Named tokens with their names, those of [`NAMES`] first.
    named: Vec<(String, AddedToken)>,
    /// More special tokens, without names.
    extra: Vec<AddedToken>,
    /// Tokens listed with their ids, by id.
    listed: Vec<(u32, AddedToken)>,
    /// Names of [`NAMES`] that a file gives, rather than the class.
    given: HashSet<String>,
}

impl SpecialTokens {
    /// Reads the tokens of `folder`; `config` is its `tokenizer_config.json`, `tokenizer` its `tokenizer.json`.
    pub(super) fn read(
        folder: &Path,
        config: &Map<String, Value>,
        tokenizer: &Value,
        class: Class,
    ) -> Result<Self> {
        let mut config = config.clone();
        let listed = match config.get("added_tokens_decoder") {
            Some(Value::Object(listed)) => listed_tokens(folder, listed)?,
            _ => {
                config.extend(read_object(&folder.join("special_tokens_map.json"))?);
                older_listed_tokens(folder, &config, tokenizer)?
            }
        };
        let listed: Vec<(u32, AddedToken)> = listed.into_iter().collect();
        let known = |token: AddedToken| {
            listed
                .iter()
                .find(|(_, other)| other.content == token.content)
                .map_or(token, |(_, other)| other.clone())
        };

        let mut named = Vec::new();
        let mut given = HashSet::new();
        for name in NAMES {
            let default = class.default_tokens().iter().find(|(known, _)| *known == name);
            let token = match config.get(name) {
                None => default.map(|(_, token)| AddedToken::from(*token, true)),
                Some(value) => named_token(folder, name, value)?,
            };
            if let Some(token) = token {
                if config.get(name).is_some() {
                    given.insert(name.to_string());
                }
                named.push((name.to_string(), known(token)));
            }
        }
        for (name, token) in class.default_tokens() {
            if !NAMES.contains(name) && !config.contains_key(*name) {
                named.push((name.to_string(), AddedToken::from(*token, true)));
            }
        }
        for (name, value) in &config {
            let is_token = matches!(value, Value::String(_)) || value.get("content").is_some();
            if name.ends_with("_token") && !NAMES.contains(&name.as_str()) && is_token {
                named.extend(named_token(folder, name, value)?.map(|token| (name.clone(), token)));
            }
        }
        let extra = extra_tokens(folder, &config, &mut named)?;
        Ok(SpecialTokens { named, extra, listed, given })
    }

    /// The named tokens' texts.
    pub(super) fn named(&self) -> BTreeMap<String, String> {
        self.named.iter().map(|(name, token)| (name.clone(), token.content.clone())).collect()
    }

    /// Adds what `inner` does not have yet.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) where `bos_token` or `eos_token` of a file is no token of the tokenizer,
    /// so that the files belong to two models.
    pub(super) fn add_to(&self, inner: &mut tokenizers::Tokenizer, folder: &Path) -> Result<()> {
        let present = inner.get_added_tokens_decoder();
        let mut seen: HashSet<String> = present.values().map(|token| token.content.clone()).collect();
        let mut missing: Vec<AddedToken> = Vec::new();
        for (_, token) in &self.listed {
            if !present.values().any(|known| known == token) {
                missing.push(token.clone());
            }
            seen.insert(token.content.clone());
        }
        for name in ["bos_token", "eos_token"].into_iter().filter(|name| self.given.contains(*name)) {
            let Some((_, token)) = self.named.iter().find(|(known, _)| known == name) else { continue };
            if !seen.contains(&token.content) && inner.token_to_id(&token.content).is_none() {
                return Err(Error::model(
                    &folder.join("tokenizer.json"),
                    format!("`{name}` is {:?}, which is no token of this tokenizer", token.content),
                    "use the tokenizer.json and tokenizer_config.json of the same model",
                ));
            }
        }
        for token in self.named.iter().map(|(_, token)| token).chain(&self.extra) {
            if seen.insert(token.content.clone()) {
                missing.push(token.clone());
            }
        }
        for token in &mut missing {
            token.special |= self.named.iter().any(|(_, named)| named.content == token.content);
        }
        inner
            .add_tokens(missing)
            .map_err(|error| config_error(folder, format!("cannot add its tokens: {error}")))?;
        self.warn_of_other_ids(inner, folder);
        Ok(())
    }

    /// transformers lets `tokenizer.json` decide which id a listed token has, and so do we; but two ids for one token
    /// say that the files were edited or belong to two models.
    fn warn_of_other_ids(&self, inner: &tokenizers::Tokenizer, folder: &Path) {
        let other = self.listed.iter().find(|(id, token)| inner.token_to_id(&token.content) != Some(*id));
        if let Some((id, token)) = other {
            let found = inner.token_to_id(&token.content);
            tracing::warn!(
                "{}: `added_tokens_decoder` gives {:?} the id {id}, tokenizer.json gives it {}; the latter is used",
                folder.join("tokenizer_config.json").display(),
                token.content,
                found.map_or_else(|| "none".to_string(), |found| found.to_string()),
            );
        }
    }
}

fn listed_tokens(folder: &Path, listed: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>> {
    let read = |(id, token): (&String, &Value)| match (id.parse(), added_token(token)) {
        (Ok(id), Some(token)) => Ok((id, token)),
        _ => Err(config_error(folder, format!("`added_tokens_decoder` has a broken entry `{id}`"))),
    };
    listed.iter().map(read).collect()
}

/// The lists of folders whose config has none: `added_tokens.json`, then `tokenizer.json` itself.
fn older_listed_tokens(
    folder: &Path,
    config: &Map<String, Value>,
    tokenizer: &Value,
) -> Result<BTreeMap<u32, AddedToken>> {
    let mut listed = BTreeMap::new();
    let special: Vec<&Value> = NAMES.iter().filter_map(|name| config.get(*name)).collect();
    for (content, id) in read_object(&folder.join("added_tokens.json"))? {
        let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
            return Err(Error::model(
                &folder.join("added_tokens.json"),
                format!("{content:?} has no id"),
                "the file gives each token a number; copy the model's file again",
            ));
        };
        let is_special = special.iter().any(|token| **token == *content || token["content"] == *content);
        listed.insert(id, AddedToken::from(content, is_special));
    }
    for token in tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
        let id = token.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        if let (Some(id), Some(token)) = (id, added_token(token)) {
            listed.insert(id, token);
        }
    }
    Ok(listed)
}

/// A token with its flags; those that are absent have the tokenizer library's defaults.
fn added_token(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    let content = value.get("content").and_then(Value::as_str)?;
    Some(
        AddedToken::from(content, special)
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}

/// More special tokens of a config: those without names are returned, those with names are added to `named`.
fn extra_tokens(
    folder: &Path,
    config: &Map<String, Value>,
    named: &mut Vec<(String, AddedToken)>,
) -> Result<Vec<AddedToken>> {
    let mut extra = Vec::new();
    let more = config.get("extra_special_tokens").filter(|more| super::class::truthy(more, false));
    match more.or_else(|| config.get("additional_special_tokens")) {
        Some(Value::Array(tokens)) => {
            for token in tokens {
                extra.extend(named_token(folder, "additional_special_tokens", token)?);
            }
        }
        Some(Value::Object(tokens)) => {
            for (name, token) in tokens {
                named.extend(named_token(folder, name, token)?.map(|token| (name.clone(), token)));
            }
        }
        _ => {}
    }
    Ok(extra)
}

/// A special token as older and newer configs write it: a string, or an object with its `content`.
fn named_token(folder: &Path, name: &str, value: &Value) -> Result<Option<AddedToken>> {
    match value {
        Value::Null => Ok(None),
        Value::String(token) => Ok(Some(AddedToken::from(token.as_str(), true))),
        Value::Object(_) if added_token(value).is_some() => Ok(added_token(value)),
        _ => Err(config_error(folder, format!("`{name}` is neither a string nor an object with `content`"))),
    }
}
