//! Several runs on one page: the options in which they differ, their last metrics side by side, their charts in one.

use serde::Serialize;

use super::chart::{Chart, Drawing, Line, LineKind, number};
use super::facts::RunState;
use super::history::History;
use super::page;
use super::progress::duration;
use super::run_page::RunReport;
use super::table::{Cell, Table};
use crate::config::options::{OBJECTIVE_HEADING, PROBLEMS_HEADING, rows};
use crate::error::Result;

/// The most runs of one page: as many styles of lines as style.css has.
pub const MOST_RUNS: usize = 16;

/// Options in which runs differ without being different runs.
const PLACES: [&str; 1] = ["output"];
/// Options that decide which pairs a run is evaluated on.
const EVALUATED: [&str; 6] =
    ["eval_data", "eval_split", "columns", "chat_template", "max_length", "max_prompt_length"];

/// A run and the name that it has on the page.
#[derive(Clone, Debug)]
pub struct NamedRun {
    /// A folder's name.
    pub name: String,
    /// The run.
    pub report: RunReport,
}

/// What the template is given.
#[derive(Serialize)]
struct View {
    title: String,
    runs: Table,
    options: Option<Table>,
    metrics: Table,
    notes: Vec<&'static str>,
    charts: Vec<Drawing>,
}

/// An option in which the runs differ, and each run's value.
type Differing = (String, Vec<Option<String>>);

/// A metric in the table of last values.
struct Metric {
    label: &'static str,
    value: fn(&RunReport) -> Option<f64>,
    text: fn(f64) -> String,
    better: Better,
    /// Whether it is of the evaluation's pairs.
    evaluated: bool,
    /// Whether it depends on the objective and its numbers.
    of_objective: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Better {
    More,
    Less,
}

/// The page of `runs`, which are at most [`MOST_RUNS`].
///
/// # Errors
/// A bug of this program.
pub fn comparison_page(runs: &[NamedRun]) -> Result<String> {
    let differing = differing_options(runs);
    let (same_pairs, same_objective) = (is_same_evaluation(runs, &differing), is_same_objective(&differing));
    let mut notes = Vec::new();
    if !same_pairs {
        notes.push("The runs are evaluated on different pairs: no evaluation metric is marked as the best.");
    }
    if !same_objective {
        notes.push(
            "The runs have different objectives or objective options: their losses and rewards have different scales, and none \
             is marked as the best.",
        );
    }
    let view = View {
        title: format!("{} runs beside each other", runs.len()),
        runs: runs_table(runs),
        options: options_table(runs, differing),
        metrics: metrics_table(runs, same_pairs, same_objective),
        notes,
        charts: charts(runs).iter().map(Chart::drawing).collect(),
    };
    page::render("comparison.html", include_str!("comparison.html"), &view)
}

fn columns<'a>(first: &'a str, runs: &'a [NamedRun]) -> impl Iterator<Item = &'a str> {
    std::iter::once(first).chain(runs.iter().map(|run| run.name.as_str()))
}

fn runs_table(runs: &[NamedRun]) -> Table {
    let mut table = Table::new(["run", "objective and model", "device", "steps", "time", ""]);
    for NamedRun { name, report } in runs {
        let facts = &report.facts;
        let state = match &facts.state {
            RunState::Running => "not at its end",
            RunState::Stopped(_) => "stopped",
            RunState::Finished | RunState::Unknown => "",
        };
        let time = if facts.seconds > 0.0 { duration(facts.seconds) } else { String::new() };
        let cell = |text: String, class| Cell { text, class };
        let cells = vec![
            cell(report.title(), "text"),
            cell(facts.device.clone(), "text"),
            cell(report.history.last_step().to_string(), ""),
            cell(time, ""),
            cell(state.to_string(), "text"),
        ];
        table.push(name, cells);
    }
    // Runs that are all at their end have nothing to say in the last column.
    if table.rows.iter().all(|row| row.cells.last().is_some_and(|cell| cell.text.is_empty())) {
        table.columns.pop();
        table.rows.iter_mut().for_each(|row| drop(row.cells.pop()));
    }
    table
}

/// Options that the runs do not agree in, and each run's value: in the order of `--help`, then those that only other
/// versions know.
fn differing_options(runs: &[NamedRun]) -> Vec<Differing> {
    let known: Vec<&str> = rows().iter().map(|row| row.name).collect();
    let mut names: Vec<&str> = known.clone();
    for (name, _) in runs.iter().flat_map(|run| &run.report.options) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let value = |run: &NamedRun, name: &str| {
        run.report.options.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
    };
    names
        .into_iter()
        .filter(|name| !PLACES.contains(name))
        .map(|name| (name.to_string(), runs.iter().map(|run| value(run, name)).collect::<Vec<_>>()))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .collect()
}

/// The options under a heading of `--help`.
fn options_under(heading: &str) -> Vec<&'static str> {
    rows().iter().filter(|row| row.heading == heading).map(|row| row.name).collect()
}

fn is_same_objective(differing: &[Differing]) -> bool {
    let numbers = options_under(OBJECTIVE_HEADING);
    !differing.iter().any(|(name, _)| numbers.contains(&name.as_str()))
}

/// Whether the runs are evaluated on the same pairs. An option that decides it and that a run lacks has its default, but for
/// what is done with pairs that have a problem: earlier versions had no such options and did the same.
fn is_same_evaluation(runs: &[NamedRun], differing: &[Differing]) -> bool {
    let of_problems = options_under(PROBLEMS_HEADING);
    let splits = runs.iter().any(|run| run.report.options.iter().any(|(name, _)| name == "eval_split"));
    !differing.iter().any(|(name, values)| {
        let name = name.as_str();
        let mut given = values.iter().flatten();
        let given_differ = given.next().is_some_and(|first| given.any(|other| other != first));
        EVALUATED.contains(&name)
            || (of_problems.contains(&name) && given_differ)
            || (name == "data" && splits)
    })
}

fn options_table(runs: &[NamedRun], differing: Vec<Differing>) -> Option<Table> {
    let mut table = Table::new(columns("option", runs));
    for (name, values) in differing {
        let cell =
            |value: Option<String>| Cell { text: value.unwrap_or_else(|| "not given".into()), class: "text" };
        table.push(name, values.into_iter().map(cell).collect());
    }
    (!table.rows.is_empty()).then_some(table)
}

fn metrics_table(runs: &[NamedRun], same_pairs: bool, same_objective: bool) -> Table {
    let mut table = Table::new(columns("metric", runs));
    for metric in METRICS {
        let values: Vec<Option<f64>> = runs.iter().map(|run| (metric.value)(&run.report)).collect();
        if values.iter().all(Option::is_none) {
            continue;
        }
        let comparable = (same_pairs || !metric.evaluated) && (same_objective || !metric.of_objective);
        let best = best(&values, metric.better).filter(|_| comparable);
        let cell = |value: &Option<f64>| match value {
            Some(value) if Some(*value) == best => {
                Cell { text: format!("{} best", (metric.text)(*value)), class: "good" }
            }
            Some(value) => Cell { text: (metric.text)(*value), class: "" },
            None => Cell::default(),
        };
        table.push(metric.label, values.iter().map(cell).collect());
    }
    table
}

/// The best of the values; `None` where a run has none, or where all are equal.
fn best(values: &[Option<f64>], better: Better) -> Option<f64> {
    let values: Vec<f64> = values.iter().copied().collect::<Option<_>>()?;
    let least = values.iter().copied().reduce(f64::min)?;
    let most = values.iter().copied().reduce(f64::max)?;
    (least < most).then_some(if better == Better::More { most } else { least })
}

/// The last value of a metric.
fn last(history: &History, name: &str) -> Option<f64> {
    history.series(name).last().map(|point| point.1)
}

/// The mean over the last tenth of the steps: one step's value is noise.
fn last_tenth(history: &History, name: &str) -> Option<f64> {
    let points = history.series(name);
    let tail = &points[points.len() - points.len().div_ceil(10)..];
    (!tail.is_empty()).then(|| tail.iter().map(|point| point.1).sum::<f64>() / tail.len() as f64)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

const fn evaluated(
    label: &'static str,
    value: fn(&RunReport) -> Option<f64>,
    text: fn(f64) -> String,
    better: Better,
) -> Metric {
    Metric { label, value, text, better, evaluated: true, of_objective: false }
}

const fn of_steps(
    label: &'static str,
    value: fn(&RunReport) -> Option<f64>,
    text: fn(f64) -> String,
    better: Better,
) -> Metric {
    Metric { label, value, text, better, evaluated: false, of_objective: false }
}

/// First what training can change, then what the objective computes, then what the run cost.
const METRICS: [Metric; 11] = [
    evaluated(
        "chosen gained more",
        |run| last(&run.history, "eval_implicit/accuracies"),
        percent,
        Better::More,
    ),
    evaluated(
        "gain of chosen over rejected",
        |run| last(&run.history, "eval_implicit/margins"),
        number,
        Better::More,
    ),
    evaluated(
        "chosen is the likelier",
        |run| last(&run.history, "eval_logps/accuracies"),
        percent,
        Better::More,
    ),
    evaluated("log-prob margin", |run| last(&run.history, "eval_logps/margins"), number, Better::More),
    Metric {
        of_objective: true,
        ..evaluated("evaluation loss", |run| last(&run.history, "eval_loss"), number, Better::Less)
    },
    Metric {
        of_objective: true,
        ..of_steps("training loss, last tenth", |run| last_tenth(&run.history, "loss"), number, Better::Less)
    },
    of_steps(
        "chosen gained more in training, last tenth",
        |run| last_tenth(&run.history, "implicit/accuracies"),
        percent,
        Better::More,
    ),
    of_steps(
        "tokens per second, median",
        |run| run.history.median("tokens_per_second"),
        number,
        Better::More,
    ),
    of_steps("model FLOPs used, median", |run| run.history.median("mfu"), percent, Better::More),
    of_steps("peak memory in GiB", |run| run.history.largest("memory/peak_gib"), number, Better::Less),
    of_steps(
        "time in s",
        |run| Some(run.facts.seconds).filter(|seconds| *seconds > 0.0),
        number,
        Better::Less,
    ),
];

/// A line for each run in every chart.
fn charts(runs: &[NamedRun]) -> Vec<Chart> {
    let chart = |(title, about, series, kind, share): &(&'static str, &'static str, &str, LineKind, bool)| {
        let lines = runs.iter().enumerate().map(|(style, run)| Line {
            name: run.name.clone().into(),
            points: run.report.history.series(series),
            style,
            kind: *kind,
        });
        Chart::of(title, about, *share, lines.collect())
    };
    CHARTS.iter().filter_map(chart).collect()
}

/// Title, explanation, metric, how it is drawn, whether it is a share.
const CHARTS: [(&str, &str, &str, LineKind, bool); 13] = [
    (
        "Chosen gained more, evaluation",
        "Share of pairs whose chosen response gained more log-prob over the reference than the rejected one.",
        "eval_implicit/accuracies",
        LineKind::Dots,
        true,
    ),
    (
        "Gain of chosen over rejected, evaluation",
        "Mean of how much more the chosen response gained over the reference, in nats.",
        "eval_implicit/margins",
        LineKind::Dots,
        false,
    ),
    (
        "Chosen is likelier, evaluation",
        "Share of pairs whose chosen response has the higher log-prob.",
        "eval_logps/accuracies",
        LineKind::Dots,
        true,
    ),
    ("Evaluation loss", "Mean over the evaluation pairs.", "eval_loss", LineKind::Dots, false),
    ("Training loss", "Mean over the pairs of a step.", "loss", LineKind::Noisy, false),
    (
        "Chosen gained more, training",
        "Share of a step's pairs whose chosen response gained more log-prob over the reference than the rejected one.",
        "implicit/accuracies",
        LineKind::Noisy,
        true,
    ),
    (
        "Log-prob of chosen",
        "Mean log-prob of a whole response, in nats.",
        "logps/chosen",
        LineKind::Noisy,
        false,
    ),
    (
        "Log-prob of rejected",
        "Mean log-prob of a whole response, in nats.",
        "logps/rejected",
        LineKind::Noisy,
        false,
    ),
    ("Gradient norm", "Global l2 norm before clipping.", "grad_norm", LineKind::Noisy, false),
    ("Learning rate", "After warm-up and schedule.", "learning_rate", LineKind::Exact, false),
    ("Speed", "Tokens per second, prompts counted once.", "tokens_per_second", LineKind::Noisy, false),
    ("Model FLOPs used", "Share of the device's peak (MFU).", "mfu", LineKind::Noisy, true),
    (
        "Peak memory",
        "The most that the device's buffers held so far, in GiB.",
        "memory/peak_gib",
        LineKind::Exact,
        false,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{METRICS_FILE, RunFacts};

    fn run(name: &str, options: &[(&str, &str)], metrics: &str) -> NamedRun {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(METRICS_FILE), metrics).unwrap();
        let options = options.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let history = History::read(folder.path()).unwrap();
        let facts = RunFacts { model: "m".into(), objective: "dpo".into(), ..RunFacts::default() };
        NamedRun { name: name.into(), report: RunReport { options, history, facts, ..RunReport::default() } }
    }

    fn cells(table: &Table, label: &str) -> Vec<String> {
        let row = table
            .rows
            .iter()
            .find(|row| row.label == label)
            .unwrap_or_else(|| panic!("no {label}: {table:?}"));
        row.cells.iter().map(|cell| cell.text.clone()).collect()
    }

    const GOOD: &str = "{\"step\":1,\"loss\":0.7,\"tokens_per_second\":100}\n{\"step\":1,\"eval_loss\":0.5,\"eval_implicit/accuracies\":0.9}\n";
    const POOR: &str = "{\"step\":1,\"loss\":0.6,\"tokens_per_second\":200}\n{\"step\":1,\"eval_loss\":0.6,\"eval_implicit/accuracies\":0.6}\n";

    #[test]
    fn options_that_differ_are_named_and_the_best_is_marked() {
        let one = run("a", &[("output", "\"x\""), ("seed", "1"), ("learning_rate", "1e-5")], GOOD);
        let other = run("b", &[("output", "\"y\""), ("seed", "1"), ("new_option", "3")], POOR);
        let runs = [one, other];
        let differing = differing_options(&runs);
        let names: Vec<&str> = differing.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["learning_rate", "new_option"], "neither the seed nor the output");
        let options = options_table(&runs, differing).unwrap();
        assert_eq!(cells(&options, "learning_rate"), ["1e-5", "not given"]);

        let metrics = metrics_table(&runs, true, true);
        assert_eq!(cells(&metrics, "evaluation loss"), ["0.5 best", "0.6"]);
        assert_eq!(cells(&metrics, "chosen gained more"), ["90.0 % best", "60.0 %"]);
        assert_eq!(cells(&metrics, "training loss, last tenth"), ["0.7", "0.6 best"]);
        assert_eq!(cells(&metrics, "tokens per second, median"), ["100", "200 best"]);
        let page = comparison_page(&runs).unwrap();
        assert!(
            page.contains("2 runs beside each other") && page.contains("class=\"line-1 dots\">b<"),
            "{page}"
        );
    }

    /// Losses of two objectives, and metrics of other pairs, are on the page and no better or worse.
    #[test]
    fn what_cannot_be_compared_is_not_marked() {
        let beta = [run("a", &[("beta", "0.1")], GOOD), run("b", &[("beta", "0.5")], POOR)];
        let page = comparison_page(&beta).unwrap();
        assert!(page.contains("different objectives"), "{page}");
        let metrics = metrics_table(&beta, true, false);
        assert_eq!(cells(&metrics, "evaluation loss"), ["0.5", "0.6"]);
        assert_eq!(cells(&metrics, "chosen gained more"), ["90.0 % best", "60.0 %"]);

        let pairs = [run("a", &[("eval_data", "\"c\"")], GOOD), run("b", &[("eval_data", "\"d\"")], POOR)];
        assert!(comparison_page(&pairs).unwrap().contains("different pairs"));
        let metrics = metrics_table(&pairs, false, true);
        assert_eq!(cells(&metrics, "chosen gained more"), ["90.0 %", "60.0 %"]);
        // A version without the option did what is now its default.
        let old = [run("a", &[("on_empty", "\"drop\"")], GOOD), run("b", &[], POOR)];
        assert!(!comparison_page(&old).unwrap().contains("different pairs"));
        let split = |data| run(data, &[("data", data), ("eval_split", "0.1")], GOOD);
        assert!(comparison_page(&[split("c"), split("d")]).unwrap().contains("different pairs"));
    }

    #[test]
    fn equal_values_and_lacking_ones_have_no_best() {
        assert_eq!(best(&[Some(1.0), Some(1.0)], Better::More), None);
        assert_eq!(best(&[Some(1.0), None], Better::More), None);
        assert_eq!(best(&[Some(1.0), Some(3.0), Some(3.0)], Better::More), Some(3.0));
        assert_eq!(best(&[Some(1.0), Some(3.0)], Better::Less), Some(1.0));
    }
}
