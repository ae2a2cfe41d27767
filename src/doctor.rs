//! `mmpo-fast doctor`: what this machine has of what a run can use, and what to do about each lack.
//!
//! One file for each part of the machine: `gpu.rs` (kernels, driver, GPUs, NVIDIA's libraries), `host.rs` (processor,
//! memory), `disk.rs` (the cache of reference log-probs and how fast its disk is, the Hugging Face cache).

mod disk;
mod gpu;
mod host;

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::report::print_result;

/// What `mmpo-fast doctor` was asked.
#[derive(Clone, Debug, PartialEq)]
pub struct DoctorConfig {
    /// The device that is wanted; the command fails where it cannot be used.
    pub device: DeviceChoice,
    /// Folder whose disk is timed; `None` is the cache of reference log-probs.
    pub folder: Option<PathBuf>,
    /// One JSON object instead of lines.
    pub json: bool,
}

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is there and does its part.
    Good,
    /// A run works without it: slower, or with less.
    Lack,
    /// Worth knowing, and no lack.
    Note,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Good => "ok",
            State::Lack => "lack",
            State::Note => "note",
        }
    }
}

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    name: &'static str,
    state: State,
    /// What was found, as the rest of a line that begins with the name.
    found: String,
    /// What to do about it, for a lack.
    advice: Option<String>,
    /// The same in numbers, for JSON.
    details: Map<String, Value>,
}

impl Finding {
    fn new(name: &'static str, state: State, found: impl Into<String>) -> Self {
        Finding { name, state, found: found.into(), advice: None, details: Map::new() }
    }

    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Finding::new(name, State::Good, found)
    }

    fn note(name: &'static str, found: impl Into<String>) -> Self {
        Finding::new(name, State::Note, found)
    }

    fn lack(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Finding { advice: Some(advice.into()), ..Finding::new(name, State::Lack, found) }
    }

    /// A lack whose message and advice are an error's.
    fn from_error(name: &'static str, error: &Error) -> Self {
        let advice = miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default();
        Finding::lack(name, error.to_string(), advice)
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_string(), value.into());
        self
    }

    fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("name".into(), self.name.into());
        object.insert("state".into(), self.state.word().into());
        object.insert("found".into(), self.found.clone().into());
        object.insert("advice".into(), self.advice.clone().into());
        object.extend(self.details.clone());
        Value::Object(object)
    }
}

/// What a run with `--device auto` computes on, and the findings that say so.
struct Diagnosis {
    findings: Vec<Finding>,
    gpus: gpu::Gpus,
}

/// Looks for everything but the speed of the disk, which takes a second.
fn look() -> Diagnosis {
    let (gpus, mut findings) = gpu::findings();
    findings.extend(host::findings());
    Diagnosis { findings, gpus }
}

/// What was found, a name and a line each, without advice: for `--version --verbose`.
pub fn lines() -> Vec<(&'static str, String)> {
    let mut findings = look().findings;
    findings.push(disk::hub_cache());
    // The version says itself what kernels there are.
    findings.retain(|finding| finding.name != "kernels");
    findings.into_iter().map(|finding| (finding.name, finding.found)).collect()
}

/// Prints what was found and what to do about each lack.
///
/// # Errors
/// [`Error::Device`] after the report where the device that `config` wants cannot be used; [`Error::Io`] where standard
/// output takes no more.
pub fn run(config: &DoctorConfig) -> Result<()> {
    let mut diagnosis = look();
    diagnosis.findings.extend(disk::findings(config.folder.as_deref()));
    let taken = diagnosis.gpus.taken(config.device);
    let shown = match &taken {
        Ok(device) => Finding::good("a run", format!("with --device {} computes on {device}", config.device)),
        Err(error) => Finding::from_error("a run", error),
    };
    diagnosis.findings.push(shown);
    let text = if config.json { to_json(&diagnosis.findings)? } else { to_text(&diagnosis.findings) };
    print_result(&text)?;
    taken.map(|_| ())
}

fn to_json(findings: &[Finding]) -> Result<String> {
    let object = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "lacks": findings.iter().filter(|finding| finding.state == State::Lack).count(),
        "findings": findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&object);
    text.map(|text| text + "\n").map_err(|error| Error::bug(format!("findings as JSON: {error}")))
}

/// Columns of the state and the name.
const STATE_WIDTH: usize = 6;
const NAME_WIDTH: usize = 11;

fn to_text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let (state, name) = (finding.state.word(), finding.name);
        text.push_str(&format!("{state:<STATE_WIDTH$}{name:<NAME_WIDTH$}{}\n", finding.found));
        if let Some(advice) = &finding.advice {
            text.push_str(&format!("{:1$}do: {advice}\n", "", STATE_WIDTH + NAME_WIDTH));
        }
    }
    text
}

/// `1.5 GiB`, `512 MiB`
fn bytes(count: u64) -> String {
    let mebibytes = count as f64 / f64::from(1 << 20);
    if mebibytes < 1024.0 { format!("{mebibytes:.0} MiB") } else { format!("{:.1} GiB", mebibytes / 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_says_what_to_do_in_text_and_in_json() {
        let findings =
            [Finding::good("memory", "8 GiB").with("bytes", 8), Finding::lack("nccl", "none", "install it")];
        assert_eq!(
            to_text(&findings),
            "ok    memory     8 GiB\nlack  nccl       none\n                 do: install it\n"
        );
        let json: Value = serde_json::from_str(&to_json(&findings).unwrap()).unwrap();
        assert_eq!(json["lacks"], 1);
        assert_eq!(json["findings"][0]["bytes"], 8);
        assert_eq!(json["findings"][1]["advice"], "install it");
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
    }
}
