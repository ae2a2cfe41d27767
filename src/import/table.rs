//! The account of an import, for people.

use std::path::Path;

use super::{Fate, Imported};

/// Characters of a value that are shown.
const VALUE: usize = 40;

/// A line for each key: what became of it, its line and value, and what it became or why not. What is refused comes first.
pub(super) fn write(imported: &Imported, file: &Path) -> String {
    let mut rows: Vec<_> = imported.rows.iter().collect();
    let order = [Fate::Refused, Fate::LeftOut, Fate::Mapped, Fate::Kept, Fate::Default, Fate::NoEffect];
    rows.sort_by_key(|row| (order.iter().position(|fate| *fate == row.fate), row.line));
    let cells: Vec<[String; 3]> = rows
        .iter()
        .map(|row| {
            let key = match row.line {
                Some(line) => format!("{}:{line}", row.key),
                None => row.key.clone(),
            };
            let mut value: String = row.value.chars().take(VALUE).collect();
            if value.len() < row.value.len() {
                value.push_str("...");
            }
            [row.fate.word().to_string(), key, value]
        })
        .collect();
    let width = |at: usize| cells.iter().map(|cells| cells[at].chars().count()).max().unwrap_or(0);
    let [fate, key, value] = [width(0), width(1), width(2)];
    let count = |wanted: Fate| imported.rows.iter().filter(|row| row.fate == wanted).count();
    let mut text = format!(
        "{}: a configuration of {}; {} kept, {} mapped, {} without effect, {} refused, {} defaults written out\n",
        file.display(),
        imported.dialect.word(),
        count(Fate::Kept),
        count(Fate::Mapped),
        count(Fate::NoEffect),
        count(Fate::Refused),
        count(Fate::Default),
    );
    for (cells, row) in cells.iter().zip(rows) {
        let line = format!("  {:fate$}  {:key$}  {:value$}  {}", cells[0], cells[1], cells[2], row.outcome);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
