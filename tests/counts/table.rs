//! A committed table of numbers, and how another one differs from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Rows by key; a key's and a row's cells are joined by `;`.
pub struct Table {
    path: PathBuf,
    /// What the key's columns are called, then the row's.
    header: String,
    rows: BTreeMap<String, Vec<String>>,
}

const RECORD: &str = "MMPO_FAST_RECORD=1 cargo test --release --test counts kernels";

impl Table {
    pub fn new(name: &str, header: String) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/counts").join(name);
        Table { path, header, rows: BTreeMap::new() }
    }

    pub fn insert(&mut self, key: String, cells: Vec<String>) {
        assert!(self.rows.insert(key.clone(), cells).is_none(), "{key} is counted twice");
    }

    pub fn rows(&self) -> &BTreeMap<String, Vec<String>> {
        &self.rows
    }

    fn text(&self) -> String {
        let rows: Vec<String> =
            self.rows.iter().map(|(key, cells)| format!("{key};{}\n", cells.join(";"))).collect();
        format!("{}\n{}", self.header, rows.concat())
    }

    fn parse(&self, text: &str) -> Self {
        let keys = self.header.split(';').count() - self.rows.values().next().map_or(0, Vec::len);
        let mut lines = text.lines();
        let header = lines.next().unwrap_or_default().to_owned();
        let rows = lines.map(|line| {
            let cells: Vec<&str> = line.split(';').collect();
            let (key, row) = cells.split_at(keys.min(cells.len()));
            (key.join(";"), row.iter().map(|&cell| cell.to_owned()).collect())
        });
        Table { path: self.path.clone(), header, rows: rows.collect() }
    }

    /// Fails where this table is not the committed one, naming each number that rose or fell; records it instead where
    /// `MMPO_FAST_RECORD` is set.
    pub fn hold_against_the_committed_one(&self) {
        if std::env::var_os("MMPO_FAST_RECORD").is_some() {
            std::fs::write(&self.path, self.text()).unwrap();
            eprintln!("{} is recorded", self.path.display());
            return;
        }
        let committed = std::fs::read_to_string(&self.path)
            .unwrap_or_else(|error| panic!("{}: {error}; record it: {RECORD}", self.path.display()));
        let differences = self.parse(&committed).differences(self);
        assert!(
            differences.is_empty(),
            "{} differs:\n{}\nA number that rose is work the kernel did not do before: find out why. Where it is meant, \
             and where it fell, record the table and commit it: {RECORD}",
            self.path.display(),
            differences.join("\n"),
        );
    }

    /// One line per difference, from this table to `now`.
    pub fn differences(&self, now: &Table) -> Vec<String> {
        if self.header != now.header {
            return vec![format!("the columns were {}, are {}", self.header, now.header)];
        }
        let columns: Vec<&str> = now.header.split(';').collect();
        let mut differences = Vec::new();
        for (key, cells) in &now.rows {
            let Some(before) = self.rows.get(key) else {
                differences.push(format!("{key}: new"));
                continue;
            };
            let names = &columns[columns.len() - cells.len()..];
            for ((name, before), after) in names.iter().zip(before).zip(cells) {
                let how = match (before.parse::<u64>(), after.parse::<u64>()) {
                    _ if before == after => continue,
                    (Ok(before), Ok(after)) if after > before => "rose",
                    (Ok(_), Ok(_)) => "fell",
                    _ => "changed",
                };
                differences.push(format!("{key}: {name} {how} from {before} to {after}"));
            }
        }
        let gone = self.rows.keys().filter(|key| !now.rows.contains_key(*key));
        differences.extend(gone.map(|key| format!("{key}: gone")));
        differences
    }
}

#[test]
fn a_table_says_what_rose_fell_came_and_went() {
    let table = |rows: &[(&str, [&str; 2])]| {
        let mut table = Table::new("none.csv", "kernel;bytes;conflicts".into());
        for (key, cells) in rows {
            table.insert((*key).into(), cells.map(str::to_owned).to_vec());
        }
        table
    };
    let before = table(&[("add", ["10", "0"]), ("gone", ["1", "1"]), ("rope", ["7", ""])]);
    let now = table(&[("add", ["12", "0"]), ("new", ["1", "1"]), ("rope", ["6", ""])]);
    assert_eq!(
        before.differences(&now),
        ["add: bytes rose from 10 to 12", "new: new", "rope: bytes fell from 7 to 6", "gone: gone"]
    );
    let read = now.parse(&now.text());
    assert!(read.differences(&now).is_empty(), "{:?}", read.differences(&now));
    let mut narrower = table(&[]);
    narrower.header = "kernel;bytes".into();
    assert_eq!(before.differences(&narrower).len(), 1);
}
