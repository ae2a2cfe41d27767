//! Token ids that are held in memory or lie in a mapped file.

use std::fmt;
use std::fs::File;
use std::ops::Deref;
use std::sync::Arc;

use crate::device::MappedFile;

/// Token ids, read as a slice. Those of a data set that was written to a file are read from its map: they take no memory
/// of their own, and the system may take back the pages that hold them.
#[derive(Clone)]
pub struct TokenIds(Ids);

/// A file of token ids that is open and mapped. Its lock, where it has one, lasts as long as any of its ids.
#[derive(Debug)]
pub(super) struct TokenFile {
    /// The open file.
    pub file: File,
    /// Its bytes.
    pub map: MappedFile,
}

#[derive(Clone)]
enum Ids {
    Held(Vec<u32>),
    Mapped { file: Arc<TokenFile>, start: usize, length: usize },
}

impl TokenIds {
    /// `length` ids of `file`, from byte `start` on, in this machine's byte order; `None` where the file has no such
    /// part or it does not lie at a multiple of 4 bytes.
    pub(super) fn mapped(file: &Arc<TokenFile>, start: usize, length: usize) -> Option<Self> {
        let ids = Ids::Mapped { file: file.clone(), start, length };
        ids.read()?;
        Some(TokenIds(ids))
    }

    /// The ids.
    pub fn as_slice(&self) -> &[u32] {
        self
    }
}

impl Ids {
    fn read(&self) -> Option<&[u32]> {
        match self {
            Ids::Held(ids) => Some(ids),
            Ids::Mapped { file, start, length } => {
                let end = length.checked_mul(4).and_then(|bytes| start.checked_add(bytes))?;
                bytemuck::try_cast_slice(file.map.get(*start..end)?).ok()
            }
        }
    }
}

impl Deref for TokenIds {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        // A part that cannot be read is not made.
        self.0.read().unwrap_or_default()
    }
}

impl From<Vec<u32>> for TokenIds {
    fn from(ids: Vec<u32>) -> Self {
        TokenIds(Ids::Held(ids))
    }
}

impl FromIterator<u32> for TokenIds {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        Vec::from_iter(ids).into()
    }
}

impl<'a> IntoIterator for &'a TokenIds {
    type Item = &'a u32;
    type IntoIter = std::slice::Iter<'a, u32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: AsRef<[u32]> + ?Sized> PartialEq<T> for TokenIds {
    fn eq(&self, other: &T) -> bool {
        **self == *other.as_ref()
    }
}

impl Eq for TokenIds {}

impl PartialEq<TokenIds> for Vec<u32> {
    fn eq(&self, other: &TokenIds) -> bool {
        other == self
    }
}

impl AsRef<[u32]> for TokenIds {
    fn as_ref(&self) -> &[u32] {
        self
    }
}

impl fmt::Debug for TokenIds {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        (**self).fmt(formatter)
    }
}
