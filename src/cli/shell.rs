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
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "mmpo-fast", &mut text);
    print_result(&String::from_utf8_lossy(&text)).map(|_| ())
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
