use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{LinearShape, LinearSwiglu};

use crate::harness::*;
use crate::naive;

/// Rows, inputs, outputs: one token; tails in every direction; the narrowest of the paper's models; a shape whose three
/// gemms all take the portable kernels' large tiles; one whose weight gradient Hopper's kernels sum in parts; and one
/// that gives each of Hopper's blocks several tiles, deeper than its ring of stages. Where inputs or outputs are no
/// multiples of 8, Hopper takes the portable kernels.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 16, 48),
    (1, 8, 8),
    (5, 17, 33),
    (37, 64, 100),
    (130, 96, 31),
    (9, 576, 192),
    (3, 1536, 576),
    (136, 264, 280),
    (1101, 24, 40),
    (150, 456, 264),
];

path_tests! {
    /// With and without a bias, `out` assigned in full.
    fn forward(device, bounds) {
        for &(rows, inputs, outputs) in SHAPES {
            trying("(rows, inputs, outputs)", (rows, inputs, outputs));
            let (x, x64) = random_compute(device, 1, rows * inputs, 1.0);
            let (weight, weight64) = random_compute(device, 2, outputs * inputs, 1.0);
            let (bias, bias64) = random_compute(device, 3, outputs, 4.0);
            let shape = LinearShape { rows, inputs, outputs };
            for with_bias in [false, true] {
                let mut out = unset_compute(device, rows * outputs + 5);
                device.linear_forward(&mut out, &x, &weight, with_bias.then_some(&bias), shape).unwrap();
                let zeros = vec![0.0; outputs];
                let bias64 = if with_bias { &bias64 } else { &zeros };
                let [wanted, eager] = naive::both_once(shape, &[&x64, &weight64, bias64], |precision| {
                    precision.linear(&x64, &weight64, bias64, inputs)
                });
                let out = read_compute(device, &out);
                assert_close("out", &out[..rows * outputs], &wanted, bounds);
                assert_no_worse("out", &out[..rows * outputs], Stored::Bf16, &wanted, &eager);
                assert!(out[rows * outputs..].iter().all(|value| value.is_nan()), "wrote past {shape:?}");
            }
        }
    }

    /// The three gradients agree with central differences; `dx` is assigned, those of weight and bias accumulate.
    fn backward(device, bounds) {
        for &(rows, inputs, outputs) in SHAPES {
            trying("(rows, inputs, outputs)", (rows, inputs, outputs));
            let (x, x64) = random_compute(device, 1, rows * inputs, 1.0);
            let (weight, weight64) = random_compute(device, 2, outputs * inputs, 1.0);
            let (dout, dout64) = random_compute(device, 4, rows * outputs, 1.0);
            let shape = LinearShape { rows, inputs, outputs };
            let mut dx = unset_compute(device, rows * inputs);
            device.linear_backward_input(&mut dx, &dout, &weight, shape).unwrap();
            let before_weight = random(5, outputs * inputs, 1.0);
            let before_bias = random(6, outputs, 1.0);
            let (mut dweight, mut dbias) = (floats(device, &before_weight), floats(device, &before_bias));
            device.linear_backward_weight(Some(&mut dweight), Some(&mut dbias), &dout, &x, shape).unwrap();
            let scalar = |x: &[f64], weight: &[f64], bias: &[f64]| {
                inner(&naive::linear(x, weight, bias, inputs), &dout64)
            };
            let (zeros, samples) = (vec![0.0; outputs], 12);
            let dx = read_compute(device, &dx);
            assert_gradient("dx", &dx, |x| scalar(x, &weight64, &zeros), &x64, samples, bounds);
            let [exact, eager] =
                naive::both_once(shape, &[&dout64, &weight64], |precision| {
                    precision.linear_backward_input(&dout64, &weight64, inputs)
                });
            assert_no_worse("dx", &dx, Stored::Bf16, &exact, &eager);
            let before = wide(&before_weight);
            let dweight = read(device, &dweight);
            let [exact, eager] = naive::both_once(shape, &[&before, &dout64, &x64], |precision| {
                precision.accumulate(&before, &precision.linear_backward_weight(&dout64, &x64, inputs))
            });
            assert_no_worse("dweight", &dweight, Stored::F32, &exact, &eager);
            assert_gradient(
                "dweight",
                &dweight,
                |weight| scalar(&x64, weight, &zeros) + inner(&before, weight),
                &weight64,
                samples,
                Tolerance::F32,
            );
            let before = wide(&before_bias);
            let dbias = read(device, &dbias);
            let [exact, eager] = naive::both(|precision| {
                precision.accumulate(&before, &precision.column_sums(&dout64, outputs))
            });
            assert_no_worse("dbias", &dbias, Stored::F32, &exact, &eager);
            assert_gradient(
                "dbias",
                &dbias,
                |bias| scalar(&x64, &weight64, bias) + inner(&before, bias),
                &zeros,
                samples,
                Tolerance::F32,
            );
        }
    }

    /// Products of small integers are exact in every format: any one that is missing, doubled or misplaced shows. The
    /// weight's gradient accumulates over calls.
    fn exact_integers(device, bounds) {
        let shape = LinearShape { rows: 213, inputs: 200, outputs: 232 };
        trying("shape", shape);
        let integers = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * step + i / 7) % 3) as f32 - 1.0).collect()
        };
        let (x, x64) = compute(device, &integers(shape.rows * shape.inputs, 5));
        let (weight, weight64) = compute(device, &integers(shape.outputs * shape.inputs, 7));
        let (dout, dout64) = compute(device, &integers(shape.rows * shape.outputs, 11));
        let mut out = unset_compute(device, shape.rows * shape.outputs);
        let mut dx = unset_compute(device, shape.rows * shape.inputs);
        let mut dweight = floats(device, &vec![1.0; shape.outputs * shape.inputs]);
        device.linear_forward(&mut out, &x, &weight, None, shape).unwrap();
        device.linear_backward_input(&mut dx, &dout, &weight, shape).unwrap();
        device.linear_backward_weight(Some(&mut dweight), None, &dout, &x, shape).unwrap();
        let used = device.memory().now;
        device.linear_backward_weight(Some(&mut dweight), None, &dout, &x, shape).unwrap();
        assert_eq!(device.memory().now, used, "a gemm allocates nothing once it has run");

        let wanted = naive::linear(&x64, &weight64, &vec![0.0; shape.outputs], shape.inputs);
        assert_exact("out", &read_compute(device, &out), &wanted);
        let (mut dx64, mut dweight64) =
            (vec![0.0; shape.rows * shape.inputs], vec![1.0; shape.outputs * shape.inputs]);
        for row in 0..shape.rows {
            for output in 0..shape.outputs {
                let dout = dout64[row * shape.outputs + output];
                for input in 0..shape.inputs {
                    dx64[row * shape.inputs + input] += dout * weight64[output * shape.inputs + input];
                    dweight64[output * shape.inputs + input] += 2.0 * dout * x64[row * shape.inputs + input];
                }
            }
        }
        assert_exact("dx", &read_compute(device, &dx), &dx64);
        assert_exact("dweight", &read(device, &dweight), &dweight64);
    }

    /// The gemm of gate and up followed by SwiGLU in one kernel: what each of the two gives by itself, to the bit.
    fn swiglu(device, bounds) {
        for (rows, inputs, width) in [(1, 8, 8), (70, 72, 136), (5, 17, 31), (150, 64, 280)] {
            trying("(rows, inputs, width)", (rows, inputs, width));
            let outputs = 2 * width;
            let (x, _) = random_compute(device, 1, rows * inputs, 1.0);
            let (weight, _) = random_compute(device, 2, outputs * inputs, 0.3);
            let (bias, _) = random_compute(device, 3, outputs, 1.0);
            let shape = LinearShape { rows, inputs, outputs };
            for bias in [None, Some(&bias)] {
                let (mut gate_up, mut out) =
                    (unset_compute(device, rows * outputs + 3), unset_compute(device, rows * width + 3));
                device.linear_swiglu_forward(LinearSwiglu {
                    out: &mut out,
                    gate_up: &mut gate_up,
                    x: &x,
                    weight: &weight,
                    bias,
                    shape,
                }).unwrap();
                let (mut gate_up_alone, mut out_alone) =
                    (unset_compute(device, rows * outputs + 3), unset_compute(device, rows * width + 3));
                device.linear_forward(&mut gate_up_alone, &x, &weight, bias, shape).unwrap();
                device.swiglu_forward(&mut out_alone, &gate_up_alone, rows, width).unwrap();
                assert_same_bits("gate_up", &read_compute(device, &gate_up), &read_compute(device, &gate_up_alone));
                assert_same_bits("out", &read_compute(device, &out), &read_compute(device, &out_alone));
            }
        }
    }

    /// A buffer that is too small is an error that names the operation and the buffer.
    fn too_small(device, bounds) {
        let (x, _) = random_compute(device, 1, 8, 1.0);
        let (weight, _) = random_compute(device, 2, 11, 1.0);
        let mut out = unset_compute(device, 6);
        let shape = LinearShape { rows: 2, inputs: 4, outputs: 3 };
        let error = device.linear_forward(&mut out, &x, &weight, None, shape).unwrap_err().to_string();
        assert!(error.contains("linear_forward") && error.contains("`weight`"), "{error}");
    }
}

/// Products of small integers are exact in every tile shape that Hopper's kernels have, also in those that no plan takes for
/// so small a gemm.
mod every_tile_of_hopper {
    use mmpo_fast::device::cuda::CudaDevice;

    use super::*;

    #[cfg(mmpo_emulated)]
    #[test]
    fn emulated_hopper() {
        body(emulated().with_path(KernelPath::Hopper));
    }

    #[test]
    fn gpu() {
        if let Some(device) = crate::harness::gpu().filter(|device| device.path() == KernelPath::Hopper) {
            body(device);
        }
    }

    fn body(mut device: CudaDevice) {
        let tiles = device.gemm_tiles().unwrap();
        assert!(tiles.iter().any(|tile| tile.cluster > 1), "{tiles:?}");
        let shape = LinearShape { rows: 1100, inputs: 200, outputs: 232 };
        let integers = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * step + i / 7) % 3) as f32 - 1.0).collect()
        };
        let (x, x64) = compute(&device, &integers(shape.rows * shape.inputs, 5));
        let (weight, weight64) = compute(&device, &integers(shape.outputs * shape.inputs, 7));
        let (dout, dout64) = compute(&device, &integers(shape.rows * shape.outputs, 11));
        let wanted = naive::linear(&x64, &weight64, &vec![0.0; shape.outputs], shape.inputs);
        let [dx64, dweight64] = [
            naive::Precision::Exact.linear_backward_input(&dout64, &weight64, shape.inputs),
            naive::Precision::Exact.linear_backward_weight(&dout64, &x64, shape.inputs),
        ];
        for (number, tile) in tiles.iter().enumerate() {
            device = device.with_gemm_choice(GemmChoice::Tile(number.try_into().unwrap()));
            let mut out = unset_compute(&device, shape.rows * shape.outputs);
            let mut dx = unset_compute(&device, shape.rows * shape.inputs);
            let mut dweight = floats(&device, &vec![0.0; shape.outputs * shape.inputs]);
            device.linear_forward(&mut out, &x, &weight, None, shape).unwrap();
            device.linear_backward_input(&mut dx, &dout, &weight, shape).unwrap();
            device.linear_backward_weight(Some(&mut dweight), None, &dout, &x, shape).unwrap();
            let mut dx_f32 = floats(&device, &vec![0.0; shape.rows * shape.inputs]);
            device.linear_backward_input_f32(&mut dx_f32, &dout, &weight, shape).unwrap();
            trying("(tile, shape)", (tile.to_string(), shape));
            assert_exact("dx in f32", &read(&device, &dx_f32), &dx64);
            assert_exact("out", &read_compute(&device, &out), &wanted);
            assert_exact("dx", &read_compute(&device, &dx), &dx64);
            assert_exact("dweight", &read(&device, &dweight), &dweight64);
        }
        device = device.with_gemm_choice(GemmChoice::Tile(tiles.len().try_into().unwrap()));
        let mut out = unset_compute(&device, shape.rows * shape.outputs);
        let error = device.linear_forward(&mut out, &x, &weight, None, shape).unwrap_err().to_string();
        assert!(error.contains("linear_forward_sm90"), "{error}");
    }
}

/// Where cuBLASLt is not loaded it cannot be insisted on; leaving the choice open or insisting on our kernels works.
#[cfg(mmpo_emulated)]
#[test]
fn choice_of_gemms() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, GemmChoice};
    let shape = LinearShape { rows: 2, inputs: 8, outputs: 8 };
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        for choice in [GemmChoice::Fastest, GemmChoice::Ours, GemmChoice::Vendor] {
            let device =
                CudaDevice::emulated(EmulatorVariant::Plain).with_path(path).with_gemm_choice(choice);
            let (x, _) = random_compute(&device, 1, 16, 1.0);
            let (weight, _) = random_compute(&device, 2, 64, 1.0);
            let mut out = unset_compute(&device, 16);
            let done = device.linear_forward(&mut out, &x, &weight, None, shape);
            match choice {
                GemmChoice::Vendor => {
                    let error = done.unwrap_err().to_string();
                    assert!(error.contains("cuBLASLt"), "{error}");
                }
                _ => done.unwrap(),
            }
        }
    }
}

/// The portable kernels' large tiles, which only products that fill a GPU with them choose; and Hopper's, whichever it plans.
/// Small integers make every product exact.
#[test]
fn gpu_large_products() {
    let (Some(own), Some(portable)) = (crate::harness::gpu(), crate::harness::gpu()) else { return };
    let portable = portable.with_path(KernelPath::Portable);
    let integers = |count: usize, step: usize| -> Vec<f32> {
        (0..count).map(|i| ((i * step + i / 7) % 3) as f32 - 1.0).collect()
    };
    for device in [own, portable].map(|device| device.with_gemm_choice(GemmChoice::Ours)) {
        // The two large sizes are those of the output: of `out`, of `dx`, of `dweight`.
        for [rows, inputs, outputs] in [[1408, 64, 1536], [1408, 1536, 64], [64, 1536, 1408]] {
            let shape = LinearShape { rows, inputs, outputs };
            trying("(kernels, shape)", (device.path(), shape));
            let (x, x64) = compute(&device, &integers(rows * inputs, 5));
            let (weight, weight64) = compute(&device, &integers(outputs * inputs, 7));
            let (dout, dout64) = compute(&device, &integers(rows * outputs, 11));
            let mut out = unset_compute(&device, rows * outputs);
            let mut dx = unset_compute(&device, rows * inputs);
            let mut dx_f32 = floats(&device, &vec![0.0; rows * inputs]);
            let mut dweight = floats(&device, &vec![0.0; outputs * inputs]);
            device.linear_forward(&mut out, &x, &weight, None, shape).unwrap();
            device.linear_backward_input(&mut dx, &dout, &weight, shape).unwrap();
            device.linear_backward_input_f32(&mut dx_f32, &dout, &weight, shape).unwrap();
            device.linear_backward_weight(Some(&mut dweight), None, &dout, &x, shape).unwrap();
            let exact = naive::Precision::Exact;
            let dx64 = exact.linear_backward_input(&dout64, &weight64, inputs);
            assert_exact("dx in f32", &read(&device, &dx_f32), &dx64);
            let dweight64 = exact.linear_backward_weight(&dout64, &x64, inputs);
            assert_exact("dweight", &read(&device, &dweight), &dweight64);
            // What bf16 stores of an integer above 256 is the nearest that it has.
            assert_close("dx", &read_compute(&device, &dx), &dx64, Tolerance::BF16);
            let wanted = naive::linear(&x64, &weight64, &vec![0.0; outputs], inputs);
            assert_close("out", &read_compute(&device, &out), &wanted, Tolerance::BF16);
        }
    }
}

/// Gate, up and SwiGLU in tiles of 128 x 256, by one block and by two: beside the product and SwiGLU apart.
#[test]
fn gpu_swiglu_in_wide_tiles() {
    let (Some(own), Some(portable)) = (crate::harness::gpu(), crate::harness::gpu()) else { return };
    let portable = portable.with_path(KernelPath::Portable);
    let [own, portable] = [own, portable].map(|device| device.with_gemm_choice(GemmChoice::Ours));
    for (rows, outputs) in [(1408, 3072), (1024, 4096)] {
        let shape = LinearShape { rows, inputs: 64, outputs };
        trying("shape", shape);
        let [got, wanted] = [&own, &portable].map(|device| {
            let (x, _) = random_compute(device, 1, rows * shape.inputs, 1.0);
            let (weight, _) = random_compute(device, 2, outputs * shape.inputs, 0.1);
            let mut gate_up = unset_compute(device, rows * outputs);
            let mut out = unset_compute(device, rows * outputs / 2);
            let operands = LinearSwiglu {
                out: &mut out,
                gate_up: &mut gate_up,
                x: &x,
                weight: &weight,
                bias: None,
                shape,
            };
            device.linear_swiglu_forward(operands).unwrap();
            [read_compute(device, &gate_up), read_compute(device, &out)]
        });
        // Both round sums of another order; SwiGLU of a rounded gate and up differs by as much again.
        let bounds = Tolerance { relative: 2.0 * Tolerance::BF16.relative, ..Tolerance::BF16 };
        assert_close("gate and up", &got[0], &wide(&wanted[0]), bounds);
        assert_close("out", &got[1], &wide(&wanted[1]), bounds);
    }
}
