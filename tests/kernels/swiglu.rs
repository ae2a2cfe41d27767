use crate::harness::*;
use crate::naive;

const SHAPES: &[(usize, usize)] = &[(0, 8), (1, 16), (7, 33), (20, 96), (3, 1536), (2, 8192)];

device_tests! {
    /// `silu(gate) * up`.
    fn forward(device, bounds) {
        for &(rows, width) in SHAPES {
            trying("(rows, width)", (rows, width));
            let (gate_up, gate_up64) = random_compute(device, 1, 2 * rows * width, 4.0);
            let mut out = unset_compute(device, rows * width);
            device.swiglu_forward(&mut out, &gate_up, rows, width).unwrap();
            let [wanted, eager] = naive::both(|precision| precision.swiglu(&gate_up64, width));
            let out = read_compute(device, &out);
            assert_close("out", &out, &wanted, bounds);
            assert_no_worse("out", &out, Stored::Bf16, &wanted, &eager);
        }
    }

    /// Gates far out on either side neither overflow nor become NaN.
    fn extreme_gates(device, bounds) {
        let gates = [-1e4_f32, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4, 1e-20];
        let width = gates.len();
        let (gate_up, gate_up64) = compute(device, &[gates, [1.0; 10]].concat());
        let (dout, _) = compute(device, &[1.0; 10]);
        let mut out = unset_compute(device, width);
        device.swiglu_forward(&mut out, &gate_up, 1, width).unwrap();
        assert_close("out", &read_compute(device, &out), &naive::swiglu(&gate_up64, width), bounds);
        let mut dgate_up = unset_compute(device, 2 * width);
        device.swiglu_backward(&mut dgate_up, &dout, &gate_up, 1, width).unwrap();
        let dgate_up = read_compute(device, &dgate_up);
        assert!(dgate_up.iter().all(|value| value.is_finite()), "{dgate_up:?}");
    }

    /// Both gradients agree with central differences.
    fn backward(device, bounds) {
        for &(rows, width) in SHAPES {
            trying("(rows, width)", (rows, width));
            let (gate_up, gate_up64) = random_compute(device, 1, 2 * rows * width, 3.0);
            let (dout, dout64) = random_compute(device, 2, rows * width, 1.0);
            let mut dgate_up = unset_compute(device, 2 * rows * width);
            device.swiglu_backward(&mut dgate_up, &dout, &gate_up, rows, width).unwrap();
            let dgate_up = read_compute(device, &dgate_up);
            let [exact, eager] =
                naive::both(|precision| precision.swiglu_backward(&dout64, &gate_up64, width));
            assert_no_worse("dgate_up", &dgate_up, Stored::Bf16, &exact, &eager);
            assert_gradient(
                "dgate_up",
                &dgate_up,
                |gate_up| inner(&naive::swiglu(gate_up, width), &dout64),
                &gate_up64,
                60,
                bounds,
            );
        }
    }
}
