//! What pairs are read from: files, how much each of them counts, the names of their columns, and the part of the
//! records that is wanted.

use std::path::{Path, PathBuf};

use super::pair_folder;
use super::records::PairDigests;
use crate::Result;
use crate::config::{ColumnNames, PairFiles};

/// Files of pairs, read one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct PairSource {
    /// The files, in the order in which they are read.
    pub files: Vec<SourceFile>,
    /// Columns that have other names here.
    pub columns: ColumnNames,
    /// Which records are wanted.
    pub part: Part,
}

/// A file of pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceFile {
    /// The file.
    pub path: PathBuf,
    /// How many times each of its pairs is taken: 2 is twice; 0.5 is half of the pairs, chosen by what they say.
    pub weight: f64,
}

/// A part of the records, by a hash of what they say: the same records are in it whatever their order, their file and
/// the other records are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    /// All of them.
    All,
    /// All but the given share.
    Training(f64),
    /// The given share. Records with the same prompt are either all in it or all outside.
    Evaluation(f64),
}

impl PairSource {
    /// The files that `files` names, those of its folders among them.
    ///
    /// # Errors
    /// Those of folders: no file of pairs, several splits, or a split that is not there.
    pub fn open(files: &PairFiles, columns: &ColumnNames, part: Part) -> Result<Self> {
        let mut found = Vec::new();
        for file in &files.0 {
            let paths = pair_folder::files(&file.path)?;
            found.extend(paths.into_iter().map(|path| SourceFile { path, weight: file.weight }));
        }
        Ok(PairSource { files: found, columns: columns.clone(), part })
    }

    /// All records of one file, with the columns that it has.
    pub fn file(path: &Path) -> Self {
        PairSource {
            files: vec![SourceFile { path: path.to_path_buf(), weight: 1.0 }],
            columns: ColumnNames::default(),
            part: Part::All,
        }
    }
}

impl Part {
    /// Whether a record with these hashes is in it.
    pub(super) fn holds(self, digests: &PairDigests) -> bool {
        match self {
            Part::All => true,
            Part::Training(held_out) => !is_below(digests.prompt, held_out),
            Part::Evaluation(share) => is_below(digests.prompt, share),
        }
    }
}

impl SourceFile {
    /// How many times a pair with these hashes is taken.
    pub(super) fn copies(&self, digests: &PairDigests) -> usize {
        let whole = self.weight.floor();
        let rest = is_below(mixed(digests.pair), self.weight - whole);
        whole as usize + usize::from(rest)
    }
}

/// Whether a hash lies in the first `share` of all hashes.
fn is_below(hash: u64, share: f64) -> bool {
    (hash as f64) < share * 2f64.powi(64)
}

/// Another hash made of `hash` (the last steps of SplitMix64), so that a choice by it does not follow one by `hash`.
fn mixed(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digests(number: u64) -> PairDigests {
        let hash = mixed(number);
        PairDigests { pair: mixed(hash), exchanged: 0, prompt: hash }
    }

    #[test]
    fn the_parts_are_the_share_asked_for_and_have_no_record_in_common() {
        for share in [0.05, 0.1, 0.5] {
            let held_out = (0..20_000).filter(|&number| {
                let digests = digests(number);
                let (training, evaluation) = (Part::Training(share), Part::Evaluation(share));
                assert_ne!(training.holds(&digests), evaluation.holds(&digests), "{number}");
                assert!(Part::All.holds(&digests));
                evaluation.holds(&digests)
            });
            let found = held_out.count() as f64 / 20_000.0;
            assert!((found - share).abs() <= 0.01, "{share}: {found}");
        }
    }

    #[test]
    fn a_weight_is_the_mean_number_of_copies() {
        for weight in [0.0, 0.25, 1.0, 1.5, 3.0] {
            let file = SourceFile { path: PathBuf::new(), weight };
            let copies: Vec<usize> = (0..20_000).map(|number| file.copies(&digests(number))).collect();
            let mean = copies.iter().sum::<usize>() as f64 / 20_000.0;
            assert!((mean - weight).abs() <= 0.02, "{weight}: {mean}");
            assert!(copies.iter().all(|&copies| (copies as f64 - weight).abs() < 1.0), "{weight}");
        }
    }
}
