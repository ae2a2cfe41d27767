//! Columns that have other names in a file, and whether any record had them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::FORMATS_HELP;
use crate::config::ColumnNames;
use crate::{Error, Result};

/// The names, shared by the threads that read records.
#[derive(Debug)]
pub(crate) struct Renamed<'a> {
    names: &'a ColumnNames,
    /// For each of the names.
    seen: Vec<AtomicBool>,
}

impl<'a> Renamed<'a> {
    pub fn new(names: &'a ColumnNames) -> Self {
        Renamed { names, seen: names.0.iter().map(|_| AtomicBool::new(false)).collect() }
    }

    /// What the column `name` of a record is read as; `None` where another one is read as that.
    pub fn read_as<'n>(&'n self, name: &'n str) -> Option<&'n str> {
        if let Some(place) = self.names.0.iter().position(|(_, theirs)| theirs == name) {
            self.seen[place].store(true, Ordering::Relaxed);
        }
        self.names.read_as(name)
    }

    /// The name in the file of what is read as `ours`, where it has another one.
    pub fn of(&self, ours: &str) -> Option<&str> {
        self.names.0.iter().find(|(name, _)| name == ours).map(|(_, theirs)| theirs.as_str())
    }

    /// Refuses a name that no record had: a mistake that would leave a part of each prompt out.
    pub fn check_seen(&self, path: &Path) -> Result<()> {
        let names = self.names.0.iter().zip(&self.seen);
        let unseen = names.into_iter().find(|(_, seen)| !seen.load(Ordering::Relaxed));
        match unseen {
            None => Ok(()),
            Some(((ours, theirs), _)) => Err(Error::data(
                path,
                None,
                format!("no record has a column `{theirs}`, which `--columns` reads as `{ours}`"),
                FORMATS_HELP,
            )),
        }
    }
}
