//! The values an option may have. The text of a rule completes a sentence that begins "`beta` = -1".

use std::path::PathBuf;

use super::value::{EntropyWeight, Source};
use super::{DataCache, Policy};

pub type Check<T> = fn(&T) -> Result<(), &'static str>;

fn rule(holds: bool, text: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(text) }
}

pub fn anything<T>(_value: &T) -> Result<(), &'static str> {
    Ok(())
}

/// Whether the number is finite in f32. The kernels compute in f32: a number that is infinite or zero there is not the
/// number that was asked for.
fn is_finite(value: f64) -> bool {
    (value as f32).is_finite()
}

pub fn positive(value: &f64) -> Result<(), &'static str> {
    rule(is_finite(*value) && *value as f32 > 0.0, "must be finite and greater than 0 (in single precision)")
}

pub fn not_negative(value: &f64) -> Result<(), &'static str> {
    rule(is_finite(*value) && *value >= 0.0, "must be finite and at least 0 (in single precision)")
}

pub fn epochs(value: &f64) -> Result<(), &'static str> {
    rule(*value > 0.0 && *value <= 1e6, "must be greater than 0 and at most 1000000")
}

pub fn zero_to_one(value: &f64) -> Result<(), &'static str> {
    rule((0.0..=1.0).contains(value), "must be from 0 to 1")
}

pub fn between_zero_and_one(value: &f64) -> Result<(), &'static str> {
    rule(*value > 0.0 && *value < 1.0, "must be greater than 0 and less than 1")
}

pub fn half_to_one(value: &f64) -> Result<(), &'static str> {
    rule(
        (0.5..=1.0).contains(value),
        "must be from 0.5 to 1: below, the rejected response would be preferred",
    )
}

pub fn below_one(value: &f64) -> Result<(), &'static str> {
    rule(
        (0.0..1.0).contains(value) && (*value as f32) < 1.0,
        "must be at least 0 and less than 1 (in single precision)",
    )
}

pub fn below_half(value: &f64) -> Result<(), &'static str> {
    rule((0.0..0.5).contains(value), "must be at least 0 and less than 0.5: at 0.5 the labels say nothing")
}

/// Largest count, which is more tokens, pairs or steps than any run has. Sums and products of a few such counts stay
/// within 64 bits, and TOML can write them.
const LARGEST_COUNT: usize = (1 << 31) - 1;
/// Largest number of MiB, which is more than any machine has.
const LARGEST_MEBIBYTES: usize = 1 << 30;
const MOST_THREADS: usize = 1024;

pub fn count(value: &usize) -> Result<(), &'static str> {
    rule(*value <= LARGEST_COUNT, "must be at most 2147483647")
}

pub fn at_least_one(value: &usize) -> Result<(), &'static str> {
    rule((1..=LARGEST_COUNT).contains(value), "must be at least 1 and at most 2147483647")
}

pub fn at_least_two(value: &usize) -> Result<(), &'static str> {
    rule(*value >= 2, "must be at least 2: one token of the prompt and one of the response")?;
    count(value)
}

/// More than the width of any model.
const LARGEST_RANK: usize = 1 << 16;

pub fn rank(value: &usize) -> Result<(), &'static str> {
    rule((1..=LARGEST_RANK).contains(value), "must be at least 1 and at most 65536")
}

pub fn mebibytes(value: &usize) -> Result<(), &'static str> {
    rule((1..=LARGEST_MEBIBYTES).contains(value), "must be at least 1 and at most 1073741824")
}

pub fn threads(value: &usize) -> Result<(), &'static str> {
    rule((1..=MOST_THREADS).contains(value), "must be at least 1 and at most 1024")
}

/// TOML integers are signed: a larger seed could not be written into the resolved recipe.
pub fn fits_toml(value: &u64) -> Result<(), &'static str> {
    rule(i64::try_from(*value).is_ok(), "must be at most 9223372036854775807")
}

pub fn entropy_weight(value: &EntropyWeight) -> Result<(), &'static str> {
    match value {
        EntropyWeight::Beta => Ok(()),
        EntropyWeight::Number(number) => not_negative(number),
    }
}

/// Whether the path names something at all.
#[expect(clippy::ptr_arg, reason = "a rule takes the option's own type")]
pub fn is_path(value: &PathBuf) -> bool {
    !value.as_os_str().is_empty()
}

pub fn path(value: &PathBuf) -> Result<(), &'static str> {
    rule(is_path(value), "must name a file or folder, and is empty")
}

pub fn source(value: &Source) -> Result<(), &'static str> {
    match value {
        Source::Builtin => Ok(()),
        Source::Path(value) => path(value),
    }
}

pub fn data_cache(value: &DataCache) -> Result<(), &'static str> {
    match value {
        DataCache::Off => Ok(()),
        DataCache::Folder(folder) => path(folder),
    }
}

pub fn drop_or_error(value: &Policy) -> Result<(), &'static str> {
    rule(matches!(value, Policy::Drop | Policy::Error), "must be drop or error")
}

pub fn cut_drop_or_error(value: &Policy) -> Result<(), &'static str> {
    rule(*value != Policy::Keep, "must be cut, drop or error")
}

pub fn keep_drop_or_error(value: &Policy) -> Result<(), &'static str> {
    rule(*value != Policy::Cut, "must be keep, drop or error: there is nothing to cut")
}
