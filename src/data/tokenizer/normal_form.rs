//! Unicode's normalisation form C, which nearly every text has already.

use std::borrow::Cow;

use tokenizers::{NormalizedString, Normalizer};

/// `text` as `normalizer` (NFC) makes it. The library writes two numbers for each byte of a text that it normalises, so
/// it gets only what may change: characters that compose with others, with the one before them.
pub(super) fn composed<'t, N: Normalizer>(normalizer: &N, text: &'t str) -> tokenizers::Result<Cow<'t, str>> {
    let mut written: Option<String> = None;
    let mut done = 0;
    let mut before = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((start, character)) = characters.next() {
        if stands_alone(character) {
            before = start;
            continue;
        }
        let mut end = start + character.len_utf8();
        while let Some((next, _)) = characters.next_if(|(_, next)| !stands_alone(*next)) {
            end = next + text[next..].chars().next().map_or(0, char::len_utf8);
        }
        let mut piece = NormalizedString::from(&text[before..end]);
        normalizer.normalize(&mut piece)?;
        if piece.get() != &text[before..end] {
            let written = written.get_or_insert_with(|| String::with_capacity(text.len()));
            written.push_str(&text[done..before]);
            written.push_str(piece.get());
            done = end;
        }
        before = end;
    }
    Ok(match written {
        Some(mut written) => {
            written.push_str(&text[done..]);
            Cow::Owned(written)
        }
        None => Cow::Borrowed(text),
    })
}

/// Whether a character stays as it is in form C and composes with nothing before it, so that a text can be cut in
/// front of it. Not all such characters are listed, only ranges without exceptions that much text is made of.
fn stands_alone(character: char) -> bool {
    matches!(character,
        '\0'..='\u{2ff}'
        // Cyrillic letters, Latin with marks, dashes and quotes, currency signs.
        | '\u{400}'..='\u{481}'
        | '\u{1e00}'..='\u{1eff}'
        | '\u{2010}'..='\u{2027}'
        | '\u{20a0}'..='\u{20bf}'
        // Marks, kana, ideographs, Hangul, full-width forms.
        | '\u{3000}'..='\u{3002}'
        | '\u{3041}'..='\u{3096}'
        | '\u{30a1}'..='\u{30fa}'
        | '\u{4e00}'..='\u{9fff}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{ff01}'..='\u{ff60}'
        // Pictures.
        | '\u{1f300}'..='\u{1faff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::normalizers::NFC;

    use super::*;

    fn whole(text: &str) -> String {
        let mut whole = NormalizedString::from(text);
        NFC.normalize(&mut whole).unwrap();
        whole.get().to_string()
    }

    #[test]
    fn characters_that_stand_alone_stay_as_they_are_after_any_other() {
        let alone: Vec<char> = ('\0'..=char::MAX).filter(|&character| stands_alone(character)).collect();
        assert!(alone.len() > 30_000, "{} characters", alone.len());
        // A letter, a kana, a jamo, a syllable without its end, a mark.
        for before in ["", "e", "か", "\u{1100}", "가", "a\u{301}"] {
            let before_alone = whole(before);
            for &character in &alone {
                let mut text = before.to_string();
                text.push(character);
                let mut wanted = before_alone.clone();
                wanted.push(character);
                assert_eq!(whole(&text), wanted, "{:?} after {before:?}", character);
            }
        }
    }

    #[test]
    fn a_text_in_form_c_is_not_copied() {
        for text in ["plain", "Größe – “so” 月は大きい 🌕", "", "ẫ"] {
            assert!(matches!(composed(&NFC, text), Ok(Cow::Borrowed(_))), "{text}");
        }
        assert_eq!(composed(&NFC, "xe\u{301} 가\u{11a8}か\u{3099}").unwrap(), "xé 각が");
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_gives(text in "[ae가か\u{300}-\u{315}\u{1100}-\u{1112}\u{1161}-\u{1175}\u{11a8}-\u{11c2}\u{3099}\u{0344}\u{212b}\u{958}\u{fb1d}ê x]{0,24}|\\PC{0,24}") {
            prop_assert_eq!(composed(&NFC, &text).unwrap().into_owned(), whole(&text));
        }
    }
}
