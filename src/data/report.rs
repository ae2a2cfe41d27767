//! What became of the records: every drop and every cut, counted, with the first places of each.

use std::fmt;

use crate::config::LengthLimits;

/// Places listed for each cause.
const PLACES_SHOWN: usize = 5;

/// Something that happened to a record on its way to a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Dropped: a response without any text.
    BlankResponse,
    /// Dropped: the prompt leaves no room for a response within `max_length`.
    NoRoom,
    /// Dropped: the prompt is empty and a response has one token, which nothing predicts.
    NothingToScore,
    /// The prompt was cut from the left.
    PromptCut,
    /// The chosen response was cut from the right.
    ChosenCut,
    /// The rejected response was cut from the right.
    RejectedCut,
    /// Kept: chosen and rejected have the same tokens, so the pair prefers nothing.
    Identical,
    /// The template opens the assistant's turn with more than it writes before a response; the prompt ends where
    /// the two part, as in TRL.
    PromptShortened,
    /// A `prompt` string is not among the messages that the responses share; those are used.
    PromptColumnDiffers,
    /// A token reaches from the prompt into a response, so that it and all after it belong to the responses.
    BoundaryToken,
    /// The template does not write all text of a prompt message.
    PromptTextLost,
    /// The template does not write all text of a response message.
    ResponseTextLost,
    /// The template writes no end token after a response.
    NoEndToken,
    /// Dropped: the template writes nothing for a response.
    ResponseNotWritten,
    /// Plain text begins with the BOS that the tokenizer puts in front as well.
    BosTwice,
}

impl Cause {
    pub const ALL: [Cause; 15] = [
        Cause::BlankResponse,
        Cause::NoRoom,
        Cause::NothingToScore,
        Cause::PromptCut,
        Cause::ChosenCut,
        Cause::RejectedCut,
        Cause::Identical,
        Cause::PromptShortened,
        Cause::PromptColumnDiffers,
        Cause::BoundaryToken,
        Cause::PromptTextLost,
        Cause::ResponseTextLost,
        Cause::NoEndToken,
        Cause::ResponseNotWritten,
        Cause::BosTwice,
    ];

    /// Whether the record is lost by it.
    pub fn drops(self) -> bool {
        matches!(
            self,
            Cause::BlankResponse | Cause::NoRoom | Cause::NothingToScore | Cause::ResponseNotWritten
        )
    }
}

/// How often a cause struck, and where first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub count: usize,
    /// 1-based lines (JSON Lines) or record numbers of the first few.
    pub first: Vec<usize>,
    /// What happened to the first one, where a place alone says too little.
    pub example: Option<String>,
}

/// The account of a file's records; `Display` shows it to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodingReport {
    /// Records read.
    pub records: usize,
    /// Pairs kept.
    pub pairs: usize,
    /// Tokens of the pairs kept, each prompt counted once.
    pub tokens: usize,
    /// Tokens of the largest pair kept: a micro-batch cannot be smaller.
    pub largest_pair: usize,
    pub limits: LengthLimits,
    tallies: [Tally; Cause::ALL.len()],
}

impl EncodingReport {
    pub(super) fn new(limits: LengthLimits) -> Self {
        EncodingReport {
            records: 0,
            pairs: 0,
            tokens: 0,
            largest_pair: 0,
            limits,
            tallies: std::array::from_fn(|_| Tally::default()),
        }
    }

    pub fn tally(&self, cause: Cause) -> &Tally {
        &self.tallies[cause as usize]
    }

    /// Records that gave no pair.
    pub fn dropped(&self) -> usize {
        self.records - self.pairs
    }

    pub(super) fn add(&mut self, cause: Cause, place: usize) {
        let tally = &mut self.tallies[cause as usize];
        tally.count += 1;
        if tally.first.len() < PLACES_SHOWN {
            tally.first.push(place);
        }
    }

    /// Keeps `example` for `cause` if it has none.
    pub(super) fn illustrate(&mut self, cause: Cause, place: usize, example: &str) {
        let shown = &mut self.tallies[cause as usize].example;
        shown.get_or_insert_with(|| format!("at {place}, {example}"));
    }

    /// The cause in words, with the limit that it met.
    pub fn describe(&self, cause: Cause) -> String {
        let LengthLimits { max_length, max_prompt_length } = self.limits;
        match cause {
            Cause::BlankResponse => "dropped: a response is empty".to_string(),
            Cause::NoRoom => {
                format!("dropped: no room for a response behind the prompt within max_length {max_length}")
            }
            Cause::NothingToScore => "dropped: an empty prompt and a response of one token".to_string(),
            Cause::PromptCut => format!("prompts cut on the left to max_prompt_length {max_prompt_length}"),
            Cause::ChosenCut => format!("chosen responses cut on the right to max_length {max_length}"),
            Cause::RejectedCut => format!("rejected responses cut on the right to max_length {max_length}"),
            Cause::Identical => "kept with identical chosen and rejected responses".to_string(),
            Cause::PromptShortened => {
                "prompts end early: the template writes their end otherwise once a response follows, and the prompt \
                 ends where the two part"
                    .to_string()
            }
            Cause::PromptColumnDiffers => {
                "have a `prompt` string that their messages do not contain; the messages were used".to_string()
            }
            Cause::BoundaryToken => {
                "prompts end within a token that reaches into a response: the responses begin with that token"
                    .to_string()
            }
            Cause::PromptTextLost => "have prompt text that the template leaves out or rewrites".to_string(),
            Cause::ResponseTextLost => {
                "have response text that the template leaves out or rewrites: it is not trained on".to_string()
            }
            Cause::NoEndToken => {
                "have a response without an end token, since the template writes none: nothing teaches the model to stop"
                    .to_string()
            }
            Cause::ResponseNotWritten => "dropped: the template writes nothing for a response".to_string(),
            Cause::BosTwice => {
                "prompts begin with two BOS tokens: one in the text, one that the tokenizer puts in front".to_string()
            }
        }
    }
}

impl fmt::Display for EncodingReport {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{} records, {} pairs, {} tokens", self.records, self.pairs, self.tokens)?;
        if self.pairs > 0 {
            write!(formatter, " (largest pair {})", self.largest_pair)?;
        }
        for cause in Cause::ALL {
            let Tally { count, first, example } = self.tally(cause);
            if *count == 0 {
                continue;
            }
            let places: Vec<String> = first.iter().map(usize::to_string).collect();
            let more = if *count > first.len() { ", ..." } else { "" };
            write!(formatter, "\n  {count} {} (at {}{more})", self.describe(cause), places.join(", "))?;
            if let Some(example) = example {
                write!(formatter, "\n    for example, {example}")?;
            }
        }
        Ok(())
    }
}
