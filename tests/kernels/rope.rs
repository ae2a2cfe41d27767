use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{AttentionShape, RopeDirection};

use crate::harness::*;
use crate::naive;

/// Rows, query heads, key/value heads, head size.
const SHAPES: &[(usize, usize, usize, usize)] = &[
    (0, 1, 1, 64),
    (1, 1, 1, 16),
    (4, 2, 1, 6),
    (9, 3, 1, 16),
    (21, 9, 3, 64),
    (6, 4, 4, 128),
    (5, 8, 1, 64),
];
const POSITIONS: usize = 11;

/// A table of real rotations, and positions that are neither sorted nor distinct.
fn inputs(rows: usize, head_size: usize) -> (Vec<f32>, Vec<u32>) {
    let half = head_size / 2;
    let mut table = Vec::new();
    for position in 0..POSITIONS {
        let angle = |i: usize| position as f64 * 10_000_f64.powf(-(i as f64) / half as f64);
        table.extend((0..half).map(|i| angle(i).cos() as f32));
        table.extend((0..half).map(|i| angle(i).sin() as f32));
    }
    (table, (0..rows).map(|row| (row * 7 % POSITIONS) as u32).collect())
}

device_tests! {
    /// Query and key heads are rotated, value heads stay as they are.
    fn forward(device, bounds) {
        for &(rows, heads, kv_heads, head_size) in SHAPES {
            trying("(rows, heads, kv_heads, head_size)", (rows, heads, kv_heads, head_size));
            let shape = AttentionShape { heads, kv_heads, head_size };
            let (table, positions) = inputs(rows, head_size);
            let (mut qkv, qkv64) = random_compute(device, 1, rows * shape.qkv_width(), 1.0);
            let (device_table, device_positions) = (floats(device, &table), indices(device, &positions));
            device.rope(&mut qkv, &device_table, &device_positions, rows, shape, RopeDirection::Forward).unwrap();
            let [wanted, eager] =
                naive::both(|precision| precision.rope(&qkv64, &wide(&table), &positions, shape));
            let qkv = read_compute(device, &qkv);
            assert_close("qkv", &qkv, &wanted, bounds);
            assert_no_worse("qkv", &qkv, Stored::Bf16, &wanted, &eager);
        }
    }

    /// The backward of the rotation is its gradient, checked by central differences.
    fn backward(device, bounds) {
        for &(rows, heads, kv_heads, head_size) in SHAPES {
            trying("(rows, heads, kv_heads, head_size)", (rows, heads, kv_heads, head_size));
            let shape = AttentionShape { heads, kv_heads, head_size };
            let (table, positions) = inputs(rows, head_size);
            let (mut gradient, dout) = random_compute(device, 2, rows * shape.qkv_width(), 1.0);
            let (device_table, device_positions) = (floats(device, &table), indices(device, &positions));
            device.rope(&mut gradient, &device_table, &device_positions, rows, shape, RopeDirection::Backward).unwrap();
            let qkv: Vec<f64> = wide(&random(1, dout.len(), 1.0));
            let table = wide(&table);
            let gradient = read_compute(device, &gradient);
            let turned_back: Vec<f64> = table
                .chunks(head_size)
                .flat_map(|row| row.iter().enumerate().map(|(i, value)| if i < head_size / 2 { *value } else { -value }))
                .collect();
            let [exact, eager] =
                naive::both(|precision| precision.rope(&dout, &turned_back, &positions, shape));
            assert_no_worse("dqkv", &gradient, Stored::Bf16, &exact, &eager);
            assert_gradient(
                "dqkv",
                &gradient,
                |qkv| inner(&naive::rope(qkv, &table, &positions, shape), &dout),
                &qkv,
                60,
                bounds,
            );
        }
    }
}

cpu_tests! {
    /// A position beyond the table is an error that names it.
    fn position_outside_the_table(device) {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_size: 16 };
        let (mut qkv, _) = random_compute(device, 1, shape.qkv_width(), 1.0);
        let (table, positions) = (floats(device, &[0.0; 32]), indices(device, &[2]));
        let error = device.rope(&mut qkv, &table, &positions, 1, shape, RopeDirection::Forward);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("rope") && error.contains("position 2"), "{error}");
    }
}
