//! `report.html`: one file that shows a whole run.

use std::path::Path;

use serde::Serialize;

use super::chart::{Drawing, number};
use super::charts::charts;
use super::facts::{RunFacts, RunState};
use super::history::History;
use super::page;
use super::progress::duration;
use super::summary::{Sample, compare};
use super::table::{Cell, Table};
use crate::checkpoint::atomic;
use crate::config::RESOLVED_FILE;
use crate::config::value::Source;
use crate::error::{Error, Result};
use crate::objective::ObjectiveKind;

/// Name of the file in a run's output folder.
pub const REPORT_FILE: &str = "report.html";

/// Steps in the table of numbers.
const TABLE_STEPS: usize = 24;
/// Prompts of more characters are folded.
const LONG_PROMPT: usize = 280;
/// Characters of a folded prompt that are shown.
const PROMPT_BEGINNING: usize = 140;

/// Names of options and their values as TOML writes them.
pub type Options = Vec<(String, String)>;

/// Everything the report shows.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// What the run says of itself.
    pub facts: RunFacts,
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// Its lines.
    pub options: Options,
    /// The metrics of every step and evaluation.
    pub history: History,
    /// Seconds after which the page loads itself again: that of a run that goes on and writes it again and again.
    pub refresh: Option<u64>,
}

/// What the template is given.
#[derive(Serialize)]
struct View<'a> {
    title: String,
    lead: String,
    state: String,
    refresh: u64,
    tiles: Vec<Tile>,
    warnings: &'a [String],
    comparison_title: String,
    comparison: Option<Table>,
    samples: Vec<SampleView<'a>>,
    charts: Vec<Drawing>,
    numbers: Table,
    data: Option<Table>,
    ranks: Option<Table>,
    recipe: &'a str,
}

/// A figure that one looks for first, and what it is compared with.
#[derive(Serialize)]
struct Tile {
    label: &'static str,
    value: String,
    note: String,
}

#[derive(Serialize)]
struct SampleView<'a> {
    prompt: &'a str,
    folded: bool,
    beginning: String,
    characters: usize,
    before: &'a str,
    after: &'a str,
}

impl<'a> SampleView<'a> {
    fn new(sample: &'a Sample) -> Self {
        let prompt = sample.prompt.trim();
        let characters = prompt.chars().count();
        SampleView {
            prompt,
            folded: characters > LONG_PROMPT,
            beginning: prompt.chars().take(PROMPT_BEGINNING).collect(),
            characters,
            before: sample.before.trim(),
            after: sample.after.trim(),
        }
    }
}

impl RunReport {
    /// Reads what a run's output folder holds. A run by a version without `report.json`, and one that was killed, lack the
    /// answers and the pairs' account, and nothing else.
    ///
    /// # Errors
    /// [`Error::Config`] where the folder holds no run; [`Error::Io`] and [`Error::Data`] of its files.
    pub fn read(folder: &Path) -> Result<Self> {
        let history = match History::read(folder) {
            Err(Error::Io { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::config(
                    format!("{} holds no run: there is no metrics.jsonl in it", folder.display()),
                    "name the folder that was the --output of `mmpo-fast train`",
                ));
            }
            history => history?,
        };
        let path = folder.join(RESOLVED_FILE);
        let recipe = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            recipe => recipe.map_err(|error| Error::io(&path, "read", error))?,
        };
        let options = parse_options(&recipe, &path)?;
        let facts = RunFacts::read(folder)?.unwrap_or_else(|| facts_of_options(&options));
        Ok(RunReport { facts, recipe, options, history, refresh: None })
    }

    /// Writes `report.html` into the run's folder; the file is whole at any time.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        atomic::write_file(&folder.join(REPORT_FILE), self.to_html()?.as_bytes())
    }

    /// The page.
    ///
    /// # Errors
    /// A bug of this program.
    pub fn to_html(&self) -> Result<String> {
        page::render("report.html", include_str!("report.html"), &self.view())
    }

    /// The objective and the model, for people.
    pub fn title(&self) -> String {
        format!("{} on {}", written(&self.facts.objective), self.facts.model)
    }

    fn view(&self) -> View<'_> {
        View {
            title: self.title(),
            lead: self.lead(),
            state: self.state(),
            refresh: self.refresh.unwrap_or(0),
            tiles: self.tiles(),
            warnings: &self.facts.warnings,
            comparison_title: self.comparison_title(),
            comparison: self.comparison(),
            samples: self.samples(),
            charts: charts(&self.history).iter().map(|chart| chart.drawing()).collect(),
            numbers: self.numbers(),
            data: self.data(),
            ranks: self.ranks(),
            recipe: self.recipe.trim_end(),
        }
    }

    fn lead(&self) -> String {
        let mut lead = format!("{} steps", self.history.last_step());
        if self.facts.seconds > 0.0 {
            lead.push_str(&format!(" in {}", duration(self.facts.seconds)));
        }
        if !self.facts.device.is_empty() {
            lead.push_str(&format!(" on {}", self.facts.device));
        }
        lead
    }

    /// A sentence about a run that is not at its end; empty for one that is.
    fn state(&self) -> String {
        let done = format!("after step {} of {}", self.history.last_step(), self.facts.total_steps);
        let now = jiff::Zoned::now().strftime("%Y-%m-%d %H:%M:%S %Z");
        match (&self.facts.state, self.refresh) {
            (RunState::Running, Some(_)) => {
                format!("The run goes on: this page is of {now}, {done}, and loads itself again.")
            }
            (RunState::Running, None) => {
                format!("The run was going on when this page was written, {now}, {done}.")
            }
            (RunState::Stopped(why), _) => format!("The run ended {done}: {why}"),
            (RunState::Finished | RunState::Unknown, _) => String::new(),
        }
    }

    /// The figures one looks for first: label, value, and what it is compared with.
    fn tiles(&self) -> Vec<Tile> {
        let mut tiles = Vec::new();
        let mut tile = |label, value: String, note: String| tiles.push(Tile { label, value, note });
        if let Some((before, after)) = self.history.before_and_after() {
            let percent = |share: f64| format!("{:.1} %", 100.0 * share);
            if let (Some(before), Some(after)) = (before.pairs.implicit, after.pairs.implicit) {
                tile(
                    "Chosen gained more",
                    percent(after.accuracy),
                    "of the pairs, over the reference".into(),
                );
                let before = format!("before {}", number(before.margin));
                tile("Gain over rejected", format!("{} nats", number(after.margin)), before);
            }
            if let (Some(before), Some(after)) = (before.pairs.preference, after.pairs.preference) {
                let before = format!("before {}", percent(before.likelier));
                tile("Chosen is likelier", percent(after.likelier), before);
            }
        }
        let loss = self.history.series("loss");
        if let (Some(first), Some(last)) = (loss.first(), loss.last()) {
            tile("Training loss", number(last.1), format!("first step {}", number(first.1)));
        }
        if let Some(median) = self.history.median("tokens_per_second") {
            tile("Speed", format!("{median:.0} tok/s"), "median of the steps".into());
        }
        if let Some(median) = self.history.median("mfu") {
            tile(
                "Model FLOPs used",
                format!("{:.1} %", 100.0 * median),
                "of the peak, median of the steps".into(),
            );
        }
        if let Some(peak) = self.history.largest("memory/peak_gib") {
            tile("Peak memory", format!("{peak:.2} GiB"), "highest of all steps".into());
        }
        tiles
    }

    fn comparison_title(&self) -> String {
        match (&self.facts.state, self.history.before_and_after()) {
            (RunState::Running | RunState::Stopped(_), Some((_, after))) => {
                format!("Before and after step {}", after.step)
            }
            _ => "Before and after".to_string(),
        }
    }

    fn comparison(&self) -> Option<Table> {
        let (before, after) = self.history.before_and_after()?;
        let mut table = Table::new(["the same pairs", "before", "after", "change"]);
        for row in compare(&before, &after) {
            let class = match row.better {
                Some(true) => "good",
                Some(false) => "bad",
                None => "",
            };
            let plain = |text| Cell { text, class: "" };
            let cells = vec![plain(row.before), plain(row.after), Cell { text: row.change, class }];
            table.push(row.label, cells);
        }
        Some(table)
    }

    fn samples(&self) -> Vec<SampleView<'_>> {
        self.facts.samples.iter().map(SampleView::new).collect()
    }

    /// The charts' numbers at some steps, for those who read rather than look.
    fn numbers(&self) -> Table {
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
        let mut table = Table::new(std::iter::once("step").chain(present.iter().map(|(name, _)| *name)));
        for step in spread(&self.history.series("loss"), TABLE_STEPS) {
            let at_step = |points: &[(f64, f64)]| {
                points.iter().find(|point| point.0 == step).map(|point| number(point.1))
            };
            table
                .row(step.to_string(), present.iter().map(|(_, points)| at_step(points).unwrap_or_default()));
        }
        table
    }

    /// A row for each file, and under it what was dropped and what was changed in it.
    fn data(&self) -> Option<Table> {
        let mut table = Table::new(["file", "records", "pairs used"]);
        for data in &self.facts.data {
            table.row(&data.name, [data.read.to_string(), data.used.to_string()]);
            for (what, count) in &data.dropped {
                table.row(format!("dropped: {what}"), [count.to_string(), String::new()]);
            }
            for (what, count) in &data.cut {
                table.row(format!("cut: {what}"), [count.to_string(), String::new()]);
            }
        }
        (!self.facts.data.is_empty()).then_some(table)
    }

    /// What each rank of a run on several GPUs did.
    fn ranks(&self) -> Option<Table> {
        let mut table =
            Table::new(["rank", "tokens", "tokens/s at work", "at work", "waiting", "waiting, share"]);
        for (rank, facts) in self.facts.ranks.iter().enumerate() {
            let all = facts.busy_seconds + facts.waited_seconds;
            let seconds = |value: f64| format!("{value:.1} s");
            table.row(
                format!("{rank} on {}", facts.host),
                [
                    facts.tokens.to_string(),
                    format!("{:.0}", facts.tokens as f64 / facts.busy_seconds.max(f64::MIN_POSITIVE)),
                    seconds(facts.busy_seconds),
                    seconds(facts.waited_seconds),
                    format!("{:.1} %", 100.0 * facts.waited_seconds / all.max(f64::MIN_POSITIVE)),
                ],
            );
        }
        (!self.facts.ranks.is_empty()).then_some(table)
    }
}

/// What the options alone say of a run.
fn facts_of_options(options: &Options) -> RunFacts {
    let value =
        |name: &str| options.iter().find(|(key, _)| key == name).map(|(_, value)| value.trim_matches('"'));
    let model = match value("model") {
        None => "an unknown model",
        Some(Source::BUILTIN) => "the built-in demo",
        Some(model) => model,
    };
    let objective = value("objective").unwrap_or_default();
    RunFacts { model: model.to_string(), objective: objective.to_string(), ..RunFacts::default() }
}

/// The lines of a resolved recipe: names and values, these as TOML writes them. Names that this version does not know
/// are kept: another version may have written them.
fn parse_options(text: &str, path: &Path) -> Result<Options> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
        let help = "was the file edited? It is written by `mmpo-fast train` and holds `name = value` lines";
        Error::data(path, line, format!("not TOML: {}", error.message()), help)
    })?;
    Ok(table.into_iter().map(|(name, value)| (name, value.to_string())).collect())
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
