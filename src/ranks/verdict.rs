//! Why a run of several ranks ends before its time.

use serde::{Deserialize, Serialize};

use super::progress::Position;
use crate::error::Error;
use crate::interrupt::Signal;

/// What happened to a rank, as all ranks are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The rank.
    pub rank: usize,
    /// Its machine.
    pub host: String,
    /// Where it was last.
    pub position: Position,
    /// What happened.
    pub what: What,
}

/// What can happen to a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// Its process ended without a word.
    Died,
    /// Nothing was heard of it for so many seconds, and its connection stands.
    Silent(u64),
    /// It gave signs of life and did nothing for so many seconds, while others waited for it.
    Hangs(u64),
    /// No rank did anything for so many seconds, and none is ahead of the others.
    AllHang(u64),
    /// It ended with an error.
    Failed {
        /// The error's message.
        message: String,
        /// Its advice.
        help: String,
    },
    /// A signal asked it to end.
    Stopped(i32),
}

impl Verdict {
    /// The verdict in a sentence without its full stop.
    pub fn sentence(&self) -> String {
        let Verdict { rank, host, position, what } = self;
        let who = format!("rank {rank} on {host}");
        match what {
            What::Died => format!("{who} died {position}"),
            What::Silent(seconds) => {
                format!(
                    "{who} has given no sign of life for {seconds} s, last {position}: it is stopped, or its machine is gone"
                )
            }
            What::Hangs(seconds) => {
                format!(
                    "{who} hangs: it has done nothing for {seconds} s, last {position}, while others wait for it"
                )
            }
            What::AllHang(seconds) => format!(
                "no rank has done anything for {seconds} s, last {position}: a GPU or a collective hangs ({who} among them)"
            ),
            What::Failed { message, .. } => format!("{who} failed {position}: {message}"),
            What::Stopped(_) => format!("{who} was asked to end {position}"),
        }
    }

    /// Whether the rank said it of itself. The others are what rank 0 found, or saw when a connection ended.
    pub fn is_told_by_itself(&self) -> bool {
        matches!(self.what, What::Failed { .. } | What::Stopped(_))
    }

    /// The error with which another rank ends.
    pub fn error(&self) -> Error {
        if let What::Stopped(number) = self.what
            && let Some(signal) = Signal::of(number)
        {
            return Error::Interrupted {
                signal,
                kept: format!("{}; the same command begins again", self.sentence()),
            };
        }
        let go_on = "the last checkpoint is whole: start the run again with --resume";
        let help = match &self.what {
            What::Failed { help, .. } => help.clone(),
            What::Died => format!(
                "look at the last lines of that rank, or of its machine's log (out of memory?); {go_on}"
            ),
            What::Silent(_) | What::Hangs(_) | What::AllHang(_) => {
                format!("look at that machine and its GPU (`mmpo-fast doctor`, `nvidia-smi`); {go_on}")
            }
            What::Stopped(_) => go_on.to_string(),
        };
        // A rank that failed tells its own error.
        let lost = if matches!(self.what, What::Failed { .. }) { None } else { Some(self.rank) };
        Error::Rank { message: self.sentence(), help, lost }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_host_and_step_are_in_every_sentence() {
        let failed = What::Failed { message: "loss NaN".into(), help: "lower it".into() };
        for what in
            [What::Died, What::Silent(60), What::Hangs(600), What::AllHang(600), failed, What::Stopped(15)]
        {
            let verdict = Verdict { rank: 3, host: "node7".into(), position: Position::default(), what };
            let error = verdict.error();
            let text = error.to_string();
            assert!(text.contains("rank 3 on node7") && text.contains("before the ranks"), "{text}");
            let is_stop = matches!(verdict.what, What::Stopped(_));
            assert_eq!(error.exit_code(), if is_stop { 143 } else { 9 });
            // A rank that failed has told its own error: it is not lost.
            let has_failed = matches!(verdict.what, What::Failed { .. });
            if let Error::Rank { lost, .. } = error {
                assert_eq!(lost, (!has_failed).then_some(3), "{:?}", verdict.what);
            }
        }
    }
}
