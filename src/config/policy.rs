//! What is done with pairs that have a problem: one choice for each kind of problem.

/// What is done with a pair that has a certain problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// It is trained on as it is, and counted.
    Keep,
    /// What is too much is cut off, and counted.
    Cut,
    /// It is left out, and counted.
    Drop,
    /// The command ends with an error that names the record.
    Error,
}

/// The policy of each kind of problem. `docs/data.md` has a table of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Policies {
    /// A record that cannot be read as a pair, or that the chat template refuses.
    pub refused: Policy,
    /// A response without any text or without any token to score.
    pub empty: Policy,
    /// A prompt of more than `max_prompt_length` tokens.
    pub long_prompt: Policy,
    /// A prompt and a response of more than `max_length` tokens together.
    pub long_response: Policy,
    /// Both responses have the same tokens.
    pub identical: Policy,
    /// The same pair came before.
    pub duplicate: Policy,
    /// The same pair came before with its responses exchanged.
    pub contradiction: Policy,
    /// The prompt ends within a token, or is written otherwise once a response follows.
    pub boundary: Policy,
    /// The chat template leaves out or rewrites text of a message.
    pub lost_text: Policy,
    /// The chat template writes no end token after a response.
    pub no_end: Policy,
    /// Tokens follow the last end token of a response.
    pub after_end: Policy,
    /// A record that reads well and does not look like what its author meant.
    pub suspicious: Policy,
}

impl Default for Policies {
    fn default() -> Self {
        Policies {
            refused: Policy::Error,
            empty: Policy::Drop,
            long_prompt: Policy::Cut,
            long_response: Policy::Cut,
            identical: Policy::Keep,
            duplicate: Policy::Keep,
            contradiction: Policy::Keep,
            boundary: Policy::Keep,
            lost_text: Policy::Keep,
            no_end: Policy::Keep,
            after_end: Policy::Keep,
            suspicious: Policy::Keep,
        }
    }
}
