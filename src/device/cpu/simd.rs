//! Vector mathematics shared by the operations. Everything here is `#[inline(always)]`, so that it is compiled for the
//! vectors of the caller's [`super::CpuDevice::vectorized`] block.
//!
//! Reductions use [`LANES`] fixed partial sums whatever the width of the machine's vectors: AVX2 and AVX-512 add in
//! the same order.

use super::storage::Storage;

/// Partial results of a reduction: two AVX-512 registers; LLVM keeps longer arrays on the stack.
pub(super) const LANES: usize = 32;

/// The vector extension `arch` dispatches to, for people.
pub(super) fn name(arch: pulp::Arch) -> &'static str {
    struct Width;
    impl pulp::WithSimd for Width {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    match arch.dispatch(Width) {
        16 => "AVX-512",
        8 => "AVX2",
        4 => "128-bit vectors",
        _ => "no vectors",
    }
}

/// `e^x` for `x <= 88`; larger arguments give `e^88`. Below -87 it gives 0, so no subnormal slows the loops. NaN stays
/// NaN. Error at most 2 units in the last place (tested over the whole range).
///
/// Cephes' reduction: `x = n ln 2 + r` with `ln 2` in two parts, a polynomial of degree 6 for `e^r` on
/// `|r| <= ln 2 / 2`, and `2^n` put into the exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOW: f32 = -87.0;
    const HIGH: f32 = 88.0;
    /// `1.5 * 2^23`: adding it rounds to an integer and leaves that integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // Written as selects, so that NaN passes through to the result.
    let clamped = if x < LOW { LOW } else { x };
    let clamped = if clamped > HIGH { HIGH } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOW { 0.0 } else { p * power }
}

/// `1 / (1 + e^-x)`, without overflow on either side.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    let numerator = if x < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

/// Folds the lanes pairwise, always in the same order.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum_i term(i)` for `i < len`; `term` is called with every index once.
#[inline(always)]
pub(super) fn sum_terms(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = len - len % LANES;
    let mut base = 0;
    while base < whole {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += term(base + i);
        }
        base += LANES;
    }
    for (lane, i) in lanes.iter_mut().zip(whole..len) {
        *lane += term(i);
    }
    fold(lanes, |a, b| a + b)
}

/// The sum of the lanes of a reduction that a caller ran itself.
#[inline(always)]
pub(super) fn sum(lanes: &[f32; LANES]) -> f32 {
    fold(*lanes, |a, b| a + b)
}

#[inline(always)]
pub(super) fn dot<A: Storage, B: Storage>(a: &[A], b: &[B]) -> f32 {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let mut lanes = [0.0_f32; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for i in 0..LANES {
            lanes[i] = a[i].widen().mul_add(b[i].widen(), lanes[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] = a.widen().mul_add(b.widen(), lanes[i]);
    }
    fold(lanes, |a, b| a + b)
}

/// Largest value; NaN if any value is NaN; minus infinity for none.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], block[i]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, value);
    }
    fold(lanes, larger)
}

/// Replaces each value by `e^(value * factor - max)` and returns their sum.
#[inline(always)]
pub(super) fn exp_in_place(values: &mut [f32], factor: f32, max: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (blocks, rest) = values.as_chunks_mut::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            block[i] = exp(block[i].mul_add(factor, -max));
            lanes[i] += block[i];
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *value = exp(value.mul_add(factor, -max));
        *lane += *value;
    }
    sum(&lanes)
}

/// `f32::max` drops NaN; this keeps it.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of `wanted`.
    fn units(got: f32, wanted: f64) -> f64 {
        let rounded = wanted as f32;
        let unit = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
        (f64::from(got) - wanted).abs() / unit
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in 0..=3_500_000 {
            let x = -87.0 + i as f32 * 5e-5;
            worst = worst.max(units(exp(x), f64::from(x).exp()));
        }
        assert!(worst <= 2.0, "{worst} units");
    }

    #[test]
    fn exp_outside_its_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(1e9), exp(88.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn max_and_dot_of_every_length() {
        for len in 0..200 {
            let values: Vec<f32> = (0..len).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let wanted = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&values), wanted, "max of {len}");
            let squares: f32 = values.iter().map(|value| value * value).sum();
            assert_eq!(dot(&values, &values), squares, "dot of {len}");
            if len > 0 {
                let mut broken = values.clone();
                broken[len / 2] = f32::NAN;
                assert!(max(&broken).is_nan(), "NaN among {len}");
            }
        }
    }
}
