//! Comparison of two numbers, for every test program that compares single numbers.

/// How far a number may be from the one that is wanted: the larger of two bounds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// As a share of the wanted number.
    pub relative: f64,
    /// For wanted numbers near zero.
    pub absolute: f64,
}

/// Asserts that `got` is within `bounds` of `wanted`. A NaN on either side fails.
#[track_caller]
pub fn assert_close(what: &str, got: f64, wanted: f64, bounds: Bounds) {
    let (error, allowed) = ((got - wanted).abs(), (bounds.relative * wanted.abs()).max(bounds.absolute));
    assert!(error <= allowed, "{what}: {got}, wanted {wanted}, off by {error:e}, {allowed:e} allowed");
}

#[test]
fn bounds_and_nan() {
    let close = |got, wanted| {
        let bounds = Bounds { relative: 0.01, absolute: 0.1 };
        std::panic::catch_unwind(|| assert_close("number", got, wanted, bounds)).is_ok()
    };
    assert!(close(100.9, 100.0) && close(0.09, 0.0) && close(-5.09, -5.0));
    assert!(!close(101.1, 100.0) && !close(0.11, 0.0) && !close(-5.11, -5.0) && !close(5.0, -5.0));
    assert!(!close(f64::NAN, 1.0) && !close(1.0, f64::NAN) && !close(f64::INFINITY, 1.0));
}
