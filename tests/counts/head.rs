//! What the log-prob head does, counted by the emulated device: tensor-core work next to `6 N V D` (main mode) and `8 N
//! V D` (recompute mode), the bytes beside the operands of gemms, and bank conflicts.

use mmpo_fast::device::cuda::{CudaDevice, EmulatorCounters, EmulatorVariant, KernelPath};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{
    HeadBackward, HeadForward, HeadMode, HeadShape, RawValues, TokenCoefficients, TokenScores,
};

use crate::emulator_alone;

/// Watches ordinary loads and stores too.
const VARIANT: EmulatorVariant = EmulatorVariant::Checked;

/// Whole tiles of every gemm.
const ROWS: usize = 256;
const WIDTH: usize = 128;
const VOCAB: usize = 1024;
const LOGITS: usize = ROWS * VOCAB;

/// Columns that share statistics, see `kernels/common/logp_epilogue.cuh`.
const STATISTICS: usize = 128;

/// Counts of a forward and of its backward.
fn count(device: &CudaDevice, mode: HeadMode, entropy: bool) -> [EmulatorCounters; 2] {
    let values = |count: usize, scale: f32| {
        let values: Vec<f32> =
            (0..count).map(|i| ((i * 7919 % 401) as f32 - 200.0) / 200.0 * scale).collect();
        let mut buffer = device.alloc(count).unwrap();
        device.upload_values(&mut buffer, 0, RawValues::from_f32(&values)).unwrap();
        buffer
    };
    let (mut hidden, weight) = (values(ROWS * WIDTH, 0.1), values(VOCAB * WIDTH, 1.0));
    let mut workspace = device.alloc(device.logp_head_workspace(mode, ROWS, WIDTH, VOCAB).unwrap()).unwrap();
    let mut targets = device.alloc(ROWS).unwrap();
    let target_ids: Vec<u32> = (0..ROWS).map(|row| (row * 31 % VOCAB) as u32).collect();
    device.upload(&mut targets, 0, &target_ids).unwrap();
    let mut scores = TokenScores::new(device, ROWS).unwrap();
    let mut coefficients = TokenCoefficients::new(device, ROWS).unwrap();
    device.upload(&mut coefficients.logp, 0, &[0.5; ROWS]).unwrap();
    device.upload(&mut coefficients.entropy, 0, &[0.1; ROWS]).unwrap();
    let mut dweight = device.alloc(VOCAB * WIDTH).unwrap();
    let shape = HeadShape { rows: 0..ROWS, width: WIDTH, vocab: VOCAB, entropy, mode };

    VARIANT.reset_counters();
    device
        .logp_head_forward(HeadForward {
            scores: &mut scores,
            workspace: &mut workspace,
            hidden: &hidden,
            weight: &weight,
            targets: &targets,
            shape: &shape,
        })
        .unwrap();
    let forward = VARIANT.counters();
    VARIANT.reset_counters();
    device
        .logp_head_backward(HeadBackward {
            hidden: &mut hidden,
            dweight: Some(&mut dweight),
            workspace: &mut workspace,
            weight: &weight,
            targets: &targets,
            scores: &scores,
            coefficients: &coefficients,
            shape: &shape,
        })
        .unwrap();
    [forward, VARIANT.counters()]
}

fn flops(counters: &EmulatorCounters) -> usize {
    (counters.mma_flops + counters.wgmma_flops) as usize
}

fn stored(counters: &EmulatorCounters) -> usize {
    (counters.global_store_bytes + counters.tensor_store_bytes) as usize
}

/// Bytes loaded by ordinary accesses. The operands of gemms are not among them: they go by cp.async or TMA.
fn loaded(counters: &EmulatorCounters) -> usize {
    counters.global_load_bytes as usize
}

fn print_row(pass: &str, counters: &EmulatorCounters) {
    println!(
        "  {pass:8} {:2} launches, {:.2} NVD FLOPs; per logit: {:.3} bytes stored, {:.3} loaded beside {:.3} of operands; \
         {} conflicts of ldmatrix and stmatrix, shared wavefronts {:.2} times the least",
        counters.launches,
        flops(counters) as f64 / (LOGITS * WIDTH) as f64,
        stored(counters) as f64 / LOGITS as f64,
        loaded(counters) as f64 / LOGITS as f64,
        (counters.copy_async_bytes + counters.tensor_load_bytes) as f64 / LOGITS as f64,
        counters.matrix_bank_conflicts,
        counters.shared_wavefronts as f64 / counters.shared_wavefronts_ideal.max(1) as f64,
    );
}

#[test]
fn the_head_does_the_least_work() {
    let _alone = emulator_alone();
    // Statistics of a row: two f32 for each run of columns, and the target's logit; then lse and log-prob.
    let statistics = ROWS * 4 * (2 * VOCAB / STATISTICS + 1 + 2);
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = CudaDevice::emulated(VARIANT).with_path(path);
        for (mode, factor) in [(HeadMode::Main, 6), (HeadMode::Recompute, 8)] {
            println!("{path:?}, {mode:?}: {factor} NVD FLOPs at least");
            let [forward, backward] = count(&device, mode, false);
            print_row("forward", &forward);
            print_row("backward", &backward);
            assert_eq!(flops(&forward) + flops(&backward), factor * LOGITS * WIDTH, "{path:?} {mode:?}");
            // The gemm, the merge of its statistics, and in main mode the rows' references before it. These are written
            // twice, and the target's exponential once more.
            let main = mode == HeadMode::Main;
            assert_eq!(forward.launches, if main { 3 } else { 2 }, "{path:?} {mode:?}");
            let exponentials = if main { 2 * LOGITS + ROWS * (2 * 4 + 2) } else { 0 };
            // No logit is written, and each exponential once.
            assert_eq!(stored(&forward), exponentials + statistics, "{path:?} {mode:?}");
            for counters in [&forward, &backward] {
                assert_eq!(counters.matrix_bank_conflicts, 0, "{path:?} {mode:?}");
                let (waves, ideal) = (counters.shared_wavefronts, counters.shared_wavefronts_ideal);
                assert!(
                    waves * 10 <= ideal * 11,
                    "{path:?} {mode:?}: {waves} shared wavefronts, {ideal} at least"
                );
            }
        }
        // No dlogits: rows of hidden scaled, gradients of them in f32 and in bf16, and the vocabulary matrix's.
        let [_, without] = count(&device, HeadMode::Main, false);
        let products = 2 * ROWS * WIDTH + 4 * VOCAB * WIDTH;
        // Hopper sums the f32 gradient of so few tiles in two parts.
        let parts = if path == KernelPath::Hopper { 2 * 4 * ROWS * WIDTH } else { 0 };
        assert_eq!(stored(&without), 6 * ROWS * WIDTH + parts + products, "{path:?}");
        // An entropy term is one more f32 for each run of columns and row, and no other work of the tensor cores. dlogits
        // are formed in place: read once and written once.
        let [forward, backward] = count(&device, HeadMode::Main, true);
        println!("{path:?}, with entropies");
        print_row("forward", &forward);
        print_row("backward", &backward);
        assert_eq!(flops(&forward) + flops(&backward), 6 * LOGITS * WIDTH, "{path:?}");
        let entropies = ROWS * 4 * (VOCAB / STATISTICS + 1);
        assert_eq!(stored(&forward), 2 * LOGITS + statistics + entropies, "{path:?}");
        assert_eq!(stored(&backward), 2 * LOGITS + products, "{path:?}");
    }
}
