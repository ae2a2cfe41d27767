//! What attention's backward kernels do at the lengths that matter, counted by the emulated device: tensor-core work
//! next to the ten FLOPs per value of the head that each visible (query, key) entry asks for, and the traffic of dQ's
//! sums.

use half::bf16;
use mmpo_fast::data::{PairBatch, Sides, TokenizedPair};
use mmpo_fast::device::cuda::{CudaDevice, EmulatorCounters, EmulatorVariant, KernelPath};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{AttentionGradient, AttentionShape, BatchBuffers};

use crate::emulator_alone;

const VARIANT: EmulatorVariant = EmulatorVariant::Plain;

/// One key/value head of SmolLM2 (three query heads) and of Llama-3-8B (four).
const SHAPES: [AttentionShape; 2] = [
    AttentionShape { heads: 3, kv_heads: 1, head_size: 64 },
    AttentionShape { heads: 4, kv_heads: 1, head_size: 128 },
];

/// P, C, R of a pair; for each shape, percent of tensor-core work that visible entries account for at least, on the portable
/// and on the Hopper path.
type Profile = ([usize; 3], [[usize; 2]; 2]);
const PROFILES: [Profile; 4] = [
    ([150, 75, 75], [[79, 57], [86, 67]]),
    ([190, 300, 280], [[87, 79], [95, 86]]),
    ([900, 256, 256], [[91, 84], [98, 92]]),
    ([1024, 0, 0], [[94, 85], [98, 94]]),
];

fn counted(device: &CudaDevice, batch: &PairBatch, shape: AttentionShape) -> EmulatorCounters {
    let rows = batch.tokens();
    let mut buffers = BatchBuffers::new(device, rows, batch.spans.len(), batch.scored_tokens()).unwrap();
    buffers.load(device, batch, &[]).unwrap();
    let zeros = |len: usize| {
        let mut buffer = device.alloc::<bf16>(len).unwrap();
        device.zero(&mut buffer, 0..len).unwrap();
        buffer
    };
    let (qkv, out, dout) =
        (zeros(rows * shape.qkv_width()), zeros(rows * shape.out_width()), zeros(rows * shape.out_width()));
    let mut lse = device.alloc::<f32>(rows * shape.heads).unwrap();
    device.zero(&mut lse, 0..rows * shape.heads).unwrap();
    let mut dqkv = zeros(rows * shape.qkv_width());
    VARIANT.reset_counters();
    device
        .attention_backward(AttentionGradient {
            dqkv: &mut dqkv,
            dout: &dout,
            out: &out,
            lse: &lse,
            qkv: &qkv,
            batch: &buffers,
            shape,
        })
        .unwrap();
    VARIANT.counters()
}

#[test]
fn backward_does_little_more_than_what_is_visible() {
    let _alone = emulator_alone();
    for ([prompt, chosen, rejected], least) in PROFILES {
        let tokens = |count| vec![0; count];
        let pair = TokenizedPair {
            record: 0,
            prompt: tokens(prompt).into(),
            chosen: tokens(chosen).into(),
            rejected: tokens(rejected).into(),
        };
        let batch = PairBatch::pack(&[pair], Sides::Both);
        for (shape, least) in SHAPES.into_iter().zip(least) {
            for (path, least) in [KernelPath::Portable, KernelPath::Hopper].into_iter().zip(least) {
                let device = CudaDevice::emulated(VARIANT).with_path(path);
                let counters = counted(&device, &batch, shape);
                let flops = (counters.mma_flops + counters.wgmma_flops) as usize;
                let useful = 100 * (10 * batch.spans[0].visible() * shape.out_width()) / flops;
                let dq = batch.tokens() * shape.out_width() * size_of::<f32>();
                // The finish kernel reads each sum once; what is left are terms. The portable kernel reads what it adds to.
                let terms = match path {
                    KernelPath::Portable => counters.vector_store_bytes,
                    KernelPath::Hopper => counters.tensor_store_bytes,
                } as f64;
                println!(
                    "{prompt}/{chosen}/{rejected} E {} {path:?}: {flops} FLOPs, {useful} % useful; dQ receives {:.2} terms; {} bank conflicts",
                    shape.head_size,
                    terms / dq as f64,
                    counters.matrix_bank_conflicts
                );
                assert!(
                    useful >= least,
                    "{prompt}/{chosen}/{rejected} {shape:?} {path:?}: {useful} % useful"
                );
                assert_eq!(counters.matrix_bank_conflicts, 0, "{shape:?} {path:?}");
                assert_eq!(counters.launches, 3);
            }
        }
    }
}
