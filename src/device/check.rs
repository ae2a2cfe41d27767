//! The size check that every operation makes before a device computes anything.

use std::fmt::Debug;

use crate::error::{Error, Result};

/// What to do about an error that only a mistake in this program can cause.
pub(super) const REPORT: &str = "this is a mistake in the program, not in your input; please report it";

/// Proof that an operation's buffers are as large as its shape asks.
///
/// The public method of an operation checks its operands once, for all devices, and hands the proof to the device's own
/// `run_` method. Only this module makes one, so a device's method cannot be called with unchecked buffers.
#[derive(Clone, Copy, Debug)]
pub struct Checked(());

/// Compares the buffers of an operation with its shape: `(name, values it holds, values needed)`.
///
/// # Errors
/// [`Error::Device`] that names the operation, the first buffer that is too small, and the shape.
pub(super) fn check_sizes(
    operation: &str,
    shape: &dyn Debug,
    buffers: &[(&str, usize, usize)],
) -> Result<Checked> {
    match buffers.iter().find(|(_, holds, needed)| holds < needed) {
        None => Ok(Checked(())),
        Some((name, holds, needed)) => Err(Error::device(
            format!("{operation}: `{name}` holds {holds} values, {needed} are needed for {shape:?}"),
            REPORT,
        )),
    }
}
