//! Text of a message that a chat template leaves out.

/// The part of `content` that is not in `written`, from its first missing word to its last missing character; `None`
/// if all of it is there. White space does not count: templates trim and fold it.
///
/// A template that rewrites a text (escapes it, changes its case) loses it too: what the model sees is not what the
/// record says.
pub(super) fn lost_text<'a>(content: &'a str, written: &str) -> Option<&'a str> {
    let content = content.trim();
    if written.contains(content) || without_space(written).contains(&without_space(content)) {
        return None;
    }
    let mut cuts: Vec<usize> = content.char_indices().map(|(start, _)| start).collect();
    cuts.push(content.len());
    // The longest end that is written, then the longest beginning before it. Each part of a written text is written,
    // so both are found by bisection.
    let mut end = cuts[cuts.partition_point(|&cut| !written.contains(&content[cut..]))];
    let before = cuts.partition_point(|&cut| cut <= end && written.contains(&content[..cut]));
    let mut start = before.checked_sub(1).map_or(0, |last| cuts[last]);
    // A few characters are written somewhere by chance; only whole words count.
    if start < end && !content[..end].ends_with(char::is_whitespace) {
        end += content[end..].find(char::is_whitespace).unwrap_or(content.len() - end);
    }
    if start < end && !content[start..].starts_with(char::is_whitespace) {
        start = content[..start].rfind(char::is_whitespace).unwrap_or(0);
    }
    let lost = content[start..end].trim();
    (!lost.is_empty()).then_some(lost)
}

fn without_space(text: &str) -> String {
    text.split_whitespace().collect()
}

/// A text for people: its beginning, quoted, with control characters escaped.
pub(super) fn quoted_start(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((cut, _)) => format!("{:?}...", &text[..cut]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_out_is_found_and_white_space_is_not_missed() {
        assert_eq!(lost_text(" a b ", "<|user|>\na b</s>"), None);
        assert_eq!(lost_text("a\n\n b", "a b"), None);
        assert_eq!(lost_text("", "x"), None);
        assert_eq!(
            lost_text("<think>\nwhy\n</think>\n\n42", "<|a|>\n\n42<|e|>"),
            Some("<think>\nwhy\n</think>")
        );
        assert_eq!(lost_text("Well, <think>why</think> 42", "Well,  42"), Some("<think>why</think>"));
        assert_eq!(lost_text("all of it", "<|e|>"), Some("all of it"));
        assert_eq!(lost_text("Grüße 🌍 an alle", "Grüße an alle"), Some("🌍"));
        assert_eq!(lost_text("one two three", "one two"), Some("three"));
    }

    #[test]
    fn a_long_text_is_cut_for_people_and_escaped() {
        assert_eq!(quoted_start("a\u{1b}[2J"), r#""a\u{1b}[2J""#);
        assert_eq!(quoted_start(&"ü".repeat(50)), format!("\"{}\"...", "ü".repeat(40)));
    }
}
