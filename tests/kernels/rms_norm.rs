use mmpo_fast::device::{AddRmsNorm, NormShape, RmsNormBackward};

use crate::harness::*;
use crate::naive::{self, Precision};

/// Rows and widths: none, one token, ragged rows, odd widths, the widths of the paper's models, and wider ones.
const SHAPES: &[(usize, usize)] = &[
    (0, 64),
    (1, 16),
    (7, 50),
    (1, 576),
    (70, 576),
    (33, 960),
    (5, 2048),
    (3, 4096),
    (2, 4097),
    (2, 6144),
    (1, 9000),
];
const EPSILON: f32 = 1e-5;

device_tests! {
    /// `out` and `rstd` are assigned in full, and nothing after the rows asked for is touched.
    fn forward(device, bounds) {
        for &(rows, width) in SHAPES {
            trying("(rows, width)", (rows, width));
            let (x, x64) = random_compute(device, 1, rows * width, 2.0);
            let (weight, weight64) = random_compute(device, 2, width, 1.0);
            let mut out = unset_compute(device, (rows + 1) * width);
            let mut rstd = unset_floats(device, rows + 1);
            let shape = NormShape { rows, width, epsilon: EPSILON };
            device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape).unwrap();
            let [(wanted, wanted_rstd), (eager, _)] =
                naive::both(|precision| precision.rms_norm(&x64, &weight64, EPSILON.into()));
            let (out, rstd) = (read_compute(device, &out), read(device, &rstd));
            assert_close("out", &out[..rows * width], &wanted, bounds);
            assert_no_worse("out", &out[..rows * width], Stored::Bf16, &wanted, &eager);
            assert_close("rstd", &rstd[..rows], &wanted_rstd, Tolerance::F32);
            assert!(out[rows * width..].iter().all(|value| value.is_nan()), "wrote past {shape:?}");
            assert!(rstd[rows].is_nan(), "wrote past {shape:?}");
        }
    }

    /// The fused residual addition gives the sum and the norm of the sum.
    fn add_forward(device, bounds) {
        for &(rows, width) in SHAPES {
            trying("(rows, width)", (rows, width));
            let (x, x64) = random_compute(device, 1, rows * width, 2.0);
            let (delta, delta64) = random_compute(device, 3, rows * width, 1.0);
            let (weight, weight64) = random_compute(device, 2, width, 1.0);
            let mut sum = unset_compute(device, rows * width);
            let mut out = unset_compute(device, rows * width);
            let mut rstd = unset_floats(device, rows);
            let shape = NormShape { rows, width, epsilon: EPSILON };
            device.add_rms_norm_forward(AddRmsNorm {
                sum: &mut sum,
                out: &mut out,
                rstd: &mut rstd,
                x: &x,
                delta: &delta,
                weight: &weight,
                shape,
            }).unwrap();
            let sum64: Vec<f64> = x64.iter().zip(&delta64).map(|(x, delta)| x + delta).collect();
            let eager_sum = Precision::Bf16.accumulate(&x64, &delta64);
            let sum = read_compute(device, &sum);
            assert_close("sum", &sum, &sum64, bounds);
            assert_no_worse("sum", &sum, Stored::Bf16, &sum64, &eager_sum);
            // The norm is that of the sum as it is stored.
            let stored = wide(&sum);
            let [(wanted, wanted_rstd), (eager, _)] =
                naive::both(|precision| precision.rms_norm(&stored, &weight64, EPSILON.into()));
            let out = read_compute(device, &out);
            assert_close("out", &out, &wanted, bounds);
            assert_no_worse("out", &out, Stored::Bf16, &wanted, &eager);
            assert_close("rstd", &read(device, &rstd), &wanted_rstd, Tolerance::F32);

            let mut plain = unset_compute(device, rows * width);
            device.add(&mut plain, &x, &delta, rows * width).unwrap();
            let plain = read_compute(device, &plain);
            assert_close("add", &plain, &sum64, bounds);
            assert_no_worse("add", &plain, Stored::Bf16, &sum64, &eager_sum);
        }
    }

    /// Both gradients agree with central differences, and both accumulate.
    fn backward(device, bounds) {
        for &(rows, width) in SHAPES {
            trying("(rows, width)", (rows, width));
            let (x, x64) = random_compute(device, 1, rows * width, 2.0);
            let (weight, weight64) = random_compute(device, 2, width, 1.0);
            let (dout, dout64) = random_compute(device, 3, rows * width, 1.0);
            let mut out = unset_compute(device, rows * width);
            let mut rstd = unset_floats(device, rows);
            let shape = NormShape { rows, width, epsilon: EPSILON };
            device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape).unwrap();
            let (mut dx, before_dx) = random_compute(device, 4, rows * width, 0.5);
            let before_dweight = random(5, width, 0.5);
            let mut dweight = floats(device, &before_dweight);
            device.rms_norm_backward(RmsNormBackward {
                dx: &mut dx,
                dweight: Some(&mut dweight),
                dout: &dout,
                x: &x,
                weight: &weight,
                rstd: &rstd,
                shape,
            }).unwrap();
            // What was there before is part of the scalar's gradient, so that accumulation is checked as well.
            let scalar = |x: &[f64], weight: &[f64]| inner(&naive::rms_norm(x, weight, EPSILON.into()).0, &dout64);
            let (dx, dweight) = (read_compute(device, &dx), read(device, &dweight));
            let [exact, eager] = naive::both(|precision| {
                let (dx, dweight) = precision.rms_norm_backward(&dout64, &x64, &weight64, EPSILON.into());
                let before_dweight = wide(&before_dweight);
                (precision.accumulate(&before_dx, &dx), precision.accumulate(&before_dweight, &dweight))
            });
            assert_no_worse("dx", &dx, Stored::Bf16, &exact.0, &eager.0);
            assert_no_worse("dweight", &dweight, Stored::F32, &exact.1, &eager.1);
            assert_gradient(
                "dx",
                &dx,
                |x| scalar(x, &weight64) + inner(&before_dx, x),
                &x64,
                40,
                bounds,
            );
            assert_gradient(
                "dweight",
                &dweight,
                |weight| scalar(&x64, weight) + inner(&wide(&before_dweight), weight),
                &weight64,
                40,
                Tolerance::F32,
            );
        }
    }

    /// A buffer that is too small is an error that names the operation, the buffer and the shape.
    fn too_small(device, bounds) {
        let (x, _) = random_compute(device, 1, 31, 1.0);
        let (weight, _) = random_compute(device, 2, 16, 1.0);
        let mut out = unset_compute(device, 32);
        let mut rstd = unset_floats(device, 2);
        let shape = NormShape { rows: 2, width: 16, epsilon: EPSILON };
        let error = device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape).unwrap_err().to_string();
        assert!(error.contains("rms_norm_forward") && error.contains("`x`") && error.contains("31"), "{error}");
        assert!(error.contains("rows: 2"), "{error}");
    }
}
