//! `mmpo-fast completions` and `mmpo-fast man`: what shells and `man` need to know of the command line, from the same
//! description that parses it.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};
use clap_complete::Shell;

use crate::checkpoint::atomic;
use crate::error::{Error, Result};
use crate::report::print_result;

/// Where man pages go.
pub struct ManConfig {
    /// The folder, made if it is absent.
    pub folder: PathBuf,
}

/// `completions` and its argument.
pub fn completions_command() -> Command {
    Command::new("completions")
        .about("Print completions for a shell")
        .arg(
            Arg::new("shell")
                .value_name("SHELL")
                .required(true)
                .value_parser(value_parser!(Shell))
                .help("The shell that is to complete commands and flags"),
        )
        .after_help(
            "Examples:\n  mmpo-fast completions bash > ~/.local/share/bash-completion/completions/mmpo-fast\n  \
             mmpo-fast completions zsh > ~/.zfunc/_mmpo-fast\n  \
             mmpo-fast completions fish > ~/.config/fish/completions/mmpo-fast.fish",
        )
}

/// `man` and its argument.
pub fn man_command() -> Command {
    Command::new("man")
        .about("Write man pages, one for each command")
        .arg(
            Arg::new("folder")
                .value_name("DIR")
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .help("Folder that receives mmpo-fast.1, mmpo-fast-train.1 and the others"),
        )
        .after_help("Example:\n  mmpo-fast man ~/.local/share/man/man1")
}

/// The shell that was asked for.
pub fn shell(matches: &ArgMatches) -> Shell {
    matches.get_one("shell").copied().unwrap_or(Shell::Bash)
}

/// The folder that was asked for.
pub fn man(matches: &ArgMatches) -> ManConfig {
    ManConfig { folder: matches.get_one("folder").cloned().unwrap_or_default() }
}

/// Prints the completions of `command` for `shell`.
///
/// # Errors
/// [`Error::Io`] where standard output takes no more.
pub fn print_completions(shell: Shell, mut command: Command) -> Result<()> {
    print_result(&completions(shell, &mut command)).map(|_| ())
}

fn completions(shell: Shell, command: &mut Command) -> String {
    let mut text = Vec::new();
    clap_complete::generate(shell, command, "mmpo-fast", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    match shell {
        // clap_complete 4.6 sets names such as `mmpo__fast__subcmd__train` and looks for `mmpo__subcmd__fast__subcmd__train`,
        // because it takes the hyphen of the program's name for the beginning of a command.
        Shell::Bash => text.replace("mmpo__subcmd__fast", "mmpo__fast"),
        _ => text,
    }
}

/// Writes a page for `command` and one for each of its commands.
///
/// # Errors
/// [`Error::Io`] where the folder cannot be written.
pub fn write_man(config: &ManConfig, mut command: Command) -> Result<()> {
    std::fs::create_dir_all(&config.folder).map_err(|cause| Error::io(&config.folder, "create", cause))?;
    command.build();
    let pages = std::iter::once(&command).chain(command.get_subcommands());
    for page in pages {
        let name = page.get_display_name().unwrap_or(page.get_name()).to_string();
        let path = config.folder.join(format!("{name}.1"));
        let mut text = Vec::new();
        clap_mangen::Man::new(page.clone().name(name))
            .render(&mut text)
            .map_err(|cause| Error::io(&path, "write", cause))?;
        atomic::write_file(&path, &text)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bash offers for the last of `words`.
    fn offered(words: &[&str]) -> Vec<String> {
        let script = completions(Shell::Bash, &mut crate::cli::command());
        let call = r#"
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            _mmpo__fast "$1" "${@: -1}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}"
        "#;
        let output = std::process::Command::new("bash")
            .args(["--norc", "-c", &format!("{script}\n{call}"), "bash"])
            .args(words)
            .output()
            .expect("bash");
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect()
    }

    #[test]
    fn bash_completes_commands_their_flags_and_their_words() {
        assert_eq!(offered(&["mmpo-fast", "ver"]), ["verify"]);
        assert_eq!(offered(&["mmpo-fast", "train", "--eval-s"]), ["--eval-split", "--eval-steps"]);
        let dialects = ["trl", "alignment-handbook", "llama-factory", "axolotl"];
        assert_eq!(offered(&["mmpo-fast", "import", "--from", ""]), dialects);
    }
}
