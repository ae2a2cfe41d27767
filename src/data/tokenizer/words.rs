//! Tokenising word by word, with the ids that the library gives the whole.
//!
//! A model sees a text in words, each by itself, and most words come again and again. The library records where each
//! byte of each word came from, which takes most of its time and a hundred bytes of memory per byte of text. Here the
//! text is cut into the same words as slices, each new word is tokenised by the library's model once, and a long text
//! costs little more than its ids. Layouts that are not understood ([`Layout`]) are left to the library.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;
use regex_automata::meta::Cache;
use serde_json::Value;
use tokenizers::Model;

use super::added::{AddedTokens, Part};
use super::layout::{InFront, Kind, Layout, Step};
use super::merges::{Merges, SPACE};
use super::normal_form::composed;
use super::{MOST_UNCUT, SegmentCache, Uncut};

/// A word of this many bytes or more is merged here, in little memory, rather than by the library.
const LONG_WORD: usize = 4096;
/// Bytes of a word up to which it is worth remembering, and the number of words that are remembered.
const REMEMBERED_BYTES: usize = 64;
const REMEMBERED_WORDS: usize = 1 << 16;
/// Bytes of a segment up to which it is worth remembering for the other texts of its record.
const REMEMBERED_SEGMENT: usize = 1 << 16;

/// A text with a little of most things that may come: letters, marks and digits of several scripts, white space of all
/// kinds, the letters of contractions, and what a template writes.
const PROBE: &str = "<s>[INST] It's  I'LL we'd 'tis x's\n\n\n  don't 3.14 1234567 ٣٤ Ⅷ ½ \t\ttabs \r\n end \u{a0}\u{2003}wide   \
    snake_case CamelCase {\"a\": [1, 2]} <|im_start|>user\n<|eot_id|></s> Größe é e\u{301} ﬁ \u{1e9b}\u{323} naïve — “so” … \
    月は大きい。カ\u{3099}が 한국어 \u{1112}\u{1161}\u{11ab} नमस्ते สวัสดี مرحبا \u{200d}👩\u{200d}🔬🌕 \u{fffd}\u{7f}\0 ▁ ▁▁x a▁b +++--- ==== // \\ \
    https://example.org/?q=1&r=%20 aaaaaaaaaaaaaaaaaaaaaaaa  \n ";

/// A tokenizer whose layout is understood.
#[derive(Debug)]
pub(super) struct Words {
    added: AddedTokens,
    layout: Layout,
    merges: Option<Merges>,
    /// The character that stands for each byte, and its token if it has one.
    byte_characters: [char; 256],
    byte_tokens: [Option<u32>; 256],
    /// Whether a word begins at a space after this ASCII character.
    ends_word: [bool; 128],
    idle: Mutex<Vec<State>>,
}

/// The parts of a `tokenizer.json` that are understood, before the library has made a tokenizer of it.
#[derive(Debug)]
pub(super) struct Understood {
    layout: Layout,
    merges: Option<Merges>,
}

impl Understood {
    pub fn read(tokenizer: &Value) -> Option<Self> {
        let layout = Layout::read(tokenizer)?;
        let merges = tokenizer.get("model").and_then(Merges::read);
        Some(Understood { layout, merges })
    }
}

/// What one thread needs to tokenise a text; kept for the next text.
#[derive(Debug)]
struct State {
    words: Remembered,
    patterns: Vec<Cache>,
}

/// Token ids of words that came before.
#[derive(Debug, Default)]
struct Remembered {
    places: HashMap<Box<str>, Range<u32>, RandomState>,
    ids: Vec<u32>,
}

impl Words {
    /// `None` for a layout that is not understood, and where the ids of [`PROBE`] are other ones here than in the
    /// library, which has the last word.
    pub fn new(understood: Understood, tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let Understood { layout, merges } = understood;
        let added = AddedTokens::of(tokenizer)?;
        let model = tokenizer.get_model();
        let is_token = |character: char| model.token_to_id(character.encode_utf8(&mut [0; 4])).is_some();
        let mut ends_word = [false; 128];
        if let Kind::Spaces { splits, .. } = layout.kind {
            // The library looks for normalised tokens in a text that has been given its `▁`.
            let writes_first = tokenizer.get_normalizer().is_some();
            let cuts =
                splits || merges.as_ref().is_some_and(|merges| merges.stop_before_space('a', is_token));
            if !cuts || (writes_first && added.normalised.is_some()) {
                return None;
            }
            for (character, ends) in ('\0'..).zip(&mut ends_word) {
                let stops = |merges: &Merges| merges.stop_before_space(character, is_token);
                *ends = splits || (character != ' ' && merges.as_ref().is_some_and(stops));
            }
        }
        let byte_characters = byte_characters();
        let token = |character: char| model.token_to_id(character.encode_utf8(&mut [0; 4]));
        let byte_tokens = byte_characters.map(token);
        let idle = Mutex::new(Vec::new());
        let words = Words { added, layout, merges, byte_characters, byte_tokens, ends_word, idle };
        let ours = words.encode(tokenizer, PROBE, &mut SegmentCache::default());
        let library = tokenizer.encode_fast(PROBE, false);
        match (ours, library) {
            (Ok(ours), Ok(library)) if ours == library.get_ids() => Some(words),
            _ => {
                tracing::debug!("the tokenizer is not tokenised word by word: a probe has other ids");
                None
            }
        }
    }

    /// The ids of `text`, without what the post-processor adds.
    pub fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        cache: &mut SegmentCache,
    ) -> tokenizers::Result<Vec<u32>> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let state = idle().pop();
        let mut state = state.unwrap_or_else(|| self.state());
        let mut ids = Vec::with_capacity(text.len() / 4);
        let mut part = |part: Part| match part {
            Part::Token(id) => {
                ids.push(id);
                Ok(())
            }
            Part::Text(segment, start) => {
                self.remembered_segment(tokenizer, segment, start == 0, cache, &mut state, &mut ids)
            }
        };
        match &self.added.raw {
            Some(tokens) => tokens.split(text, &mut part)?,
            None if text.is_empty() => {}
            None => part(Part::Text(text, 0))?,
        }
        idle().push(state);
        Ok(ids)
    }

    fn state(&self) -> State {
        let patterns = match &self.layout.kind {
            Kind::Bytes(steps) => steps.iter().filter_map(|step| match step {
                Step::Words(pattern) => Some(pattern.cache()),
                _ => None,
            }),
            Kind::Spaces { .. } => return State { words: Remembered::default(), patterns: Vec::new() },
        };
        State { words: Remembered::default(), patterns: patterns.collect() }
    }

    fn remembered_segment(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        segment: &str,
        begins: bool,
        cache: &mut SegmentCache,
        state: &mut State,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let cache = &mut cache.ids[usize::from(begins)];
        if let Some(known) = cache.get(segment) {
            ids.extend_from_slice(known);
            return Ok(());
        }
        let from = ids.len();
        self.segment(tokenizer, segment, begins, state, ids)?;
        if segment.len() <= REMEMBERED_SEGMENT {
            cache.insert(segment.to_string(), ids[from..].to_vec());
        }
        Ok(())
    }

    /// The ids of a text between two tokens; `begins` says whether it is the beginning of the whole text.
    fn segment(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        segment: &str,
        begins: bool,
        state: &mut State,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let normalizer = tokenizer.get_normalizer().filter(|_| self.layout.composes);
        let composed = normalizer.map(|normalizer| composed(normalizer, segment)).transpose()?;
        let text = composed.as_deref().unwrap_or(segment);
        let model = tokenizer.get_model();
        let mut part = |part: Part| match part {
            Part::Token(id) => {
                ids.push(id);
                Ok(())
            }
            Part::Text(text, start) => {
                let State { words, patterns } = &mut *state;
                let mut word = |word: &str| self.word(model, word, words, ids);
                match &self.layout.kind {
                    Kind::Bytes(steps) => cut(steps, patterns, text, &mut word),
                    Kind::Spaces { in_front, splits } => {
                        let begins = begins && start == 0;
                        self.cut_at_spaces(model, text, (*in_front, begins), *splits, &mut word)
                    }
                }
            }
        };
        match &self.added.normalised {
            Some(tokens) => tokens.split(text, part),
            None => part(Part::Text(text, 0)),
        }
    }

    fn cut_at_spaces(
        &self,
        model: &impl Model,
        text: &str,
        (in_front, begins): (InFront, bool),
        splits: bool,
        word: Sink,
    ) -> tokenizers::Result<()> {
        let is_space = |character: char| character == ' ' || character == SPACE;
        let is_missing = !text.starts_with(is_space);
        let mut put = match in_front {
            InFront::Never => false,
            InFront::Always => true,
            InFront::WhereMissing => is_missing,
            InFront::AtTheBeginning => is_missing && begins,
        };
        let mut cut_off = |text: &str| match std::mem::take(&mut put) {
            true => word(&format!("{SPACE}{text}")),
            false => word(text),
        };
        let mut start = 0;
        let mut before = SPACE;
        for (place, character) in text.char_indices() {
            if place > start && is_space(character) && (splits || self.ends_word(model, before)) {
                cut_off(&text[start..place])?;
                start = place;
            }
            before = character;
        }
        cut_off(&text[start..])
    }

    /// Whether a word ends after `character` where a space follows.
    fn ends_word(&self, model: &impl Model, character: char) -> bool {
        if let Some(&ends) = self.ends_word.get(character as usize) {
            return ends;
        }
        let is_token = |character: char| model.token_to_id(character.encode_utf8(&mut [0; 4])).is_some();
        self.merges.as_ref().is_some_and(|merges| merges.stop_before_space(character, is_token))
    }

    /// Appends the ids of a word.
    fn word(
        &self,
        model: &impl Model,
        word: &str,
        words: &mut Remembered,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        if let Some(place) = words.places.get(word) {
            ids.extend_from_slice(&words.ids[place.start as usize..place.end as usize]);
            return Ok(());
        }
        if word.len() >= LONG_WORD {
            if let Some((merges, mut tokens)) = self.long_word(model, word) {
                merges.merge(&mut tokens);
                ids.append(&mut tokens);
                return Ok(());
            }
            if word.len() > MOST_UNCUT {
                return Err(Box::new(Uncut(word.len())));
            }
        }
        let from = ids.len();
        ids.extend(model.tokenize(&self.written(word))?.iter().map(|token| token.id));
        if word.len() <= REMEMBERED_BYTES {
            words.remember(word, &ids[from..]);
        }
        Ok(())
    }

    /// A word as the model writes it.
    fn written(&self, word: &str) -> String {
        match &self.layout.kind {
            Kind::Bytes(_) => word.bytes().map(|byte| self.byte_characters[usize::from(byte)]).collect(),
            Kind::Spaces { .. } => word.replace(' ', "▁"),
        }
    }

    /// The tokens of a long word's characters, if all that the model does with them is to merge them.
    fn long_word(&self, model: &impl Model, word: &str) -> Option<(&Merges, Vec<u32>)> {
        let merges = self.merges.as_ref()?;
        if merges.takes_whole_words && word.len() <= merges.longest {
            return None;
        }
        if let Kind::Bytes(_) = self.layout.kind {
            let tokens = word.bytes().map(|byte| self.byte_tokens[usize::from(byte)]);
            return Some((merges, tokens.collect::<Option<Vec<u32>>>()?));
        }
        let mut tokens = Vec::with_capacity(word.len());
        for character in word.chars() {
            let character = if character == ' ' { SPACE } else { character };
            match model.token_to_id(character.encode_utf8(&mut [0; 4])) {
                Some(token) => tokens.push(token),
                None => tokens.extend(merges.of_bytes(character)?),
            }
        }
        Some((merges, tokens))
    }
}

/// Receives the words of a text, in order.
type Sink<'a> = &'a mut dyn FnMut(&str) -> tokenizers::Result<()>;

/// Cuts a piece of text by `steps`, each within the pieces of the one before. `patterns` holds a cache for each step
/// that has a pattern.
fn cut(steps: &[Step], patterns: &mut [Cache], piece: &str, word: Sink) -> tokenizers::Result<()> {
    let Some((step, rest)) = steps.split_first() else { return word(piece) };
    match step {
        Step::Words(pattern) => {
            let (cache, patterns) = patterns.split_first_mut().ok_or("a pattern has no cache")?;
            let mut at = 0;
            while let Some(piece) = pattern.next(cache, piece, &mut at) {
                cut(rest, patterns, piece, word)?;
            }
            Ok(())
        }
        Step::Digits { each } => {
            let mut start = 0;
            let mut after_digit = false;
            for (place, character) in piece.char_indices() {
                let is_digit = character.is_numeric();
                if place > 0 && (is_digit != after_digit || (is_digit && *each)) {
                    cut(rest, patterns, &piece[start..place], word)?;
                    start = place;
                }
                after_digit = is_digit;
            }
            cut(rest, patterns, &piece[start..], word)
        }
        Step::SpaceInFront if piece.starts_with(' ') => cut(rest, patterns, piece, word),
        Step::SpaceInFront => cut(rest, patterns, &format!(" {piece}"), word),
    }
}

impl Remembered {
    fn remember(&mut self, word: &str, ids: &[u32]) {
        if self.places.len() >= REMEMBERED_WORDS {
            self.places.clear();
            self.ids.clear();
        }
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        self.places.insert(word.into(), start..self.ids.len() as u32);
    }
}

/// The character that byte-level tokenizers write for each byte: itself where it can be seen in Latin 1, else the
/// next one from U+0100 on.
fn byte_characters() -> [char; 256] {
    let mut hidden = 0x100u32;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => {
            hidden += 1;
            char::from_u32(hidden - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}
