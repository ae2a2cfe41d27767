//! The token that ends an assistant's turn: where a model that was trained with a template stops.
//!
//! It is found by looking: a conversation is rendered, and the first special token that the template writes between
//! the assistant's last content and the end, or the next message, is the one. Where a template writes none there, a
//! trained response ends with the tokenizer's `eos_token`, and that is the one.

use serde_json::Map;

use super::ChatTemplate;
use crate::Result;
use crate::data::{Message, Tokenizer};

/// Contents that no template writes by itself or looks for.
const QUESTION: &str = "mmpoquestion";
const ANSWER: &str = "mmpoanswer";

impl ChatTemplate {
    /// The token that ends an assistant's turn of this template; `None` where neither template nor tokenizer has one,
    /// or the template takes none of the conversations that are tried.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Result<Option<u32>> {
        let turn = |role: &str, content: &str| Message::new(role, content);
        let plain = [turn("user", QUESTION), turn("assistant", ANSWER)];
        let with_system = [turn("system", QUESTION), turn("user", QUESTION), turn("assistant", ANSWER)];
        for conversation in [plain.as_slice(), with_system.as_slice()] {
            let messages: Vec<&Message> = conversation.iter().collect();
            let Ok(text) = self.render(&messages, &Map::new(), false) else { continue };
            let Some(at) = text.rfind(ANSWER) else { continue };
            let written = tokenizer.encode(&text[at + ANSWER.len()..])?;
            let special = written.into_iter().find(|&id| tokenizer.is_special(id));
            return Ok(special.or(tokenizer.eos()));
        }
        Ok(tokenizer.eos())
    }
}
