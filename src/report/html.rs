//! `report.html`: one file that shows a whole run, with no script and nothing fetched from anywhere.

use std::fmt::Write;

use super::chart::{Chart, Line, LineKind, number};
use super::history::History;
use super::metrics::EvalMetrics;
use super::progress::duration;
use super::summary::{Sample, compare};
use crate::objective::ObjectiveKind;

/// Name of the file in a run's output folder.
pub const REPORT_FILE: &str = "report.html";

/// The style of every page.
pub(crate) const STYLE: &str = include_str!("style.css");

/// Steps in the table of numbers.
const TABLE_STEPS: usize = 24;

/// Everything the report shows.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// The model for people: a folder's name, or `the built-in demo`.
    pub model: String,
    /// The objective's name.
    pub objective: String,
    /// What computed, and why: the device's own words.
    pub device: String,
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// The metrics of every step and evaluation.
    pub history: History,
    /// The training pairs, and those of the evaluation where there are some.
    pub data: Vec<DataSummary>,
    /// Evaluations of the same pairs before the first and after the last step.
    pub comparison: Option<(EvalMetrics, EvalMetrics)>,
    /// Prompts with the answers before and after.
    pub samples: Vec<Sample>,
    /// What a user should know of this run: saturated weights, many cut prompts.
    pub warnings: Vec<String>,
    /// Wall-clock time of this process.
    pub seconds: f64,
}

/// How the records of one file were used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataSummary {
    /// The file, or `the built-in demo`.
    pub name: String,
    /// Records read.
    pub read: usize,
    /// Pairs used.
    pub used: usize,
    /// Reasons for dropping a pair, and how often.
    pub dropped: Vec<(String, usize)>,
    /// What was shortened, and how often.
    pub cut: Vec<(String, usize)>,
}

impl RunReport {
    /// The page.
    pub fn to_html(&self) -> String {
        let title = format!("{} on {}", written(&self.objective), self.model);
        let mut out = String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
        // The policy makes a browser refuse what this page never asks for: anything from elsewhere, and any script.
        out.push_str(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n",
        );
        let _ = write!(out, "<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n", escape(&title));
        self.header(&mut out, &title);
        out.push_str("<main>\n");
        self.comparison_section(&mut out);
        self.samples_section(&mut out);
        self.charts_section(&mut out);
        self.data_section(&mut out);
        let _ = write!(
            out,
            "<h2>Configuration</h2>\n<p>The whole recipe, defaults included: <code>mmpo-fast train --recipe</code> \
             repeats the run with it.</p>\n<pre tabindex=\"0\">{}</pre>\n",
            escape(self.recipe.trim_end())
        );
        let _ = write!(
            out,
            "</main>\n<footer>Written by mmpo-fast {}.</footer>\n</body>\n</html>\n",
            env!("CARGO_PKG_VERSION")
        );
        out
    }

    fn header(&self, out: &mut String, title: &str) {
        let _ = write!(
            out,
            "<header>\n<h1>{}</h1>\n<p class=\"lead\">{} steps in {} on {}</p>\n<dl class=\"tiles\">\n",
            escape(title),
            self.history.last_step(),
            duration(self.seconds),
            escape(&self.device)
        );
        for (label, value, small) in self.tiles() {
            let _ = writeln!(
                out,
                "<div><dt>{label}</dt><dd>{}<small>{}</small></dd></div>",
                escape(&value),
                escape(&small)
            );
        }
        out.push_str("</dl>\n");
        if !self.warnings.is_empty() {
            out.push_str("<ul class=\"notes\">\n");
            for warning in &self.warnings {
                let _ = writeln!(out, "<li>{}</li>", escape(warning));
            }
            out.push_str("</ul>\n");
        }
        out.push_str("</header>\n");
    }

    /// The figures one looks for first: label, value, and what it is compared with.
    fn tiles(&self) -> Vec<(&'static str, String, String)> {
        let mut tiles = Vec::new();
        if let Some((before, after)) = &self.comparison {
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            let was = |text: String| format!("before {text}");
            if let (Some(before), Some(after)) = (before.pairs.implicit, after.pairs.implicit) {
                tiles.push((
                    "Chosen gained more",
                    percent(after.accuracy),
                    "of the pairs, over the reference".into(),
                ));
                tiles.push((
                    "Gain over rejected",
                    format!("{} nats", number(after.margin)),
                    was(number(before.margin)),
                ));
            }
            if let (Some(before), Some(after)) = (before.pairs.preference, after.pairs.preference) {
                tiles.push(("Chosen is likelier", percent(after.likelier), was(percent(before.likelier))));
            }
        }
        let loss = self.history.series("loss");
        if let (Some(first), Some(last)) = (loss.first(), loss.last()) {
            tiles.push(("Training loss", number(last.1), format!("first step {}", number(first.1))));
        }
        let speed = self.history.series("tokens_per_second");
        if let Some(median) = median(&speed) {
            tiles.push(("Speed", format!("{median:.0} tok/s"), "median of the steps".into()));
        }
        let memory = self.history.series("memory/peak_gib");
        if let Some(peak) = memory.iter().map(|point| point.1).reduce(f64::max) {
            tiles.push(("Peak memory", format!("{peak:.2} GiB"), "highest of all steps".into()));
        }
        tiles
    }

    fn comparison_section(&self, out: &mut String) {
        let Some((before, after)) = &self.comparison else { return };
        out.push_str("<h2>Before and after</h2>\n");
        begin_table(out, &["the same pairs", "before", "after", "change"]);
        for row in compare(before, after) {
            let class = match row.better {
                Some(true) => " class=\"good\"",
                Some(false) => " class=\"bad\"",
                None => "",
            };
            let _ = writeln!(
                out,
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td{class}>{}</td></tr>",
                row.label, row.before, row.after, row.change
            );
        }
        out.push_str(END_OF_TABLE);
    }

    fn samples_section(&self, out: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        out.push_str("<h2>Answers before and after</h2>\n");
        for sample in &self.samples {
            let _ = writeln!(
                out,
                "<article class=\"sample\"><p class=\"prompt\">{}</p><div class=\"answers\">\
                 <div><h4>before</h4><p>{}</p></div>\
                 <div><h4>after</h4><p>{}</p></div></div></article>",
                escape(sample.prompt.trim()),
                escape(sample.before.trim()),
                escape(sample.after.trim())
            );
        }
    }

    fn charts_section(&self, out: &mut String) {
        let charts = charts(&self.history);
        if charts.is_empty() {
            return;
        }
        out.push_str("<h2>Training</h2>\n<div class=\"charts\">\n");
        charts.iter().for_each(|chart| out.push_str(&chart.figure()));
        out.push_str("</div>\n");
        self.numbers(out);
    }

    /// The charts' numbers at some steps, for those who read rather than look.
    fn numbers(&self, out: &mut String) {
        let columns = [
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "implicit/accuracies",
            "implicit/margins",
            "logps/accuracies",
            "grad_norm",
            "learning_rate",
        ];
        let present: Vec<(&str, Vec<(f64, f64)>)> = columns
            .into_iter()
            .map(|name| (name, self.history.series(name)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        out.push_str("<details><summary>Numbers of some steps</summary>\n");
        let names: Vec<&str> = std::iter::once("step").chain(present.iter().map(|(name, _)| *name)).collect();
        begin_table(out, &names);
        for step in spread(&self.history.series("loss"), TABLE_STEPS) {
            let _ = write!(out, "<tr><th scope=\"row\">{step}</th>");
            for (_, points) in &present {
                let value = points.iter().find(|point| point.0 == step).map(|point| number(point.1));
                let _ = write!(out, "<td>{}</td>", value.unwrap_or_default());
            }
            out.push_str("</tr>\n");
        }
        out.push_str(END_OF_TABLE);
        out.push_str("</details>\n");
    }

    fn data_section(&self, out: &mut String) {
        if self.data.is_empty() {
            return;
        }
        out.push_str("<h2>Data</h2>\n");
        begin_table(out, &["file", "pairs"]);
        let row = |out: &mut String, label: &str, count: usize| {
            let _ = writeln!(out, "<tr><th scope=\"row\">{}</th><td>{count}</td></tr>", escape(label));
        };
        for data in &self.data {
            row(out, &format!("{}: read", data.name), data.read);
            data.dropped.iter().for_each(|(reason, count)| row(out, &format!("dropped: {reason}"), *count));
            data.cut.iter().for_each(|(what, count)| row(out, &format!("cut: {what}"), *count));
            row(out, "used", data.used);
        }
        out.push_str(END_OF_TABLE);
    }
}

/// Closes what [`begin_table`] opens.
const END_OF_TABLE: &str = "</tbody></table></div>\n";

/// A table with these columns; it scrolls, by keyboard too, where it is wider than the page.
fn begin_table(out: &mut String, columns: &[&str]) {
    out.push_str("<div class=\"scroll\" tabindex=\"0\"><table>\n<thead><tr>");
    for column in columns {
        let _ = write!(out, "<th scope=\"col\">{}</th>", escape(column));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
}

/// The charts for which a run's metrics have lines.
fn charts(history: &History) -> Vec<Chart> {
    let charts = [preference_charts(history), reward_charts(history), training_charts(history)];
    charts.into_iter().flatten().flatten().collect()
}

/// The line of a value that every step has; its trend is drawn.
fn line(history: &History, name: &'static str, series: &str, color: usize) -> Line {
    Line { name, points: history.series(series), color, kind: LineKind::Noisy }
}

/// The dots of a value that every evaluation has.
fn dots(history: &History, name: &'static str, series: &str, color: usize) -> Line {
    Line { kind: LineKind::Dots, ..line(history, name, series, color) }
}

/// What training does to the preferences of the model.
fn preference_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, color| line(history, name, series, color);
    let dots = |name, series, color| dots(history, name, series, color);
    vec![
        Chart::of(
            "Loss",
            "Mean over the pairs of a step.",
            false,
            vec![line("training", "loss", 0), dots("evaluation", "eval_loss", 1)],
        ),
        Chart::of(
            "Chosen gained more",
            "Share of pairs whose chosen response gained more log-prob over the reference than the rejected one. A tie counts \
             as half, so a run begins at 50 %.",
            true,
            vec![
                line("training", "implicit/accuracies", 0),
                dots("evaluation", "eval_implicit/accuracies", 1),
            ],
        ),
        Chart::of(
            "Gain of chosen over rejected",
            "Mean of how much more the chosen response gained over the reference, in nats.",
            false,
            vec![line("training", "implicit/margins", 0), dots("evaluation", "eval_implicit/margins", 1)],
        ),
        Chart::of(
            "Chosen is likelier",
            "Share of pairs whose chosen response has the higher log-prob.",
            true,
            vec![line("training", "logps/accuracies", 0), dots("evaluation", "eval_logps/accuracies", 1)],
        ),
    ]
}

/// What the objective computes on the way: rewards, log-probs and weights.
fn reward_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, color| line(history, name, series, color);
    let dots = |name, series, color| dots(history, name, series, color);
    vec![
        Chart::of(
            "Reward accuracy",
            "Share of pairs whose chosen response has the higher reward. MMPO's rewards hold a part of the label, so theirs is \
             high before any training.",
            true,
            vec![line("training", "rewards/accuracies", 0), dots("evaluation", "eval_rewards/accuracies", 1)],
        ),
        Chart::of(
            "Rewards",
            "Mean reward of the chosen and the rejected responses.",
            false,
            vec![
                line("chosen", "rewards/chosen", 0),
                line("rejected", "rewards/rejected", 1),
                dots("chosen, evaluation", "eval_rewards/chosen", 2),
                dots("rejected, evaluation", "eval_rewards/rejected", 3),
            ],
        ),
        Chart::of(
            "Reward margin",
            "Mean of chosen minus rejected.",
            false,
            vec![line("training", "rewards/margins", 0), dots("evaluation", "eval_rewards/margins", 1)],
        ),
        Chart::of(
            "Log-probs",
            "Mean log-prob of a whole response, in nats.",
            false,
            vec![line("chosen", "logps/chosen", 0), line("rejected", "logps/rejected", 1)],
        ),
        Chart::of(
            "MMPO weights",
            "Mean softmax weight of the chosen response, and the share of pairs with a weight above 0.99, which train on \
             one response alone.",
            true,
            vec![
                line("weight of chosen", "weights/chosen", 0),
                line("saturated pairs", "weights/saturated", 1),
            ],
        ),
    ]
}

/// How the training itself goes.
fn training_charts(history: &History) -> Vec<Option<Chart>> {
    let line = |name, series, color| line(history, name, series, color);
    let learning_rate = Line { kind: LineKind::Exact, ..line("learning rate", "learning_rate", 0) };
    vec![
        Chart::of(
            "Gradient norm",
            "Global l2 norm before clipping.",
            false,
            vec![line("gradient norm", "grad_norm", 0)],
        ),
        Chart::of("Learning rate", "After warm-up and schedule.", false, vec![learning_rate]),
        Chart::of(
            "Speed",
            "Tokens per second, prompts counted once.",
            false,
            vec![line("tokens per second", "tokens_per_second", 0)],
        ),
        Chart::of(
            "Utilisation",
            "MFU: the model's own operations, as a share of the device's peak rate.",
            false,
            vec![line("MFU", "mfu", 0)],
        ),
    ]
}

/// An objective's name as its paper writes it.
fn written(objective: &str) -> &str {
    ObjectiveKind::from_name(objective).map_or(objective, |kind| kind.descriptor().title)
}

/// At most `most` of the steps, evenly spread, the first and the last among them.
fn spread(points: &[(f64, f64)], most: usize) -> Vec<f64> {
    if points.len() <= most {
        return points.iter().map(|point| point.0).collect();
    }
    (0..most).map(|index| points[index * (points.len() - 1) / (most - 1)].0).collect()
}

fn median(points: &[(f64, f64)]) -> Option<f64> {
    let mut values: Vec<f64> = points.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Text for HTML content and attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Characters that HTML forbids, as a model may well produce them.
            control if control.is_control() && !control.is_whitespace() => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}
