//! The account for a terminal, or as plain text.

use std::fmt::Write;

use super::account::{Account, LengthRow, Problem};
use super::shown::{Piece, ShownPair};
use crate::config::Policy;
use crate::report::escaped;

/// Characters of the longest bar of the histogram.
const BAR: usize = 40;

/// Codes around words, or nothing.
#[derive(Clone, Copy)]
struct Paint {
    color: bool,
}

const BOLD: &str = "1";
const SOFT: &str = "2";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const SPECIAL: &str = "36";
const BOUNDARY: &str = "1;35";

impl Paint {
    /// Text of a file or a model, which must not command the terminal.
    fn text(self, code: &str, text: &str) -> String {
        self.code(code, &escaped(text))
    }

    fn code(self, code: &str, text: &str) -> String {
        match self.color && !text.is_empty() {
            true => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
            false => text.to_string(),
        }
    }

    fn heading(self, text: &str) -> String {
        format!("\n{}\n", self.code(BOLD, text))
    }
}

/// The account as text.
pub(super) fn write(account: &Account, color: bool) -> String {
    let paint = Paint { color };
    let mut out = String::new();
    records(account, paint, &mut out);
    problems(account, paint, &mut out);
    lengths(account, paint, &mut out);
    tokens(account, paint, &mut out);
    pairs(account, paint, &mut out);
    let verdict = match account.usable {
        true => paint.code(GREEN, "usable: a training run takes these pairs"),
        false => paint.code(RED, "not usable as it is"),
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}

fn records(account: &Account, paint: Paint, out: &mut String) {
    let _ = writeln!(out, "model   {} (context {})", escaped(&account.model), account.context);
    for file in &account.files {
        let copies = if file.copies > 0 { format!(", {} more copies", file.copies) } else { String::new() };
        let _ = writeln!(
            out,
            "file    {}: {} records, {} kept, {} left out, {} errors{copies}",
            escaped(&file.path),
            file.records,
            file.kept,
            file.dropped,
            file.errors
        );
    }
    let _ = writeln!(
        out,
        "pairs   {}",
        paint.code(BOLD, &format!("{} of {} records are kept", account.kept, account.records))
    );
}

fn problems(account: &Account, paint: Paint, out: &mut String) {
    out.push_str(&paint.heading("Problems"));
    if account.problems.is_empty() && account.refusals.is_empty() {
        out.push_str("none\n");
    }
    for problem in &account.problems {
        let (code, done) = outcome(problem);
        let _ = writeln!(out, "{:>7}  {} {}", problem.count, paint.code(code, done), escaped(&problem.what));
        let file = problem.file.as_deref().map_or_else(String::new, |file| format!(" of {file}"));
        let more = if problem.count > problem.places.len() { ", ..." } else { "" };
        let places: Vec<String> = problem.places.iter().map(usize::to_string).collect();
        let mut detail = format!("at {}{more}{file}", places.join(", "));
        if let Some(example) = problem.example.as_deref().filter(|example| !example.is_empty()) {
            let _ = write!(detail, "; such as: {example}");
        }
        let _ = writeln!(out, "         {}", paint.text(SOFT, &detail));
        let flag = problem.flag.as_deref().map_or_else(String::new, |flag| format!("{flag} decides"));
        let advice: Vec<&str> = [flag.as_str(), problem.advice.unwrap_or_default()]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        if !advice.is_empty() {
            let _ = writeln!(out, "         {}", paint.text(SOFT, &advice.join("; ")));
        }
    }
    for refusal in &account.refusals {
        let _ = writeln!(out, "{} {}", paint.code(RED, "error"), escaped(&refusal.message));
        let _ = writeln!(out, "      {}", paint.text(SOFT, &format!("help: {}", refusal.help)));
    }
}

/// What was done with the records of a problem, and its colour.
fn outcome(problem: &Problem) -> (&'static str, &'static str) {
    match problem.policy {
        Policy::Error => (RED, "error:   "),
        Policy::Drop => (YELLOW, "left out:"),
        Policy::Cut => (YELLOW, "cut:     "),
        Policy::Keep => (SOFT, "kept:    "),
    }
}

fn lengths(account: &Account, paint: Paint, out: &mut String) {
    let lengths = &account.lengths;
    if lengths.rows.is_empty() {
        return;
    }
    out.push_str(&paint.heading("Lengths in tokens, before anything is cut"));
    let _ = writeln!(
        out,
        "{:<26}{:>8}{:>8}{:>10}{:>8}{:>8}{:>8}",
        "", "least", "median", "mean", "90 %", "99 %", "most"
    );
    for LengthRow { part, least, median, mean, p90, p99, most } in &lengths.rows {
        let _ = writeln!(out, "{part:<26}{least:>8}{median:>8}{mean:>10.1}{p90:>8}{p99:>8}{most:>8}");
    }
    out.push_str(&paint.heading("Records by the tokens of prompt and longer response"));
    let highest = lengths.histogram.iter().map(|bin| bin.count).max().unwrap_or(1).max(1);
    for bin in &lengths.histogram {
        // A bin with a record has a mark.
        let bar = "#".repeat((bin.count * BAR).div_ceil(highest));
        let limit = account.limits.max_length;
        let over = if bin.from > limit { YELLOW } else { GREEN };
        let marked = (bin.from..=bin.to).contains(&limit);
        let marked = if marked { format!("  <- max_length {limit}") } else { String::new() };
        let _ = writeln!(
            out,
            "{:>7} - {:<7}{:>8}  {}{marked}",
            bin.from,
            bin.to,
            bin.count,
            paint.code(over, &bar)
        );
    }
    let records = lengths.fits.iter().map(|fit| fit.whole).max().unwrap_or(0).max(count(account));
    out.push_str(&paint.heading("What --max-length leaves whole"));
    for fit in &lengths.fits {
        let share = 100.0 * fit.whole as f64 / records.max(1) as f64;
        let holds = if fit.holds { "  <- holds" } else { "" };
        let _ = writeln!(out, "{:>8} {:>8} records {share:>6.1} %{holds}", fit.max_length, fit.whole);
    }
    out.push_str(&paint.heading("What --tokens-per-micro-batch makes of the kept pairs"));
    for budget in &account.budgets {
        let larger = match budget.larger {
            0 => String::new(),
            larger => format!(", {larger} pairs larger than that"),
        };
        let holds = if budget.holds { "  <- holds" } else { "" };
        let _ = writeln!(
            out,
            "{:>8} {:>8} micro-batches an epoch, {:>5.1} % filled{larger}{holds}",
            budget.tokens,
            budget.micro_batches,
            100.0 * budget.filled
        );
    }
}

/// Records that were tokenised.
fn count(account: &Account) -> usize {
    account.lengths.histogram.iter().map(|bin| bin.count).sum()
}

fn tokens(account: &Account, paint: Paint, out: &mut String) {
    if account.kept == 0 {
        return;
    }
    out.push_str(&paint.heading("Begin and end tokens of the kept pairs"));
    let tokens = &account.tokens;
    let bos = account.bos.as_deref().unwrap_or("none");
    let quoted: Vec<String> = account.ends.iter().map(|end| format!("{end:?}")).collect();
    let _ = writeln!(
        out,
        "begin token {}, end tokens {}",
        escaped(&format!("{bos:?}")),
        escaped(&quoted.join(", "))
    );
    for (count, what) in [
        (tokens.prompts_begin_with_bos, "prompts begin with the begin token"),
        (tokens.prompts_with_several_bos, "prompts have it more than once"),
        (tokens.responses_with_bos, "responses have it"),
        (tokens.responses_with_one_end, "responses have one end token"),
        (tokens.responses_with_several_ends, "responses have several, as those of several turns do"),
        (tokens.responses_without_end, "responses have none: they were cut, or the template writes none"),
    ] {
        let _ = writeln!(out, "{count:>8} {what}");
    }
    let _ = writeln!(
        out,
        "{:>8} responses have tokens after their last end token, {} in all, which are scored too; --on-after-end cut \
         takes them off",
        tokens.responses_with_tokens_after_end, tokens.tokens_after_end
    );
    let [chosen, rejected] = tokens.scored;
    let _ = writeln!(out, "{chosen:>8} tokens of chosen and {rejected} of rejected responses are scored");
}

fn pairs(account: &Account, paint: Paint, out: &mut String) {
    if account.pairs.is_empty() {
        return;
    }
    out.push_str(&paint.heading("Pairs as the model sees them"));
    let boundary = paint.code(BOUNDARY, "|");
    let _ = writeln!(
        out,
        "{} is a special token, {boundary} is where the prompt ends and scoring begins",
        paint.code(SPECIAL, "<token>")
    );
    for pair in &account.pairs {
        let ShownPair { place, prompt_tokens, response_tokens: [chosen, rejected], .. } = pair;
        let _ = writeln!(
            out,
            "\n{}",
            paint.code(BOLD, &format!("record at {place}: {prompt_tokens} + {chosen} and {rejected} tokens"))
        );
        let _ = writeln!(out, "{}{boundary}", written(&pair.prompt, "0", paint));
        let _ = writeln!(out, "  chosen   {boundary}{}", written(&pair.chosen, GREEN, paint));
        let _ = writeln!(out, "  rejected {boundary}{}", written(&pair.rejected, RED, paint));
    }
}

/// The pieces on lines of their own text, with each line end visible.
fn written(pieces: &[Piece], code: &str, paint: Paint) -> String {
    let piece = |piece: &Piece| {
        let text = piece.text.replace('\n', "\u{23ce}\n");
        // A code over a line end would colour the rest of a wrapped line.
        let code = if piece.special { SPECIAL } else { code };
        let lines: Vec<String> = text.split('\n').map(|line| paint.text(code, line)).collect();
        let left_out = match piece.left_out {
            0 => String::new(),
            count => paint.code(SOFT, &format!(" ({count} characters left out)")),
        };
        lines.join("\n") + &left_out
    };
    pieces.iter().map(piece).collect()
}
