use mmpo_fast::device::{AdamWState, AdamWStep};

use crate::harness::*;
use crate::naive::Precision;

const STEP: AdamWStep =
    AdamWStep { learning_rate: 5e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step: 1 };

device_tests! {
    /// Five updates, with decay and a clipping factor, against the formulas of PyTorch's documentation.
    fn five_updates(device, bounds) {
        for len in [1, 50, 4095, 40_000] {
            let (mut weight, weight64) = random_compute(device, 1, len, 1.0);
            let mut state = AdamWState::new(device, len).unwrap();
            if let Some(master) = &mut state.master {
                let values: Vec<f32> = weight64.iter().map(|&value| value as f32).collect();
                device.upload(master, 0, &values).unwrap();
            }
            let mut wanted: Vec<_> = weight64.iter().map(|&weight| (weight, 0.0, 0.0)).collect();
            let mut eager = wanted.clone();
            let norm = floats(device, &[8.0, 0.125]);
            for number in 1..=5 {
                let gradient = random(10 + u64::from(number), len, 3.0);
                let step = AdamWStep { step: number, ..STEP };
                device.adamw(&mut weight, &mut state, &floats(device, &gradient), &norm, step).unwrap();
                for (precision, values) in [(Precision::Exact, &mut wanted), (Precision::Bf16, &mut eager)] {
                    for (values, gradient) in values.iter_mut().zip(&gradient) {
                        let gradient = 0.125 * f64::from(*gradient);
                        *values = precision.adamw(*values, gradient, step, (0.9, 0.999));
                    }
                }
            }
            let column = |pick: fn(&(f64, f64, f64)) -> f64| wanted.iter().map(pick).collect::<Vec<f64>>();
            assert_close("first moment", &read(device, &state.first_moment), &column(|v| v.1), Tolerance::F32);
            assert_close("second moment", &read(device, &state.second_moment), &column(|v| v.2), Tolerance::F32);
            let weight = read_compute(device, &weight);
            assert_close("weight", &weight, &column(|v| v.0), bounds);
            let eager: Vec<f64> = eager.iter().map(|values| values.0).collect();
            assert_no_worse("weight", &weight, Stored::Bf16, &column(|v| v.0), &eager);
            if let Some(master) = &state.master {
                assert_close("master", &read(device, master), &column(|v| v.0), Tolerance::F32);
            }
        }
    }

    /// The first update moves every weight by the learning rate against its gradient's sign, whatever the gradient's
    /// size: the bias correction is exact.
    fn first_update_is_the_learning_rate(device, bounds) {
        let (mut weight, _) = compute(device, &[0.0; 4]);
        let mut state = AdamWState::new(device, 4).unwrap();
        let gradient = floats(device, &[1e-3, -1e-3, 10.0, -1e3]);
        let norm = floats(device, &[0.0, 1.0]);
        let step = AdamWStep { weight_decay: 0.0, ..STEP };
        device.adamw(&mut weight, &mut state, &gradient, &norm, step).unwrap();
        // Epsilon is 1e-5 of the smallest gradient.
        let wanted = [-5e-4 / (1.0 + 1e-5), 5e-4 / (1.0 + 1e-5), -5e-4, 5e-4];
        assert_close("weight", &read_compute(device, &weight), &wanted, bounds);
    }

    /// Update number 0 has no bias correction, and a short gradient is refused.
    fn refused(device, bounds) {
        let (mut weight, _) = compute(device, &[0.0; 4]);
        let mut state = AdamWState::new(device, 4).unwrap();
        let (gradient, norm) = (floats(device, &[0.0; 4]), floats(device, &[0.0, 1.0]));
        let step = AdamWStep { step: 0, ..STEP };
        assert!(device.adamw(&mut weight, &mut state, &gradient, &norm, step).is_err());
        let error = device.adamw(&mut weight, &mut state, &floats(device, &[0.0; 3]), &norm, STEP);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("adamw") && error.contains("`gradient` holds 3"), "{error}");
    }
}
