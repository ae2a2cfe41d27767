//! How far results may be from the naive ones, and assertions whose failure says where they are further.

use std::cell::RefCell;
use std::sync::Once;

use super::wide;

/// How far a device's result may lie from the naive f64 one:
/// `error <= relative * |wanted| + absolute * rms(wanted)`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub relative: f64,
    pub absolute: f64,
}

impl Tolerance {
    /// f32 storage and accumulation: a few units in the last place of a value, and of the largest term of a sum.
    pub const F32: Tolerance = Tolerance { relative: 3e-6, absolute: 3e-6 };
    /// bf16 storage, f32 accumulation: half a unit in the last place is 2^-9 of a value; one more for a rounded
    /// intermediate.
    pub const BF16: Tolerance = Tolerance { relative: 4e-3, absolute: 4e-3 };
}

thread_local! {
    static TRYING: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Says what the test is trying: whatever fails next, an assertion or an operation, prints it. A fix must be possible from the
/// output alone, because a GPU is at hand for minutes.
pub fn trying(what: &str, shape: impl std::fmt::Debug) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            usual(panic);
            TRYING.with_borrow(|trying| {
                if !trying.is_empty() {
                    eprintln!("  with {trying}");
                }
            });
        }));
    });
    TRYING.set(format!("{what} = {shape:?}"));
}

/// The wrong values of a tensor: how many, and where. Their pattern tells a missing tile from a wrong number.
#[derive(Clone, Copy, Debug, Default)]
struct WrongValues {
    count: usize,
    /// How many of them are NaN or infinite.
    not_finite: usize,
    first: usize,
    last: usize,
    worst: usize,
    worst_error: f64,
}

impl WrongValues {
    /// Values whose error exceeds what `allowed` gives for their index.
    fn find(got: &[f32], wanted: &[f64], allowed: impl Fn(usize) -> f64) -> Self {
        let mut wrong = WrongValues::default();
        for (i, (&got, &wanted)) in got.iter().zip(wanted).enumerate() {
            let error = (f64::from(got) - wanted).abs();
            if error <= allowed(i) {
                continue;
            }
            if wrong.count == 0 {
                (wrong.first, wrong.worst) = (i, i);
            }
            (wrong.count, wrong.last) = (wrong.count + 1, i);
            if !got.is_finite() {
                wrong.not_finite += 1;
            }
            // A NaN is worse than any number, and the first one stays the worst.
            if !wrong.worst_error.is_nan() && (error.is_nan() || error > wrong.worst_error) {
                (wrong.worst, wrong.worst_error) = (i, error);
            }
        }
        wrong
    }

    /// For people: the first and the worst, with what was wanted.
    fn describe(&self, got: &[f32], wanted: &[f64]) -> String {
        let value = |i: usize| format!("[{i}] = {:e}, wanted {:e}", got[i], wanted[i]);
        let WrongValues { count, not_finite, first, last, worst, worst_error } = *self;
        format!(
            "{count} of {} values are wrong, {not_finite} of them not finite; first {}; last [{last}]; worst {}, off by {worst_error:e}",
            got.len(),
            value(first),
            value(worst),
        )
    }
}

/// Asserts that every value of `got` is within `bounds` of `wanted`; otherwise names the first wrong one and the worst.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], wanted: &[f64], bounds: Tolerance) {
    assert_eq!(got.len(), wanted.len(), "{what}: lengths");
    let mean_square = wanted.iter().map(|value| value * value).sum::<f64>() / wanted.len().max(1) as f64;
    let absolute = bounds.absolute * mean_square.sqrt();
    let allowed = |i: usize| bounds.relative * wanted[i].abs() + absolute;
    let wrong = WrongValues::find(got, wanted, allowed);
    assert!(
        wrong.count == 0,
        "{what}: {}, {:e} allowed ({bounds:?})",
        wrong.describe(got, wanted),
        allowed(wrong.worst)
    );
}

/// Asserts that every value is the one wanted, as a copy or a product of small integers is in any format.
#[track_caller]
pub fn assert_exact(what: &str, got: &[f32], wanted: &[f64]) {
    assert_eq!(got.len(), wanted.len(), "{what}: lengths");
    let wrong = WrongValues::find(got, wanted, |_| 0.0);
    assert!(wrong.count == 0, "{what}: {}", wrong.describe(got, wanted));
}

/// Asserts that two runs gave the same bits; otherwise says how many values differ and where the first does.
#[track_caller]
pub fn assert_same_bits(what: &str, got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len(), "{what}: lengths");
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    let count = got.iter().zip(wanted).filter(|&pair| differs(pair)).count();
    let first = got.iter().zip(wanted).position(differs).unwrap_or(0);
    assert!(
        count == 0,
        "{what}: {count} of {} values have other bits; first [{first}] = {:e}, before {:e}",
        got.len(),
        got[first],
        wanted[first]
    );
}

/// The type of a result, which decides how far a right one may be from the truth.
#[derive(Clone, Copy, Debug)]
pub enum Stored {
    Bf16,
    F32,
}

impl Stored {
    /// The errors that a tensor may have, the largest and the root mean square, given the same two norms of its values:
    /// in bf16 one unit in the last place, and the 1 / sqrt(12) of a unit that rounding alone costs; in f32 what sums
    /// may lose.
    fn slack(self, [largest, root_mean_square]: [f64; 2]) -> [f64; 2] {
        let ulp = |value: f64| if value == 0.0 { 0.0 } else { (value.log2().floor() - 7.0).exp2() };
        match self {
            Stored::Bf16 => [ulp(largest), ulp(root_mean_square) / 12_f64.sqrt()],
            Stored::F32 => [largest, root_mean_square].map(|norm| Tolerance::F32.absolute * norm),
        }
    }
}

/// The largest absolute value and the root mean square; NaN if there is a NaN among the values.
fn norms(values: &[f64]) -> [f64; 2] {
    // `f64::max` would drop a NaN.
    let larger = |largest: f64, value: &f64| {
        if largest.is_nan() || value.abs() <= largest { largest } else { value.abs() }
    };
    let mean_square = inner(values, values) / values.len().max(1) as f64;
    [values.iter().fold(0.0, larger), mean_square.sqrt()]
}

/// Asserts that `got` is no worse than twice the naive bf16 version's own error, in its largest error and in the root mean
/// square, and a [`Stored::slack`].
#[track_caller]
pub fn assert_no_worse(what: &str, got: &[f32], stored: Stored, exact: &[f64], naive_bf16: &[f64]) {
    assert_eq!((got.len(), naive_bf16.len()), (exact.len(), exact.len()), "{what}: lengths");
    let errors = |values: &[f64]| {
        norms(&values.iter().zip(exact).map(|(value, exact)| value - exact).collect::<Vec<f64>>())
    };
    let (ours, naive, slack) = (errors(&wide(got)), errors(naive_bf16), stored.slack(norms(exact)));
    for (i, name) in ["largest", "root mean square"].into_iter().enumerate() {
        let allowed = 2.0 * naive[i] + slack[i];
        // Where the mean alone is too large, values that are off by more than the mean may be show where.
        let wrong = || WrongValues::find(got, exact, |_| allowed).describe(got, exact);
        assert!(
            ours[i] <= allowed,
            "{what}: {name} error {:e}, {allowed:e} allowed: twice the naive bf16 version's {:e} and {:e}; beyond what is \
             allowed, {}",
            ours[i],
            naive[i],
            slack[i],
            wrong()
        );
    }
}

/// The derivative of `f` along coordinate `index` at `x`, by a five-point central difference.
pub fn derivative(f: impl Fn(&[f64]) -> f64, x: &[f64], index: usize) -> f64 {
    let step = 1e-3 * x[index].abs().max(0.1);
    let at = |offset: f64| {
        let mut moved = x.to_vec();
        moved[index] += offset * step;
        f(&moved)
    };
    (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * step)
}

/// Asserts that `got`, the gradient of `f` at `x`, agrees with central differences in `samples` coordinates spread
/// over `x` (all of them if there are no more).
#[track_caller]
pub fn assert_gradient(
    what: &str,
    got: &[f32],
    f: impl Fn(&[f64]) -> f64,
    x: &[f64],
    samples: usize,
    bounds: Tolerance,
) {
    assert_eq!(got.len(), x.len(), "{what}: lengths");
    // A stride that shares no factor with usual widths visits every column.
    let coordinates: Vec<usize> = if x.len() <= samples {
        (0..x.len()).collect()
    } else {
        (0..samples).map(|i| (i * 7919 + i * i * 13) % x.len()).collect()
    };
    let wanted: Vec<f64> = coordinates.iter().map(|&index| derivative(&f, x, index)).collect();
    let got: Vec<f32> = coordinates.iter().map(|&index| got[index]).collect();
    // An index in a message is a place in this list.
    let what = format!("{what} at {coordinates:?}");
    assert_close(&what, &got, &wanted, bounds);
}

/// `sum_i a_i b_i`: the scalar whose gradients a backward pass gives.
pub fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What [`assert_no_worse`] lets through and what not: a naive version that is off by 0.01 in the second value.
#[test]
fn no_worse_means_at_most_twice_the_error() {
    let (exact, naive) = ([1.0, 2.0, 3.0, 4.0], [1.0, 2.01, 3.0, 4.0]);
    let verdict = |got: [f32; 4], stored| {
        std::panic::catch_unwind(|| assert_no_worse("value", &got, stored, &exact, &naive)).is_ok()
    };
    assert!(verdict([1.0, 2.02, 3.0, 4.0], Stored::F32));
    assert!(!verdict([1.0, 2.021, 3.0, 4.0], Stored::F32), "the largest");
    assert!(!verdict([1.015, 2.015, 3.015, 4.015], Stored::F32), "the mean");
    // Half of bf16's unit at 4 is 0.016.
    assert!(verdict([1.0, 2.0, 3.0, 4.025], Stored::Bf16));
    assert!(!verdict([1.0, 2.0, 3.0, 4.025], Stored::F32));
    assert!(!verdict([1.0, 2.0, 3.0, 4.0625], Stored::Bf16));
    for place in 0..4 {
        let mut got = [1.0, 2.0, 3.0, 4.0];
        got[place] = f32::NAN;
        assert!(!verdict(got, Stored::Bf16), "a NaN in place {place}");
    }
}

/// A failure names the shape, how many values are wrong, and the first with its index: what a fix needs.
#[test]
fn a_failure_says_where() {
    let message = |run: fn()| {
        let panic = std::panic::catch_unwind(run).unwrap_err();
        panic.downcast_ref::<String>().cloned().unwrap_or_default()
    };
    let said = message(|| {
        assert_close("out", &[1.0, 2.5, f32::NAN, 3.5, 5.0], &[1.0, 2.0, 3.0, 3.0, 5.0], Tolerance::F32)
    });
    let wanted = "out: 3 of 5 values are wrong, 1 of them not finite; first [1] = 2.5e0, wanted 2e0; last [3]; worst [2] = NaN";
    assert!(said.starts_with(wanted), "{said}");
    let said = message(|| assert_no_worse("dx", &[1.0, 9.0], Stored::F32, &[1.0, 2.0], &[1.0, 2.0]));
    assert!(said.contains("dx: largest error 7e0") && said.contains("first [1] = 9e0, wanted 2e0"), "{said}");
    let said = message(|| assert_same_bits("lse", &[1.0, 0.0, 2.0], &[1.0, -0.0, 3.0]));
    assert!(said.contains("lse: 2 of 3 values have other bits; first [1] = 0e0, before -0e0"), "{said}");
    let said = message(|| {
        assert_gradient("dx", &[2.0, 7.0], |x| x[0] * x[0] + x[1], &[1.0, 1.0], 4, Tolerance::BF16)
    });
    assert!(
        said.contains("dx at [0, 1]: 1 of 2 values are wrong")
            && said.contains("first [1] = 7e0, wanted 9.99"),
        "{said}"
    );
}
