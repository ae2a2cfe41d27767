//! What became of the records: every drop and every cut, counted, with the first places of each.

use std::fmt;

use super::records::Note;
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
    /// No column holds a prompt: it is the beginning that both texts share.
    ImplicitPrompt,
    /// As [`Cause::ImplicitPrompt`], while the record has a text in a column whose name means nothing here.
    ImplicitPromptBesideText,
    /// The messages of the prompt stood at the beginning of a response too, and were taken off there.
    PromptTakenOff,
    /// A response begins with the text of its prompt.
    PromptRepeated,
    /// A text is a list as Python or JSON writes it.
    ListAsText,
    /// A response goes on with a turn of the user.
    UserTurnInResponse,
    /// The prompt's last message is the assistant's.
    PromptEndsWithAssistant,
    /// The same pair came before.
    Repeated,
    /// The same pair came before with its responses exchanged.
    Opposite,
    /// A column stands twice in one record; the last one counts.
    RepeatedKey,
}

impl Cause {
    /// All causes, in the order of the report.
    pub const ALL: [Cause; 25] = [
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
        Cause::ImplicitPrompt,
        Cause::ImplicitPromptBesideText,
        Cause::PromptTakenOff,
        Cause::PromptRepeated,
        Cause::ListAsText,
        Cause::UserTurnInResponse,
        Cause::PromptEndsWithAssistant,
        Cause::Repeated,
        Cause::Opposite,
        Cause::RepeatedKey,
    ];

    /// Whether the record is lost by it.
    pub fn drops(self) -> bool {
        matches!(
            self,
            Cause::BlankResponse | Cause::NoRoom | Cause::NothingToScore | Cause::ResponseNotWritten
        )
    }

    /// Whether its example says what happened, rather than being an excerpt of the record.
    fn is_told(self) -> bool {
        matches!(
            self,
            Cause::PromptShortened | Cause::BoundaryToken | Cause::PromptTextLost | Cause::ResponseTextLost
        )
    }

    /// For a cause that suggests a mistake in the file: what to do about it.
    pub fn advice(self) -> Option<&'static str> {
        match self {
            Cause::PromptRepeated => Some(
                "the prompt is scored a second time as part of the response: leave it out of `chosen` and `rejected`",
            ),
            Cause::ListAsText => Some(
                "it is used as plain text: parse such lists before writing the file (Python: `ast.literal_eval`)",
            ),
            Cause::UserTurnInResponse => Some(
                "the user's words are scored too: cut the response there, or make the turns before the last one the prompt",
            ),
            Cause::PromptEndsWithAssistant => Some(
                "the response is a second message of the assistant: does the prompt hold an answer already?",
            ),
            Cause::Identical => Some("such pairs prefer nothing: leave them out"),
            Cause::Repeated => Some("such pairs count twice: leave them out if that is not meant"),
            Cause::Opposite => Some("such pairs teach nothing: keep the right one"),
            Cause::RepeatedKey => Some("the last one counts, as in Python"),
            Cause::ImplicitPromptBesideText => {
                Some("if that column holds the prompt, rename it to `prompt`; otherwise remove it")
            }
            Cause::PromptColumnDiffers => Some("remove the column, or mend the messages"),
            _ => None,
        }
    }
}

/// How often a cause was met, and where first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Records in which it was met.
    pub count: usize,
    /// 1-based lines (JSON Lines) or record numbers of the first few.
    pub first: Vec<usize>,
    /// An excerpt of the first one, where there is something to show.
    pub example: Option<String>,
}

/// The report on a file's records. `Display` shows it to people, and its alternate form leaves out what
/// [`EncodingReport::warnings`] says.
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
    /// Lengths to which pairs were cut.
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

    /// How often a cause was met.
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

    pub(super) fn add_note(&mut self, note: &Note, place: usize) {
        self.add(note.cause, place);
        self.illustrate(note.cause, &note.example);
    }

    /// Keeps `example` for `cause` if it has none.
    pub(super) fn illustrate(&mut self, cause: Cause, example: &str) {
        self.tallies[cause as usize].example.get_or_insert_with(|| example.to_string());
    }

    /// What suggests mistakes in the file: a line for each kind, with its count and an example.
    pub fn warnings(&self) -> Vec<String> {
        let suspicious = Cause::ALL.into_iter().filter(|cause| self.tally(*cause).count > 0);
        suspicious
            .filter_map(|cause| {
                let advice = cause.advice()?;
                Some(format!("{}; {advice}", self.counted(cause)))
            })
            .collect()
    }

    /// Logs the report on the records of the file `name`, and each warning once.
    pub fn log(&self, name: &str) {
        tracing::info!("{name}: {self:#}");
        for warning in self.warnings() {
            tracing::warn!("{name}: {warning}");
        }
    }

    /// A cause with its count, its first places and its example.
    fn counted(&self, cause: Cause) -> String {
        let Tally { count, first, example } = self.tally(cause);
        let places: Vec<String> = first.iter().map(usize::to_string).collect();
        let more = if *count > first.len() { ", ..." } else { "" };
        let example = match example {
            Some(example) if cause.is_told() => {
                format!("; for example, at {}, {example}", places.first().map_or("", String::as_str))
            }
            Some(example) if !example.is_empty() => format!(", such as `{example}`"),
            _ => String::new(),
        };
        format!("{count} {} (at {}{more}){example}", self.describe(cause), places.join(", "))
    }

    /// The cause in words, with the limit that it met.
    pub fn describe(&self, cause: Cause) -> String {
        let LengthLimits { max_length, max_prompt_length } = self.limits;
        match cause {
            Cause::BlankResponse => "dropped: a response is empty".to_string(),
            Cause::NoRoom => {
                format!("dropped: no room for a response after the prompt within max_length {max_length}")
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
                "with a `prompt` string that the messages do not contain; the messages were used".to_string()
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
            Cause::ImplicitPrompt => {
                "without a prompt column: the prompt is the beginning that both responses share".to_string()
            }
            Cause::ImplicitPromptBesideText => {
                "without a prompt column, but with a text that is not read: the prompt is the beginning that both \
                 responses share"
                    .to_string()
            }
            Cause::PromptTakenOff => {
                "with the prompt's messages in a response too; they were taken off there".to_string()
            }
            Cause::PromptRepeated => "with a response that begins with the text of its prompt".to_string(),
            Cause::ListAsText => "with a list written as text".to_string(),
            Cause::UserTurnInResponse => "with a turn of the user inside a response".to_string(),
            Cause::PromptEndsWithAssistant => "with a prompt that ends with an assistant message".to_string(),
            Cause::Repeated => "repeated: the same as an earlier record".to_string(),
            Cause::Opposite => "contradicted: an earlier record has the same responses exchanged".to_string(),
            Cause::RepeatedKey => "with a column that stands twice".to_string(),
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
            let said = formatter.alternate() && cause.advice().is_some();
            if self.tally(cause).count > 0 && !said {
                write!(formatter, "\n  {}", self.counted(cause))?;
            }
        }
        Ok(())
    }
}
