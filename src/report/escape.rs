//! Text from files and models, made safe for a terminal.
//!
//! A template, a file name, a record or an answer can hold escape sequences that move the cursor, set the window's
//! title or hide what was printed. Everything that this program shows a person goes through [`escaped`].

use std::borrow::Cow;

/// `text` with each character that could command a terminal written as `\u{1b}`. Line ends and tabs stay.
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(is_command) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match is_command(character) {
            true => shown.extend(character.escape_unicode()),
            false => shown.push(character),
        }
    }
    Cow::Owned(shown)
}

/// Whether a terminal could take this for a command: control characters (C0, DEL and C1), characters that reorder the
/// text around them (bidirectional embeddings, overrides and isolates), Unicode's own line ends, and the marks of
/// interlinear annotation.
fn is_command(character: char) -> bool {
    match character {
        '\n' | '\t' => false,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        '\u{2028}' | '\u{2029}' | '\u{fff9}'..='\u{fffb}' => true,
        _ => character.is_control(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_commands_a_terminal_is_shown_and_all_else_stays() {
        for (text, shown) in [
            (
                "two\n\tlines, caf\u{e9} \u{1f469}\u{200d}\u{1f680}",
                "two\n\tlines, caf\u{e9} \u{1f469}\u{200d}\u{1f680}",
            ),
            ("\u{1b}]0;title\u{7}", "\\u{1b}]0;title\\u{7}"),
            ("\u{9b}31m red \u{7f}\r", "\\u{9b}31m red \\u{7f}\\u{d}"),
            ("admin\u{202e}gpj.exe\u{2066}", "admin\\u{202e}gpj.exe\\u{2066}"),
        ] {
            assert_eq!(escaped(text), shown);
        }
    }
}
