//! The Python package's types of options are those of the command line: `python/mmpo_fast/_options.py` is made from it.

use std::fmt::Write as _;
use std::path::Path;

use clap::{Arg, ArgAction, Command};

/// Commands that are Python functions, and what their types are called.
const FUNCTIONS: [(&str, &str); 4] = [
    ("train", "TrainOptions"),
    ("score", "ScoreOptions"),
    ("generate", "GenerateOptions"),
    ("plan", "PlanOptions"),
];

/// Functions that have most of their options in common, and the type that holds those.
const ALIKE: ([&str; 2], &str) = (["train", "plan"], "RunOptions");

const HEAD: &str = r#""""The options of the commands, made from the program's own table: `MMPO_FAST_RECORD=1 cargo test --test training python`.
"""

from __future__ import annotations

import os
from typing import TypedDict, Union

PathLike = Union[str, "os.PathLike[str]"]
"#;

/// The file, as the command line of today asks for it.
fn python() -> String {
    let command = mmpo_fast::cli::command();
    let options = |function: &str| -> Vec<String> {
        let command = command.find_subcommand(function).expect("command");
        let flags = command.get_arguments().filter(|flag| flag.get_long().is_some());
        flags.map(|flag| option(command, flag)).collect()
    };
    let (alike, base) = ALIKE;
    let [train, plan] = alike.map(options);
    let shared: Vec<String> = train.into_iter().filter(|option| plan.contains(option)).collect();

    let mut text = String::from(HEAD);
    let mut class = |name: &str, parent: &str, about: &str, options: &[String]| {
        write!(text, "\n\nclass {name}({parent}, total=False):\n    \"\"\"{about}\"\"\"\n\n").unwrap();
        text.push_str(&options.concat());
    };
    class(base, "TypedDict", &format!("What `{}` have in common.", alike.join("` and `")), &shared);
    for (function, name) in FUNCTIONS {
        let about = format!("Options of `{function}`.");
        let mut own = options(function);
        let parent = if alike.contains(&function) { base } else { "TypedDict" };
        if parent == base {
            own.retain(|option| !shared.contains(option));
        }
        class(name, parent, &about, &own);
    }
    text
}

/// An option with its type, and what the program's help says of it.
fn option(command: &Command, flag: &Arg) -> String {
    let name = flag.get_long().unwrap().replace('-', "_");
    let placeholder = flag.get_value_names().and_then(|names| names.first()).map(|name| name.as_str());
    let is_switch = matches!(flag.get_action(), ArgAction::SetTrue)
        || flag.get_num_args().is_some_and(|count| count.min_values() == 0);
    let python_type = match placeholder {
        _ if is_switch => "bool",
        Some("NUMBER") => "float",
        Some("COUNT" | "N") => "int",
        Some("NUMBER|beta") => "Union[float, str]",
        Some(name) if ["FILE", "DIR", "PATH"].iter().any(|part| name.contains(part)) => "PathLike",
        Some(_) => "str",
        None => panic!("{}: {name} has no placeholder", command.get_name()),
    };
    let help = flag.get_help().map(ToString::to_string).unwrap_or_default();
    // The first line, unless a list follows that it announces.
    let first = help.lines().next().filter(|line| !line.ends_with(':'));
    let help = first
        .map_or_else(|| help.split_whitespace().collect::<Vec<_>>().join(" "), str::to_string)
        .replace('\\', "\\\\")
        .replace('"', "\\\"");
    format!("    {name}: {python_type}\n    \"\"\"{help}\"\"\"\n")
}

#[test]
fn python_has_the_options_of_the_command_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/mmpo_fast/_options.py");
    if std::env::var_os("MMPO_FAST_RECORD").is_some() {
        std::fs::write(&path, python()).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let same = committed == python();
    assert!(same, "make it anew: MMPO_FAST_RECORD=1 cargo test --release --test training python");
}
