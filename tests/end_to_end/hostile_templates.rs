//! Hostile chat templates on the program itself: each ends within 5 seconds of processor time, in little memory, with
//! a text or with one error that names the template.

use std::path::Path;
use std::process::{Command, Output};

use crate::hostile_templates_list::templates;

/// Address space, in KiB: stacks and the model's files are in it, so that far less is ever used.
const ADDRESSES: u32 = 1_600_000;
const SECONDS: u32 = 5;

fn generate(template: &Path) -> Output {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo/model");
    let limited = format!("ulimit -v {ADDRESSES} -t {SECONDS}; exec \"$0\" \"$@\"");
    let mut command = Command::new("bash");
    command.args(["-c", &limited, env!("CARGO_BIN_EXE_mmpo-fast"), "--quiet", "generate", "--device", "cpu"]);
    command.args(["--threads", "1", "--prompt", "hi", "--max-new-tokens", "1", "--model"]).arg(model);
    command.arg("--chat-template").arg(template).output().expect("bash runs")
}

#[test]
fn hostile_templates_end_with_one_clear_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("hostile.jinja");
    let templates = templates();
    assert!(templates.len() >= 60);
    let mut wrong = Vec::new();
    for (name, source) in templates {
        std::fs::write(&path, source).expect("a file in the temporary folder");
        let output = generate(&path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        // A few of the list are merely odd, and give a text.
        let is_clear = match output.status.code() {
            Some(0) => stderr.is_empty(),
            Some(4) => stderr.contains("hostile.jinja") && !stderr.contains("panicked"),
            // The prompt is longer than the demo's model takes, or holds ids that it does not have.
            _ => false,
        };
        if !is_clear {
            wrong.push(format!(
                "{name}: {}\n{}",
                output.status,
                stderr.chars().take(600).collect::<String>()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
