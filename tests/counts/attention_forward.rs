//! What attention's kernels do at the lengths that matter, counted by the emulated device: tensor-core work and bytes next
//! to the least that the visible (query, key) entries ask for. And that nothing depends on how many multiprocessors share
//! the work.

use half::bf16;
use mmpo_fast::data::{PairBatch, PairSpan, Sides, TokenizedPair};
use mmpo_fast::device::cuda::{
    CudaDevice, EmulatorCounters, EmulatorOptions, EmulatorVariant, KernelPath, MMPO_EMULATOR_ASYNC_EARLY,
    MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_ASYNC_RANDOM,
};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{AttentionShape, BatchBuffers, RawValues};

use crate::{ORDINARY, emulator_alone};

const VARIANT: EmulatorVariant = EmulatorVariant::Plain;

/// Name, P, C and R of a pair.
type Profile = (&'static str, usize, usize, usize);
const PROFILES: [Profile; 4] = [
    ("HH-RLHF", 150, 75, 75),
    ("UltraFeedback", 190, 300, 280),
    ("long", 1800, 512, 512),
    ("causal", 2048, 0, 0),
];

/// One key/value head of SmolLM2 (three query heads) and of Llama-3-8B (four).
const SHAPES: [AttentionShape; 2] = [
    AttentionShape { heads: 3, kv_heads: 1, head_size: 64 },
    AttentionShape { heads: 4, kv_heads: 1, head_size: 128 },
];

/// For each shape and path, the least share of tensor-core work that visible entries account for, in percent, by profile.
const LEAST_USEFUL: [(usize, KernelPath, [usize; 4]); 4] = [
    (64, KernelPath::Portable, [65, 82, 91, 94]),
    (64, KernelPath::Hopper, [70, 82, 93, 93]),
    (128, KernelPath::Portable, [62, 83, 96, 97]),
    (128, KernelPath::Hopper, [71, 86, 97, 97]),
];

/// When copies and products take effect, and how many multiprocessors a persistent grid is told of.
fn configure(timing: u32, multiprocessors: i32) {
    VARIANT.configure(EmulatorOptions { async_: timing as i32, multiprocessors, ..ORDINARY }).unwrap();
}

fn batch_of(&(_, prompt, chosen, rejected): &Profile) -> PairBatch {
    let tokens = |count| vec![0; count];
    let pair = TokenizedPair {
        record: 0,
        prompt: tokens(prompt).into(),
        chosen: tokens(chosen).into(),
        rejected: tokens(rejected).into(),
    };
    PairBatch::pack(&[pair], Sides::Both)
}

struct Pass {
    counters: EmulatorCounters,
    out: Vec<bf16>,
    lse: Vec<f32>,
}

fn forward(device: &CudaDevice, batch: &PairBatch, shape: AttentionShape) -> Pass {
    let rows = batch.tokens();
    let mut buffers = BatchBuffers::new(device, rows, batch.spans.len(), batch.scored_tokens()).unwrap();
    buffers.load(device, batch, &[]).unwrap();
    let values: Vec<f32> =
        (0..rows * shape.qkv_width()).map(|i| ((i * 7919 % 401) as f32 - 200.0) / 100.0).collect();
    let mut qkv = device.alloc(values.len()).unwrap();
    device.upload_values(&mut qkv, 0, RawValues::from_f32(&values)).unwrap();
    let mut out = device.alloc::<bf16>(rows * shape.out_width()).unwrap();
    let mut lse = device.alloc::<f32>(rows * shape.heads).unwrap();
    VARIANT.reset_counters();
    device.attention_forward(&mut out, &mut lse, &qkv, &buffers, shape).unwrap();
    let counters = VARIANT.counters();
    let mut pass = Pass {
        counters,
        out: vec![bf16::ZERO; rows * shape.out_width()],
        lse: vec![0.0; rows * shape.heads],
    };
    device.download(&mut pass.out, &out, 0).unwrap();
    device.download(&mut pass.lse, &lse, 0).unwrap();
    pass
}

/// Percent of `part` in `whole`, rounded down.
fn percent(part: usize, whole: usize) -> usize {
    100 * part / whole
}

fn report(
    profile: &Profile,
    shape: AttentionShape,
    path: KernelPath,
    counters: &EmulatorCounters,
    span: PairSpan,
) -> usize {
    let (rows, size) = (span.rows().end, size_of::<bf16>());
    let minimum = 4 * span.visible() * shape.out_width();
    let counted = (counters.mma_flops + counters.wgmma_flops) as usize;
    let read = (counters.copy_async_bytes + counters.tensor_load_bytes) as usize;
    let minimum_read = rows * shape.qkv_width() * size;
    println!(
        "{:13} {:4}/{}/{} E {:3} {path:?}: {counted} FLOPs, {} % useful; {read} bytes read, {:.2} times each once; {} bank conflicts",
        profile.0,
        profile.1,
        profile.2,
        profile.3,
        shape.head_size,
        percent(minimum, counted),
        read as f64 / minimum_read as f64,
        counters.matrix_bank_conflicts,
    );
    percent(minimum, counted)
}

#[test]
fn forward_does_little_more_than_what_is_visible() {
    let _alone = emulator_alone();
    for (head_size, path, least) in LEAST_USEFUL {
        let shape = SHAPES.into_iter().find(|shape| shape.head_size == head_size).unwrap();
        let device = CudaDevice::emulated(VARIANT).with_path(path);
        for (profile, least) in PROFILES.iter().zip(least) {
            let batch = batch_of(profile);
            let counters = forward(&device, &batch, shape).counters;
            let useful = report(profile, shape, path, &counters, batch.spans[0]);
            assert!(useful >= least, "{profile:?}, {shape:?}, {path:?}: {useful} % useful, {least} % wanted");
            assert_eq!(counters.matrix_bank_conflicts, 0, "{profile:?}, {shape:?}, {path:?}");
            assert_eq!(counters.launches, 1);
            let products = (counters.mma_operations, counters.wgmma_operations);
            assert_eq!(products.0 == 0, path == KernelPath::Hopper, "{products:?}");
        }
    }
    // A persistent grid of any size gives the same bits, and so does every timing of copies and products.
    let batch = batch_of(&PROFILES[0]);
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = CudaDevice::emulated(VARIANT).with_path(path);
        let passes =
            [(MMPO_EMULATOR_ASYNC_LATE, 1), (MMPO_EMULATOR_ASYNC_EARLY, 3), (MMPO_EMULATOR_ASYNC_RANDOM, 64)]
                .map(|(timing, multiprocessors)| {
                    configure(timing, multiprocessors);
                    forward(&device, &batch, SHAPES[0])
                });
        for pass in &passes[1..] {
            assert!(pass.out == passes[0].out && pass.lse == passes[0].lse, "{path:?}");
        }
    }
}
