//! Flags made from the table of options, and typed access to a command's own flags.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches};

use crate::config;
use crate::config::options::{Options, Origin, Row, rows};
use crate::config::value::OptionValue;
use crate::error::{Error, Result};

/// The flag of a row: `--learning-rate NUMBER`. The row itself reads the values, so that a flag and a recipe key accept
/// the same and complain alike.
fn flag(row: &Row) -> Arg {
    let flag = Arg::new(row.name)
        .long(row.name.replace('_', "-"))
        .value_name(row.placeholder)
        .help(row.help())
        .help_heading(row.heading)
        .allow_negative_numbers(true)
        .action(ArgAction::Set);
    if row.is_switch { flag.num_args(0..=1).default_missing_value("true") } else { flag }
}

/// The flags of all options that `wanted` lets through.
pub fn flags(wanted: impl Fn(&Row) -> bool) -> Vec<Arg> {
    rows().iter().filter(|row| wanted(row)).map(flag).collect()
}

/// What was given to the flags of [`flags`].
///
/// # Errors
/// [`Error::Config`] naming the flag whose value is wrong.
pub fn options(matches: &ArgMatches, wanted: impl Fn(&Row) -> bool) -> Result<Options> {
    let mut options = Options::default();
    for row in rows().iter().filter(|row| wanted(row)) {
        if let Some(text) = matches.get_one::<String>(row.name) {
            (row.put_text)(&mut options, text, Origin::Flag)?;
        }
    }
    Ok(options)
}

/// A flag that one command alone has.
pub fn own(name: &'static str, placeholder: &'static str, help: impl Into<String>) -> Arg {
    Arg::new(name)
        .long(name.replace('_', "-"))
        .value_name(placeholder)
        .help(help.into())
        .allow_negative_numbers(true)
        .action(ArgAction::Set)
}

/// The value of a flag made by [`own`]; `rule` must hold for it.
///
/// # Errors
/// [`Error::Config`] naming the flag, where its value does not parse or breaks the rule.
pub fn value<T: OptionValue>(
    matches: &ArgMatches,
    name: &str,
    rule: fn(&T) -> bool,
    must: &str,
) -> Result<Option<T>> {
    let Some(text) = matches.get_one::<String>(name) else { return Ok(None) };
    let flag = name.replace('_', "-");
    let help = "the command's --help explains the flag";
    let parsed =
        T::from_text(text).map_err(|problem| Error::config(format!("`--{flag}` {problem}"), help))?;
    if !rule(&parsed) {
        return Err(Error::config(format!("`--{flag}` = {text} {must}"), help));
    }
    Ok(Some(parsed))
}

/// The page that a flag made by [`own`] names.
///
/// # Errors
/// [`Error::Config`] for a name that does not end in `.html`, which may be that of anything but a page.
pub fn page(matches: &ArgMatches, name: &str) -> Result<Option<PathBuf>> {
    let page: Option<PathBuf> = value(matches, name, config::is_path, "must name a file")?;
    match page.as_ref().filter(|path| path.extension().is_none_or(|end| end != "html")) {
        None => Ok(page),
        Some(path) => Err(Error::config(
            format!("`--{name}` = {} does not end in .html", path.display()),
            "name the page FILE.html; so nothing but a page is ever replaced",
        )),
    }
}

/// The value of a flag made by [`own`], as it was given.
pub fn text(matches: &ArgMatches, name: &str) -> Option<String> {
    matches.get_one::<String>(name).cloned()
}
