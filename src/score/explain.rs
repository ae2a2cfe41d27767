//! `score --explain`: the change of each response token's log-prob against a reference, for a terminal and as a page.
//!
//! The sum of a response's changes is the gain that DPO's rewards multiply by beta, and the chosen response's gain less the
//! rejected one's is the pair's margin.

use std::fmt::Write;

use serde::Serialize;

use super::output::ScoreOutput;
use super::scorer::TokenLogps;
use crate::checkpoint::atomic;
use crate::config::ExplainConfig;
use crate::data::{TextEncoder, TokenizedPair};
use crate::error::Result;
use crate::report::{escaped, page, print_notice, print_result, print_styled, wants_color_on};

/// Tokens before a response that its text is decoded with: decoders treat the first token of a text specially.
const CONTEXT: usize = 4;
/// Characters of a prompt's end that the terminal shows.
const PROMPT_END: usize = 400;
/// A token is marked in one of three strengths where it became likelier, or less likely, by more than these factors.
const FACTORS: [f64; 3] = [1.1, 2.0, 10.0];

/// A pair with the changes of its tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExplainedPair {
    /// 1-based record of the data.
    pub record: usize,
    /// The prompt's text, special tokens included.
    pub prompt: String,
    /// The better response.
    pub chosen: ExplainedResponse,
    /// The worse response.
    pub rejected: ExplainedResponse,
    /// The chosen response's gain less the rejected one's, in nats.
    pub margin: f64,
}

/// A response and its tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExplainedResponse {
    /// Sum of its tokens' changes: its log-prob less that under the reference, in nats.
    pub gain: f64,
    /// Its tokens, in order.
    pub tokens: Vec<ExplainedToken>,
}

/// A token, or several that only together make a character.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExplainedToken {
    /// Its text.
    pub text: String,
    /// Log-prob under the model, in nats.
    pub logp: f64,
    /// Log-prob under the reference, in nats.
    pub reference: f64,
    /// `logp - reference`.
    pub change: f64,
    /// The strength of its mark: 1 to 3 for a likelier token, -1 to -3 for a less likely one, 0 for neither.
    pub level: i32,
}

/// Explains the pairs for which there are tokens: `tokens` are those under the model and under the reference.
///
/// # Errors
/// Those of the tokenizer.
pub fn explain(
    encoder: &TextEncoder,
    pairs: &[TokenizedPair],
    tokens: &[[TokenLogps; 2]],
) -> Result<Vec<ExplainedPair>> {
    let explained = |(pair, [policy, reference]): (&TokenizedPair, &[TokenLogps; 2])| {
        let chosen = response(encoder, &pair.prompt, &pair.chosen, [&policy.chosen, &reference.chosen])?;
        let rejected =
            response(encoder, &pair.prompt, &pair.rejected, [&policy.rejected, &reference.rejected])?;
        Ok(ExplainedPair {
            record: pair.record + 1,
            prompt: encoder.tokenizer.decode(&pair.prompt, false)?,
            margin: chosen.gain - rejected.gain,
            chosen,
            rejected,
        })
    };
    pairs.iter().zip(tokens).map(explained).collect()
}

fn response(
    encoder: &TextEncoder,
    prompt: &[u32],
    ids: &[u32],
    [policy, reference]: [&Vec<f32>; 2],
) -> Result<ExplainedResponse> {
    let mut decoder = encoder.tokenizer.stream(false);
    for &id in &prompt[prompt.len().saturating_sub(CONTEXT)..] {
        decoder.push(id)?;
    }
    let mut tokens = Vec::with_capacity(ids.len());
    let (mut logp, mut reference_logp) = (0.0, 0.0);
    for (&id, (&new, &old)) in ids.iter().zip(policy.iter().zip(reference)) {
        logp += f64::from(new);
        reference_logp += f64::from(old);
        let text = decoder.push(id)?;
        if !text.is_empty() {
            tokens.push(ExplainedToken::new(text, logp, reference_logp));
            (logp, reference_logp) = (0.0, 0.0);
        }
    }
    // Bytes that no further token completes.
    if logp != 0.0 || reference_logp != 0.0 {
        tokens.push(ExplainedToken::new(decoder.finish()?, logp, reference_logp));
    }
    Ok(ExplainedResponse { gain: tokens.iter().map(|token| token.change).sum(), tokens })
}

impl ExplainedToken {
    fn new(text: String, logp: f64, reference: f64) -> Self {
        let change = logp - reference;
        let strength = FACTORS.iter().filter(|factor| change.abs() > factor.ln()).count() as i32;
        let level = if change < 0.0 { -strength } else { strength };
        ExplainedToken { text, logp, reference, change, level }
    }
}

/// Writes the page where one is asked for, else prints the pairs.
pub(super) fn show(pairs: &[ExplainedPair], how: &ExplainConfig, scores: &ScoreOutput) -> Result<()> {
    match &how.html {
        Some(path) => {
            atomic::write_file(path, to_html(pairs)?.as_bytes())?;
            let said = format!("page    {}", path.display());
            match scores {
                ScoreOutput::StandardOutput => print_notice(&said),
                _ => _ = print_result(&(said + "\n"))?,
            }
        }
        None => {
            print_styled(&to_text(pairs, how.color.unwrap_or_else(|| wants_color_on(&std::io::stdout()))))?;
        }
    }
    Ok(())
}

/// The pairs as a page.
fn to_html(pairs: &[ExplainedPair]) -> Result<String> {
    #[derive(Serialize)]
    struct View<'a> {
        factors: [String; 3],
        pairs: &'a [ExplainedPair],
    }
    page::render(
        "explain.html",
        include_str!("explain.html"),
        &View { factors: FACTORS.map(|factor| factor.to_string()), pairs },
    )
}

/// The pairs for a terminal. Without colours a marked token has its change in brackets after it.
fn to_text(pairs: &[ExplainedPair], color: bool) -> String {
    let mut out = String::from("Each token is compared with the reference: ");
    match color {
        true => {
            let marks = |sign: i32| (1..=3).map(move |level| (sign * level, FACTORS[level as usize - 1]));
            let legend = |(level, factor): (i32, f64)| painted(&format!(" {factor} "), level);
            let join = |sign| marks(sign).map(legend).collect::<Vec<_>>().join("");
            let _ =
                writeln!(out, "likelier by a factor of more than {}, less likely by {}", join(1), join(-1));
        }
        false => {
            let _ = writeln!(
                out,
                "[+1.2] stands after one whose log-prob is 1.2 nats higher, [-1.2] after one whose is lower; factors of less \
                 than {} are not marked",
                FACTORS[0]
            );
        }
    }
    for pair in pairs {
        let _ = writeln!(
            out,
            "\nrecord {}: margin {:+.3} nats\nprompt  {}",
            pair.record,
            pair.margin,
            prompt(pair)
        );
        for (name, response) in [("chosen", &pair.chosen), ("rejected", &pair.rejected)] {
            let _ = writeln!(out, "{name}, {:+.3} nats", response.gain);
            response.tokens.iter().for_each(|token| write_token(&mut out, token, color));
            out.push('\n');
        }
    }
    out
}

/// The end of a prompt, which a response follows.
fn prompt(pair: &ExplainedPair) -> String {
    let count = pair.prompt.chars().count();
    let skipped = count.saturating_sub(PROMPT_END);
    let end: String = pair.prompt.chars().skip(skipped).collect();
    match skipped {
        0 => escaped(&end).into_owned(),
        skipped => format!("({skipped} characters left out) {}", escaped(&end)),
    }
}

fn write_token(out: &mut String, token: &ExplainedToken, color: bool) {
    let text = escaped(&token.text);
    match (color, token.level) {
        (_, 0) => out.push_str(&text),
        (true, level) => out.push_str(&painted(&text, level)),
        (false, _) => {
            let _ = write!(out, "{text}[{:+.2}]", token.change);
        }
    }
}

/// Text on a blue ground where it became likelier, on an orange one where it became less likely. A line end is not painted:
/// some terminals would paint the rest of the line.
fn painted(text: &str, level: i32) -> String {
    let code = match level {
        3.. => "38;5;231;48;5;25",
        2 => "38;5;16;48;5;110",
        1 => "38;5;16;48;5;153",
        0 => return text.to_string(),
        -1 => "38;5;16;48;5;223",
        -2 => "38;5;16;48;5;215",
        _ => "38;5;231;48;5;166",
    };
    let paint =
        |line: &str| if line.is_empty() { String::new() } else { format!("\u{1b}[{code}m{line}\u{1b}[0m") };
    // A token that is nothing but line ends would show no mark.
    let lines: Vec<String> = text.split('\n').map(paint).collect();
    match text.trim_matches('\n').is_empty() {
        true => format!("{}{text}", paint("\\n")),
        false => lines.join("\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, change: f64) -> ExplainedToken {
        ExplainedToken::new(text.into(), change - 2.0, -2.0)
    }

    fn pair(chosen: Vec<ExplainedToken>, rejected: Vec<ExplainedToken>) -> ExplainedPair {
        let response = |tokens: Vec<ExplainedToken>| ExplainedResponse {
            gain: tokens.iter().map(|token| token.change).sum(),
            tokens,
        };
        let (chosen, rejected) = (response(chosen), response(rejected));
        let margin = chosen.gain - rejected.gain;
        ExplainedPair { record: 3, prompt: "<|user|>\u{1b}[2J & \"you\"".into(), chosen, rejected, margin }
    }

    #[test]
    fn levels_follow_the_factors_both_ways() {
        for (factor, level) in
            [(1.0, 0), (1.09, 0), (1.2, 1), (2.5, 2), (11.0, 3), (1.0 / 1.2, -1), (0.3, -2), (0.01, -3)]
        {
            assert_eq!(token("a", f64::ln(factor)).level, level, "{factor}");
        }
    }

    #[test]
    fn text_without_colours_has_numbers_and_no_codes() {
        let text = to_text(
            &[pair(vec![token("good", 0.75), token(" day", 0.01)], vec![token("bad\u{7}", -3.0)])],
            false,
        );
        assert!(text.contains("record 3: margin +3.760 nats"), "{text}");
        assert!(text.contains("chosen, +0.760 nats\ngood[+0.75] day\n"), "{text}");
        assert!(text.contains("bad\\u{7}[-3.00]"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn text_with_colours_has_a_legend_and_closes_each_colour() {
        let tokens = vec![token("good\n\nday", 0.75), token("\n", -5.0), token(" \u{1b}[31mevil", 0.2)];
        let text = to_text(&[pair(tokens, vec![token("bad", -3.0)])], true);
        assert!(
            text.contains("\u{1b}[38;5;16;48;5;110mgood\u{1b}[0m\n\n\u{1b}[38;5;16;48;5;110mday\u{1b}[0m"),
            "{text:?}"
        );
        assert!(text.contains("\u{1b}[38;5;231;48;5;166m\\n\u{1b}[0m\n"), "{text:?}");
        assert!(text.contains(" \\u{1b}[31mevil"), "a token's own codes are shown, not obeyed: {text:?}");
        assert_eq!(text.matches("\u{1b}[0m").count(), text.matches("\u{1b}[38").count(), "{text:?}");
        assert_eq!(text.lines().next().unwrap().matches("\u{1b}[38").count(), 6, "the legend's marks");
    }

    #[test]
    fn the_page_escapes_and_says_the_numbers() {
        let tokens = vec![token("<b>&", 0.75), token("plain", 0.0)];
        let html = to_html(&[pair(tokens, vec![token("'\u{0}", -3.0)])]).unwrap();
        for part in [
            "<span class=\"gain-2\" title=\"+0.750 nats: log-prob -1.250, reference -2.000\">&lt;b&gt;&amp;</span>",
            "<span title=\"+0.000 nats: log-prob -2.000, reference -2.000\">plain</span>",
            "<span class=\"loss-3\"",
            "margin +3.750 nats",
            "&lt;|user|&gt;\\u{1b}[2J &amp; &quot;you&quot;",
        ] {
            assert!(html.contains(part), "no {part} in {html}");
        }
        assert!(!html.contains('\u{1b}') && !html.contains('\u{0}') && !html.contains("<script"));
        assert!(!html.contains("https:") && !html.contains("http:") && !html.contains("src="));
    }
}
