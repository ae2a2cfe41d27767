use mmpo_fast::device::{Device, Floats, Gradient};

use crate::harness::*;

/// Values of a partial norm on CUDA.
const PART: usize = 16_384;

/// Norm and factor.
fn norm_of<D: Device>(device: &D, gradients: &[&Floats<D>]) -> Vec<f32> {
    let mut out = unset_floats(device, 2);
    device.gradient_norm(&mut out, gradients, Some(1.0)).unwrap();
    read(device, &out)
}

device_tests! {
    /// The norm over several gradients, and PyTorch's clipping factor.
    fn norm_and_factor(device, bounds) {
        let values: Vec<Vec<f32>> =
            [1, 50, 16_384, 70_001, 200_000].iter().map(|&len| random(len as u64, len, 0.3)).collect();
        let wanted = values.iter().flatten().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        let buffers: Vec<_> = values.iter().map(|values| floats(device, values)).collect();
        let gradients: Vec<_> = buffers.iter().collect();
        for (max_norm, factor) in [(None, 1.0), (Some(1.0), 1.0 / (wanted + 1e-6)), (Some(1e6), 1.0), (Some(f64::INFINITY), 1.0)] {
            let mut out = unset_floats(device, 2);
            device.gradient_norm(&mut out, &gradients, max_norm).unwrap();
            assert_close("norm and factor", &read(device, &out), &[wanted, factor], Tolerance::F32);
        }
    }

    /// Squares beyond the range of f32 are still summed.
    fn large_and_small_values(device, bounds) {
        let buffer = floats(device, &[3e25, 4e25, 1e-30]);
        let mut out = unset_floats(device, 2);
        device.gradient_norm(&mut out, &[&buffer], Some(1.0)).unwrap();
        assert_close("norm", &read(device, &out)[..1], &[5e25], Tolerance::F32);
    }

    /// A single NaN anywhere, in whole blocks or their tails, must reach the norm and the factor.
    fn nan_reaches_the_norm(device, bounds) {
        for len in [3, 65_536 + 17] {
            for at in [0, len / 2, len - 1] {
                let mut values = random(1, len, 1.0);
                values[at] = f32::NAN;
                let buffer = floats(device, &values);
                let mut out = unset_floats(device, 2);
                device.gradient_norm(&mut out, &[&buffer], Some(1.0)).unwrap();
                let out = read(device, &out);
                assert!(out[0].is_nan() && out[1].is_nan(), "NaN at {at} of {len}: {out:?}");
            }
        }
    }

    /// Many gradients, with and without values, ragged, more than a table has room for. On CUDA the norm is that of the
    /// norms of their parts, bit for bit those of a call each.
    fn together_as_one_by_one(device, bounds) {
        let lengths: Vec<usize> = (0..500).map(|tensor| tensor % 11).chain([PART, 0, 2 * PART + 7233, 0]).collect();
        let values: Vec<Vec<f32>> =
            lengths.iter().zip(1..).map(|(&len, seed)| random(seed, len, 0.3)).collect();
        let buffers: Vec<_> = values.iter().map(|values| floats(device, values)).collect();
        let got = norm_of(device, &buffers.iter().collect::<Vec<_>>());
        let norm = |squares: &mut dyn Iterator<Item = f32>| {
            squares.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt()
        };
        let wanted = norm(&mut values.iter().flatten().copied());
        assert_close("norm and factor", &got, &[wanted, 1.0 / (wanted + 1e-6)], Tolerance::F32);
        if !is_cpu::<D>() {
            let parts = values.iter().flat_map(|values| values.chunks(PART));
            let of_norms = norm(&mut parts.map(|part| norm_of(device, &[&floats(device, part)])[0]));
            assert_eq!(got[0], of_norms as f32);
        }
    }

    /// Gradients without values, between others, change no bit.
    fn empty_gradients_change_nothing(device, bounds) {
        let (first, second) = (floats(device, &random(1, 20_000, 1.0)), floats(device, &random(2, 77, 1.0)));
        let empty = floats(device, &[]);
        let between = [&empty, &first, &empty, &empty, &second, &empty];
        assert_eq!(norm_of(device, &between), norm_of(device, &[&first, &second]));
        assert_eq!(norm_of(device, &[&empty, &empty]), [0.0, 1.0]);
    }

    /// bf16 gradients have the norm of the same values in f32, bit for bit, alone and between f32 ones; a NaN reaches it.
    fn bf16_gradients(device, bounds) {
        let lengths = [1, 0, 77, PART, 2 * PART + 7233, 5000, 0];
        let values: Vec<Vec<f32>> =
            lengths.iter().zip(1..).map(|(&len, seed)| random(seed, len, 0.3)).collect();
        let (sums, wide): (Vec<_>, Vec<_>) = values.iter().map(|values| narrow(device, values)).unzip();
        let buffers: Vec<_> = wide.iter().map(|values| floats(device, values)).collect();
        let wanted = norm_of(device, &buffers.iter().collect::<Vec<_>>());
        let norm_of_kinds = |is_bf16: fn(usize) -> bool| {
            let gradients = buffers.iter().zip(&sums).enumerate();
            let gradients: Vec<Gradient<'_, D>> = gradients
                .map(|(tensor, (wide, sum))| if is_bf16(tensor) { Gradient::Bf16(sum) } else { Gradient::F32(wide) })
                .collect();
            let mut out = unset_floats(device, 2);
            device.reserve_gradient_norm_of(&gradients).unwrap();
            device.gradient_norm_of(&mut out, &gradients, Some(1.0)).unwrap();
            read(device, &out)
        };
        assert_same_bits("all of them bf16", &norm_of_kinds(|_| true), &wanted);
        assert_same_bits("every other one", &norm_of_kinds(|tensor| tensor % 2 == 0), &wanted);
        assert_same_bits("the inner ones", &norm_of_kinds(|tensor| tensor > 1 && tensor < 5), &wanted);
        let mut broken = random(1, PART + 9, 1.0);
        broken[PART + 5] = f32::NAN;
        let (broken, _) = narrow(device, &broken);
        let mut out = unset_floats(device, 2);
        device.gradient_norm_of(&mut out, &[Gradient::Bf16(&broken)], Some(1.0)).unwrap();
        assert!(read(device, &out).iter().all(|value| value.is_nan()));
    }

    /// No gradients: norm 0, nothing to clip.
    fn nothing(device, bounds) {
        let mut out = unset_floats(device, 2);
        device.gradient_norm(&mut out, &[], Some(1.0)).unwrap();
        assert_eq!(read(device, &out), [0.0, 1.0]);
    }
}
