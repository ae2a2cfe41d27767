//! Prompts that are not a column of their own but the beginning which both responses share.

use super::Message;

/// The turn marker behind which an hh-rlhf response begins.
const ASSISTANT_MARKER: &str = "\n\nAssistant:";

/// How many leading messages of two whole conversations are their prompt, as TRL's `extract_prompt` counts them:
/// the common ones, but never the whole of the shorter conversation, so that each side keeps a response.
pub(super) fn shared_messages(chosen: &[Message], rejected: &[Message]) -> usize {
    let shorter = chosen.len().min(rejected.len());
    let common = chosen.iter().zip(rejected).take_while(|(left, right)| left == right).count();
    common.min(shorter.saturating_sub(1))
}

/// Where the prompt of two whole texts ends, in bytes.
///
/// In hh-rlhf's form the prompt ends behind the last shared `\n\nAssistant:`, however alike the two answers begin
/// (as the DPO authors cut it). In any other text it is the common beginning as TRL's `extract_prompt` has it,
/// without a trailing space; but a word is never cut in two, since neither half would get the tokens it has in
/// running text.
pub(super) fn shared_text(chosen: &str, rejected: &str) -> usize {
    let common = common_prefix(chosen, rejected);
    if let Some(marker) = chosen[..common].rfind(ASSISTANT_MARKER) {
        return marker + ASSISTANT_MARKER.len();
    }
    let cut = if common == chosen.len() || common == rejected.len() {
        // Nothing would be left of one side: its last word is the response.
        chosen[..common].char_indices().next_back().map_or(0, |(last, _)| last)
    } else {
        common
    };
    let cut = word_start(chosen, rejected, cut);
    if chosen[..cut].ends_with(' ') { cut - 1 } else { cut }
}

/// Bytes of the longest common beginning, always at a character boundary of both.
pub(crate) fn common_prefix(left: &str, right: &str) -> usize {
    left.chars().zip(right.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Moves `cut` back to where the word around it starts, if it lies within a word of either text.
fn word_start(chosen: &str, rejected: &str, cut: usize) -> usize {
    let goes_on = [chosen, rejected].iter().any(|text| text[cut..].chars().next().is_some_and(is_word));
    if !goes_on {
        return cut;
    }
    let word = chosen[..cut].chars().rev().take_while(|&c| is_word(c));
    cut - word.map(char::len_utf8).sum::<usize>()
}

/// Letters and digits of scripts that separate words by spaces (those below the CJK blocks).
fn is_word(c: char) -> bool {
    c.is_alphanumeric() && (c as u32) < 0x2E80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(chosen: &'a str, rejected: &'a str) -> (&'a str, &'a str, &'a str) {
        let cut = shared_text(chosen, rejected);
        (&chosen[..cut], &chosen[cut..], &rejected[cut..])
    }

    #[test]
    fn text_is_cut_before_the_space_of_the_first_word_that_differs() {
        assert_eq!(
            split("The sky is blue.", "The sky is green."),
            ("The sky is", " blue.", " green."),
            "as TRL's extract_prompt"
        );
        assert_eq!(split("The sky is blue.", "The sky is brown."), ("The sky is", " blue.", " brown."));
    }

    #[test]
    fn hh_text_is_cut_behind_the_last_shared_marker() {
        let chosen = "\n\nHuman: Hi\n\nAssistant: Hello. You?\n\nHuman: Good.\n\nAssistant: I see.";
        let rejected = "\n\nHuman: Hi\n\nAssistant: Hello. You?\n\nHuman: Good.\n\nAssistant: I am glad.";
        let (prompt, left, right) = split(chosen, rejected);
        assert!(prompt.ends_with("Good.\n\nAssistant:"), "{prompt:?}");
        assert_eq!((left, right), (" I see.", " I am glad."));
    }

    #[test]
    fn texts_without_a_shared_beginning_have_no_prompt() {
        assert_eq!(split("Yes.", "No."), ("", "Yes.", "No."));
        assert_eq!(split("", "No."), ("", "", "No."));
    }

    #[test]
    fn each_side_of_equal_texts_keeps_its_last_word() {
        assert_eq!(split("one two", "one two"), ("one", " two", " two"));
        assert_eq!(split("one two", "one two three"), ("one", " two", " two three"));
    }

    #[test]
    fn cuts_respect_characters_of_several_bytes() {
        assert_eq!(split("天气晴", "天气雨"), ("天气", "晴", "雨"));
        assert_eq!(split("é ü", "é ö"), ("é", " ü", " ö"));
    }

    #[test]
    fn equal_conversations_keep_their_last_message_as_the_response() {
        let turns = [Message::new("user", "a"), Message::new("assistant", "b")];
        assert_eq!(shared_messages(&turns, &turns), 1);
        assert_eq!(shared_messages(&turns[..1], &turns), 0);
        assert_eq!(shared_messages(&[], &turns), 0);
    }
}
