//! `docs/reference/options.md` is made from the description of the command line that parses it.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

use crate::pages::repository;

const HEAD: &str = "# Options

<!-- Made from the program's own table: MMPO_FAST_RECORD=1 cargo test --test book options -->

Every option of `train` is also a key of a [recipe](files.md#what-is-read), with underscores: `--learning-rate` is `learning_rate`. A flag goes
before the recipe, the recipe before the default. `mmpo-fast COMMAND --help` prints the same.

";

/// The headings of clap's own flags, which stand in `train` alone here.
const EVERYWHERE: [&str; 3] = ["quiet", "verbose", "help"];

fn page() -> String {
    let mut text = String::from(HEAD);
    let mut program = mmpo_fast::cli::command();
    program.build();
    let commands: Vec<&Command> = program.get_subcommands().collect();
    for command in &commands {
        writeln!(text, "- [`{0}`](#{0}): {1}", command.get_name(), about(command)).unwrap();
    }
    text.push_str("\nAll of them take `--quiet` (`-q`: warnings and errors only), `--verbose` (`-v`: debug messages too) and `--help` (`-h`).\n");
    for command in commands {
        write_command(&mut text, command);
    }
    text
}

fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default()
}

fn write_command(text: &mut String, command: &Command) {
    write!(text, "\n## {}\n\n", command.get_name()).unwrap();
    let long = command.get_long_about().map_or_else(|| about(command), ToString::to_string);
    writeln!(text, "{}", escaped(&long)).unwrap();
    let arguments: Vec<&Arg> = command.get_arguments().filter(|argument| is_own(argument)).collect();
    let mut headings: Vec<Option<&str>> = Vec::new();
    for argument in &arguments {
        if !headings.contains(&argument.get_help_heading()) {
            headings.push(argument.get_help_heading());
        }
    }
    // Those without a heading are the command's own.
    headings.sort_by_key(|heading| heading.is_some());
    for heading in headings {
        if let Some(heading) = heading {
            write!(text, "\n**{heading}**\n").unwrap();
        }
        let under = arguments.iter().filter(|argument| argument.get_help_heading() == heading);
        under.for_each(|argument| write_argument(text, argument));
    }
}

fn is_own(argument: &Arg) -> bool {
    !EVERYWHERE.contains(&argument.get_id().as_str())
}

/// A term and its meaning, whose lists stay lists.
fn write_argument(text: &mut String, argument: &Arg) {
    let placeholder = argument.get_value_names().and_then(|names| names.first()).map(|name| name.as_str());
    let is_switch = matches!(argument.get_action(), ArgAction::SetTrue);
    let value = match (placeholder, is_switch) {
        (Some(name), false) => name.to_string(),
        _ => String::new(),
    };
    let name = argument.get_long().map(|long| format!("--{long}")).unwrap_or_default();
    let term = [name, value].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    write!(text, "\n- `{term}`").unwrap();
    let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let (help, default) = match help.rsplit_once("[default: ") {
        Some((help, default)) => (help.to_string(), default.strip_suffix(']').map(String::from)),
        None => (help, None),
    };
    let (help, only) = match help.rsplit_once("[only ") {
        Some((help, only)) => (help.to_string(), only.trim_end().strip_suffix(']').map(String::from)),
        None => (help, None),
    };
    // A list inside an item is indented; a line that begins with none goes on with its paragraph.
    for (index, line) in help.trim().lines().enumerate() {
        let gap = if index == 0 { "<br>" } else { "\n  " };
        let first_of_list = line.starts_with("- ") && index == 1;
        let blank = if first_of_list { "\n" } else { "" };
        write!(text, "{blank}{gap}{}", escaped(line)).unwrap();
    }
    let possible: Vec<String> =
        argument.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
    let facts = [
        (!possible.is_empty() && !is_switch).then(|| format!("One of {}.", possible.join(", "))),
        only.map(|only| format!("Only {only}.")),
        default.map(|default| format!("Default: {}.", escaped(&default))),
    ];
    let facts: Vec<String> = facts.into_iter().flatten().collect();
    if !facts.is_empty() {
        let after_list = help.contains("\n- ");
        let gap = if after_list { "\n\n  " } else { "<br>" };
        write!(text, "{gap}*{}*", facts.join(" ")).unwrap();
    }
    text.push('\n');
}

/// Markdown in which `*`, `<`, `_` and flags are themselves.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    // What stands between backquotes is code and needs nothing.
    for (index, part) in text.split('`').enumerate() {
        if index > 0 {
            out.push('`');
        }
        match index % 2 {
            1 => out.push_str(part),
            _ => out.push_str(
                &part.replace('<', "&lt;").replace('*', "\\*").replace('_', "\\_").replace('[', "\\["),
            ),
        }
    }
    out
}

#[test]
fn the_page_of_options_is_that_of_the_command_line() {
    let path = repository().join("docs/reference/options.md");
    if std::env::var_os("MMPO_FAST_RECORD").is_some() {
        std::fs::write(&path, page()).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let same = committed == page();
    assert!(same, "make it anew: MMPO_FAST_RECORD=1 cargo test --release --test book options");
}
