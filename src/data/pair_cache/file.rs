//! The file of tokenised pairs, in this machine's byte order:
//!
//! | part | bytes |
//! |---|---|
//! | [`MAGIC`] | 16 |
//! | the token ids of all pairs, each pair's prompt, chosen and rejected response one after the other | 4 each |
//! | an [`Entry`] for each record | 56 each |
//! | [`Summary`] as JSON | |
//! | how many token ids, how many entries, bytes of the JSON | 3 x 8 |
//! | the BLAKE3 hash of everything before it | 32 |
//!
//! The whole file is read once for its hash before anything in it is believed, and mapped then.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::{Key, limit};
use crate::data::reference_cache::open_own_file;
use crate::data::token_ids::TokenFile;
use crate::data::{Cause, EncodedRecord, EncodingReport, TokenIds, TokenizedPair};
use crate::device::MappedFile;
use crate::{Error, Result};

const MAGIC: [u8; 16] = *b"mmpo-fast pairs\n";
const HASH_BYTES: usize = blake3::OUT_LEN;
const FOOTER_BYTES: usize = 3 * 8 + HASH_BYTES;
/// Bytes that are gathered before they are written.
const WRITTEN: usize = 256 << 10;
/// Bytes that are read at a time.
const BLOCK: usize = 4 << 20;
/// More bytes than the reports on any number of files take.
const MOST_SUMMARY_BYTES: u64 = 256 << 20;

/// What became of one record.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Entry {
    /// 0-based position of the record.
    record: u64,
    /// 1-based line or record.
    place: u64,
    /// A bit for each cause, in the order of [`Cause::ALL`].
    causes: u64,
    /// Tokens before anything was cut.
    uncut: [u32; 3],
    /// Tokens of prompt, chosen and rejected response.
    lengths: [u32; 3],
    /// How many times the pair is taken.
    copies: u32,
    /// [`HAS_PAIR`], [`HAS_UNCUT`].
    flags: u32,
}

const HAS_PAIR: u32 = 1;
const HAS_UNCUT: u32 = 2;

/// What is said of all pairs together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::data) struct Summary {
    /// [`super::super::PairDataset::fingerprint`].
    pub fingerprint: [u8; 32],
    /// The largest token id.
    pub largest_token: u32,
    /// The report on each file.
    pub reports: Vec<EncodingReport>,
}

#[derive(Serialize, Deserialize)]
struct Described {
    key: String,
    #[serde(flatten)]
    summary: Summary,
}

/// A file of pairs that is being written.
#[derive(Debug)]
pub(in crate::data) struct PairWriter {
    file: NamedTempFile,
    hasher: blake3::Hasher,
    block: Vec<u8>,
    entries: Vec<Entry>,
    tokens: u64,
    failed: bool,
}

impl PairWriter {
    pub(super) fn new(file: NamedTempFile) -> Result<Self> {
        let mut block = Vec::with_capacity(WRITTEN);
        block.extend_from_slice(&MAGIC);
        let hasher = blake3::Hasher::new();
        Ok(PairWriter { file, hasher, block, entries: Vec::new(), tokens: 0, failed: false })
    }

    /// Whether an error that was returned is one of writing.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Adds the next record, whose pair is taken `copies` times.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written.
    pub fn add(&mut self, encoded: &EncodedRecord, copies: usize) -> Result<()> {
        let mut entry = Entry {
            record: 0,
            place: encoded.place as u64,
            causes: encoded.causes.iter().fold(0, |bits, cause| bits | bit(*cause)),
            uncut: [0; 3],
            lengths: [0; 3],
            copies: copies as u32,
            flags: 0,
        };
        if let Some(uncut) = encoded.uncut {
            entry.flags |= HAS_UNCUT;
            entry.uncut = uncut.map(|tokens| tokens as u32);
        }
        if let Some(pair) = &encoded.pair {
            entry.flags |= HAS_PAIR;
            entry.record = pair.record as u64;
            let parts = [&pair.prompt, &pair.chosen, &pair.rejected];
            entry.lengths = parts.map(|part| part.len() as u32);
            for part in parts {
                self.put(bytemuck::cast_slice(part))?;
                self.tokens += part.len() as u64;
            }
        }
        self.entries.push(entry);
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.block.extend_from_slice(bytes);
        if self.block.len() >= WRITTEN { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.hasher.update(&self.block);
        let written = self.file.write_all(&self.block);
        self.block.clear();
        written.map_err(|error| {
            self.failed = true;
            Error::io(self.file.path(), "write", error)
        })
    }

    /// Ends the file, which is kept as `path`, or not at all: then it exists as long as it is read.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be written or mapped. That it cannot be kept is a warning.
    pub fn finish(mut self, key: &Key, summary: Summary, path: Option<&Path>) -> Result<StoredPairs> {
        let entries = std::mem::take(&mut self.entries);
        let described = Described { key: key.hex(), summary };
        let json = serde_json::to_vec(&described)
            .map_err(|error| Error::bug(format!("a report cannot be written: {error}")))?;
        for entries in entries.chunks(1024) {
            self.put(bytemuck::cast_slice(entries))?;
        }
        self.put(&json)?;
        for count in [self.tokens, entries.len() as u64, json.len() as u64] {
            self.put(&count.to_ne_bytes())?;
        }
        self.flush()?;
        let hash = *self.hasher.finalize().as_bytes();
        self.put(&hash)?;
        self.flush()?;
        // Nothing waits for the disk: a file that a power failure cut short has another hash, and is made again.
        let file = self.file.reopen().map_err(|error| Error::io(self.file.path(), "read", error))?;
        let shown = path.unwrap_or(self.file.path()).to_path_buf();
        let map = MappedFile::of(&file, &shown)?;
        // Before others can see it.
        limit::note_use(&file);
        if let Some(path) = path {
            match self.file.persist(path) {
                Ok(_) => tracing::info!("tokenised pairs are kept in {}", path.display()),
                Err(error) => {
                    tracing::warn!("{}: the tokenised pairs are not kept: {}", path.display(), error.error);
                }
            }
        }
        Ok(StoredPairs { file: Arc::new(TokenFile { file, map }), entries, summary: described.summary })
    }
}

/// Tokenised pairs in a file.
#[derive(Debug)]
pub(in crate::data) struct StoredPairs {
    file: Arc<TokenFile>,
    entries: Vec<Entry>,
    /// What is said of all of them.
    pub summary: Summary,
}

impl StoredPairs {
    /// Opens the file of `key`; `None` where there is none. The error says what is wrong with it.
    pub(super) fn open(path: &Path, key: &Key) -> std::result::Result<Option<Self>, String> {
        let failed = |error: std::io::Error| format!("the file cannot be read ({error})");
        let Some(mut file) = open_own_file(path)? else { return Ok(None) };
        limit::note_use(&file);
        let length = file.metadata().map_err(failed)?.len();
        let content = length.checked_sub(HASH_BYTES as u64).ok_or("the file is cut short")?;
        check_hash(&mut file, content)
            .map_err(failed)?
            .then_some(())
            .ok_or_else(|| "the file is damaged or cut short (its checksum differs)".to_string())?;
        let (counts, entries, described) = read_tables(&mut file, length)?;
        if described.key != key.hex() {
            return Err("the file is for other pairs".to_string());
        }
        let map = MappedFile::of(&file, path).map_err(|error| error.to_string())?;
        let file = Arc::new(TokenFile { file, map });
        let stored = StoredPairs { file, entries, summary: described.summary };
        let tokens: u64 = stored.entries.iter().map(Entry::tokens).sum();
        if tokens != counts.tokens {
            return Err("the file contradicts itself about its tokens".to_string());
        }
        Ok(Some(stored))
    }

    fn path(&self) -> &Path {
        self.file.map.path()
    }

    /// The pairs in their order, each as often as it is taken. Their ids stay in the file.
    ///
    /// # Errors
    /// [`Error::Io`] where the file is shorter than its tables say, which its checksum rules out.
    pub fn pairs(&self) -> Result<Vec<TokenizedPair>> {
        let taken = self.entries.iter().map(|entry| entry.copies as usize).sum();
        let mut pairs = Vec::with_capacity(taken);
        let mut start = MAGIC.len();
        for entry in self.entries.iter().filter(|entry| entry.flags & HAS_PAIR != 0) {
            let mut next = |length: u32| {
                let ids = TokenIds::mapped(&self.file, start, length as usize);
                start += 4 * length as usize;
                ids.ok_or_else(|| Error::io(self.path(), "read", std::io::ErrorKind::UnexpectedEof.into()))
            };
            let [prompt, chosen, rejected] = entry.lengths.map(&mut next);
            let pair = TokenizedPair {
                record: entry.record as usize,
                prompt: prompt?,
                chosen: chosen?,
                rejected: rejected?,
            };
            for _ in 1..entry.copies {
                pairs.push(pair.clone());
            }
            if entry.copies > 0 {
                pairs.push(pair);
            }
        }
        Ok(pairs)
    }

    /// Shows `observe` every record in its order, without the words of examples, which the reports have. The ids are read
    /// from the file piece by piece, not through the map, whose pages would count as this program's.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be read.
    pub fn replay(&self, observe: &mut dyn FnMut(&EncodedRecord)) -> Result<()> {
        let failed = |error| Error::io(self.path(), "read", error);
        let mut file = BufReader::with_capacity(BLOCK, &self.file.file);
        file.seek(SeekFrom::Start(MAGIC.len() as u64)).map_err(failed)?;
        for entry in &self.entries {
            let mut pair = None;
            if entry.flags & HAS_PAIR != 0 {
                let mut next = |length: u32| -> Result<TokenIds> {
                    let mut ids = vec![0u32; length as usize];
                    file.read_exact(bytemuck::cast_slice_mut(&mut ids)).map_err(failed)?;
                    Ok(ids.into())
                };
                let [prompt, chosen, rejected] = entry.lengths.map(&mut next);
                pair = Some(TokenizedPair {
                    record: entry.record as usize,
                    prompt: prompt?,
                    chosen: chosen?,
                    rejected: rejected?,
                });
            }
            observe(&EncodedRecord {
                pair,
                place: entry.place as usize,
                causes: Cause::ALL.into_iter().filter(|cause| entry.causes & bit(*cause) != 0).collect(),
                examples: Vec::new(),
                uncut: (entry.flags & HAS_UNCUT != 0).then(|| entry.uncut.map(|tokens| tokens as usize)),
            });
        }
        Ok(())
    }
}

impl Entry {
    fn tokens(&self) -> u64 {
        self.lengths.iter().map(|&length| u64::from(length)).sum()
    }
}

fn bit(cause: Cause) -> u64 {
    1 << cause as usize
}

/// Whether the first `content` bytes have the hash that follows them.
fn check_hash(file: &mut File, content: u64) -> std::io::Result<bool> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    let mut left = content;
    while left > 0 {
        let size = left.min(BLOCK as u64) as usize;
        file.read_exact(&mut block[..size])?;
        hasher.update_rayon(&block[..size]);
        left -= size as u64;
    }
    let mut hash = [0; HASH_BYTES];
    file.read_exact(&mut hash)?;
    Ok(*hasher.finalize().as_bytes() == hash)
}

struct Counts {
    tokens: u64,
}

/// The tables after the token ids of a file of `length` bytes whose hash is right.
fn read_tables(file: &mut File, length: u64) -> std::result::Result<(Counts, Vec<Entry>, Described), String> {
    let failed = |error: std::io::Error| format!("the file cannot be read ({error})");
    let other = || "the file is no file of pairs of this version".to_string();
    let tables = length.checked_sub((MAGIC.len() + FOOTER_BYTES) as u64).ok_or_else(other)?;
    let mut magic = [0; MAGIC.len()];
    file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut magic)).map_err(failed)?;
    let mut counts = [0u64; 3];
    file.seek(SeekFrom::End(-(FOOTER_BYTES as i64))).map_err(failed)?;
    file.read_exact(bytemuck::cast_slice_mut(&mut counts)).map_err(failed)?;
    let [tokens, entries, json] = counts;
    let entry_bytes = entries.checked_mul(size_of::<Entry>() as u64);
    let sum = tokens.checked_mul(4).zip(entry_bytes);
    let sum = sum.and_then(|(tokens, entries)| tokens.checked_add(entries)?.checked_add(json));
    if magic != MAGIC || sum != Some(tables) || json > MOST_SUMMARY_BYTES {
        return Err(other());
    }
    file.seek(SeekFrom::Start(MAGIC.len() as u64 + 4 * tokens)).map_err(failed)?;
    let mut list = vec![Entry::zeroed(); entries as usize];
    file.read_exact(bytemuck::cast_slice_mut(&mut list)).map_err(failed)?;
    let mut text = vec![0; json as usize];
    file.read_exact(&mut text).map_err(failed)?;
    let described = serde_json::from_slice(&text).map_err(|_| other())?;
    Ok((Counts { tokens }, list, described))
}
