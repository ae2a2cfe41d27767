//! What low-rank adapters add to a layer: operations, counted.

use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, KernelPath};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{LinearShape, LowRankShape, RowPart};

use crate::emulator_alone;

/// The paper's rank.
const RANK: usize = 64;
/// Tokens: whole tiles.
const ROWS: usize = 64;

/// A projection: its inputs, and the outputs of the modules that share them.
struct Projection {
    inputs: usize,
    modules: &'static [usize],
}

/// Query, key and value; output; gate and up; down.
const LLAMA_3_2_1B: [Projection; 4] = [
    Projection { inputs: 2048, modules: &[2048, 512, 512] },
    Projection { inputs: 2048, modules: &[2048] },
    Projection { inputs: 2048, modules: &[8192, 8192] },
    Projection { inputs: 8192, modules: &[2048] },
];

/// Runs what adapters add to the forward and the backward of a projection, as the model does.
fn run(device: &CudaDevice, projection: &Projection) {
    let Projection { inputs, modules } = *projection;
    let (outputs, inner_width) = (modules.iter().sum::<usize>(), modules.len() * RANK);
    let down = LinearShape { rows: ROWS, inputs, outputs: inner_width };
    let compute = |len: usize| device.alloc(len).unwrap();
    let (x, a, b) = (compute(ROWS * inputs), compute(inner_width * inputs), compute(outputs * RANK));
    let (mut inner, mut out, mut dx) =
        (compute(ROWS * inner_width), compute(ROWS * outputs), compute(ROWS * inputs));
    let (mut da, mut db) =
        (device.alloc(inner_width * inputs).unwrap(), device.alloc(outputs * RANK).unwrap());

    device.linear_forward(&mut inner, &x, &a, None, down).unwrap();
    let mut first = 0;
    for (module, &count) in modules.iter().enumerate() {
        let shape = LowRankShape {
            rows: ROWS,
            rank: RANK,
            outputs: count,
            out: RowPart { first, width: outputs },
            inner: RowPart { first: module * RANK, width: inner_width },
            first_row: first,
            scale: 1.0,
        };
        device.low_rank_forward(&mut out, &inner, &b, shape).unwrap();
        device.low_rank_backward_weight(&mut db, &out, &inner, shape).unwrap();
        device.low_rank_backward_input(&mut inner, &out, &b, shape).unwrap();
        first += count;
    }
    device.linear_backward_weight(Some(&mut da), None, &inner, &x, down).unwrap();
    device.linear_backward_input_add(&mut dx, &inner, &a, down, None).unwrap();
}

/// A step over a frozen layer has two gemms of each projection. The adapters of all of its modules at rank 64 add less than a
/// tenth of their operations.
#[test]
fn adapters_of_a_layer_of_2048_add_less_than_a_tenth_of_its_operations() {
    let _alone = emulator_alone();
    let variant = EmulatorVariant::Plain;
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = CudaDevice::emulated(variant).with_path(path);
        let (mut frozen, mut added, mut counted) = (0, 0, 0);
        for projection in &LLAMA_3_2_1B {
            variant.reset_counters();
            run(&device, projection);
            let counters = variant.counters();
            counted += (counters.mma_flops + counters.wgmma_flops) as usize;
            let outputs: usize = projection.modules.iter().sum();
            let rank = projection.modules.len() * RANK;
            frozen += 2 * (2 * ROWS * projection.inputs * outputs);
            added += 3 * (2 * ROWS * (projection.inputs * rank + outputs * RANK));
        }
        println!("{path:?}: {:.2} % more operations", 100.0 * counted as f64 / frozen as f64);
        // A tile that rank 64 does not fill costs as much as a full one.
        assert!(counted >= added, "{path:?}: {counted}, {added}");
        assert!(counted as f64 <= 0.1 * frozen as f64, "{path:?}: {counted} of {frozen}");
    }
}
