//! Prompts that are not a column of their own but the beginning which both responses share.

use super::Message;

/// The turn marker after which an hh-rlhf response begins.
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
/// In hh-rlhf's form the prompt ends after the last shared `\n\nAssistant:`, however alike the two answers begin
/// (as the DPO authors cut it). In any other text it is the common beginning as TRL's `extract_prompt` has it: without
/// a trailing space, and where one text is the beginning of the other, without its last character.
pub(super) fn shared_text(chosen: &str, rejected: &str) -> usize {
    let common = common_prefix(chosen, rejected);
    if let Some(marker) = chosen[..common].rfind(ASSISTANT_MARKER) {
        return marker + ASSISTANT_MARKER.len();
    }
    if common == chosen.len() || common == rejected.len() {
        return chosen[..common].char_indices().next_back().map_or(0, |(last, _)| last);
    }
    if chosen[..common].ends_with(' ') { common - 1 } else { common }
}

/// Bytes of the longest common beginning, always at a character boundary of both.
pub(crate) fn common_prefix(left: &str, right: &str) -> usize {
    left.chars().zip(right.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'a>(chosen: &'a str, rejected: &'a str) -> (&'a str, &'a str, &'a str) {
        let cut = shared_text(chosen, rejected);
        (&chosen[..cut], &chosen[cut..], &rejected[cut..])
    }

    #[test]
    fn text_is_cut_where_it_differs_or_before_the_space_there() {
        // The values of TRL 1.16's extract_prompt.
        assert_eq!(split("The sky is blue.", "The sky is green."), ("The sky is", " blue.", " green."));
        assert_eq!(split("The sky is blue.", "The sky is brown."), ("The sky is b", "lue.", "rown."));
    }

    #[test]
    fn hh_text_is_cut_after_the_last_shared_marker() {
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
    fn each_side_of_equal_texts_keeps_a_last_character() {
        assert_eq!(split("one two", "one two"), ("one tw", "o", "o"));
        assert_eq!(split("one two", "one two three"), ("one tw", "o", "o three"));
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
