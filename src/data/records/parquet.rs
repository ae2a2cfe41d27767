//! Parquet: a row becomes the JSON text of a record, nested lists and structs included.
//!
//! The crate's reader of rows is used, without Arrow: it is small, and a pair is text. Columns that could not matter to
//! a pair (numbers, embeddings) are not read at all.

mod claims;
mod pages;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Type as PhysicalType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::TreeBuilder;
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescriptor, Type};
use serde_json::Value;

use pages::CheckedRowGroup;

use super::columns::is_known;
use super::source::{Chunks, Start};
use crate::config::ColumnNames;
use crate::data::panics::catch;
use crate::{Error, Result};

const HELP: &str = "fetch or write the file again; `python -c \"import pyarrow.parquet as p; p.read_table('FILE')\"` \
                    checks it";

/// Rows that the crate decodes at a time: few, since each may hold [`claims::MAX_ITEMS`] items.
const BATCH_ROWS: usize = 16;

/// Reads the rows of a Parquet file.
pub(super) fn read(path: &Path, columns: &ColumnNames, chunks: &mut Chunks) -> Result<()> {
    let file = Arc::new(File::open(path).map_err(|error| Error::io(path, "read", error))?);
    let handle = file.try_clone().map_err(|error| Error::io(path, "read", error))?;
    // A damaged file may run into an assertion of the crate.
    let reader = caught(path, None, || SerializedFileReader::new(handle))?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted: Vec<Arc<Type>> =
        schema.get_fields().iter().filter(|field| matters(field, columns)).cloned().collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build();
    let projection = projection.map_err(|error| broken(path, None, &error))?;
    let wanted = Arc::new(SchemaDescriptor::new(Arc::new(projection)));
    let mut place = 0;
    for metadata in reader.metadata().row_groups() {
        let group = CheckedRowGroup { file: file.clone(), metadata };
        let tree = TreeBuilder::new().with_batch_size(BATCH_ROWS);
        let mut rows = caught(path, Some(place + 1), || tree.as_iter(wanted.clone(), &group))?;
        while let Some(row) = caught(path, Some(place + 1), || rows.next().transpose())? {
            place += 1;
            let is_read = |name: &str| columns.read_as(name).is_some_and(is_known);
            if let Some((name, _)) =
                row.get_column_iter().find(|(name, field)| is_read(name) && holds_other_bytes(field))
            {
                return Err(Error::data(
                    path,
                    Some(place),
                    format!("column `{name}` holds bytes that are no UTF-8 text"),
                    "write the column as text in UTF-8 (a string column), or leave such rows out",
                ));
            }
            let mut text = Vec::new();
            write_row(&row, &mut text);
            chunks.push(Start { line: 0, byte: None, is_line: false }, text)?;
        }
    }
    Ok(())
}

/// Runs a step of the crate, whose panics are faults of the file.
fn caught<T>(
    path: &Path,
    row: Option<usize>,
    step: impl FnOnce() -> std::result::Result<T, ParquetError>,
) -> Result<T> {
    match catch(step) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(broken(path, row, &error)),
        Err(panic) => Err(broken(path, row, &panic)),
    }
}

fn broken(path: &Path, row: Option<usize>, error: &dyn std::fmt::Display) -> Error {
    let text = error.to_string();
    let codec = text.contains("Disabled feature") || text.contains("not supported");
    let help = match codec {
        true => {
            "write it with another compression: `datasets.load_dataset(\"parquet\", data_files=FILE)[\"train\"].to_parquet(...)`"
        }
        false => HELP,
    };
    Error::data(path, row, format!("the Parquet table cannot be read: {text}"), help)
}

/// Whether a column may matter to a pair: it has a meaning, or there is text in it, which may be a prompt under another
/// name.
fn matters(field: &Type, columns: &ColumnNames) -> bool {
    columns.read_as(field.name()).is_some_and(is_known) || holds_text(field)
}

fn holds_text(field: &Type) -> bool {
    match field {
        Type::PrimitiveType { physical_type, .. } => *physical_type == PhysicalType::BYTE_ARRAY,
        Type::GroupType { fields, .. } => fields.iter().any(|field| holds_text(field)),
    }
}

/// Whether there are bytes in a value that are no text. Where nothing reads them, a few words stand for them.
fn holds_other_bytes(field: &Field) -> bool {
    match field {
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).is_err(),
        Field::Group(row) => row.get_column_iter().any(|(_, field)| holds_other_bytes(field)),
        Field::ListInternal(list) => list.elements().iter().any(holds_other_bytes),
        Field::MapInternal(map) => map.entries().iter().any(|(_, value)| holds_other_bytes(value)),
        _ => false,
    }
}

fn write_row(row: &Row, text: &mut Vec<u8>) {
    text.push(b'{');
    for (place, (name, field)) in row.get_column_iter().enumerate() {
        if place > 0 {
            text.push(b',');
        }
        write_text(name, text);
        text.push(b':');
        write_field(field, text);
    }
    text.push(b'}');
}

fn write_field(field: &Field, text: &mut Vec<u8>) {
    match field {
        Field::Null => text.extend_from_slice(b"null"),
        Field::Str(value) => write_text(value, text),
        // Some programs write text without saying that it is text.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(value) => write_text(value, text),
            Err(_) => write_text(&format!("({} bytes that are no text)", bytes.len()), text),
        },
        Field::Group(row) => write_row(row, text),
        Field::ListInternal(list) => {
            text.push(b'[');
            for (place, element) in list.elements().iter().enumerate() {
                if place > 0 {
                    text.push(b',');
                }
                write_field(element, text);
            }
            text.push(b']');
        }
        Field::MapInternal(map) => write_map(map, text),
        Field::Float16(value) => write_number(f64::from(*value), text),
        Field::Float(value) => write_number(f64::from(*value), text),
        Field::Double(value) => write_number(*value, text),
        Field::Bool(_)
        | Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_) => text.extend_from_slice(field.to_string().as_bytes()),
        other => write_text(&other.to_string(), text),
    }
}

fn write_map(map: &parquet::record::Map, text: &mut Vec<u8>) {
    text.push(b'{');
    for (place, (key, value)) in map.entries().iter().enumerate() {
        if place > 0 {
            text.push(b',');
        }
        match key {
            Field::Str(key) => write_text(key, text),
            key => write_text(&key.to_string(), text),
        }
        text.push(b':');
        write_field(value, text);
    }
    text.push(b'}');
}

fn write_number(number: f64, text: &mut Vec<u8>) {
    // Python's words for what JSON lacks, as in the JSON that it writes.
    let written = match number {
        number if number.is_nan() => "NaN".to_string(),
        f64::INFINITY => "Infinity".to_string(),
        f64::NEG_INFINITY => "-Infinity".to_string(),
        number => number.to_string(),
    };
    text.extend_from_slice(written.as_bytes());
}

fn write_text(value: &str, text: &mut Vec<u8>) {
    text.extend_from_slice(Value::from(value).to_string().as_bytes());
}
