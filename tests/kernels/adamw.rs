use mmpo_fast::device::{ComputeBuffer, Device, Floats};
use mmpo_fast::error::Result;
use mmpo_fast::optimizer::{AdamWStep, OptimizerState};

use crate::harness::*;
use crate::naive::Precision;

const STEP: AdamWStep =
    AdamWStep { learning_rate: 5e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step: 1 };

/// An update of one tensor.
fn update<D: Device>(
    device: &D,
    weight: &mut ComputeBuffer<D>,
    state: &mut OptimizerState<D>,
    gradient: &Floats<D>,
    norm: &Floats<D>,
    step: AdamWStep,
) -> Result<()> {
    device.adamw(&mut [state.update(weight, gradient)], norm, step)
}

/// Weights, states and gradients of these lengths, after two updates: of all tensors in one call, or of one in each. What
/// comes out, as bits.
fn two_updates<D: Device>(device: &D, lengths: &[usize], together: bool) -> Vec<u32> {
    let mut weights: Vec<ComputeBuffer<D>> =
        lengths.iter().zip(1..).map(|(&len, seed)| random_compute(device, seed, len, 1.0).0).collect();
    let mut states: Vec<OptimizerState<D>> =
        lengths.iter().map(|&len| OptimizerState::new(device, len).unwrap()).collect();
    for (state, weight) in states.iter_mut().zip(&weights) {
        if let Some(master) = &mut state.master {
            device.upload(master, 0, &read_compute(device, weight)).unwrap();
        }
    }
    let norm = floats(device, &[8.0, 0.125]);
    for number in 1..=2 {
        let step = AdamWStep { step: number, ..STEP };
        let gradients: Vec<Floats<D>> = lengths
            .iter()
            .zip(u64::from(number) * 1000..)
            .map(|(&len, seed)| floats(device, &random(seed, len, 3.0)))
            .collect();
        let tensors = weights.iter_mut().zip(&mut states).zip(&gradients);
        let mut updates: Vec<_> =
            tensors.map(|((weight, state), gradient)| state.update(weight, gradient)).collect();
        if together {
            device.adamw(&mut updates, &norm, step).unwrap();
        } else {
            for update in updates.chunks_mut(1) {
                device.adamw(update, &norm, step).unwrap();
            }
        }
    }
    let weights = weights.iter().flat_map(|weight| read_compute(device, weight));
    let states = states.iter().flat_map(|OptimizerState { master, first_moment, second_moment }| {
        [Some(first_moment), Some(second_moment), master.as_ref()].into_iter().flatten().collect::<Vec<_>>()
    });
    weights.chain(states.flat_map(|buffer| read(device, buffer))).map(f32::to_bits).collect()
}

device_tests! {
    /// Many tensors in one call, with and without values, ragged, more than a table has room for: what a call each gives.
    fn together_as_one_by_one(device, bounds) {
        let mut lengths = vec![0, 5, 1024, 1025, 0, 3, 4099, 8];
        lengths.extend((0..200).map(|tensor| tensor % 7));
        lengths.extend([2048, 0, 1, 0]);
        let together = two_updates(device, &lengths, true);
        assert_eq!(together.len() % lengths.iter().sum::<usize>(), 0);
        assert!(together == two_updates(device, &lengths, false));
        assert!(two_updates(device, &[0, 0], true).is_empty());
    }

    /// No tensors: nothing to do.
    fn none(device, bounds) {
        device.adamw(&mut [], &floats(device, &[0.0, 1.0]), STEP).unwrap();
    }

    /// Five updates, with decay and a clipping factor, against the formulas of PyTorch's documentation.
    fn five_updates(device, bounds) {
        for len in [1, 50, 4095, 40_000] {
            trying("values", len);
            let (mut weight, weight64) = random_compute(device, 1, len, 1.0);
            let mut state = OptimizerState::new(device, len).unwrap();
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
                update(device, &mut weight, &mut state, &floats(device, &gradient), &norm, step).unwrap();
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
        let mut state = OptimizerState::new(device, 4).unwrap();
        let gradient = floats(device, &[1e-3, -1e-3, 10.0, -1e3]);
        let norm = floats(device, &[0.0, 1.0]);
        let step = AdamWStep { weight_decay: 0.0, ..STEP };
        update(device, &mut weight, &mut state, &gradient, &norm, step).unwrap();
        // Epsilon is 1e-5 of the smallest gradient.
        let wanted = [-5e-4 / (1.0 + 1e-5), 5e-4 / (1.0 + 1e-5), -5e-4, 5e-4];
        assert_close("weight", &read_compute(device, &weight), &wanted, bounds);
    }

    /// Update number 0 has no bias correction, and a short gradient is refused.
    fn refused(device, bounds) {
        let (mut weight, _) = compute(device, &[0.0; 4]);
        let mut state = OptimizerState::new(device, 4).unwrap();
        let (gradient, norm) = (floats(device, &[0.0; 4]), floats(device, &[0.0, 1.0]));
        let step = AdamWStep { step: 0, ..STEP };
        assert!(update(device, &mut weight, &mut state, &gradient, &norm, step).is_err());
        let error = update(device, &mut weight, &mut state, &floats(device, &[0.0; 3]), &norm, STEP);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("adamw") && error.contains("`gradient` holds 3"), "{error}");
    }
}
