//! A file that is one JSON object: a single record, an object with one list of records, or an object of columns.

use std::ops::Range;
use std::path::Path;

use super::columns::{self, is_prompt_column};
use super::lines::Line;
use super::scan::{Kind, Scanner, Span};
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
        [(_, rows)] => object.items(rows).into_iter().try_for_each(|row| {
            let start = Start { is_line: false, ..start }.moved(&line.text, row.range.start);
            chunks.push(start, line.text[row.range].to_vec())
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
    /// The items of a list, or the values of an object, which were scanned before.
    fn items(&self, span: &Span) -> Vec<Span> {
        let mut items = Vec::new();
        let mut scanner = Scanner::new(self.text, span.range.start);
        // The text was read once already, so that it cannot break here.
        let _ = match span.kind {
            Kind::Object { .. } => scanner.members(|_, item| {
                items.push(item);
                Ok(())
            }),
            _ => scanner.items(|item| {
                items.push(item);
                Ok(())
            }),
        };
        items
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
        let first = self.items(span).into_iter().next();
        first.is_some_and(|first| {
            matches!(first.kind, Kind::Object { .. })
                && self.keys(&first).iter().any(|key| columns::is_known(key))
        })
    }

    /// The number of rows if `chosen` is a column of values, rather than one record's response: a list with a value
    /// a row, or an object with a row's number as each key, as pandas writes it by default.
    fn is_columns(&self, chosen: &Span) -> Option<usize> {
        match chosen.kind {
            Kind::List { .. } => {
                let values = self.items(chosen);
                let no_objects = values.iter().all(|value| !matches!(value.kind, Kind::Object { .. }));
                let holds_lists = |column: &str| {
                    let span = self.members.iter().find(|(name, _)| name == column).map(|(_, span)| span);
                    let first = span.filter(|span| matches!(span.kind, Kind::List { .. }));
                    let first = first.and_then(|span| self.items(span).into_iter().next());
                    first.is_some_and(|first| matches!(first.kind, Kind::List { .. }))
                };
                let columns =
                    no_objects || ["conversations", "messages", "prompt"].into_iter().any(holds_lists);
                columns.then_some(values.len())
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
            let values = match span.kind {
                Kind::List { .. } | Kind::Object { .. } => self.items(span),
                _ => {
                    return Err(self.fault(
                        format!("column `{name}` is neither a list nor an object"),
                        "every column of an object of columns is a list with one value a record",
                    ));
                }
            };
            if matches!(span.kind, Kind::Object { .. }) && self.keys(span) != self.row_names(chosen) {
                return Err(self.fault(
                    format!("the rows of column `{name}` have other names than those of `{chosen}`"),
                    "write one record a line (pandas: `to_json(FILE, orient=\"records\", lines=True)`)",
                ));
            }
            if values.len() != rows {
                return Err(self.fault(
                    format!("column `{name}` has {} values and `{chosen}` has {rows}", values.len()),
                    "every column of an object of columns has one value a record",
                ));
            }
            columns.push((name, values.into_iter().map(|value| value.range).collect()));
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
