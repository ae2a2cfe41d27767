//! What became of the records: every drop and every cut, counted, with the first places of each.

use std::fmt;

use super::records::Note;
use crate::config::options::flag_name;
use crate::config::{LengthLimits, Policies, Policy};

/// Places listed for each cause.
const PLACES_SHOWN: usize = 5;

/// Something that happened to a record on its way to a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// The record cannot be read as a pair, or the chat template refuses it.
    Refused,
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
    /// Tokens follow the last end token of a response. Looked for only where `on_after_end` asks for it.
    AfterEnd,
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
    /// Dropped: the scores of the two responses are less far apart than was asked for.
    ScoresTooClose,
}

impl Cause {
    /// All causes, in the order of the report.
    pub const ALL: [Cause; 28] = [
        Cause::Refused,
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
        Cause::AfterEnd,
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
        Cause::ScoresTooClose,
    ];

    /// What `policies` say of it. A prompt that leaves no room cannot be cut; what only tells how a record was read is
    /// kept.
    pub fn policy(self, policies: &Policies) -> Policy {
        match self {
            Cause::Refused => policies.refused,
            Cause::BlankResponse | Cause::NothingToScore | Cause::ResponseNotWritten => policies.empty,
            Cause::ScoresTooClose => Policy::Drop,
            Cause::NoRoom if policies.long_prompt == Policy::Cut => Policy::Drop,
            Cause::NoRoom | Cause::PromptCut => policies.long_prompt,
            Cause::ChosenCut | Cause::RejectedCut => policies.long_response,
            Cause::Identical => policies.identical,
            Cause::Repeated => policies.duplicate,
            Cause::Opposite => policies.contradiction,
            Cause::PromptShortened | Cause::BoundaryToken => policies.boundary,
            Cause::PromptTextLost | Cause::ResponseTextLost => policies.lost_text,
            Cause::NoEndToken => policies.no_end,
            Cause::AfterEnd => policies.after_end,
            Cause::BosTwice
            | Cause::PromptColumnDiffers
            | Cause::ImplicitPromptBesideText
            | Cause::PromptRepeated
            | Cause::ListAsText
            | Cause::UserTurnInResponse
            | Cause::PromptEndsWithAssistant => policies.suspicious,
            Cause::ImplicitPrompt | Cause::PromptTakenOff | Cause::RepeatedKey => Policy::Keep,
        }
    }

    /// The option that says what is done with it; `None` where there is no choice.
    pub fn option(self) -> Option<&'static str> {
        Some(match self {
            Cause::Refused => "on_refused",
            Cause::BlankResponse | Cause::NothingToScore | Cause::ResponseNotWritten => "on_empty",
            Cause::NoRoom | Cause::PromptCut => "on_long_prompt",
            Cause::ChosenCut | Cause::RejectedCut => "on_long_response",
            Cause::Identical => "on_identical",
            Cause::Repeated => "on_duplicate",
            Cause::Opposite => "on_contradiction",
            Cause::PromptShortened | Cause::BoundaryToken => "on_boundary",
            Cause::PromptTextLost | Cause::ResponseTextLost => "on_lost_text",
            Cause::NoEndToken => "on_no_end",
            Cause::AfterEnd => "on_after_end",
            Cause::ScoresTooClose => "min_score_gap",
            Cause::BosTwice
            | Cause::PromptColumnDiffers
            | Cause::ImplicitPromptBesideText
            | Cause::PromptRepeated
            | Cause::ListAsText
            | Cause::UserTurnInResponse
            | Cause::PromptEndsWithAssistant => "on_suspicious",
            Cause::ImplicitPrompt | Cause::PromptTakenOff | Cause::RepeatedKey => return None,
        })
    }

    /// A word that names it for machines.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Refused => "refused",
            Cause::BlankResponse => "blank_response",
            Cause::NoRoom => "no_room",
            Cause::NothingToScore => "nothing_to_score",
            Cause::PromptCut => "prompt_cut",
            Cause::ChosenCut => "chosen_cut",
            Cause::RejectedCut => "rejected_cut",
            Cause::Identical => "identical",
            Cause::PromptShortened => "prompt_shortened",
            Cause::PromptColumnDiffers => "prompt_column_differs",
            Cause::BoundaryToken => "boundary_token",
            Cause::PromptTextLost => "prompt_text_lost",
            Cause::ResponseTextLost => "response_text_lost",
            Cause::NoEndToken => "no_end_token",
            Cause::AfterEnd => "after_end",
            Cause::ResponseNotWritten => "response_not_written",
            Cause::BosTwice => "bos_twice",
            Cause::ImplicitPrompt => "implicit_prompt",
            Cause::ImplicitPromptBesideText => "implicit_prompt_beside_text",
            Cause::PromptTakenOff => "prompt_taken_off",
            Cause::PromptRepeated => "prompt_repeated",
            Cause::ListAsText => "list_as_text",
            Cause::UserTurnInResponse => "user_turn_in_response",
            Cause::PromptEndsWithAssistant => "prompt_ends_with_assistant",
            Cause::Repeated => "repeated",
            Cause::Opposite => "opposite",
            Cause::RepeatedKey => "repeated_key",
            Cause::ScoresTooClose => "scores_too_close",
        }
    }

    /// Whether its example says what happened, rather than being an excerpt of the record.
    fn is_told(self) -> bool {
        matches!(
            self,
            Cause::Refused
                | Cause::PromptShortened
                | Cause::BoundaryToken
                | Cause::PromptTextLost
                | Cause::ResponseTextLost
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
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Records in which it was met.
    pub count: usize,
    /// Records that were left out for it; of several causes, the first in the order of [`Cause::ALL`] counts.
    pub dropped: usize,
    /// Records at which a command that trains would end, because the policy is an error.
    pub stops: usize,
    /// 1-based lines (JSON Lines) or record numbers of the first few.
    pub first: Vec<usize>,
    /// An excerpt of the first one, where there is something to show.
    pub example: Option<String>,
}

/// The report on a file's records. `Display` shows it to people, and its alternate form leaves out what
/// [`EncodingReport::warnings`] says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EncodingReport {
    /// Records read.
    pub records: usize,
    /// Records whose pair was kept.
    pub pairs: usize,
    /// Pairs that are there again, because their file has a weight above 1.
    pub copies: usize,
    /// Records that are not taken, because their file has a weight below 1.
    pub left_out_by_weight: usize,
    /// Tokens of the pairs kept and of their copies, each prompt counted once.
    pub tokens: usize,
    /// Tokens of the largest pair kept: a micro-batch cannot be smaller.
    pub largest_pair: usize,
    /// Lengths to which pairs were cut.
    pub limits: LengthLimits,
    /// What was done with pairs that have a problem.
    pub policies: Policies,
    tallies: [Tally; Cause::ALL.len()],
}

impl EncodingReport {
    pub(super) fn new(limits: LengthLimits, policies: Policies) -> Self {
        EncodingReport {
            records: 0,
            pairs: 0,
            copies: 0,
            left_out_by_weight: 0,
            tokens: 0,
            largest_pair: 0,
            limits,
            policies,
            tallies: std::array::from_fn(|_| Tally::default()),
        }
    }

    /// How often a cause was met.
    pub fn tally(&self, cause: Cause) -> &Tally {
        &self.tallies[cause as usize]
    }

    /// Records that are left out, by a policy or by the weight of their file.
    pub fn dropped(&self) -> usize {
        self.tallies.iter().map(|tally| tally.dropped).sum::<usize>() + self.left_out_by_weight
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

    /// Adds the report on a further file. Places of its records are not taken over: they would not say in which file.
    pub(super) fn merge(&mut self, other: &EncodingReport) {
        let is_first = self.records == 0 && self.tallies.iter().all(|tally| tally.stops == 0);
        if is_first {
            *self = other.clone();
            return;
        }
        self.records += other.records;
        self.pairs += other.pairs;
        self.copies += other.copies;
        self.left_out_by_weight += other.left_out_by_weight;
        self.tokens += other.tokens;
        self.largest_pair = self.largest_pair.max(other.largest_pair);
        for (tally, other) in self.tallies.iter_mut().zip(&other.tallies) {
            tally.count += other.count;
            tally.dropped += other.dropped;
            tally.stops += other.stops;
            tally.first.clear();
            if tally.example.is_none() {
                tally.example.clone_from(&other.example);
            }
        }
    }

    /// Counts a record that is left out for `cause`.
    pub(super) fn drop_for(&mut self, cause: Cause) {
        self.tallies[cause as usize].dropped += 1;
    }

    /// Counts a record that is no pair because the policy of `cause` is an error.
    pub(super) fn stop_at(&mut self, cause: Cause) {
        self.tallies[cause as usize].stops += 1;
    }

    /// Records at which a command that trains would end.
    pub fn stops(&self) -> usize {
        self.tallies.iter().map(|tally| tally.stops).sum()
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
    pub fn counted(&self, cause: Cause) -> String {
        let Tally { count, first, example, .. } = self.tally(cause);
        let places: Vec<String> = first.iter().map(usize::to_string).collect();
        let more = if *count > first.len() { ", ..." } else { "" };
        let example = match example {
            Some(example) if cause.is_told() => {
                format!("; for example, at {}, {example}", places.first().map_or("", String::as_str))
            }
            Some(example) if !example.is_empty() => format!(", such as `{example}`"),
            _ => String::new(),
        };
        let places = match places.is_empty() {
            true => String::new(),
            false => format!(" (at {}{more})", places.join(", ")),
        };
        format!("{count} {}{places}{example}", self.describe(cause))
    }

    /// The cause in words, with the limit that it met and what was done.
    pub fn describe(&self, cause: Cause) -> String {
        match cause.policy(&self.policies) {
            Policy::Drop => format!("dropped: {}", self.problem(cause)),
            Policy::Error => {
                let flag = cause.option().map(flag_name).unwrap_or_default();
                format!("not allowed by {flag}: {}", self.problem(cause))
            }
            Policy::Keep | Policy::Cut => self.left_as_is(cause),
        }
    }

    /// The words of a cause whose records are kept, perhaps cut.
    fn left_as_is(&self, cause: Cause) -> String {
        let LengthLimits { max_length, max_prompt_length } = self.limits;
        match cause {
            Cause::PromptCut => format!("prompts cut on the left to max_prompt_length {max_prompt_length}"),
            Cause::ChosenCut => format!("chosen responses cut on the right to max_length {max_length}"),
            Cause::RejectedCut => format!("rejected responses cut on the right to max_length {max_length}"),
            Cause::AfterEnd => "responses cut after their last end token".to_string(),
            Cause::Identical => "kept with identical chosen and rejected responses".to_string(),
            _ => self.problem(cause),
        }
    }

    /// What is the matter, without what was done about it.
    pub fn problem(&self, cause: Cause) -> String {
        let LengthLimits { max_length, max_prompt_length } = self.limits;
        match cause {
            Cause::Refused => "no pair can be read from the record".to_string(),
            Cause::BlankResponse => "a response is empty".to_string(),
            Cause::NoRoom => {
                format!("no room for a response after the prompt within max_length {max_length}")
            }
            Cause::NothingToScore => "an empty prompt and a response of one token".to_string(),
            Cause::PromptCut => {
                format!("the prompt has more tokens than max_prompt_length {max_prompt_length}")
            }
            Cause::ChosenCut => format!("the chosen response ends beyond max_length {max_length}"),
            Cause::RejectedCut => format!("the rejected response ends beyond max_length {max_length}"),
            Cause::AfterEnd => "tokens follow the last end token of a response".to_string(),
            Cause::Identical => "identical chosen and rejected responses".to_string(),
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
            Cause::ResponseNotWritten => "the template writes nothing for a response".to_string(),
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
            Cause::ScoresTooClose => "scores that are less far apart than --min-score-gap".to_string(),
        }
    }
}

impl fmt::Display for EncodingReport {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{} records, {} pairs, {} tokens", self.records, self.pairs, self.tokens)?;
        if self.pairs > 0 {
            write!(formatter, " (largest pair {})", self.largest_pair)?;
        }
        if self.copies > 0 {
            write!(formatter, "\n  {} more copies of pairs, for the file's weight", self.copies)?;
        }
        if self.left_out_by_weight > 0 {
            write!(formatter, "\n  {} pairs not taken, for the file's weight", self.left_out_by_weight)?;
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
