//! Standard error for machines: with `--log-format json` every line there is a JSON object.

use std::borrow::Cow;
use std::io::Write;
use std::sync::OnceLock;
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

/// Which rank this process is, and its machine: for a rank that is not the first, whose lines mix with those of others.
static RANK: OnceLock<(usize, String)> = OnceLock::new();

/// Marks every line that this process writes to standard error from now on as those of a rank on a machine.
pub fn set_rank(rank: usize, host: &str) {
    // The first call holds.
    let _ = RANK.set((rank, host.to_string()));
}

/// Lines as they are written: with the rank before each, or inside the object of each.
pub fn marked(lines: &[u8]) -> Cow<'_, [u8]> {
    let Some((rank, host)) = RANK.get() else { return Cow::Borrowed(lines) };
    let mut marked = Vec::with_capacity(lines.len() + 32);
    for line in lines.split_inclusive(|&byte| byte == b'\n') {
        let line = match line.strip_prefix(b"{").filter(|_| is_json()) {
            Some(rest) => {
                let host = Value::from(host.as_str());
                marked.extend_from_slice(format!("{{\"rank\":{rank},\"host\":{host},").as_bytes());
                rest
            }
            None if line.trim_ascii().is_empty() => line,
            None => {
                marked.extend_from_slice(format!("rank {rank} ({host}): ").as_bytes());
                line
            }
        };
        marked.extend_from_slice(line);
    }
    Cow::Owned(marked)
}

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
