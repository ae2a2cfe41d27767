//! What the kernels do, counted exactly by the emulated device: work and traffic that a change of a kernel should not
//! raise unseen. Counts are of a whole process, so this is one test.

#![cfg(mmpo_emulated)]

use mmpo_fast::device::cuda::{
    CudaDevice, EmulatorCounters, EmulatorOptions, EmulatorVariant, KernelPath, MMPO_EMULATOR_ASYNC_LATE,
    MMPO_EMULATOR_SCHEDULE_ORDERED,
};
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

/// What `kernels/linear_sm90.cu` takes for products as small as these.
const HOPPER_TILE: (usize, usize) = (64, 128);
const F32: usize = 4;

/// As [`assert_product`], with wgmma and TMA: `stored` bytes a value leave shared memory by TMA, once.
#[track_caller]
fn assert_hopper_product(
    counters: &EmulatorCounters,
    rows: usize,
    columns: usize,
    depth: usize,
    stored: usize,
) {
    assert_eq!(counters.launches, 1);
    assert_eq!(counters.wgmma_flops as usize, 2 * rows * columns * depth);
    assert_eq!(counters.wgmma_operations as usize, rows / 64 * (columns / 64) * (depth / 16));
    let (tile_rows, tile_columns) = HOPPER_TILE;
    let tiles = rows / tile_rows * (columns / tile_columns);
    assert_eq!(counters.tensor_load_bytes as usize, tiles * (tile_rows + tile_columns) * depth * BF16);
    assert_eq!(counters.tensor_store_bytes as usize, rows * columns * stored);
    assert_eq!((counters.mma_operations, counters.copy_async_bytes), (0, 0));
    assert_eq!(counters.matrix_bank_conflicts, 0);
    assert_eq!(counters.shared_wavefronts, counters.shared_wavefronts_ideal);
    assert_eq!((counters.global_load_bytes, counters.global_store_bytes), (0, 0));
}

#[test]
fn hopper_products_read_each_operand_once_a_tile() {
    let variant = EmulatorVariant::Checked;
    let options = EmulatorOptions {
        async_: MMPO_EMULATOR_ASYNC_LATE as i32,
        schedule: MMPO_EMULATOR_SCHEDULE_ORDERED as i32,
        seed: 1,
        host_threads: 0,
        multiprocessors: 0,
        trace_accesses: 1,
    };
    variant.configure(options).unwrap();
    let device = CudaDevice::emulated(variant).with_path(KernelPath::Hopper);
    let shape = LinearShape { rows: 128, inputs: 384, outputs: 256 };
    let mut x = device.alloc(shape.rows * shape.inputs).unwrap();
    let weight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let mut out = device.alloc(shape.rows * shape.outputs).unwrap();
    let mut dweight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let counted = |run: &mut dyn FnMut()| {
        variant.reset_counters();
        run();
        variant.counters()
    };

    let forward = counted(&mut || device.linear_forward(&mut out, &x, &weight, None, shape).unwrap());
    assert_hopper_product(&forward, shape.rows, shape.outputs, shape.inputs, BF16);
    assert_eq!(forward.shared_wavefronts, 0, "bf16 leaves by stmatrix alone");
    let weights =
        counted(&mut || device.linear_backward_weight(&mut dweight, None, &out, &x, shape).unwrap());
    assert_hopper_product(&weights, shape.outputs, shape.inputs, shape.rows, F32);
    assert_eq!(weights.shared_wavefronts as usize, shape.outputs * shape.inputs * F32 / 128);
    let inputs = counted(&mut || device.linear_backward_input(&mut x, &out, &weight, shape).unwrap());
    assert_hopper_product(&inputs, shape.rows, shape.inputs, shape.outputs, BF16);
}
