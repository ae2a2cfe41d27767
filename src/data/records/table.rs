//! A file that is one JSON object: a single record, an object with one list of records, or an object of columns.

use std::ops::Range;
use std::path::Path;

use super::columns::{self, is_prompt_column};
use super::lines::Line;
use super::scan::{Broken, Kind, Scanner, Span};
use super::source::{Chunks, Start, broken};
use crate::{Error, Result};

/// The members of the object, in file order.
struct Object<'a> {
    path: &'a Path,
    text: &'a [u8],
    start: Start,
    members: Vec<(String, Span)>,
}

/// Reads the object that `line` holds.
pub(super) fn read(path: &Path, line: Line, chunks: &mut Chunks) -> Result<()> {
    // A record of a single line is named by that line, like any record of JSON Lines.
    let start = line.start(!line.text.contains(&b'\n'));
    let mut object = Object { path, text: &line.text, start, members: Vec::new() };
    let mut scanner = Scanner::new(&line.text, 0);
    let members = &mut object.members;
    let read = scanner.members(|name, span| {
        members.push((name, span));
        Ok(())
    });
    read.and_then(|()| scanner.end()).map_err(|fault| broken(path, &line.text, start, &fault, ""))?;
    let chosen = object.members.iter().find(|(name, _)| columns::is_chosen(name));
    if let Some((name, span)) = chosen {
        if let Some(rows) = object.is_columns(span) {
            return object.read_columns(name, rows, chunks);
        }
        return chunks.push(start, line.text);
    }
    let lists: Vec<&(String, Span)> =
        object.members.iter().filter(|(_, span)| object.is_rows(span)).collect();
    match lists.as_slice() {
        [] => chunks.push(start, line.text),
        [(_, rows)] => object.ranges(rows).into_iter().try_for_each(|row| {
            let start = Start { is_line: false, ..start }.moved(&line.text, row.start);
            chunks.push(start, line.text[row].to_vec())
        }),
        several => {
            let names: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(Error::data(
                path,
                None,
                format!("several lists of records: `{}`", names.join("`, `")),
                "write the one to train on to a file of its own",
            ))
        }
    }
}

impl Object<'_> {
    /// Goes through the items of a list, or the values of an object, until `each` has seen enough (`false`).
    fn each_item(&self, span: &Span, mut each: impl FnMut(&Span) -> bool) {
        let mut scanner = Scanner::new(self.text, span.range.start);
        let mut step = |item: Span| if each(&item) { Ok(()) } else { Err(Broken::stop()) };
        // The text was read once already, so that only `each` ends this early.
        let _ = match span.kind {
            Kind::Object { .. } => scanner.members(|_, item| step(item)),
            _ => scanner.items(step),
        };
    }

    fn first_item(&self, span: &Span) -> Option<Span> {
        let mut first = None;
        self.each_item(span, |item| {
            first = Some(item.clone());
            false
        });
        first
    }

    fn count(&self, span: &Span) -> usize {
        let mut count = 0;
        self.each_item(span, |_| {
            count += 1;
            true
        });
        count
    }

    fn ranges(&self, span: &Span) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        self.each_item(span, |item| {
            ranges.push(item.range.clone());
            true
        });
        ranges
    }

    fn keys(&self, span: &Span) -> Vec<String> {
        let mut keys = Vec::new();
        let _ = Scanner::new(self.text, span.range.start).members(|key, _| {
            keys.push(key);
            Ok(())
        });
        keys
    }

    fn is_rows(&self, span: &Span) -> bool {
        // An object with a prompt is a record itself, such as one with a list of rated answers.
        let has_prompt = self.members.iter().any(|(name, _)| is_prompt_column(name));
        if has_prompt || !matches!(span.kind, Kind::List { empty: false }) {
            return false;
        }
        self.first_item(span).is_some_and(|first| {
            matches!(first.kind, Kind::Object { .. })
                && self.keys(&first).iter().any(|key| columns::is_known(key))
        })
    }

    /// The number of rows if `chosen` is a column of values rather than one record's response: a list with one value
    /// per row, or an object with each row's number as a key, as pandas writes it by default.
    fn is_columns(&self, chosen: &Span) -> Option<usize> {
        match chosen.kind {
            Kind::List { .. } => {
                let mut no_objects = true;
                self.each_item(chosen, |value| {
                    no_objects = !matches!(value.kind, Kind::Object { .. });
                    no_objects
                });
                let holds_lists = |column: &str| {
                    let span = self.members.iter().find(|(name, _)| name == column).map(|(_, span)| span);
                    let first = span.filter(|span| matches!(span.kind, Kind::List { .. }));
                    let first = first.and_then(|span| self.first_item(span));
                    first.is_some_and(|first| matches!(first.kind, Kind::List { .. }))
                };
                let columns =
                    no_objects || ["conversations", "messages", "prompt"].into_iter().any(holds_lists);
                columns.then(|| self.count(chosen))
            }
            Kind::Object { empty: false } => {
                let keys = self.keys(chosen);
                keys.iter().all(|key| key.parse::<u64>().is_ok()).then_some(keys.len())
            }
            _ => None,
        }
    }

    /// Turns columns into rows; the column `chosen` says how many there are.
    fn read_columns(&self, chosen: &str, rows: usize, chunks: &mut Chunks) -> Result<()> {
        let mut columns: Vec<(&str, Vec<Range<usize>>)> = Vec::with_capacity(self.members.len());
        for (name, span) in &self.members {
            if !matches!(span.kind, Kind::List { .. } | Kind::Object { .. }) {
                return Err(self.fault(
                    format!("column `{name}` is neither a list nor an object"),
                    "every column of an object of columns is a list with one value per record",
                ));
            }
            if matches!(span.kind, Kind::Object { .. }) && self.keys(span) != self.row_names(chosen) {
                return Err(self.fault(
                    format!("the rows of column `{name}` have other names than those of `{chosen}`"),
                    "write one record per line (pandas: `to_json(FILE, orient=\"records\", lines=True)`)",
                ));
            }
            let values = self.count(span);
            if values != rows {
                return Err(self.fault(
                    format!("column `{name}` has {values} values and `{chosen}` has {rows}"),
                    "every column of an object of columns has one value per record",
                ));
            }
            columns.push((name, self.ranges(span)));
        }
        let start = Start { is_line: false, byte: None, ..self.start };
        (0..rows).try_for_each(|row| {
            let mut text = vec![b'{'];
            for (position, (name, values)) in columns.iter().enumerate() {
                if position > 0 {
                    text.push(b',');
                }
                text.extend_from_slice(serde_json::Value::from(*name).to_string().as_bytes());
                text.push(b':');
                text.extend_from_slice(&self.text[values[row].clone()]);
            }
            text.push(b'}');
            chunks.push(start, text)
        })
    }

    /// The keys of a column that is an object.
    fn row_names(&self, column: &str) -> Vec<String> {
        let span = self.members.iter().find(|(name, _)| name == column);
        span.map_or_else(Vec::new, |(_, span)| self.keys(span))
    }

    fn fault(&self, message: String, help: &str) -> Error {
        Error::data(self.path, None, message, help)
    }
}
