//! The account of `check`: numbers and words alone, from which terminal, page and JSON are written.

use std::path::Path;

use serde::Serialize;

use super::shown::ShownPair;
use super::survey::{Survey, TokenCounts};
use crate::config::options::flag_name;
use crate::config::{CheckConfig, LengthLimits, Policies, Policy};
use crate::data::{Cause, FileReport, PairDataset, Refusal, TextEncoder, TokenizedPair, micro_batches};
use crate::error::{Error, Result};
use crate::model::LlamaConfig;

/// Everything that `check` says.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// Whether a training run would take the pairs.
    pub usable: bool,
    /// The model folder.
    pub model: String,
    /// The longest sequence that the model was trained for.
    pub context: usize,
    /// Lengths that pairs are cut to.
    pub limits: LengthLimits,
    /// What is done with pairs that have a problem.
    pub policies: Policies,
    /// The files, each with its records.
    pub files: Vec<FileCounts>,
    /// Records read.
    pub records: usize,
    /// Records whose pair is kept.
    pub kept: usize,
    /// Records that are left out.
    pub dropped: usize,
    /// Records at which a training run would end.
    pub errors: usize,
    /// What was found, a row for each kind and file.
    pub problems: Vec<Problem>,
    /// The first errors of records.
    pub refusals: Vec<Refusal>,
    /// How long the records are.
    pub lengths: Lengths,
    /// How the pairs that are kept fill micro-batches.
    pub budgets: Vec<Budget>,
    /// Begin and end tokens of the pairs that are kept.
    pub tokens: TokenCounts,
    /// The BOS token as text, if there is one.
    pub bos: Option<String>,
    /// The tokens that end a response, as text.
    pub ends: Vec<String>,
    /// Some pairs.
    pub pairs: Vec<ShownPair>,
}

/// The records of one file.
#[derive(Clone, Debug, Serialize)]
pub struct FileCounts {
    /// The file.
    pub path: String,
    /// Records read.
    pub records: usize,
    /// Records whose pair is kept.
    pub kept: usize,
    /// Records left out.
    pub dropped: usize,
    /// Records at which a training run would end.
    pub errors: usize,
    /// Pairs that are there again, for the file's weight.
    pub copies: usize,
}

/// One kind of problem in one file.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// A word that names it.
    pub name: &'static str,
    /// The file, where there are several.
    pub file: Option<String>,
    /// What is the matter.
    pub what: String,
    /// Records that have it.
    pub count: usize,
    /// Records left out for it.
    pub dropped: usize,
    /// Records at which a training run would end for it.
    pub errors: usize,
    /// What is done.
    pub policy: Policy,
    /// The flag that decides; `None` where there is no choice.
    pub flag: Option<String>,
    /// The first lines or records.
    pub places: Vec<usize>,
    /// What it looks like.
    pub example: Option<String>,
    /// What to do about it, where it suggests a mistake.
    pub advice: Option<&'static str>,
}

/// Lengths in tokens, before anything is cut.
#[derive(Clone, Debug, Serialize)]
pub struct Lengths {
    /// A row each for prompts, chosen responses, rejected responses, prompt with the longer response, and whole pairs.
    pub rows: Vec<LengthRow>,
    /// How many records have prompt and longer response within so many tokens.
    pub histogram: Vec<Bin>,
    /// How many of the records a `max_length` would not cut.
    pub fits: Vec<Fit>,
}

/// Lengths of one part of a pair.
#[derive(Clone, Debug, Serialize)]
pub struct LengthRow {
    /// The part.
    pub part: &'static str,
    /// The shortest.
    pub least: usize,
    /// The middle one.
    pub median: usize,
    /// The mean.
    pub mean: f64,
    /// 90 % are not longer.
    pub p90: usize,
    /// 99 % are not longer.
    pub p99: usize,
    /// The longest.
    pub most: usize,
}

/// Records of `from..=to` tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Bin {
    /// The shortest that counts here.
    pub from: usize,
    /// The longest that counts here.
    pub to: usize,
    /// How many there are.
    pub count: usize,
}

/// What a `max_length` does.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// The limit.
    pub max_length: usize,
    /// Records that it does not cut.
    pub whole: usize,
    /// Whether it is the one that holds.
    pub holds: bool,
}

/// What a `tokens_per_micro_batch` does with the pairs that are kept.
#[derive(Clone, Debug, Serialize)]
pub struct Budget {
    /// The budget.
    pub tokens: usize,
    /// Micro-batches of an epoch, in the order of the files.
    pub micro_batches: usize,
    /// The mean share of the budget that is filled.
    pub filled: f64,
    /// Pairs that are larger than the budget, and a micro-batch of their own.
    pub larger: usize,
    /// Whether it is the one that holds.
    pub holds: bool,
}

impl Account {
    pub(super) fn new(
        folder: &Path,
        model: &LlamaConfig,
        encoder: &TextEncoder,
        dataset: &PairDataset,
        survey: &Survey,
        config: &CheckConfig,
    ) -> Result<Self> {
        let report = &dataset.report;
        let text = |id: u32| encoder.tokenizer.decode(&[id], false);
        if let Some(failure) = survey.take_failure() {
            tracing::warn!("a pair cannot be shown: {failure}");
        }
        let many = dataset.files.len() > 1;
        let errors = report.stops();
        Ok(Account {
            usable: errors == 0 && report.pairs > 0,
            model: folder.display().to_string(),
            context: model.context(),
            limits: report.limits,
            policies: report.policies,
            files: dataset.files.iter().map(FileCounts::new).collect(),
            records: report.records,
            kept: report.pairs,
            dropped: report.dropped(),
            errors,
            problems: dataset.files.iter().flat_map(|file| problems(file, many)).collect(),
            refusals: dataset.refusals.clone(),
            lengths: Lengths::new(&survey.uncut, report.limits, model.context()),
            budgets: budgets(&dataset.pairs, config.tokens_per_micro_batch),
            tokens: survey.tokens,
            bos: encoder.tokenizer.bos().map(text).transpose()?,
            ends: survey.ends.iter().map(|&id| text(id)).collect::<Result<_>>()?,
            pairs: survey.shown.clone(),
        })
    }

    /// The account as one JSON object.
    pub(super) fn to_json(&self) -> Result<String> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| Error::bug(format!("the account cannot be written as JSON: {error}")))?;
        Ok(json + "\n")
    }

    /// The error of pairs that a training run would not take.
    pub(super) fn verdict(&self) -> Result<()> {
        let first = self.files.first().map_or("", |file| &file.path);
        let error = |message: String, help: &str| Err(Error::data(Path::new(first), None, message, help));
        match self.errors {
            0 if self.kept == 0 => error(
                format!("no usable pair in {} records", self.records),
                "the table of problems says why each record is left out",
            ),
            0 => Ok(()),
            _ if self.records == 0 => error(
                "not usable: no record can be read, and a training run would end here".to_string(),
                "the account says why; name another file with --data, or mend this one",
            ),
            errors => error(
                format!(
                    "not usable as it is: a training run would end at {errors} record{}",
                    if errors == 1 { "" } else { "s" }
                ),
                "mend them, or let --on-refused or the flag named beside the problem leave them out",
            ),
        }
    }
}

impl FileCounts {
    fn new(file: &FileReport) -> Self {
        let report = &file.report;
        FileCounts {
            path: file.path.display().to_string(),
            records: report.records,
            kept: report.pairs,
            dropped: report.dropped(),
            errors: report.stops(),
            copies: report.copies,
        }
    }
}

fn problems(file: &FileReport, many: bool) -> Vec<Problem> {
    let report = &file.report;
    let found = Cause::ALL.into_iter().filter(|cause| report.tally(*cause).count > 0);
    let problem = |cause: Cause| {
        let tally = report.tally(cause);
        Problem {
            name: cause.name(),
            file: many.then(|| file.path.display().to_string()),
            what: report.problem(cause),
            count: tally.count,
            dropped: tally.dropped,
            errors: tally.stops,
            policy: cause.policy(&report.policies),
            flag: cause.option().map(flag_name),
            places: tally.first.clone(),
            example: tally.example.clone(),
            advice: cause.advice(),
        }
    };
    found.map(problem).collect()
}

/// The length of one part, of the lengths of prompt, chosen and rejected response.
type LengthOf = fn(&[usize; 3]) -> usize;

/// What `max_length` bounds.
fn sequence([prompt, chosen, rejected]: &[usize; 3]) -> usize {
    prompt + chosen.max(rejected)
}

impl Lengths {
    fn new(uncut: &[[usize; 3]], limits: LengthLimits, context: usize) -> Self {
        let parts: [(&'static str, LengthOf); 5] = [
            ("prompt", |lengths| lengths[0]),
            ("chosen", |lengths| lengths[1]),
            ("rejected", |lengths| lengths[2]),
            ("prompt + longer response", sequence),
            ("whole pair", |lengths| lengths.iter().sum()),
        ];
        let sorted = |part: LengthOf| {
            let mut lengths: Vec<usize> = uncut.iter().map(part).collect();
            lengths.sort_unstable();
            lengths
        };
        let rows = parts.iter().filter_map(|(part, length)| LengthRow::new(part, &sorted(*length))).collect();
        let sequences = sorted(sequence);
        let mut candidates: Vec<usize> =
            (7..=17).map(|power| 1 << power).filter(|&length| length <= context).collect();
        candidates.push(limits.max_length);
        candidates.sort_unstable();
        candidates.dedup();
        let fit = |max_length: usize| Fit {
            max_length,
            whole: sequences.partition_point(|&length| length <= max_length),
            holds: max_length == limits.max_length,
        };
        Lengths { rows, histogram: histogram(&sequences), fits: candidates.into_iter().map(fit).collect() }
    }
}

impl LengthRow {
    fn new(part: &'static str, sorted: &[usize]) -> Option<Self> {
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let mean = sorted.iter().sum::<usize>() as f64 / sorted.len() as f64;
        // The smallest length that the share does not exceed.
        let at =
            |share: f64| sorted[((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1];
        Some(LengthRow { part, least, median: at(0.5), mean, p90: at(0.9), p99: at(0.99), most })
    }
}

/// Bins of one width, and one for the longest hundredth where it is far out.
fn histogram(sorted: &[usize]) -> Vec<Bin> {
    const BINS: usize = 16;
    let Some(&most) = sorted.last() else { return Vec::new() };
    let p99 = sorted[(sorted.len() * 99).div_ceil(100).max(1) - 1];
    let usual = if most > 2 * p99 { p99 } else { most };
    let width = nice_width(usual.div_ceil(BINS).max(1));
    let count = |from: usize, to: usize| {
        sorted.partition_point(|&length| length <= to) - sorted.partition_point(|&length| length < from)
    };
    let mut bins: Vec<Bin> = (0..=usual / width)
        .map(|place| (place * width, (place + 1) * width - 1))
        .map(|(from, to)| Bin { from, to: to.min(most), count: count(from, to) })
        .collect();
    let end = bins.last().map_or(0, |bin| bin.to);
    if end < most {
        bins.push(Bin { from: end + 1, to: most, count: count(end + 1, most) });
    }
    let empty = bins.iter().take_while(|bin| bin.count == 0).count();
    bins.split_off(empty)
}

/// The smallest of 1, 2 and 5 times a power of ten that is not less.
fn nice_width(least: usize) -> usize {
    let mut power = 1;
    loop {
        if let Some(width) = [1, 2, 5].into_iter().map(|step| step * power).find(|&width| width >= least) {
            return width;
        }
        power *= 10;
    }
}

fn budgets(pairs: &[TokenizedPair], given: usize) -> Vec<Budget> {
    let tokens: Vec<usize> = pairs.iter().map(TokenizedPair::tokens).collect();
    let mut budgets = vec![1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, given];
    budgets.sort_unstable();
    budgets.dedup();
    let sum: usize = tokens.iter().sum();
    let budget = |budget: usize| {
        let runs = micro_batches(&tokens, budget).len();
        Budget {
            tokens: budget,
            micro_batches: runs,
            filled: sum as f64 / (runs.max(1) * budget) as f64,
            larger: tokens.iter().filter(|&&tokens| tokens > budget).count(),
            holds: budget == given,
        }
    };
    budgets.into_iter().map(budget).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_in_one_bin_and_a_far_one_widens_none() {
        for lengths in [vec![5], vec![0, 0, 1], (1..=1000).collect(), [vec![10; 500], vec![90_000]].concat()]
        {
            let bins = histogram(&lengths);
            assert_eq!(bins.iter().map(|bin| bin.count).sum::<usize>(), lengths.len(), "{bins:?}");
            assert!(bins.len() <= 18, "{bins:?}");
            assert_eq!(bins.last().unwrap().to, *lengths.last().unwrap(), "{bins:?}");
            assert!(bins.windows(2).all(|pair| pair[0].to + 1 == pair[1].from), "{bins:?}");
        }
        assert!(histogram(&[]).is_empty());
    }

    #[test]
    fn percentiles_are_lengths_that_occur() {
        let row = LengthRow::new("prompt", &(1..=100).collect::<Vec<_>>()).unwrap();
        assert_eq!((row.least, row.median, row.p90, row.p99, row.most), (1, 50, 90, 99, 100));
        let one = LengthRow::new("prompt", &[7]).unwrap();
        assert_eq!((one.least, one.median, one.p99, one.most), (7, 7, 7, 7));
    }
}
