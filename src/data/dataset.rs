//! A pairs file as tokenised pairs: read in chunks, each chunk parsed, rendered and tokenised on all cores.

use std::path::Path;
use std::sync::mpsc::sync_channel;

use rayon::prelude::*;

use super::records::{Digests, OneKind, RawRecord, Read, for_each_chunk, no_record};
use super::{Cause, EncodedRecord, EncodingReport, TextEncoder, TokenizedPair};
use crate::config::LengthLimits;
use crate::{Error, Result};

/// The pairs of a file, in file order, cut to the limits.
#[derive(Clone, Debug)]
pub struct PairDataset {
    /// The pairs that are left, in the order of the file.
    pub pairs: Vec<TokenizedPair>,
    /// What became of every record.
    pub report: EncodingReport,
    /// Hash of all token ids and of where they are cut into prompts and responses.
    pub fingerprint: [u8; 32],
}

impl PairDataset {
    /// Refuses pairs with a token that a model of `vocabulary` tokens (folder `model`, for the message) does not have.
    ///
    /// # Errors
    /// [`Error::Model`] with the largest such token.
    pub fn check_vocabulary(&self, vocabulary: usize, model: &Path) -> Result<()> {
        let tokens =
            self.pairs.iter().flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]).flatten();
        let largest = tokens.copied().max().unwrap_or(0);
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

/// Reads `path` and tokenises its pairs. The result does not depend on the number of threads, and the error of the
/// first bad record in file order is the one reported.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read; [`Error::Data`] where it is empty, holds a broken or ill-typed record
/// or one that the chat template refuses, or where not one pair of it can be used.
pub fn load_pairs(path: &Path, encoder: &TextEncoder, limits: LengthLimits) -> Result<PairDataset> {
    let mut dataset =
        PairDataset { pairs: Vec::new(), report: EncodingReport::new(limits), fingerprint: [0; 32] };
    let mut hasher = blake3::Hasher::new();
    let (mut one_kind, mut digests) = (OneKind::default(), Digests::default());
    read_ahead(path, &mut |chunk| {
        let read = |raw: RawRecord| -> Result<(Read, EncodedRecord)> {
            let record = raw.read(path)?;
            // Drop the raw text before the tokens are made.
            drop(raw);
            Ok((Read::of(&record), encoder.encode(path, &record, limits)?))
        };
        let records: Vec<Result<(Read, EncodedRecord)>> = chunk.into_par_iter().map(read).collect();
        for record in records {
            let (read, encoded) = record?;
            one_kind.check(path, encoded.place, read.is_text)?;
            for note in &read.notes {
                dataset.report.add_note(note, encoded.place);
            }
            if let Some(same) = read.same.filter(|_| encoded.causes.contains(&Cause::Identical)) {
                dataset.report.illustrate(Cause::Identical, &same);
            }
            if let Some(cause) = digests.add(read.digests) {
                dataset.report.add(cause, encoded.place);
            }
            dataset.push(encoded, &mut hasher);
        }
        Ok(())
    })?;
    if dataset.report.records == 0 {
        return Err(no_record(path));
    }
    if dataset.pairs.is_empty() {
        return Err(Error::data(
            path,
            None,
            format!("no usable pair: {}", dataset.report),
            "raise max_length or lower max_prompt_length, or mend the records named",
        ));
    }
    dataset.fingerprint = *hasher.finalize().as_bytes();
    Ok(dataset)
}

/// Hands the chunks of `path` to `sink` in file order, on this thread, while another thread reads the next ones: the
/// cores that tokenise do not wait for the file.
fn read_ahead(path: &Path, sink: &mut dyn FnMut(Vec<RawRecord>) -> Result<()>) -> Result<()> {
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(CHUNKS_AHEAD);
        let reader = scope.spawn(move || {
            let mut stopped = false;
            let read = for_each_chunk(path, &mut |chunk| {
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

impl PairDataset {
    fn push(&mut self, record: EncodedRecord, hasher: &mut blake3::Hasher) {
        self.report.records += 1;
        for cause in record.causes {
            self.report.add(cause, record.place);
        }
        for (cause, example) in &record.examples {
            self.report.illustrate(*cause, example);
        }
        let Some(pair) = record.pair else { return };
        self.report.pairs += 1;
        self.report.tokens += pair.tokens();
        self.report.largest_pair = self.report.largest_pair.max(pair.tokens());
        for part in [&pair.prompt, &pair.chosen, &pair.rejected] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hash_ids(part, hasher);
        }
        // Copied on one thread: what the tokenising threads leave between their short-lived texts would keep those
        // pages in use for the whole run. A large pair has pages of its own.
        self.pairs.push(if pair.tokens() > LARGE_PAIR { pair } else { pair.clone() });
    }
}

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
