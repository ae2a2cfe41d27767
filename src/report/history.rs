//! `metrics.jsonl`: one JSON object per step or evaluation, written as the run goes and read back for its report.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::metrics::{
    EvalMetrics, ImplicitMetrics, PairMetrics, PreferenceMetrics, StepMetrics, WeightMetrics,
};
use crate::error::{Error, Result};

/// Name of the file in a run's output folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Appends lines to `metrics.jsonl`; a line reaches the file whole, as soon as it is written.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Begins the file of a new run; one that is there is emptied.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be made.
    pub fn create(folder: &Path) -> Result<Self> {
        let path = folder.join(METRICS_FILE);
        let file = File::create(&path).map_err(|source| Error::io(&path, "create", source))?;
        Ok(MetricsWriter { path, file })
    }

    /// Continues after step `step`: later lines, and a last line that a crash cut short, are removed, so that the steps
    /// that are done again are not in the file twice.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or written.
    pub fn resume(folder: &Path, step: usize) -> Result<Self> {
        let path = folder.join(METRICS_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::io(&path, "read", source)),
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| Error::io(&path, "open", source))?;
        let kept = kept_bytes(&text, step);
        file.set_len(kept)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map_err(|source| Error::io(&path, "truncate", source))?;
        Ok(MetricsWriter { path, file })
    }

    /// Appends the line of a step.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.line(metrics.step, metrics.fields())
    }

    /// Appends the line of an evaluation.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn evaluation(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.line(metrics.step, metrics.fields())
    }

    fn line(&mut self, step: usize, fields: Vec<(String, f64)>) -> Result<()> {
        let mut object = Map::new();
        object.insert("step".into(), step.into());
        // JSON has no NaN: it becomes null.
        object.extend(fields.into_iter().map(|(name, value)| (name, Value::from(value))));
        let line = format!("{}\n", Value::Object(object));
        self.file.write_all(line.as_bytes()).map_err(|source| Error::io(&self.path, "write", source))
    }

    /// Waits until the lines are on the disk; to be called where a checkpoint is saved.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::io(&self.path, "sync", source))
    }
}

/// Bytes of the whole lines at the beginning that belong to steps up to `step`.
fn kept_bytes(text: &[u8], step: usize) -> u64 {
    let keeps = |line: &[u8]| {
        line.ends_with(b"\n")
            && serde_json::from_slice::<Map<String, Value>>(line)
                .ok()
                .and_then(|object| object.get("step").and_then(Value::as_u64))
                .is_some_and(|at| at <= step as u64)
    };
    text.split_inclusive(|&byte| byte == b'\n')
        .take_while(|line| keeps(line))
        .map(|line| line.len() as u64)
        .sum()
}

/// A run's metrics as they were written, over all parts of a resumed run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    rows: Vec<Map<String, Value>>,
}

impl History {
    /// Reads the `metrics.jsonl` of a run's output folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Data`] naming a line that is not a JSON object.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(METRICS_FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| Error::io(&path, "read", source))?;
        // A process that was killed while it wrote leaves a line without its end.
        let whole = whole_lines(&text);
        if whole < text.len() {
            tracing::warn!("{}: the last line was cut short, and is left out", path.display());
        }
        let row = |(index, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| {
                Error::data(
                    &path,
                    Some(index + 1),
                    format!("not a line of metrics: {error}"),
                    "was the file edited?",
                )
            })
        };
        let rows = text[..whole].lines().enumerate().map(row).collect::<Result<_>>()?;
        Ok(History { rows })
    }

    /// `(step, value)` of the lines that have a number of this name.
    pub fn series(&self, name: &str) -> Vec<(f64, f64)> {
        self.rows
            .iter()
            .filter_map(|row| Some((row.get("step")?.as_f64()?, row.get(name)?.as_f64()?)))
            .collect()
    }

    /// The median of a metric; `None` where no line has it.
    pub fn median(&self, name: &str) -> Option<f64> {
        let mut values: Vec<f64> = self.series(name).iter().map(|point| point.1).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    }

    /// The largest value of a metric; `None` where no line has it.
    pub fn largest(&self, name: &str) -> Option<f64> {
        self.series(name).iter().map(|point| point.1).reduce(f64::max)
    }

    /// The evaluation before the first step and the last one after it; `None` where one is lacking.
    pub fn before_and_after(&self) -> Option<(EvalMetrics, EvalMetrics)> {
        let mut evaluations = self.rows.iter().filter_map(evaluation);
        let before = evaluations.next().filter(|first| first.step == 0)?;
        Some((before, evaluations.next_back()?))
    }

    /// Number of the last step.
    pub fn last_step(&self) -> usize {
        self.series("loss").last().map_or(0, |(step, _)| *step as usize)
    }
}

/// Bytes of the text without a last line that has neither an end nor a meaning.
fn whole_lines(text: &str) -> usize {
    let begin = text.rfind('\n').map_or(0, |end| end + 1);
    match serde_json::from_str::<Map<String, Value>>(&text[begin..]) {
        Ok(_) => text.len(),
        Err(_) => begin,
    }
}

/// The evaluation of a line; `None` for the line of a step.
fn evaluation(row: &Map<String, Value>) -> Option<EvalMetrics> {
    let value = |name: &str| row.get(&format!("eval_{name}")).and_then(Value::as_f64);
    let preference = || {
        Some(PreferenceMetrics {
            rewards_chosen: value("rewards/chosen")?,
            rewards_rejected: value("rewards/rejected")?,
            accuracy: value("rewards/accuracies")?,
            logps_rejected: value("logps/rejected")?,
            likelier: value("logps/accuracies")?,
        })
    };
    let implicit = || {
        Some(ImplicitMetrics { accuracy: value("implicit/accuracies")?, margin: value("implicit/margins")? })
    };
    let weights =
        || Some(WeightMetrics { chosen: value("weights/chosen")?, saturated: value("weights/saturated")? });
    let pairs = PairMetrics {
        loss: value("loss")?,
        logps_chosen: value("logps/chosen")?,
        preference: preference(),
        implicit: implicit(),
        weights: weights(),
    };
    let epoch = row.get("epoch").and_then(Value::as_f64).unwrap_or_default();
    Some(EvalMetrics { step: row.get("step")?.as_u64()? as usize, epoch, pairs })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, loss: f64) -> StepMetrics {
        StepMetrics { step, pairs: PairMetrics { loss, ..PairMetrics::default() }, ..StepMetrics::default() }
    }

    fn evaluation(step: usize) -> EvalMetrics {
        EvalMetrics { step, ..EvalMetrics::default() }
    }

    #[test]
    fn a_resumed_run_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut whole = MetricsWriter::create(folder.path()).unwrap();
        for number in 1..=6 {
            whole.step(&step(number, number as f64)).unwrap();
            if number % 2 == 0 {
                whole.evaluation(&evaluation(number)).unwrap();
            }
        }
        whole.sync().unwrap();
        let expected = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();

        let mut resumed = MetricsWriter::resume(folder.path(), 4).unwrap();
        let kept = History::read(folder.path()).unwrap();
        assert_eq!(
            (kept.last_step(), kept.series("eval_loss").len()),
            (4, 2),
            "the evaluation at step 4 stays"
        );
        for number in 5..=6 {
            resumed.step(&step(number, number as f64)).unwrap();
            if number % 2 == 0 {
                resumed.evaluation(&evaluation(number)).unwrap();
            }
        }
        assert_eq!(std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap(), expected);
    }

    #[test]
    fn a_line_cut_short_is_taken_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        std::fs::write(&path, "{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"lo").unwrap();
        MetricsWriter::resume(folder.path(), 9).unwrap().step(&step(2, 1.0)).unwrap();
        assert_eq!(History::read(folder.path()).unwrap().series("loss"), [(1.0, 2.0), (2.0, 1.0)]);
    }

    #[test]
    fn a_new_run_begins_anew_and_a_resume_without_a_file_begins() {
        let folder = tempfile::tempdir().unwrap();
        MetricsWriter::resume(folder.path(), 3).unwrap().step(&step(4, 0.5)).unwrap();
        assert_eq!(History::read(folder.path()).unwrap().last_step(), 4);
        MetricsWriter::create(folder.path()).unwrap();
        assert_eq!(History::read(folder.path()).unwrap(), History::default());
    }

    #[test]
    fn evaluations_come_back_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(folder.path()).unwrap();
        let preference = PreferenceMetrics { accuracy: 0.25, logps_rejected: -3.0, ..Default::default() };
        let all = PairMetrics {
            loss: 0.5,
            logps_chosen: -7.5,
            preference: Some(preference),
            implicit: Some(ImplicitMetrics { accuracy: 0.75, margin: -1.0 }),
            weights: Some(WeightMetrics { chosen: 0.125, saturated: 1.0 }),
        };
        let before = EvalMetrics { step: 0, epoch: 0.0, pairs: all };
        writer.evaluation(&before).unwrap();
        assert_eq!(History::read(folder.path()).unwrap().before_and_after(), None, "there is no after yet");
        writer.step(&step(1, 0.5)).unwrap();
        let after = EvalMetrics {
            step: 1,
            epoch: 0.5,
            pairs: PairMetrics { preference: None, implicit: None, weights: None, ..all },
        };
        writer.evaluation(&after).unwrap();
        assert_eq!(History::read(folder.path()).unwrap().before_and_after(), Some((before, after)));
    }

    #[test]
    fn the_line_that_a_killed_process_cut_short_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(METRICS_FILE), "{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"lo")
            .unwrap();
        assert_eq!(History::read(folder.path()).unwrap().series("loss"), [(1.0, 2.0)]);
        std::fs::write(folder.path().join(METRICS_FILE), "{\"step\":1,\"loss\":2.0}").unwrap();
        assert_eq!(
            History::read(folder.path()).unwrap().last_step(),
            1,
            "a line that lacks its end alone is kept"
        );
    }

    #[test]
    fn not_a_number_is_null() {
        let folder = tempfile::tempdir().unwrap();
        MetricsWriter::create(folder.path()).unwrap().step(&step(1, f64::NAN)).unwrap();
        let text = std::fs::read_to_string(folder.path().join(METRICS_FILE)).unwrap();
        assert!(text.starts_with("{\"step\":1,\"loss\":null,"), "{text}");
        assert_eq!(History::read(folder.path()).unwrap().series("loss"), []);
    }

    #[test]
    fn refusals_of_the_system_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = MetricsWriter::create(&folder.path().join("absent")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains(METRICS_FILE), "{error}");
        // A device that is always full.
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut writer = MetricsWriter { path: "run/metrics.jsonl".into(), file: full };
        let error = writer.step(&step(1, 0.0)).unwrap_err();
        assert_eq!(
            (error.exit_code(), error.to_string().contains("run/metrics.jsonl")),
            (5, true),
            "{error}"
        );
    }
}
