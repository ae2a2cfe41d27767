//! The account as one HTML page, with no script and nothing fetched from anywhere.

use minijinja::{AutoEscape, Environment, context};

use super::account::Account;
use crate::error::{Error, Result};
use crate::report::escaped;

const NAME: &str = "check.html";
const TEMPLATE: &str = include_str!("check.html");

/// The page.
pub(super) fn write(account: &Account) -> Result<String> {
    let failed =
        |error: minijinja::Error| Error::bug(format!("the page of `check` cannot be written: {error:#}"));
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    // Characters that HTML forbids or that command a terminal are shown, as they are on a terminal.
    environment.add_filter("shown", |text: &str| escaped(text).into_owned());
    environment.add_filter("percent", |share: f64| format!("{:.1} %", 100.0 * share));
    environment.add_filter("tenth", |number: f64| format!("{number:.1}"));
    environment.add_template(NAME, TEMPLATE).map_err(failed)?;
    let highest = account.lengths.histogram.iter().map(|bin| bin.count).max().unwrap_or(1).max(1);
    let tokenised: usize = account.lengths.histogram.iter().map(|bin| bin.count).sum();
    let page = environment.get_template(NAME).map_err(failed)?;
    page.render(context! {
        account => minijinja::value::Value::from(minijinja::value::Serde(account)),
        highest,
        tokenised => tokenised.max(1),
        style => crate::report::STYLE,
        version => env!("CARGO_PKG_VERSION"),
    })
    .map_err(failed)
}
