//! From records to token ids.
//!
//! Prompt and response are tokenised apart, so that no token crosses the boundary and the prompt's ids are the same
//! before both responses. A conversation's prompt text is the template over the prompt messages with the generation
//! prompt; its response text is what the template over prompt and response writes behind that, end token included.
//! Plain text gets an end token and, if the tokenizer puts one in front, a BOS. Prompts are cut from the left
//! (a prepended BOS stays), once for both sides; responses from the right.

use std::path::Path;

use serde_json::{Map, Value};

use super::records::Record;
use super::{Body, Cause, ChatTemplate, Message, TokenizedPair, Tokenizer};
use crate::config::LengthLimits;
use crate::{Error, Result};

/// A model's tokenizer and chat template: all that text needs to become token ids.
#[derive(Debug)]
pub struct TextEncoder {
    pub tokenizer: Tokenizer,
    /// `None` if the model has none; conversations are then refused.
    pub template: Option<ChatTemplate>,
}

/// What became of one record.
#[derive(Clone, Debug, PartialEq)]
pub struct EncodedRecord {
    /// `None` if one of `causes` drops it.
    pub pair: Option<TokenizedPair>,
    pub place: usize,
    pub causes: Vec<Cause>,
}

/// A record's texts, ready to be tokenised apart.
struct Texts {
    prompt: String,
    chosen: String,
    rejected: String,
}

impl TextEncoder {
    /// Loads tokenizer and template of a model folder; `chat_template` is a file to use instead of its template.
    pub fn load(folder: &Path, chat_template: Option<&Path>) -> Result<Self> {
        let (tokenizer, config) = Tokenizer::load(folder)?;
        let special_tokens = tokenizer.special_tokens().clone();
        let template = ChatTemplate::load(folder, &config, special_tokens, chat_template)?;
        Ok(TextEncoder { tokenizer, template })
    }

    /// Token ids of a prompt that a model is to answer: the conversation with the assistant's turn opened. The same
    /// ids stand before a response in training.
    pub fn encode_chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template()?;
        let messages: Vec<&Message> = messages.iter().collect();
        let text = template
            .render(&messages, &Map::new(), true)
            .map_err(|refusal| Error::model(template.path(), refusal.to_string(), TEMPLATE_HELP))?;
        self.encode_prompt(&text)
    }

    /// Token ids of a plain prompt, as in plain-text pairs.
    pub fn encode_text_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_prompt(text)
    }

    /// Token ids of one record of `path`, which errors name.
    pub fn encode(&self, path: &Path, record: &Record, limits: LengthLimits) -> Result<EncodedRecord> {
        let mut causes = Vec::new();
        if has_blank_response(&record.body) {
            causes.push(Cause::BlankResponse);
            return Ok(EncodedRecord { pair: None, place: record.place, causes });
        }
        let texts = match &record.body {
            Body::Text { prompt, chosen, rejected } => {
                Texts { prompt: prompt.clone(), chosen: chosen.clone(), rejected: rejected.clone() }
            }
            Body::Conversation { prompt, chosen, rejected, variables } => {
                let (texts, shortened) =
                    self.render(prompt, chosen, rejected, variables).map_err(|failure| match failure {
                        RenderFailure::Model(error) => error,
                        RenderFailure::Record(message) => {
                            Error::data(path, Some(record.place), message, TEMPLATE_HELP)
                        }
                    })?;
                if shortened {
                    causes.push(Cause::PromptShortened);
                }
                texts
            }
        };
        let pair = TokenizedPair {
            record: record.index,
            prompt: self.encode_prompt(&texts.prompt)?,
            chosen: self.encode_response(&texts.chosen)?,
            rejected: self.encode_response(&texts.rejected)?,
        };
        let pair = self.fit(pair, limits, &mut causes);
        Ok(EncodedRecord { pair, place: record.place, causes })
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

    /// A prompt's ids, begun by the BOS that the tokenizer prepends: once, whoever wrote it.
    fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        if let Some(bos) = self.tokenizer.prepended() {
            let written = ids.iter().take_while(|&&id| id == bos).count();
            match written {
                0 => ids.insert(0, bos),
                _ => drop(ids.drain(1..written)),
            }
        }
        Ok(ids)
    }

    /// A response's ids, closed by exactly one end token. A template may close it with a special token other than
    /// EOS, and may write white space behind it.
    fn encode_response(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        let is_blank = |id: u32| -> Result<bool> {
            Ok(!self.tokenizer.is_special(id) && self.tokenizer.decode(&[id], false)?.trim().is_empty())
        };
        let mut closed = ids.len();
        while closed > 0 && is_blank(ids[closed - 1])? {
            closed -= 1;
        }
        let Some(eos) = self.tokenizer.eos() else {
            return match ids[..closed].last() {
                Some(&last) if self.tokenizer.is_special(last) => Ok(ids),
                _ => Err(Error::model(
                    self.tokenizer.path(),
                    "the tokenizer has no `eos_token` to end a response with",
                    "name it in tokenizer_config.json, or use a chat template that writes the end token",
                )),
            };
        };
        let written = ids[..closed].iter().rev().take_while(|&&id| id == eos).count();
        match ids[..closed].last() {
            Some(&last) if last == eos => drop(ids.drain(closed - written..closed - 1)),
            Some(&last) if self.tokenizer.is_special(last) => {}
            _ => ids.push(eos),
        }
        Ok(ids)
    }

    /// Cuts a pair to the limits; `None` if nothing is left to score on a side.
    fn fit(
        &self,
        mut pair: TokenizedPair,
        limits: LengthLimits,
        causes: &mut Vec<Cause>,
    ) -> Option<TokenizedPair> {
        if pair.prompt.len() > limits.max_prompt_length {
            causes.push(Cause::PromptCut);
            self.cut_prompt(&mut pair.prompt, limits.max_prompt_length);
        }
        let room = limits.max_length.saturating_sub(pair.prompt.len());
        if room == 0 {
            causes.push(Cause::NoRoom);
            return None;
        }
        for (response, cause) in
            [(&mut pair.chosen, Cause::ChosenCut), (&mut pair.rejected, Cause::RejectedCut)]
        {
            if response.len() > room {
                causes.push(cause);
                response.truncate(room);
            }
        }
        // Without a prompt, nothing predicts a response's first token.
        let context_only = usize::from(pair.prompt.is_empty());
        if pair.chosen.len().min(pair.rejected.len()) <= context_only {
            causes.push(Cause::NothingToScore);
            return None;
        }
        if pair.chosen == pair.rejected {
            causes.push(Cause::Identical);
        }
        Some(pair)
    }

    /// Keeps the last `length` tokens, and in their first place the BOS, if the tokenizer puts one there.
    fn cut_prompt(&self, prompt: &mut Vec<u32>, length: usize) {
        let bos = self.tokenizer.prepended();
        prompt.drain(..prompt.len() - length);
        if let (Some(bos), Some(first)) = (bos, prompt.first_mut()) {
            *first = bos;
        }
    }

    /// The texts of a conversation, and whether its prompt had to be shortened to be a prefix of both sides.
    fn render(
        &self,
        prompt: &[Message],
        chosen: &[Message],
        rejected: &[Message],
        variables: &Map<String, Value>,
    ) -> std::result::Result<(Texts, bool), RenderFailure> {
        let template = self.template().map_err(RenderFailure::Model)?;
        let render = |parts: [&[Message]; 2], open: bool| {
            let messages: Vec<&Message> = parts.into_iter().flatten().collect();
            template
                .render(&messages, variables, open)
                .map_err(|refusal| RenderFailure::Record(refusal.to_string()))
        };
        let mut prompt_text = render([prompt, &[]], true)?;
        let with_chosen = render([prompt, chosen], false)?;
        let with_rejected = render([prompt, rejected], false)?;
        let shared = super::common_prefix(&prompt_text, &with_chosen)
            .min(super::common_prefix(&prompt_text, &with_rejected));
        let shortened = shared < prompt_text.len();
        if shortened {
            // Only the opening of the assistant's turn may go; a prompt that is itself rewritten once a response
            // follows would leave some of its own text to be scored as the response.
            let closed_prompt = render([prompt, &[]], false)?;
            if !(prompt_text.starts_with(&closed_prompt) && shared >= closed_prompt.len()) {
                return Err(RenderFailure::Record(
                    "the chat template writes the prompt differently once a response follows it".to_string(),
                ));
            }
            prompt_text.truncate(shared);
        }
        let texts = Texts {
            chosen: with_chosen[shared..].to_string(),
            rejected: with_rejected[shared..].to_string(),
            prompt: prompt_text,
        };
        Ok((texts, shortened))
    }
}

/// Whose fault it is that a conversation has no text.
enum RenderFailure {
    Model(Error),
    Record(String),
}

const TEMPLATE_HELP: &str = "mend the conversation (roles usually alternate, a system message comes first), or pass another --chat-template FILE";

fn has_blank_response(body: &Body) -> bool {
    let blank = |messages: &[Message]| messages.iter().all(Message::is_blank);
    match body {
        Body::Text { chosen, rejected, .. } => chosen.trim().is_empty() || rejected.trim().is_empty(),
        Body::Conversation { chosen, rejected, .. } => blank(chosen) || blank(rejected),
    }
}
