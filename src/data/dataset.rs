//! Pairs files as tokenised pairs: read in chunks, each chunk parsed, rendered and tokenised on all cores.

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;

use super::encode::Cutting;
use super::pair_cache::{Key, PairCache, PairWriter, StoredPairs, Summary};
use super::pair_source::{PairSource, Part, SourceFile};
use super::records::{
    Digests, OneKind, RATINGS, RawRecord, Read, Record, Renamed, SCORE_COLUMNS, for_each_chunk, no_record,
};
use super::{Cause, ChatTemplate, EncodedRecord, EncodingReport, TextEncoder, TokenizedPair};
use crate::config::options::flag_name;
use crate::config::{ColumnNames, LengthLimits, Policies, Policy};
use crate::{Error, Result};

/// The pairs of a file, in file order, cut to the limits.
#[derive(Clone, Debug)]
pub struct PairDataset {
    /// The pairs that are left, in the order of the file.
    pub pairs: Vec<TokenizedPair>,
    /// What became of every record.
    pub report: EncodingReport,
    /// What became of the records of each file.
    pub files: Vec<FileReport>,
    /// The first errors of records, where reading went on after them.
    pub refusals: Vec<Refusal>,
    /// Hash of all token ids and of where they are cut into prompts and responses.
    pub fingerprint: [u8; 32],
    /// The largest token id.
    pub largest_token: u32,
}

/// An error of a record after which reading went on.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Refusal {
    /// What is wrong, and where.
    pub message: String,
    /// What to do about it.
    pub help: String,
}

impl PairDataset {
    /// Logs what became of the records: a report for each file, and each of its warnings once.
    pub fn log(&self) {
        for file in &self.files {
            file.report.log(&file.path.display().to_string());
        }
    }

    /// Refuses pairs with a token that a model of `vocabulary` tokens (folder `model`, for the message) does not have.
    ///
    /// # Errors
    /// [`Error::Model`] with the largest such token.
    pub fn check_vocabulary(&self, vocabulary: usize, model: &Path) -> Result<()> {
        let largest = self.largest_token;
        if (largest as usize) < vocabulary {
            return Ok(());
        }
        Err(Error::model(
            model,
            format!("the tokenizer gives token {largest}, but vocab_size is {vocabulary}"),
            "tokenizer and weights do not belong together: use the tokenizer the model was trained with",
        ))
    }
}

/// How records become pairs.
#[derive(Clone, Copy, Debug)]
pub struct Treatment {
    /// Lengths that pairs are cut to.
    pub limits: LengthLimits,
    /// What is done with pairs that have a problem.
    pub policies: Policies,
    /// Pairs whose scores in the file are less far apart than this are left out.
    pub min_score_gap: Option<f64>,
    /// Whether reading goes on after what would be an error of a record: it is counted, and its message is kept. No
    /// pairs at all are no error then.
    pub tolerant: bool,
}

impl Treatment {
    /// The default policies, with these limits.
    pub fn new(limits: LengthLimits) -> Self {
        Treatment { limits, policies: Policies::default(), min_score_gap: None, tolerant: false }
    }
}

/// The report on one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// What became of its records.
    pub report: EncodingReport,
}

/// Reads all records of the file `path` and tokenises their pairs; see [`load`].
///
/// # Errors
/// Those of [`load`].
pub fn load_pairs(path: &Path, encoder: &TextEncoder, limits: LengthLimits) -> Result<PairDataset> {
    load(&PairSource::file(path), encoder, Treatment::new(limits), &mut |_| {})
}

/// Reads the files of `source` and tokenises their pairs; `observe` sees what became of each record, in order. The
/// result does not depend on the number of threads, and the error of the first bad record in file order is the one
/// reported.
///
/// # Errors
/// [`Error::Io`] where a file cannot be read; [`Error::Data`] where one is empty, holds a broken or ill-typed record or
/// one that the chat template refuses or that `treatment` does not allow, or where not one pair can be used.
pub fn load(
    source: &PairSource,
    encoder: &TextEncoder,
    treatment: Treatment,
    observe: &mut dyn FnMut(&EncodedRecord),
) -> Result<PairDataset> {
    let mut intake = Intake::new(source, encoder, treatment, None)?;
    intake.read_all(observe)?;
    intake.finish()
}

/// As [`load`], with the pairs in a file of `cache`: those that an earlier call left there, else they are tokenised and
/// written to it as they come. Pairs and reports are the same either way; records that `observe` sees have no words of
/// examples where they come from the cache. Where the cache cannot be used, a warning says so and the pairs are held in
/// memory.
///
/// # Errors
/// Those of [`load`].
pub fn load_cached(
    source: &PairSource,
    encoder: &TextEncoder,
    treatment: Treatment,
    cache: Option<&PairCache>,
    mut observe: Option<&mut dyn FnMut(&EncodedRecord)>,
) -> Result<PairDataset> {
    let mut seen = 0;
    let keyed = |cache| Some((cache, Key::of(source, encoder, &treatment)?));
    if let Some((cache, key)) = cache.and_then(keyed) {
        if let Some(stored) = cache.open(&key) {
            tracing::info!("tokenised pairs are read from {}", cache.path(&key).display());
            return stored_dataset(source, treatment, &stored, observe);
        }
        let mut see = |record: &EncodedRecord| {
            seen += 1;
            if let Some(observe) = &mut observe {
                observe(record);
            }
        };
        let not_written = match cache.create() {
            Err(error) => error,
            Ok(writer) => {
                let mut intake = Intake::new(source, encoder, treatment, Some(writer))?;
                let read = intake.read_all(&mut see);
                let failed = |intake: &Intake| intake.writer.as_ref().is_some_and(PairWriter::failed);
                match read {
                    Ok(()) => match intake.finish_into(cache, &key)? {
                        Ok(dataset) => return Ok(dataset),
                        Err(error) => error,
                    },
                    Err(error) if failed(&intake) => error,
                    Err(error) => return Err(error),
                }
            }
        };
        tracing::warn!("{not_written}; the tokenised pairs are held in memory instead, and not kept");
    }
    let mut to_skip = seen;
    load(source, encoder, treatment, &mut |record| match (to_skip, &mut observe) {
        (0, Some(observe)) => observe(record),
        (0, None) => {}
        _ => to_skip -= 1,
    })
}

/// The data set of pairs that a cache has.
fn stored_dataset(
    source: &PairSource,
    treatment: Treatment,
    stored: &StoredPairs,
    observe: Option<&mut dyn FnMut(&EncodedRecord)>,
) -> Result<PairDataset> {
    let Summary { fingerprint, largest_token, reports } = &stored.summary;
    let mut report = EncodingReport::new(treatment.limits, treatment.policies);
    reports.iter().for_each(|file| report.merge(file));
    let paths = source.files.iter().map(|file| file.path.clone());
    let files = paths.zip(reports.iter().cloned()).map(|(path, report)| FileReport { path, report });
    let files = files.collect();
    if let Some(observe) = observe {
        stored.replay(observe)?;
    }
    Ok(PairDataset {
        pairs: stored.pairs()?,
        report,
        files,
        refusals: Vec::new(),
        fingerprint: *fingerprint,
        largest_token: *largest_token,
    })
}

/// Records on their way into a data set.
struct Intake<'a> {
    source: &'a PairSource,
    encoder: &'a TextEncoder,
    cutting: Cutting,
    treatment: Treatment,
    dataset: PairDataset,
    hasher: blake3::Hasher,
    one_kind: OneKind,
    digests: Digests,
    /// Which of the columns with other names were seen.
    renamed: Renamed<'a>,
    /// Records of the files before this one.
    before: usize,
    /// Where pairs are written, instead of being held in memory.
    writer: Option<PairWriter>,
}

/// What a thread made of a record: the entry for its report and its tokens, unless it is in another part.
type Outcome = Result<Option<(Read, EncodedRecord)>>;

impl<'a> Intake<'a> {
    fn new(
        source: &'a PairSource,
        encoder: &'a TextEncoder,
        treatment: Treatment,
        writer: Option<PairWriter>,
    ) -> Result<Self> {
        let after_end = treatment.policies.after_end;
        let ends = if after_end == Policy::Keep { Vec::new() } else { encoder.end_tokens()? };
        let report = EncodingReport::new(treatment.limits, treatment.policies);
        let dataset = PairDataset {
            pairs: Vec::new(),
            report,
            files: Vec::new(),
            refusals: Vec::new(),
            fingerprint: [0; 32],
            largest_token: 0,
        };
        Ok(Intake {
            source,
            encoder,
            cutting: Cutting { limits: treatment.limits, after_end, ends },
            treatment,
            dataset,
            hasher: blake3::Hasher::new(),
            one_kind: OneKind::default(),
            digests: Digests::default(),
            renamed: Renamed::new(&source.columns),
            before: 0,
            writer,
        })
    }

    fn read_all(&mut self, observe: &mut dyn FnMut(&EncodedRecord)) -> Result<()> {
        self.source.files.iter().try_for_each(|file| self.read(file, observe))
    }

    fn read(&mut self, file: &SourceFile, observe: &mut dyn FnMut(&EncodedRecord)) -> Result<()> {
        let path = file.path.as_path();
        let mut report = EncodingReport::new(self.treatment.limits, self.treatment.policies);
        let mut records = 0;
        let read = read_ahead(path, &self.source.columns, &mut |chunk| {
            records += chunk.len();
            let outcomes: Vec<(usize, Outcome)> =
                chunk.into_par_iter().map(|raw| (raw.place, self.encode(path, raw))).collect();
            for (place, outcome) in outcomes {
                self.take(file, place, outcome, &mut report, observe)?;
            }
            Ok(())
        });
        match read {
            Ok(()) if records == 0 => self.tolerate(no_record(path), &mut report)?,
            Ok(()) => {}
            Err(error @ Error::Data { .. }) if self.treatment.tolerant => {
                self.tolerate(error, &mut report)?
            }
            Err(error) => return Err(error),
        }
        self.before += records;
        self.dataset.report.merge(&report);
        self.dataset.files.push(FileReport { path: file.path.clone(), report });
        Ok(())
    }

    /// Reads and tokenises one record, on any thread.
    fn encode(&self, path: &Path, raw: RawRecord) -> Outcome {
        let mut record = raw.read(path, &self.renamed)?;
        // The raw text goes before the tokens come.
        drop(raw);
        let read = Read::of(&record);
        if !self.source.part.holds(&read.digests) {
            return Ok(None);
        }
        record.index += self.before;
        if let Some(least) = self.treatment.min_score_gap {
            let gap = record.score_gap.ok_or_else(|| no_scores(path, &record))?;
            if gap < least {
                return Ok(Some((read, EncodedRecord::without_pair(record.place, Cause::ScoresTooClose))));
            }
        }
        Ok(Some((read, self.encoder.encode(path, &record, &self.cutting)?)))
    }

    /// Enters the next record in file order.
    fn take(
        &mut self,
        file: &SourceFile,
        place: usize,
        outcome: Outcome,
        report: &mut EncodingReport,
        observe: &mut dyn FnMut(&EncodedRecord),
    ) -> Result<()> {
        let (read, mut encoded) = match outcome {
            Ok(None) => return Ok(()),
            Ok(Some(record)) => record,
            Err(error @ Error::Data { .. }) => return self.refuse(error, place, report),
            Err(error) => return Err(error),
        };
        report.records += 1;
        if let Err(error) = self.one_kind.check(&file.path, place, read.is_text) {
            return self.tolerate(error, report);
        }
        for note in &read.notes {
            report.add_note(note, place);
        }
        if let Some(same) = read.same.as_ref().filter(|_| encoded.causes.contains(&Cause::Identical)) {
            report.illustrate(Cause::Identical, same);
        }
        let repeated = self.digests.add(read.digests);
        let known = encoded.causes.iter().copied();
        let causes: Vec<Cause> =
            known.chain(repeated).chain(read.notes.iter().map(|note| note.cause)).collect();
        for &cause in encoded.causes.iter().chain(&repeated) {
            report.add(cause, place);
        }
        for (cause, example) in &encoded.examples {
            report.illustrate(*cause, example);
        }
        self.judge(&file.path, &causes, &mut encoded, report)?;
        let copies = if encoded.pair.is_some() { file.copies(&read.digests) } else { 0 };
        if let Some(writer) = &mut self.writer {
            writer.add(&encoded, copies)?;
        }
        observe(&encoded);
        if let Some(pair) = encoded.pair {
            self.push(pair, copies, report);
        }
        Ok(())
    }

    /// Does what the policies of `causes` say: an error, or leaving the pair out.
    fn judge(
        &mut self,
        path: &Path,
        causes: &[Cause],
        encoded: &mut EncodedRecord,
        report: &mut EncodingReport,
    ) -> Result<()> {
        let policies = self.treatment.policies;
        let first_with = |policy| {
            let with = causes.iter().copied().filter(|cause| cause.policy(&policies) == policy);
            with.min()
        };
        if let Some(cause) = first_with(Policy::Error) {
            let flag = cause.option().map(flag_name).unwrap_or_default();
            let example = encoded.examples.iter().find(|(other, _)| *other == cause);
            let example = example.map_or_else(String::new, |(_, example)| format!(" ({example})"));
            let message = format!("{}{example}, which {flag} does not allow", report.problem(cause));
            let help =
                format!("mend the record or leave it out; `{flag} drop` leaves out all that are like it");
            encoded.pair = None;
            report.stop_at(cause);
            return self.note_refusal(Error::data(path, Some(encoded.place), message, help));
        }
        if let Some(cause) = first_with(Policy::Drop) {
            encoded.pair = None;
            report.drop_for(cause);
        }
        Ok(())
    }

    /// A record from which no pair can be read.
    fn refuse(&mut self, error: Error, place: usize, report: &mut EncodingReport) -> Result<()> {
        report.records += 1;
        report.add(Cause::Refused, place);
        if let Error::Data { message, .. } = &error {
            report.illustrate(Cause::Refused, message);
        }
        if self.treatment.policies.refused == Policy::Drop {
            report.drop_for(Cause::Refused);
            return Ok(());
        }
        self.tolerate(error, report)
    }

    /// Counts an error that no policy excuses.
    fn tolerate(&mut self, error: Error, report: &mut EncodingReport) -> Result<()> {
        report.stop_at(Cause::Refused);
        self.note_refusal(error)
    }

    /// Ends with the error, unless reading goes on after errors.
    fn note_refusal(&mut self, error: Error) -> Result<()> {
        if !self.treatment.tolerant {
            return Err(error);
        }
        if self.dataset.refusals.len() < REFUSALS_KEPT
            && let Error::Data { help, .. } = &error
        {
            self.dataset.refusals.push(Refusal { message: error.to_string(), help: help.clone() });
        }
        Ok(())
    }

    fn push(&mut self, pair: TokenizedPair, copies: usize, report: &mut EncodingReport) {
        if copies == 0 {
            report.left_out_by_weight += 1;
            return;
        }
        report.pairs += 1;
        report.copies += copies - 1;
        report.tokens += pair.tokens() * copies;
        report.largest_pair = report.largest_pair.max(pair.tokens());
        let parts = [&pair.prompt, &pair.chosen, &pair.rejected].into_iter().flatten();
        self.dataset.largest_token = parts.copied().fold(self.dataset.largest_token, u32::max);
        for _ in 0..copies {
            for part in [&pair.prompt, &pair.chosen, &pair.rejected] {
                self.hasher.update(&(part.len() as u64).to_le_bytes());
                hash_ids(part, &mut self.hasher);
            }
        }
        if self.writer.is_some() {
            return;
        }
        for _ in 1..copies {
            self.dataset.pairs.push(pair.clone());
        }
        // Copied on one thread: what the tokenising threads leave between their short-lived texts would keep those
        // pages in use for the whole run. A large pair has pages of its own.
        self.dataset.pairs.push(if pair.tokens() > LARGE_PAIR { pair } else { pair.clone() });
    }

    /// The data set, with its pairs in a file of `cache` where a later run would find the same; the inner error is one of
    /// writing.
    fn finish_into(mut self, cache: &PairCache, key: &Key) -> Result<Result<PairDataset>> {
        let writer = self.writer.take().ok_or_else(|| Error::bug("no pairs were written"))?;
        let path = self.is_lasting().then(|| cache.path(key));
        let mut dataset = self.finish()?;
        let summary = Summary {
            fingerprint: dataset.fingerprint,
            largest_token: dataset.largest_token,
            reports: dataset.files.iter().map(|file| file.report.clone()).collect(),
        };
        let pairs = writer.finish(key, summary, path.as_deref()).and_then(|stored| stored.pairs());
        if path.is_some() {
            cache.keep_within_limit(key);
        }
        Ok(pairs.map(|pairs| {
            dataset.pairs = pairs;
            dataset
        }))
    }

    fn finish(mut self) -> Result<PairDataset> {
        let first = self.source.files.first().map_or(Path::new(""), |file| &file.path);
        if !self.treatment.tolerant || self.dataset.report.pairs > 0 {
            self.renamed.check_seen(first)?;
        }
        if self.dataset.report.pairs == 0 && !self.treatment.tolerant {
            let (message, help) = match self.source.part {
                Part::All => (
                    "no usable pair",
                    "raise max_length or lower max_prompt_length, or mend the records named",
                ),
                Part::Training(_) => ("no usable pair is left to train on", "lower --eval-split"),
                Part::Evaluation(_) => ("no usable pair is held out for evaluation", "raise --eval-split"),
            };
            return Err(Error::data(first, None, format!("{message}: {}", self.dataset.report), help));
        }
        self.dataset.fingerprint = *self.hasher.finalize().as_bytes();
        Ok(self.dataset)
    }

    /// Whether a later run would find the same: nothing was an error, and no text has the time of this run in it.
    fn is_lasting(&self) -> bool {
        let template = self.encoder.template.as_ref();
        if template.is_some_and(ChatTemplate::depends_on_now) {
            tracing::info!(
                "the tokenised pairs are not kept: the chat template writes the time; with --template-date they are"
            );
            return false;
        }
        self.dataset.report.stops() == 0 && self.dataset.report.pairs > 0
    }
}

/// The error of a record without scores, where they are to be looked at.
fn no_scores(path: &Path, record: &Record) -> Error {
    let names = SCORE_COLUMNS.map(|[chosen, rejected]| format!("`{chosen}` and `{rejected}`"));
    Error::data(
        path,
        Some(record.place),
        "no scores of the two responses, which --min-score-gap looks at",
        format!(
            "they are numbers in {}, or two numbers in `{RATINGS}`; --columns score_chosen=NAME,score_rejected=NAME reads \
             others, and --on-refused drop leaves out records without",
            names.join(", or ")
        ),
    )
}

/// Errors whose messages are kept where reading goes on after them.
const REFUSALS_KEPT: usize = 20;

/// Hands the chunks of `path` to `sink` in file order, on this thread, while another thread reads the next ones: the
/// cores that tokenise do not wait for the file.
fn read_ahead(
    path: &Path,
    columns: &ColumnNames,
    sink: &mut dyn FnMut(Vec<RawRecord>) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(CHUNKS_AHEAD);
        let reader = scope.spawn(move || {
            let mut stopped = false;
            let read = for_each_chunk(path, columns, &mut |chunk| {
                send.send(chunk).map_err(|_| {
                    stopped = true;
                    no_record(path)
                })
            });
            // The receiver that hung up has an error of its own, of an earlier record.
            if stopped { Ok(()) } else { read }
        });
        for chunk in &receive {
            sink(chunk)?;
        }
        reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A pair of more tokens than this has lists that lie on pages of their own.
const LARGE_PAIR: usize = 1 << 20;

/// Chunks that are read before they are needed.
const CHUNKS_AHEAD: usize = 2;

/// Hashes ids as little-endian bytes, in pieces that are worth a call.
fn hash_ids(ids: &[u32], hasher: &mut blake3::Hasher) {
    let mut bytes = [0u8; 4096];
    for ids in ids.chunks(bytes.len() / 4) {
        for (place, id) in bytes.chunks_exact_mut(4).zip(ids) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        hasher.update(&bytes[..4 * ids.len()]);
    }
}
