//! The text of tokens as they are generated.

use super::Tokenizer;
use crate::Result;

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

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        StreamDecoder { tokenizer, skip_special_tokens, ids: Vec::new(), context: 0, shown: 0 }
    }

    /// Takes the next token; returns the text that is certain now, perhaps none.
    ///
    /// # Errors
    /// Those of the tokenizer.
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
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.shown], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.ids[self.context..], self.skip_special_tokens)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}
