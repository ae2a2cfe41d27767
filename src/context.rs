//! How long sequences may be under a model: the lengths asked for, and the context that its config names.

use std::path::Path;

use crate::checkpoint::ModelFolder;
use crate::config::{AskedLengths, LengthLimits};
use crate::error::{Error, Result};

/// The limits of a run over `models`. A default length is at most the shortest context among them, which is logged; a
/// given one may be longer, with a warning.
///
/// # Errors
/// Those of [`AskedLengths::limits`].
pub fn limits(asked: AskedLengths, models: &[&ModelFolder]) -> Result<LengthLimits> {
    let shortest = models.iter().min_by_key(|model| model.config().context());
    let limits = asked.limits(shortest.map(|model| model.config().context()))?;
    if let (Some(model), None) = (shortest, asked.max_length)
        && limits.max_length < asked.limits(None)?.max_length
    {
        tracing::info!(
            "max_length is {}, the context of {}; --max-length sets another",
            limits.max_length,
            model.path().display()
        );
    }
    for model in models {
        let context = model.config().context();
        if limits.max_length > context.max(AskedLengths::LEAST) {
            tracing::warn!(
                "max_length {} is beyond the context of {}, {context} positions: the model was not trained for longer sequences",
                limits.max_length,
                model.path().display()
            );
        }
    }
    Ok(limits)
}

/// The folder whose tokenizer and chat template hold: the adapter's where it has some, as it was trained with them.
pub fn text_folder<'a>(model: &'a Path, adapter: Option<&'a Path>) -> &'a Path {
    adapter.filter(|adapter| adapter.join("tokenizer.json").is_file()).unwrap_or(model)
}

/// Refuses sequences of `longest` positions where the rope of a model holds for fewer.
///
/// # Errors
/// [`Error::Model`] with the number that it holds for.
pub fn check_positions(model: &ModelFolder, longest: usize, help: impl Fn(usize) -> String) -> Result<()> {
    match model.config().rope.positions() {
        Some(positions) if longest > positions => Err(Error::model(
            model.path(),
            format!(
                "the longest sequence has {longest} positions; beyond {positions}, the rope of this model depends on the other sequences of its batch, which is not computed here"
            ),
            help(positions),
        )),
        _ => Ok(()),
    }
}

/// As [`check_positions`], for pairs, whose lengths an option bounds.
///
/// # Errors
/// [`Error::Model`] with the length that the rope holds for.
pub fn check_pairs(model: &ModelFolder, longest: usize) -> Result<()> {
    check_positions(model, longest, |positions| format!("give --max-length {positions} or less"))
}
