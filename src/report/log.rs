//! Standard error for machines: with `--log-format json` every line there is a JSON object.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value, json};

use super::progress::LogWriter;

/// What standard error is written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// People.
    #[default]
    Text,
    /// Programs: log lines, progress, notices and errors are JSON objects, one a line.
    Json,
}

static JSON: AtomicBool = AtomicBool::new(false);

/// Sets the format of all that is written to standard error from now on.
pub fn set_log_format(format: LogFormat) {
    JSON.store(format == LogFormat::Json, Ordering::SeqCst);
}

/// Whether standard error is written for programs.
pub fn is_json() -> bool {
    JSON.load(Ordering::SeqCst)
}

/// Writes a line of `fields`, with the time and the level before them, as the log has them. A line that cannot be written is
/// lost, as a line of the log is.
pub fn write_json(level: &str, fields: &[(&str, Value)]) {
    let mut line = Map::new();
    line.insert("timestamp".into(), json!(jiff::Timestamp::now().to_string()));
    line.insert("level".into(), json!(level));
    line.extend(fields.iter().map(|(name, value)| (name.to_string(), value.clone())));
    let _ = LogWriter.write_all(format!("{}\n", Value::Object(line)).as_bytes());
}
