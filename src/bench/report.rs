//! What is printed: tables for people, JSON and CSV for programs.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::measure::Sample;
use crate::error::{Error, Result};
use crate::report::{Reader, print_result};

/// The columns of every CSV file of results, for this program and for its peers.
pub const CSV_HEADER: &str = "date,machine,peer,op,shape,median_us,min_us,max_us,flops,bytes,workspace";

/// The name that marks this program's own results.
pub const OURS: &str = "mmpo-fast";

/// One result, in the columns of [`CSV_HEADER`].
#[derive(Clone, Debug, Serialize)]
pub struct ResultRow {
    /// The operation.
    pub op: String,
    /// Its shape, under the name by which engines are compared.
    pub shape: String,
    /// Median of the microseconds per call.
    pub median_us: f64,
    /// Microseconds of the fastest call.
    pub min_us: f64,
    /// Microseconds of the slowest call.
    pub max_us: f64,
    /// Least floating-point operations of a call.
    pub flops: f64,
    /// Least bytes that a call reads and writes.
    pub bytes: f64,
    /// Bytes of memory beside operands and results, where they are counted.
    pub workspace: f64,
}

impl ResultRow {
    /// The row of one measured operation; `flops` and `bytes` are the least that it asks for.
    pub fn new(op: &str, shape: &str, sample: &Sample, flops: f64, bytes: f64) -> Self {
        ResultRow {
            op: op.to_owned(),
            shape: shape.to_owned(),
            median_us: sample.median() * 1e6,
            min_us: sample.min() * 1e6,
            max_us: sample.max() * 1e6,
            flops,
            bytes,
            workspace: 0.0,
        }
    }
}

/// Adds rows of one engine, `peer`, to a file, with the header if it is new.
///
/// # Errors
/// [`Error::Io`].
pub fn append_csv(path: &Path, machine: &str, peer: &str, rows: &[ResultRow]) -> Result<()> {
    let failed = |error| Error::io(path, "write", error);
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(failed)?;
    let mut text = String::new();
    if file.metadata().map_err(failed)?.len() == 0 {
        text += CSV_HEADER;
        text.push('\n');
    }
    let date = jiff::Zoned::now().date();
    let plain = |text: &str| text.replace([',', '"', '\n'], ";");
    let machine = plain(machine);
    for row in rows {
        let (op, shape) = (plain(&row.op), plain(&row.shape));
        let ResultRow { median_us, min_us, max_us, flops, bytes, workspace, .. } = row;
        text += &format!(
            "{date},{machine},{peer},{op},{shape},{median_us:.3},{min_us:.3},{max_us:.3},{flops},{bytes},{workspace}\n"
        );
    }
    file.write_all(text.as_bytes()).map_err(failed)
}

/// Prints to standard output, escaped on a terminal; a closed pipe is an error like any other.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn print(text: &str) -> Result<()> {
    match print_result(text)? {
        Reader::Listening => Ok(()),
        Reader::Gone => {
            Err(Error::io(Path::new("standard output"), "write to", std::io::ErrorKind::BrokenPipe.into()))
        }
    }
}

/// A table with columns as wide as they need to be: the first is aligned to the left, the others to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[&str]| {
        let mut text = String::new();
        for (column, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
            match column {
                0 => text += &format!("{cell:<width$}"),
                _ => text += &format!("  {cell:>width$}"),
            }
        }
        text.trim_end().to_owned() + "\n"
    };
    let mut text = line(header);
    for row in rows {
        text += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

/// A number with three figures, as tables have it: `0.123`, `12.3`, `1234`.
pub fn figures(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_csv_file_grows_under_one_header() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw.csv");
        let row = ResultRow::new("rope, turned", "tiny hh-rlhf x2", &Sample(vec![1e-6, 3e-6]), 0.0, 64.0);
        append_csv(&path, "cpu (a, b)", OURS, std::slice::from_ref(&row)).unwrap();
        append_csv(&path, "cpu (a, b)", OURS, &[row]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0], CSV_HEADER);
        assert!(
            lines[2].ends_with("cpu (a; b),mmpo-fast,rope; turned,tiny hh-rlhf x2,2.000,1.000,3.000,0,64,0"),
            "{text}"
        );
    }

    #[test]
    fn tables_line_up() {
        let text = table(&["kernel", "us"], &[vec!["a".into(), "12.5".into()]]);
        assert_eq!(text, "kernel    us\na       12.5\n");
        assert_eq!([0.0, 0.1234, 1.234, 12.34, 123.4].map(figures), ["0", "0.123", "1.23", "12.3", "123"]);
    }
}
