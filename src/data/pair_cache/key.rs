//! All that tokenised pairs depend on, as one hash.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::data::{Cause, PairSource, TextEncoder, Treatment};

/// Raised by hand where records are read, rendered, tokenised or cut otherwise than before, or where the file has another
/// layout. `tests/data/pair_cache.rs` fails where the committed pairs become other tokens under the same number.
const VERSION: u32 = 1;

/// Bytes of a data file that are hashed at a time, on all cores.
const BLOCK: usize = 8 << 20;

/// The hash under which tokenised pairs are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::data) struct Key(blake3::Hash);

impl Key {
    /// The key of the pairs of `source`. `None` where one of its files is no regular file, which could be read only
    /// once, or cannot be read: whoever reads the pairs says why.
    pub fn of(source: &PairSource, encoder: &TextEncoder, treatment: &Treatment) -> Option<Self> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |part: &[u8]| {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        };
        add(&VERSION.to_le_bytes());
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(if cfg!(target_endian = "big") { b"big" } else { b"little" });
        // A report with a kind of problem that an earlier program did not know is another report.
        add(format!("{:?}", Cause::ALL).as_bytes());
        add(&encoder.tokenizer.fingerprint());
        if let Some(template) = &encoder.template {
            add(&template.fingerprint());
            add(template.fixed_moment().unwrap_or_default().as_bytes());
        }
        let Treatment { limits, policies, min_score_gap, tolerant: _ } = treatment;
        add(format!("{limits:?} {policies:?} {min_score_gap:?}").as_bytes());
        add(format!("{:?} {:?}", source.columns, source.part).as_bytes());
        for file in &source.files {
            add(&file.weight.to_le_bytes());
            // A table's separator may follow from its name.
            add(file.path.extension().unwrap_or_default().as_encoded_bytes());
            add(content_hash(&file.path)?.as_bytes());
        }
        Some(Key(hasher.finalize()))
    }

    /// 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.to_hex().to_string()
    }
}

/// Hash of the bytes of a regular file.
fn content_hash(path: &Path) -> Option<blake3::Hash> {
    if !path.metadata().ok()?.is_file() {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    loop {
        match file.read(&mut block).ok()? {
            0 => return Some(hasher.finalize()),
            read => _ = hasher.update_rayon(&block[..read]),
        }
    }
}
