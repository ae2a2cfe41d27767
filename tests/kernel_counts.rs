//! What the kernels do, counted exactly by the emulated device: work and traffic that a change of a kernel should not
//! raise unseen. Counts are of a whole process, so this is one test.

#![cfg(mmpo_emulated)]

use mmpo_fast::device::cuda::{CudaDevice, EmulatorCounters, EmulatorVariant};
use mmpo_fast::device::{Device, LinearShape};

const VARIANT: EmulatorVariant = EmulatorVariant::Plain;

/// Of the tiles of `kernels/linear.cu`.
const TILE: usize = 128;
const BF16: usize = 2;

fn counted(run: impl FnOnce()) -> EmulatorCounters {
    VARIANT.reset_counters();
    run();
    VARIANT.counters()
}

/// `[rows, columns] = [rows, depth] * [depth, columns]` in whole tiles: each operand is read once a tile, each mma of
/// 16 x 8 x 16 is done once, and no `ldmatrix` waits for a bank.
#[track_caller]
fn assert_product(counters: &EmulatorCounters, rows: usize, columns: usize, depth: usize) {
    assert_eq!(counters.launches, 1);
    assert_eq!(counters.mma_operations as usize, rows / 16 * (columns / 8) * (depth / 16));
    assert_eq!(counters.mma_flops as usize, 2 * rows * columns * depth);
    let tiles = rows / TILE * (columns / TILE);
    assert_eq!(counters.copy_async_bytes as usize, tiles * 2 * TILE * depth * BF16);
    assert_eq!(counters.matrix_bank_conflicts, 0);
}

#[test]
fn products_read_each_operand_once_a_tile() {
    let device = CudaDevice::emulated(VARIANT);
    let shape = LinearShape { rows: 256, inputs: 384, outputs: 512 };
    let mut x = device.alloc(shape.rows * shape.inputs).unwrap();
    let weight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let mut out = device.alloc(shape.rows * shape.outputs).unwrap();
    let mut dweight = device.alloc(shape.outputs * shape.inputs).unwrap();

    let forward = counted(|| device.linear_forward(&mut out, &x, &weight, None, shape).unwrap());
    assert_product(&forward, shape.rows, shape.outputs, shape.inputs);
    let weights = counted(|| device.linear_backward_weight(&mut dweight, None, &out, &x, shape).unwrap());
    assert_product(&weights, shape.outputs, shape.inputs, shape.rows);
    let inputs = counted(|| device.linear_backward_input(&mut x, &out, &weight, shape).unwrap());
    assert_product(&inputs, shape.rows, shape.inputs, shape.outputs);
}
