//! The size check that every operation makes before a device computes anything.

use std::fmt::Debug;

use crate::error::{Error, Result};

/// Proof that an operation's buffers are as large as its shape asks.
///
/// The public method of an operation checks its operands once, for all devices, and hands the proof to the device's own
/// `run_` method. Only this module makes one, so a device's method cannot be called with unchecked buffers.
#[derive(Clone, Copy, Debug)]
pub struct Checked(());

/// Compares the buffers of an operation with its shape: `(name, values it holds, values needed)`.
///
/// # Errors
/// [`Error::Bug`] that names the operation, the first buffer that is too small, and the shape: buffers are made for the
/// shapes that use them.
pub(super) fn check_sizes(
    operation: &str,
    shape: &dyn Debug,
    buffers: &[(&str, usize, usize)],
) -> Result<Checked> {
    match buffers.iter().find(|(_, holds, needed)| holds < needed) {
        None => Ok(Checked(())),
        Some((name, holds, needed)) => Err(Error::bug(format!(
            "{operation}: `{name}` holds {holds} values, {needed} are needed for {shape:?}"
        ))),
    }
}
