use half::bf16;
use mmpo_fast::device::{Device, Sum};

use crate::harness::*;

/// Values of a block on CUDA.
const BLOCK: usize = 4096;

/// The buffers' sizes, and where the sum and what is added to it begin: whole blocks, tails, and every alignment of the two.
fn ranges() -> Vec<(usize, usize, usize)> {
    let mut ranges = vec![(0, 0, 0), (1, 2, 0), (0, 0, 2 * BLOCK), (4, 8, BLOCK + 4), (0, 0, 3 * BLOCK + 1)];
    for out_offset in 0..5 {
        ranges.extend((0..5).map(|offset| (out_offset, offset, BLOCK + 7)));
    }
    ranges
}

/// Adds once, and gives the sums before and after, and what was added.
fn sums<T: Sum, D: Device>(
    device: &D,
    (out_offset, offset, len): (usize, usize, usize),
) -> (Vec<T>, Vec<T>, Vec<f32>) {
    let before: Vec<T> = random(1, out_offset + len + 9, 1.0).into_iter().map(T::round).collect();
    let source = random(2, offset + len + 3, 0.5);
    let mut out = device.alloc::<T>(before.len()).unwrap();
    device.upload(&mut out, 0, &before).unwrap();
    device.accumulate(&mut out, out_offset, &floats(device, &source), offset, len).unwrap();
    let mut after = vec![T::default(); before.len()];
    device.download(&mut after, &out, 0).unwrap();
    (before, after, source)
}

/// Every sum is the one rounded result that the sum of two numbers in f32 has, and no other value is touched.
fn check<T: Sum, D: Device>(device: &D) {
    for range in ranges() {
        trying("(out_offset, offset, len)", range);
        let (out_offset, offset, len) = range;
        let (mut wanted, got, source) = sums::<T, D>(device, range);
        for (sum, term) in wanted[out_offset..][..len].iter_mut().zip(&source[offset..]) {
            *sum = T::round(sum.widen() + term);
        }
        let wide = |values: &[T]| values.iter().map(|value| value.widen()).collect::<Vec<_>>();
        assert_same_bits("sums", &wide(&got), &wide(&wanted));
    }
}

device_tests! {
    /// Sums in f32: each is that of IEEE arithmetic.
    fn f32_sums(device, bounds) {
        check::<f32, D>(device);
    }

    /// Sums in bf16 are formed in f32 and rounded once.
    fn bf16_sums(device, bounds) {
        check::<bf16, D>(device);
    }

    /// Halfway between two bf16 values the even one is taken; what is less than half a step is lost, what is more is not;
    /// infinities and NaN stay.
    fn bf16_rounding(device, bounds) {
        let step = 2f32.powi(-7);
        let cases = [
            (1.0, step / 2.0, 1.0),
            (1.0 + step, step / 2.0, 1.0 + 2.0 * step),
            (1.0, step * 0.499, 1.0),
            (1.0, step * 0.501, 1.0 + step),
            (-1.0, 1.0, 0.0),
            (3e38, 3e38, f32::INFINITY),
        ];
        let before: Vec<bf16> = cases.iter().map(|case| bf16::from_f32(case.0)).chain([bf16::ONE]).collect();
        let mut out = device.alloc(before.len()).unwrap();
        device.upload(&mut out, 0, &before).unwrap();
        let terms: Vec<f32> = cases.iter().map(|case| case.1).chain([f32::NAN]).collect();
        device.accumulate(&mut out, 0, &floats(device, &terms), 0, terms.len()).unwrap();
        let mut got = vec![bf16::ZERO; terms.len()];
        device.download(&mut got, &out, 0).unwrap();
        for (got, case) in got.iter().zip(&cases) {
            assert_eq!(got.to_f32(), case.2, "{case:?}");
        }
        assert!(got[cases.len()].is_nan());
    }

    /// Ranges that do not fit are errors.
    fn outside(device, bounds) {
        let mut out = device.alloc::<f32>(8).unwrap();
        let source = device.alloc::<f32>(8).unwrap();
        assert!(device.accumulate(&mut out, 5, &source, 0, 4).is_err());
        assert!(device.accumulate(&mut out, 0, &source, 5, 4).is_err());
        assert!(device.accumulate(&mut out, usize::MAX, &source, 0, 4).is_err());
        device.accumulate(&mut out, 8, &source, 8, 0).unwrap();
    }
}
