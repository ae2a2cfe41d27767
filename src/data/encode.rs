//! From records to token ids: each text is tokenised in one piece, as the model sees it and as TRL does it.
//!
//! Prompt and response are tokenised as one text, once with each response. The prompt's share is what both have in
//! common with the tokens of the prompt alone; all after it is the response. Where a token reaches across the boundary,
//! or the template writes the prompt's end otherwise once a response follows, that end is left out and the response
//! begins earlier: the model is scored on the tokens it would see and give. See `docs/tokens.md`.
//!
//! A conversation's text is the template's, and nothing is added to it. Plain text gets an end token, and what the
//! tokenizer puts around plain text (a BOS in most). Prompts are cut from the left (a BOS that the tokenizer puts in
//! front stays), once for both sides; responses from the right.

use std::path::Path;

use serde_json::{Map, Value};

use super::lost_text::{lost_text, quoted_start};
use super::records::Record;
use super::tokenizer::SegmentCache;
use super::{Body, Cause, ChatTemplate, Message, TokenizedPair, Tokenizer};
use crate::config::{LengthLimits, Policy, TemplateDate};
use crate::{Error, Result};

/// A model's tokenizer and chat template: all that text needs to become token ids.
#[derive(Debug)]
pub struct TextEncoder {
    /// Turns text into token ids.
    pub tokenizer: Tokenizer,
    /// `None` if the model has none; conversations are then refused.
    pub template: Option<ChatTemplate>,
}

/// What became of one record.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedRecord {
    /// `None` if one of `causes` drops it.
    pub pair: Option<TokenizedPair>,
    /// 1-based line or record.
    pub place: usize,
    /// What happened to it.
    pub causes: Vec<Cause>,
    /// What happened, in words, for those of `causes` that need them.
    pub examples: Vec<(Cause, String)>,
    /// Tokens of prompt, chosen and rejected response before anything was cut; `None` where nothing was tokenised.
    pub uncut: Option<[usize; 3]>,
}

impl EncodedRecord {
    /// A record that is left out for `cause` before it is tokenised.
    pub(super) fn without_pair(place: usize, cause: Cause) -> Self {
        EncodedRecord { pair: None, place, causes: vec![cause], examples: Vec::new(), uncut: None }
    }
}

/// What tokenising is to do beyond turning text into ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cutting {
    /// Lengths that pairs are cut to.
    pub limits: LengthLimits,
    /// What is done with tokens after the last end token of a response.
    pub after_end: Policy,
    /// The tokens that end a response, as [`TextEncoder::end_tokens`] has them. Needed only where `after_end` is not
    /// [`Policy::Keep`].
    pub ends: Vec<u32>,
}

/// A record's texts: the prompt alone, and followed by each response.
struct Texts {
    prompt: String,
    with_chosen: String,
    with_rejected: String,
    /// Whether these are plain texts rather than a template's.
    plain: bool,
}

/// A pair whose ids may still be cut.
struct Draft {
    record: usize,
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

/// What happened to a record so far.
#[derive(Default)]
struct Events {
    causes: Vec<Cause>,
    examples: Vec<(Cause, String)>,
}

impl Events {
    fn add(&mut self, cause: Cause) {
        self.causes.push(cause);
    }

    fn add_with(&mut self, cause: Cause, example: String) {
        self.causes.push(cause);
        self.examples.push((cause, example));
    }
}

impl TextEncoder {
    /// Loads tokenizer and template of a model folder; `chat_template` is the name of one of its templates, or a file,
    /// to use instead.
    ///
    /// # Errors
    /// Those of [`Tokenizer::load`] and [`ChatTemplate::load`].
    pub fn load(folder: &Path, chat_template: Option<&Path>) -> Result<Self> {
        let (tokenizer, config) = Tokenizer::load(folder)?;
        let special_tokens = tokenizer.special_tokens().clone();
        let template = ChatTemplate::load(folder, &config, special_tokens, chat_template)?;
        Ok(TextEncoder { tokenizer, template })
    }

    /// Fixes the date that the chat template's functions give, where one is given.
    ///
    /// # Errors
    /// [`Error::Config`] for a date that cannot be counted.
    pub fn at(self, date: Option<TemplateDate>) -> Result<Self> {
        if let (Some(date), Some(template)) = (date, &self.template) {
            let seconds = date.unix_seconds().map_err(|error| {
                Error::config(format!("`--template-date`: {error}"), "give a date such as 2024-07-26")
            })?;
            template.fix_time(seconds)?;
        }
        Ok(self)
    }

    /// Token ids of a prompt that a model is to answer: the conversation with the assistant's turn opened. The same ids
    /// stand before a response in training, but for an end that belongs to the response there.
    ///
    /// # Errors
    /// [`Error::Model`] for a model without a chat template, and for a prompt that the template refuses; those of the
    /// tokenizer.
    pub fn encode_chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template()?;
        let messages: Vec<&Message> = messages.iter().collect();
        let text = template
            .render(&messages, &Map::new(), true)
            .map_err(|refusal| Error::model(template.path(), refusal.to_string(), TEMPLATE_HELP))?;
        self.tokenizer.encode(&text)
    }

    /// Token ids of a plain prompt, as in plain-text pairs: without the tokens that the tokenizer puts after plain
    /// text, since the prompt goes on.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn encode_text_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode_plain(text, &mut SegmentCache::default())?;
        ids.truncate(ids.len() - self.tokenizer.appended());
        Ok(ids)
    }

    /// The tokens that end a response: the tokenizer's `eos_token`, and what the chat template writes after the
    /// assistant's turn.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn end_tokens(&self) -> Result<Vec<u32>> {
        let mut ends: Vec<u32> = self.tokenizer.eos().into_iter().collect();
        if let Some(template) = &self.template {
            ends.extend(template.end_of_turn(&self.tokenizer)?);
        }
        ends.sort_unstable();
        ends.dedup();
        Ok(ends)
    }

    /// Token ids of one record of `path`, which errors name.
    ///
    /// # Errors
    /// [`Error::Data`] for a record that the chat template refuses or that is too long to be tokenised;
    /// [`Error::Model`] where tokenizer or template cannot be used.
    pub fn encode(&self, path: &Path, record: &Record, cutting: &Cutting) -> Result<EncodedRecord> {
        let mut events = Events::default();
        let mut uncut = None;
        let pair = match has_blank_response(&record.body) {
            true => {
                events.add(Cause::BlankResponse);
                None
            }
            false => {
                let texts = self.texts(path, record, &mut events)?;
                let pair = self.tokenise(record.index, &texts, &mut events).map_err(|error| match error {
                    // A text that is too long, which the tokenizer cannot place.
                    Error::Data { message, help, .. } => Error::data(path, Some(record.place), message, help),
                    error => error,
                })?;
                uncut = Some([&pair.prompt, &pair.chosen, &pair.rejected].map(Vec::len));
                self.fit(look_after_ends(pair, cutting, &mut events), cutting.limits, &mut events)
            }
        };
        let Events { causes, examples } = events;
        Ok(EncodedRecord { pair, place: record.place, causes, examples, uncut })
    }

    fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::model(
                self.tokenizer.path(),
                "the model has no chat template, and the text is a conversation",
                "pass --chat-template FILE, or use plain-text prompts and pairs",
            )
        })
    }

    fn texts(&self, path: &Path, record: &Record, events: &mut Events) -> Result<Texts> {
        match &record.body {
            Body::Text { prompt, chosen, rejected } => {
                let eos = self.end_of_text()?;
                let with = |response: &str| {
                    let end = if response.ends_with(eos) { "" } else { eos };
                    [prompt, response, end].concat()
                };
                Ok(Texts {
                    prompt: prompt.clone(),
                    with_chosen: with(chosen),
                    with_rejected: with(rejected),
                    plain: true,
                })
            }
            Body::Conversation { prompt, chosen, rejected, variables } => {
                let texts =
                    self.render([prompt, chosen, rejected], variables).map_err(|failure| match failure {
                        RenderFailure::Model(error) => error,
                        RenderFailure::Record(message) => {
                            Error::data(path, Some(record.place), message, TEMPLATE_HELP)
                        }
                    })?;
                note_lost_text([prompt, chosen, rejected], &texts, events);
                Ok(texts)
            }
        }
    }

    /// `eos_token` as text, which ends a plain response.
    fn end_of_text(&self) -> Result<&str> {
        self.tokenizer.special_tokens().get("eos_token").map(String::as_str).ok_or_else(|| {
            Error::model(
                self.tokenizer.path(),
                "the tokenizer has no `eos_token` to end a response with",
                "name it in tokenizer_config.json",
            )
        })
    }

    /// The three texts as ids, cut where both wholes differ from the prompt alone.
    fn tokenise(&self, record: usize, texts: &Texts, events: &mut Events) -> Result<Draft> {
        let mut cache = SegmentCache::default();
        let mut encode = |text: &str| match texts.plain {
            true => self.tokenizer.encode_plain(text, &mut cache),
            false => self.tokenizer.encode_with(text, &mut cache),
        };
        let prompt = encode(&texts.prompt)?;
        let (chosen, rejected) = (encode(&texts.with_chosen)?, encode(&texts.with_rejected)?);
        let shared = common_tokens(&prompt, &chosen).min(common_tokens(&prompt, &rejected));
        let ended = if texts.plain { prompt.len() - self.tokenizer.appended() } else { prompt.len() };
        if shared < ended {
            self.note_shorter_prompt(texts, &prompt, [&chosen, &rejected], shared, events)?;
        }
        if texts.plain {
            let bos = self.tokenizer.prepended();
            if bos.is_some() && bos == prompt.get(1).copied() {
                events.add(Cause::BosTwice);
            }
        } else if !(self.is_closed(&chosen[shared..])? && self.is_closed(&rejected[shared..])?) {
            events.add(Cause::NoEndToken);
        }
        let mut pair = Draft { record, prompt, chosen, rejected };
        pair.prompt.truncate(shared);
        for response in [&mut pair.chosen, &mut pair.rejected] {
            response.drain(..shared);
        }
        // Exact sizes: these stay for the whole run.
        for ids in [&mut pair.prompt, &mut pair.chosen, &mut pair.rejected] {
            ids.shrink_to_fit();
        }
        Ok(pair)
    }

    /// Counts a prompt of which only `shared` tokens stand before both responses.
    fn note_shorter_prompt(
        &self,
        texts: &Texts,
        prompt: &[u32],
        wholes: [&[u32]; 2],
        shared: usize,
        events: &mut Events,
    ) -> Result<()> {
        let left_out = quoted_start(&self.tokenizer.tail_text(prompt, shared)?);
        if !(texts.with_chosen.starts_with(&texts.prompt) && texts.with_rejected.starts_with(&texts.prompt)) {
            events.add_with(Cause::PromptShortened, format!("the prompt loses its end {left_out}"));
            return Ok(());
        }
        let firsts =
            wholes.map(|whole| self.tokenizer.tail_text(&whole[..whole.len().min(shared + 1)], shared));
        let [chosen, rejected] = firsts;
        events.add_with(
            Cause::BoundaryToken,
            format!(
                "the prompt's end {left_out} is left out, and the responses begin with the tokens {:?} and {:?}",
                chosen?, rejected?
            ),
        );
        Ok(())
    }

    /// Whether a special token ends the response; a template may write white space after it.
    fn is_closed(&self, response: &[u32]) -> Result<bool> {
        for &id in response.iter().rev() {
            if self.tokenizer.is_special(id) {
                return Ok(true);
            }
            if !self.tokenizer.decode(&[id], false)?.trim().is_empty() {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Cuts a pair to the limits; `None` if nothing is left to score on a side.
    fn fit(&self, mut pair: Draft, limits: LengthLimits, events: &mut Events) -> Option<TokenizedPair> {
        if pair.prompt.len() > limits.max_prompt_length {
            events.add(Cause::PromptCut);
            self.cut_prompt(&mut pair.prompt, limits.max_prompt_length);
        }
        let room = limits.max_length.saturating_sub(pair.prompt.len());
        if room == 0 {
            events.add(Cause::NoRoom);
            return None;
        }
        for (response, cause) in
            [(&mut pair.chosen, Cause::ChosenCut), (&mut pair.rejected, Cause::RejectedCut)]
        {
            if response.len() > room {
                events.add(cause);
                response.truncate(room);
            }
        }
        if pair.chosen.is_empty() || pair.rejected.is_empty() {
            events.add(Cause::ResponseNotWritten);
            return None;
        }
        // Without a prompt, nothing predicts a response's first token.
        let context_only = usize::from(pair.prompt.is_empty());
        if pair.chosen.len().min(pair.rejected.len()) <= context_only {
            events.add(Cause::NothingToScore);
            return None;
        }
        if pair.chosen == pair.rejected {
            events.add(Cause::Identical);
        }
        let Draft { record, prompt, chosen, rejected } = pair;
        Some(TokenizedPair {
            record,
            prompt: prompt.into(),
            chosen: chosen.into(),
            rejected: rejected.into(),
        })
    }

    /// Keeps the last `length` tokens, and in their first place the BOS that the tokenizer puts in front, if it is
    /// there.
    fn cut_prompt(&self, prompt: &mut Vec<u32>, length: usize) {
        let bos = self.tokenizer.prepended().filter(|bos| prompt.first() == Some(bos));
        prompt.drain(..prompt.len() - length);
        prompt.shrink_to_fit();
        if let (Some(bos), Some(first)) = (bos, prompt.first_mut()) {
            *first = bos;
        }
    }

    /// The texts of a conversation: its prompt with the assistant's turn opened, and with each response.
    fn render(
        &self,
        [prompt, chosen, rejected]: [&[Message]; 3],
        variables: &Map<String, Value>,
    ) -> std::result::Result<Texts, RenderFailure> {
        let template = self.template().map_err(RenderFailure::Model)?;
        let render = |response: &[Message], open: bool| {
            let messages: Vec<&Message> = prompt.iter().chain(response).collect();
            template.render(&messages, variables, open).map_err(|refusal| match refusal.exceeded {
                true => {
                    RenderFailure::Model(Error::model(template.path(), refusal.to_string(), EXCEEDED_HELP))
                }
                false => RenderFailure::Record(refusal.to_string()),
            })
        };
        Ok(Texts {
            prompt: render(&[], true)?,
            with_chosen: render(chosen, false)?,
            with_rejected: render(rejected, false)?,
            plain: false,
        })
    }
}

/// Counts tokens after the last end token of each response, and cuts them off where that is asked for.
fn look_after_ends(mut pair: Draft, cutting: &Cutting, events: &mut Events) -> Draft {
    if cutting.after_end == Policy::Keep {
        return pair;
    }
    let mut found = false;
    for response in [&mut pair.chosen, &mut pair.rejected] {
        let after = tokens_after_end(response, &cutting.ends);
        found |= after > 0;
        if cutting.after_end == Policy::Cut {
            response.truncate(response.len() - after);
        }
    }
    if found {
        events.add(Cause::AfterEnd);
    }
    pair
}

/// How many tokens follow the last of `ends` in a response; 0 where it has none.
pub(crate) fn tokens_after_end(response: &[u32], ends: &[u32]) -> usize {
    let last = response.iter().rposition(|id| ends.contains(id));
    last.map_or(0, |last| response.len() - last - 1)
}

/// Counts what the template leaves out of the messages.
fn note_lost_text([prompt, chosen, rejected]: [&[Message]; 3], texts: &Texts, events: &mut Events) {
    let lost = |messages: &[Message], written: &str, from: usize| {
        messages.iter().find_map(|message| {
            // A response's text may begin in the opening of its turn.
            let mut start = from.saturating_sub(message.content.len());
            while !written.is_char_boundary(start) {
                start -= 1;
            }
            lost_text(&message.content, &written[start..]).map(|lost| {
                let (characters, start) = (lost.chars().count(), quoted_start(lost));
                format!("{characters} characters of the {} message, from {start}", message.role)
            })
        })
    };
    if let Some(lost) = lost(prompt, &texts.with_chosen, 0) {
        events.add_with(Cause::PromptTextLost, lost);
    }
    let sides = [("chosen", chosen, &texts.with_chosen), ("rejected", rejected, &texts.with_rejected)];
    let lost = sides.into_iter().find_map(|(side, messages, written)| {
        let shared = super::common_prefix(&texts.prompt, written);
        lost(messages, written, shared).map(|lost| format!("{side} response: {lost}"))
    });
    if let Some(lost) = lost {
        events.add_with(Cause::ResponseTextLost, lost);
    }
}

/// How many first tokens both have in common.
fn common_tokens(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// Who has to mend it when a conversation gives no text: whoever made the model, or whoever wrote the record.
enum RenderFailure {
    Model(Error),
    Record(String),
}

const EXCEEDED_HELP: &str = "mend the template, or pass another --chat-template FILE";
const TEMPLATE_HELP: &str = "mend the conversation (roles usually alternate, a system message comes first), or pass another --chat-template FILE";

fn has_blank_response(body: &Body) -> bool {
    let blank = |messages: &[Message]| messages.iter().all(Message::is_blank);
    match body {
        Body::Text { chosen, rejected, .. } => chosen.trim().is_empty() || rejected.trim().is_empty(),
        Body::Conversation { chosen, rejected, .. } => blank(chosen) || blank(rejected),
    }
}
