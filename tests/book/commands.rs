//! Every command that a page shows is run, page by page and in order, in a small form.
//!
//! A block of commands is fenced as `console`. Each command begins with `$ `, and goes on in lines that are indented. A
//! block that cannot run in a test says why after the word: `console,needs-gpu`.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::pages::{Block, Page, pages};
use crate::workplace::Workplace;

/// What a block may need that a test does not have.
const NEEDS: [&str; 8] = [
    "needs-build",
    "needs-container",
    "needs-failure",
    "needs-gpu",
    "needs-kubernetes",
    "needs-network",
    "needs-slurm",
    "needs-hours",
];

/// Pairs that stand in for a page's file: enough for two steps.
const PAIRS: usize = 8;

/// The commands of a block that can be run; none of a block that needs something.
fn commands(page: &Page, block: &Block) -> Vec<String> {
    let place = format!("docs/{}:{}", page.path.display(), block.line);
    let Some(need) = block.kind.strip_prefix("console") else { return Vec::new() };
    if !need.is_empty() {
        let known = need.strip_prefix(',').is_some_and(|need| NEEDS.contains(&need));
        assert!(known, "{place}: `{}` is not console, or console with one of {NEEDS:?}", block.kind);
        return Vec::new();
    }
    let mut commands: Vec<String> = Vec::new();
    for line in &block.lines {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push(command.to_string()),
            (None, Some(command)) if line.starts_with("  ") => {
                command.push('\n');
                command.push_str(line);
            }
            _ => panic!("{place}: `{line}` neither begins a command (`$ `) nor goes on with one (indented)"),
        }
    }
    assert!(!commands.is_empty(), "{place}: no command");
    commands
}

/// Runs a page's commands; the answer is the failures, and the metrics that runs wrote.
fn run(page: &Page) -> (Vec<String>, Vec<String>) {
    let (blocks, _) = page.parts();
    let all: Vec<String> = blocks.iter().flat_map(|block| commands(page, block)).collect();
    if all.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let workplace = Workplace::new(PAIRS);
    let mut failures = Vec::new();
    for command in all {
        let output = workplace.shell().arg("-c").arg(&command).output().unwrap();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            failures.push(format!("docs/{}: {command}\n{}\n{said}", page.path.display(), output.status));
        }
    }
    (failures, workplace.metrics())
}

#[test]
fn every_command_runs_and_every_metric_is_documented() {
    let pages = pages();
    let results: Vec<_> = pages.par_iter().map(run).collect();
    let failures: Vec<&String> = results.iter().flat_map(|(failures, _)| failures).collect();
    assert!(failures.is_empty(), "{failures:#?}");

    let lines: Vec<&String> = results.iter().flat_map(|(_, metrics)| metrics).collect();
    let names: BTreeSet<String> = lines
        .iter()
        .flat_map(|line| serde_json::from_str::<Map<String, Value>>(line).unwrap())
        .map(|(name, _)| name.strip_prefix("eval_").map_or(name.clone(), String::from))
        .collect();
    assert!(names.len() > 15, "too few metrics were seen: {names:?}");
    let reference = pages.iter().find(|page| page.path.ends_with("reference/metrics.md")).unwrap();
    for name in names {
        assert!(reference.text.contains(&format!("`{name}`")), "{name} is not in docs/reference/metrics.md");
    }
}

/// A command that stands in another kind of block, or is indented, would never be run.
#[test]
fn commands_stand_in_console_blocks() {
    for page in pages() {
        let (blocks, text) = page.parts();
        let is_command = |line: &str| {
            let line = line.trim_start();
            line.starts_with("mmpo-fast ") || line.starts_with("$ ")
        };
        let indented = text.into_iter().filter(|(_, line)| line.starts_with("    ") && is_command(line));
        let fenced = blocks.iter().filter(|block| !block.kind.starts_with("console"));
        // Scripts and files of jobs are tested as such.
        let fenced = fenced.filter(|block| !["bash", "yaml"].contains(&block.kind.as_str()));
        let fenced =
            fenced.filter(|block| block.lines.iter().any(|line| is_command(line))).map(|block| block.line);
        let lines: Vec<usize> = indented.map(|(line, _)| line).chain(fenced).collect();
        assert!(
            lines.is_empty(),
            "docs/{}: lines {lines:?}: put commands in a block ```console",
            page.path.display()
        );
    }
}

/// The exit codes of the program are those of their page.
#[test]
fn every_exit_code_is_documented() {
    let page = pages().into_iter().find(|page| page.path.ends_with("reference/exit-codes.md")).unwrap();
    let rows: Vec<&str> =
        page.text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()).collect();
    let listed: BTreeSet<u8> =
        rows.iter().flat_map(|row| row.split(", ")).filter_map(|code| code.parse().ok()).collect();
    assert_eq!(listed, BTreeSet::from([0, 2, 3, 4, 5, 6, 7, 8, 9, 70, 129, 130, 143]));
}
