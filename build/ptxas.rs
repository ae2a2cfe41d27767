//! What nvcc and ptxas said of every kernel: kept under `OUT_DIR/ptxas/`, and read for what must not be there.

use std::path::Path;

use crate::Result;
use crate::objects::Compiled;

/// Writes `<stem>.txt` for each file, and returns a line for every warning, register spill, stack frame and lost chance of speed.
pub fn review(compiled: &[Compiled], folder: &Path) -> Result<Vec<String>> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut findings = Vec::new();
    for file in compiled {
        let stem = file.source.file_stem().unwrap_or_default().to_string_lossy();
        let report = folder.join(format!("{stem}.txt"));
        std::fs::write(&report, &file.output).map_err(|error| format!("{}: {error}", report.display()))?;
        let found = findings_of(&file.output);
        findings.extend(found.into_iter().map(|finding| format!("{}: {finding}", file.source.display())));
    }
    Ok(findings)
}

/// What ptxas calls an information and is none: products of a warpgroup that wait for one another, register counts that
/// it does not honour.
const LOST_SPEED: [&str; 2] = ["Potential Performance Loss", "setmaxnreg' ignored"];

/// ptxas names a kernel and its target, then its stack and spills on a line of their own:
///
///     ptxas info    : Compiling entry function 'name' for 'sm_80'
///     ptxas info    : Function properties for name
///         0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
fn findings_of(output: &str) -> Vec<String> {
    let mut kernel = "";
    let mut findings = Vec::new();
    for line in output.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function ") {
            kernel = rest;
        } else if line.contains("bytes stack frame") {
            let clean = line.split(',').all(|part| part.trim_start().starts_with("0 bytes"));
            if !clean {
                findings.push(format!("{kernel}: {}", line.trim()));
            }
        } else if line.to_ascii_lowercase().contains("warning")
            || LOST_SPEED.iter().any(|text| line.contains(text))
        {
            findings.push(line.trim().to_owned());
        }
    }
    findings
}
