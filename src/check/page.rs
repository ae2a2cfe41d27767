//! The account as one HTML page.

use serde::Serialize;

use super::account::Account;
use crate::error::Result;
use crate::report::page;

/// What the template is given.
#[derive(Serialize)]
struct View<'a> {
    account: &'a Account,
    /// Records of the highest bar of the histogram; at least 1.
    highest: usize,
    /// Records that have lengths; at least 1.
    tokenised: usize,
}

/// The page.
pub(super) fn write(account: &Account) -> Result<String> {
    let counts = || account.lengths.histogram.iter().map(|bin| bin.count);
    let view = View {
        account,
        highest: counts().max().unwrap_or(1).max(1),
        tokenised: counts().sum::<usize>().max(1),
    };
    page::render("check.html", include_str!("check.html"), &view)
}
