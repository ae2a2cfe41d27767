//! Faults planted in the PTX that nvcc emitted, each of which the PTX machine must catch: by a finding whose text is named
//! here, or by a result that differs from that of the kernel as it is.

#![cfg(mmpo_gpu_kernels)]

mod ptx_machine;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use half::bf16;
use mmpo_fast::data::{PairBatch, Sides, TokenizedPair};
use mmpo_fast::device::cuda::{CudaDevice, GemmChoice};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{
    AttentionGradient, AttentionShape, BatchBuffers, ComputeBuffer, LinearShape, NormShape, RawValues,
    StorageType,
};
use mmpo_fast::error::Result;
use ptx_machine::Mode;

/// What a fault is planted in: an operation, the target whose PTX runs, and words that the mangled names of its kernels hold.
struct Subject {
    name: &'static str,
    target: &'static str,
    entry: &'static str,
    run: fn(&CudaDevice) -> Result<Vec<f32>>,
}

/// `wgmma`, TMA and mbarriers: a tile of 64 x 128 without clusters.
const GEMM: Subject = Subject {
    name: "gemm",
    target: "sm_90a",
    entry: "gemm_sm9016gemm_sm90_kernelINS1_10Tile64x128ENS0_12ForwardLinesENS1_9StoreBf16",
    run: |device| gemm(device, Some("64x128"), 200),
};
/// The same by clusters of two blocks.
const PAIRED: Subject = Subject {
    name: "gemm by two blocks",
    target: "sm_90a",
    entry: "gemm_sm9016gemm_sm90_kernelINS1_6PairedINS1_11Tile128x128EEENS0_12ForwardLinesENS1_9StoreBf16",
    run: |device| gemm(device, Some("128x128 by 2"), 600),
};
/// `mma.sync`, `ldmatrix` and `cp.async`.
const PORTABLE: Subject = Subject {
    name: "portable gemm",
    target: "sm_80",
    entry: "gemm11gemm_kernel",
    run: |device| gemm(device, None, 150),
};
const NORM: Subject = Subject {
    name: "norm",
    target: "sm_80",
    entry: "rms_norm_forward_kernel",
    run: |device| norm(device, 37, 192),
};
/// Rows that whole blocks share.
const WIDE_NORM: Subject = Subject {
    name: "norm of wide rows",
    target: "sm_80",
    entry: "rms_norm_forward_kernel",
    run: |device| norm(device, 5, 4100),
};
const ATTENTION: Subject = Subject {
    name: "attention",
    target: "sm_90a",
    entry: "attention_forward_sm90_cu",
    run: |device| attention(device, false),
};
const ATTENTION_GRADIENT: Subject = Subject {
    name: "attention's gradient",
    target: "sm_90a",
    entry: "attention_backward_sm90_kernelILi64EN4mmpo3gpu10FixedOrder",
    run: |device| attention(device, true),
};
const PORTABLE_ATTENTION: Subject = Subject {
    name: "portable attention",
    target: "sm_80",
    entry: "attention_forward_kernelILi64",
    run: |device| attention(device, false),
};

/// Writes scratch memory that the gradient's kernel reads.
const ATTENTION_PREPARATION: Subject = Subject {
    name: "preparation of attention's gradient",
    target: "sm_90a",
    entry: "attention_prepare_kernelILi64 FixedOrder",
    run: |device| attention(device, true),
};

/// How a fault shows.
enum Caught {
    /// By a finding that says this.
    Says(&'static str),
    /// By other results.
    Differs,
}
use Caught::{Differs, Says};

/// Occurrence `.1` (0: all) of `.2` becomes `.3` in the entries of the subject. `//` makes the rest of a line a comment, so the
/// instruction is gone.
type Fault = (&'static Subject, i32, &'static str, &'static str, Caught);

const FAULTS: &[Fault] = &[
    // Waits of wgmma and its fences.
    (
        &GEMM,
        1,
        "wgmma.wait_group.sync.aligned 0",
        "wgmma.wait_group.sync.aligned 1",
        Says("register of a wgmma under way"),
    ),
    (&GEMM, 0, "wgmma.wait_group.sync.aligned 1", "wgmma.wait_group.sync.aligned 3", Says("may still read")),
    (&GEMM, 1, "wgmma.fence", "//wgmma.fence", Says("wgmma without wgmma.fence")),
    (&GEMM, 1, "wgmma.commit_group", "//wgmma.commit_group", Says("commit_group is missing")),
    // Its operands: scale-d, and which of both is transposed.
    (&GEMM, 1, "setp.ne.b32 p", "setp.eq.b32 p", Differs),
    (&GEMM, 2, "p, 1, 1, 0, 0", "p, 1, 1, 0, 1", Differs),
    (&GEMM, 2, "p, 1, 1, 0, 0", "p, 1, 1, 1, 0", Differs),
    // mbarriers.
    (&GEMM, 1, "fence.mbarrier_init", "//fence.mbarrier_init", Says("missing fence.mbarrier_init")),
    (&GEMM, 1, "bar.sync 0", "//bar.sync 0", Says("race: uses the mbarrier")),
    (&GEMM, 1, "mbarrier.init", "//mbarrier.init", Says("no mbarrier is initialised")),
    (&GEMM, 2, "mbarrier.init", "//mbarrier.init", Says("no mbarrier is initialised")),
    (&GEMM, 1, "mbarrier.arrive.expect_tx", "//mbarrier.arrive.expect_tx", Says("deadlock")),
    (&GEMM, 1, "mbarrier.arrive.expect_tx", "mbarrier.arrive", Says("more arrivals at the mbarrier")),
    (&GEMM, 0, "mbarrier.arrive.shared::cta", "//mbarrier.arrive.shared::cta", Says("deadlock")),
    // A wait that always says that the phase is complete: the producer's, and a consumer's.
    (&GEMM, 1, "1, 0, p;", "1, 1, p;", Says("race: a copy overwrites")),
    (&GEMM, 2, "1, 0, p;", "1, 1, p;", Says("reads shared memory that nothing wrote")),
    // Named barriers between the consumers.
    (&GEMM, 1, "bar.arrive", "//bar.arrive", Says("deadlock")),
    (&GEMM, 2, "bar.sync", "//bar.sync", Says("threads at barrier")),
    (&GEMM, 1, "bar.arrive %r", "bar.arrive 1, 128; //bar.arrive %r", Says("mismatched counts")),
    // The lane that asks for a tensor copy has not seen what the other lanes wrote.
    (&GEMM, 2, "bar.warp.sync", "//bar.warp.sync", Says("race between lanes")),
    // Tensor copies in and out.
    (&GEMM, 1, "cp.async.bulk.tensor.2d.shared", "//cp.async.bulk.tensor.2d.shared", Says("deadlock")),
    (&GEMM, 1, "tensor.2d.shared", "tensor.3d.shared", Says("another number of coordinates")),
    (&GEMM, 0, "fence.proxy.async", "//fence.proxy.async", Says("missing fence.proxy.async")),
    (&GEMM, 1, "stmatrix", "//stmatrix", Says("reads shared memory that nothing wrote")),
    (&GEMM, 1, ".x4.shared.b16", ".x4.trans.shared.b16", Differs),
    (
        &GEMM,
        0,
        "cp.async.bulk.commit_group",
        "//cp.async.bulk.commit_group",
        Says("cp.async.bulk.commit_group is missing"),
    ),
    (
        &GEMM,
        0,
        "cp.async.bulk.wait_group",
        "//cp.async.bulk.wait_group",
        Says("still reads its shared memory"),
    ),
    (&GEMM, 1, "cp.async.bulk.tensor.2d.global", "//cp.async.bulk.tensor.2d.global", Differs),
    // Clusters.
    (&PAIRED, 1, "barrier.cluster.arrive", "//barrier.cluster.arrive", Says("without having arrived")),
    (&PAIRED, 0, "barrier.cluster", "//barrier.cluster", Says("race: uses the mbarrier")),
    (&PAIRED, 0, "mbarrier.arrive.shared::cluster", "//mbarrier.arrive.shared::cluster", Says("deadlock")),
    // cp.async and its groups; each thread waits before the block's barrier.
    (
        &PORTABLE,
        1,
        "cp.async.wait_group",
        "//cp.async.wait_group",
        Says("reads shared memory that nothing wrote"),
    ),
    (
        &PORTABLE,
        0,
        "cp.async.wait_group 1",
        "cp.async.wait_group 2",
        Says("reads shared memory that nothing wrote"),
    ),
    (
        &PORTABLE,
        1,
        "cp.async.commit_group",
        "//cp.async.commit_group",
        Says("reads shared memory that nothing wrote"),
    ),
    // With more waits than groups.
    (
        &PORTABLE,
        0,
        "cp.async.commit_group",
        "//cp.async.commit_group",
        Says("cp.async.commit_group is missing"),
    ),
    (&PORTABLE, 1, "cp.async.cg", "//cp.async.cg", Says("reads shared memory that nothing wrote")),
    (&PORTABLE, 1, "], 16, %r", "], 8, %r", Says("cp.async.cg copies 16 bytes")),
    (&PORTABLE, 1, "bar.sync 0", "//bar.sync 0", Says("race between lanes")),
    (&PORTABLE, 2, "bar.sync 0", "//bar.sync 0", Says("race: reads shared memory")),
    // Fragments.
    (
        &PORTABLE,
        1,
        "ldmatrix.sync.aligned.m8n8.x4.shared",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared",
        Differs,
    ),
    (&PORTABLE, 1, "ldmatrix", "//ldmatrix", Differs),
    (&PORTABLE, 1, "mma.sync", "//mma.sync", Differs),
    // Who does what.
    (&PORTABLE, 1, "%tid.x", "%laneid", Says("race: a copy overwrites")),
    // Rows and columns beyond the matrix are filled with zeros, so that a wrong tile is wrong numbers.
    (&PORTABLE, 1, "%ctaid.x", "%tid.x", Differs),
    (&NORM, 1, "%ctaid.x", "%ntid.x", Differs),
    (&NORM, 1, "setp.ge.", "setp.gt.", Says("out of bounds")),
    (&NORM, 1, "shfl.sync", "//shfl.sync", Differs),
    (&NORM, 0, "shfl.sync.bfly", "shfl.sync.down", Differs),
    (&NORM, 1, "rsqrt", "//rsqrt", Differs),
    (&WIDE_NORM, 1, "bar.sync", "//bar.sync", Says("reads shared memory that nothing wrote")),
    // All lanes take themselves for the first one, which alone writes the warp's sum.
    (&WIDE_NORM, 0, ", 31;", ", 0;", Says("race between lanes")),
    // Vectors off their boundaries, in shared and in global memory.
    (&WIDE_NORM, 0, "+16];", "+8];", Says("misaligned: shared")),
    (&ATTENTION_PREPARATION, 0, "+16], {", "+20], {", Says("misaligned: global")),
    (
        &ATTENTION_PREPARATION,
        0,
        "st.global.f32",
        "//st.global.f32",
        Says("reads global memory that nothing wrote"),
    ),
    // Attention: softmax, rings of tiles, turns between blocks.
    (&PORTABLE_ATTENTION, 0, "ex2.approx", "lg2.approx", Differs),
    (
        &PORTABLE_ATTENTION,
        0,
        "cp.async.wait_group",
        "//cp.async.wait_group",
        Says("reads shared memory that nothing wrote"),
    ),
    (&ATTENTION, 0, "mbarrier.arrive.expect_tx", "//mbarrier.arrive.expect_tx", Says("deadlock")),
    (&ATTENTION, 0, "wgmma.fence", "//wgmma.fence", Says("wgmma without wgmma.fence")),
    (&ATTENTION, 0, "ex2.approx", "lg2.approx", Differs),
    (&ATTENTION_GRADIENT, 0, "st.release", "//st.release", Says("deadlock")),
    (&ATTENTION_GRADIENT, 0, "cp.reduce.async", "//cp.reduce.async", Differs),
];

/// Pseudo-random values between -1 and 1.
fn values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// As bf16, which needs no conversion on the device: that would leave what it converts in the scratch memory of the kernels.
fn upload(device: &CudaDevice, values: &[f32]) -> Result<ComputeBuffer<CudaDevice>> {
    let mut buffer = device.alloc(values.len())?;
    let bytes: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
    device.upload_values(&mut buffer, 0, RawValues { storage: StorageType::Bf16, bytes: &bytes })?;
    Ok(buffer)
}

fn gemm(device: &CudaDevice, tile: Option<&str>, rows: usize) -> Result<Vec<f32>> {
    let choice = match tile {
        None => GemmChoice::Ours,
        Some(name) => {
            let tiles = device.gemm_tiles()?;
            let number = tiles.iter().position(|tile| tile.to_string() == name).expect("a tile of this name");
            GemmChoice::Tile(u8::try_from(number).expect("few tiles"))
        }
    };
    let device = &CudaDevice::open(if tile.is_some() { 0 } else { 1 })?.with_gemm_choice(choice);
    let shape = LinearShape { rows, inputs: 600, outputs: 232 };
    let x = upload(device, &values(1, rows * shape.inputs))?;
    let weight = upload(device, &values(2, shape.outputs * shape.inputs))?;
    let mut out = upload(device, &vec![f32::NAN; rows * shape.outputs])?;
    device.linear_forward(&mut out, &x, &weight, None, shape)?;
    let mut result = vec![0.0; rows * shape.outputs];
    device.download_compute(&mut result, &out, 0)?;
    Ok(result)
}

fn norm(device: &CudaDevice, rows: usize, width: usize) -> Result<Vec<f32>> {
    let x = upload(device, &values(1, rows * width))?;
    let weight = upload(device, &values(2, width))?;
    let mut out = upload(device, &vec![f32::NAN; rows * width])?;
    let mut rstd = device.alloc(rows)?;
    device.upload(&mut rstd, 0, &vec![0.0_f32; rows])?;
    device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, NormShape { rows, width, epsilon: 1e-5 })?;
    let mut result = vec![0.0; rows * width];
    device.download_compute(&mut result, &out, 0)?;
    Ok(result)
}

fn attention(device: &CudaDevice, gradient: bool) -> Result<Vec<f32>> {
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_size: 64 };
    let pair = TokenizedPair {
        record: 0,
        prompt: vec![1; 150].into(),
        chosen: vec![1; 70].into(),
        rejected: vec![1; 90].into(),
    };
    let batch = PairBatch::pack(&[pair], Sides::Both);
    let tokens = batch.tokens();
    let mut buffers = BatchBuffers::new(device, tokens, 1, batch.scored_tokens())?;
    buffers.load(device, &batch, &[])?;
    let qkv = upload(device, &values(1, tokens * shape.qkv_width()))?;
    let mut out = upload(device, &vec![f32::NAN; tokens * shape.out_width()])?;
    let mut lse = device.alloc(tokens * shape.heads)?;
    device.upload(&mut lse, 0, &vec![f32::NAN; tokens * shape.heads])?;
    device.attention_forward(&mut out, &mut lse, &qkv, &buffers, shape)?;
    if !gradient {
        let mut result = vec![0.0; tokens * shape.out_width()];
        device.download_compute(&mut result, &out, 0)?;
        return Ok(result);
    }
    let dout = upload(device, &values(3, tokens * shape.out_width()))?;
    let mut dqkv = upload(device, &vec![f32::NAN; tokens * shape.qkv_width()])?;
    let batch = &buffers;
    device.attention_backward(AttentionGradient {
        dqkv: &mut dqkv,
        dout: &dout,
        out: &out,
        lse: &lse,
        qkv: &qkv,
        batch,
        shape,
    })?;
    let mut result = vec![0.0; tokens * shape.qkv_width()];
    device.download_compute(&mut result, &dqkv, 0)?;
    Ok(result)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What is wrong with the outcome of a faulty kernel, if it was not caught as it should be.
fn missed(outcome: Result<Vec<f32>>, caught: &Caught, wanted: &[u32]) -> Option<String> {
    match (outcome, caught) {
        (Err(error), Says(text)) if error.to_string().contains(text) => None,
        (Err(error), _) => Some(format!("the machine says: {error}")),
        (Ok(_), Says(text)) => Some(format!("no finding, where `{text}` was expected")),
        (Ok(result), Differs) if bits(&result) != wanted => None,
        (Ok(_), Differs) => Some("the result is the same".to_owned()),
    }
}

/// The machine has one set of edits: the tests here take turns.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn every_fault_planted_in_the_ptx_is_caught() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = ptx_machine::machine() else { return };
    machine.configure(Mode::LATE);
    assert!(FAULTS.len() >= 40, "{} faults", FAULTS.len());
    let mut wanted: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    let mut all_missed = Vec::new();
    for (subject, occurrence, from, to, caught) in FAULTS {
        let device = ptx_machine::device(subject.target).expect("the machine runs");
        let wanted = wanted.entry(subject.name).or_insert_with(|| {
            bits(&(subject.run)(&device).unwrap_or_else(|error| panic!("{} as it is: {error}", subject.name)))
        });
        machine
            .edit(subject.entry, from, to, *occurrence)
            .unwrap_or_else(|error| panic!("{}: {error}", subject.name));
        let outcome = (subject.run)(&device);
        machine.restore();
        if let Some(why) = missed(outcome, caught, wanted) {
            all_missed.push(format!("{}: `{from}` ({occurrence}) to `{to}`: {why}", subject.name));
        }
    }
    assert!(all_missed.is_empty(), "{} of {}:\n{}", all_missed.len(), FAULTS.len(), all_missed.join("\n"));
}

/// A report names what a person needs to find the fault: kernel, block, thread, the PTX line and its text, and the source.
#[test]
fn a_finding_says_where() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = ptx_machine::machine() else { return };
    machine.configure(Mode::LATE);
    let device = ptx_machine::device(NORM.target).expect("the machine runs");
    machine.edit(NORM.entry, "setp.ge.", "setp.gt.", 1).expect("an edit");
    let outcome = (NORM.run)(&device);
    machine.restore();
    let error = outcome.expect_err("a finding").to_string();
    for part in [
        "out of bounds: 16 bytes at byte 14208 of an allocation of 14208 bytes",
        "rms_norm_forward_kernel",
        "block (4, 0, 0), warp 5, thread 160",
        "PTX line",
        "ld.global",
        "kernels/",
    ] {
        assert!(error.contains(part), "`{part}` is missing in: {error}");
    }
}

/// Sums of 16 products that tell the roundings apart: the pairs of factors, and the sum in units of 2^-23 beyond one, in f32, on
/// Ampere and on Hopper.
type Sum = (&'static [(f32, f32)], [i32; 3]);

/// `2^exponent`.
const fn power(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

const TINY: (f32, f32) = (power(-13), power(-13));
const SUMS: &[Sum] = &[
    // f32 rounds 1 + 1.5 * 2^-24 to nearest; tensor cores cut it off.
    (&[(1.0, 1.0), (1.5 * power(-12), power(-12))], [1, 0, 0]),
    // Twice 2^-24 beside 1: the last bit that Ampere keeps. In f32 each is half a unit, which rounds to even.
    (&[(1.0, 1.0), (power(-12), power(-12)), (power(-12), power(-12))], [0, 1, 1]),
    // Four times 2^-25 beside 1: one bit more than Ampere keeps, as many as Hopper keeps.
    (
        &[
            (1.0, 1.0),
            (power(-12), power(-13)),
            (power(-12), power(-13)),
            (power(-12), power(-13)),
            (power(-12), power(-13)),
        ],
        [0, 0, 1],
    ),
    // Eight times 2^-26, which Ampere adds up before it meets the 1, and Hopper beside it.
    (&[TINY, TINY, TINY, TINY, TINY, TINY, TINY, TINY, (1.0, 1.0)], [1, 1, 0]),
];

/// A gradient of weights whose every value is the sum of these products, each factor with the sign given to the left ones.
fn sum_of_products(device: &CudaDevice, factors: &[(f32, f32)], sign: f32) -> Result<Vec<f32>> {
    let shape = LinearShape { rows: 16, inputs: 32, outputs: 24 };
    let matrix = |width: usize, value: &dyn Fn((f32, f32)) -> f32| -> Vec<f32> {
        let rows = (0..shape.rows).map(|row| factors.get(row).map_or(0.0, |&pair| value(pair)));
        rows.flat_map(|value| std::iter::repeat_n(value, width)).collect()
    };
    let dout = upload(device, &matrix(shape.outputs, &|(left, _)| sign * left))?;
    let x = upload(device, &matrix(shape.inputs, &|(_, right)| right))?;
    let mut dweight = device.alloc::<f32>(shape.inputs * shape.outputs)?;
    device.linear_backward_weight(Some(&mut dweight), None, &dout, &x, shape)?;
    let mut values = vec![0.0; shape.inputs * shape.outputs];
    device.download(&mut values, &dweight, 0)?;
    Ok(values)
}

/// What arXiv 2511.10909 measured: F = 24 and 8 products at a time on Ampere, F = 25 and 16 on Hopper, cut off towards zero.
#[test]
fn matrix_instructions_round_as_was_measured() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = ptx_machine::machine() else { return };
    for (target, measured, column) in
        [("sm_80", false, 0), ("sm_90a", false, 0), ("sm_80", true, 1), ("sm_90a", true, 2)]
    {
        machine.configure(Mode { measured_rounding: measured, ..Mode::LATE });
        let device =
            ptx_machine::device(target).expect("the machine runs").with_gemm_choice(GemmChoice::Ours);
        for (number, (factors, beyond_one)) in SUMS.iter().enumerate() {
            for sign in [1.0, -1.0] {
                let wanted = sign * (1.0 + beyond_one[column] as f32 * power(-23));
                let got = sum_of_products(&device, factors, sign).expect("a product");
                let wrong = got.iter().find(|value| value.to_bits() != wanted.to_bits());
                assert_eq!(wrong, None, "sum {number}, {target}, measured {measured}, wanted {wanted:?}");
            }
        }
    }
}

/// What a buffer's creation zeroed and nothing wrote since is as good as unwritten, where a test asks for that.
#[test]
fn strict_reads_find_a_buffer_that_was_never_filled() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = ptx_machine::machine() else { return };
    let outcome = |strict_reads, filled: bool| {
        machine.configure(Mode { strict_reads, ..Mode::LATE });
        let device = ptx_machine::device("sm_80").expect("the machine runs");
        let shape = NormShape { rows: 4, width: 64, epsilon: 1e-5 };
        let mut x = device.alloc(4 * 64).expect("a buffer");
        if filled {
            device.zero(&mut x, 0..4 * 64).expect("zeros");
        }
        let weight = upload(&device, &values(2, 64)).expect("a weight");
        let mut out = device.alloc(4 * 64).expect("a buffer");
        let mut rstd = device.alloc(4).expect("a buffer");
        device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape).map_err(|error| error.to_string())
    };
    assert_eq!(outcome(false, false), Ok(()));
    assert_eq!(outcome(true, true), Ok(()));
    let error = outcome(true, false).expect_err("a finding");
    assert!(error.contains("nothing wrote since its creation zeroed it"), "{error}");
}

/// The files of `tests/emulator` that plant faults in C++.
const CASE_FILES: [&str; 4] = ["faults_memory", "faults_order", "faults_hopper", "faults_clusters"];

/// The faults that the emulated device's own tests plant, compiled by nvcc, and what this machine says of each. The two share
/// nothing but the cases, so each shows what the other could miss.
const CASE_FAULTS: &[(&str, &str)] = &[
    ("global_read", "out of bounds: 4 bytes at byte 256 of an allocation of 256 bytes"),
    ("global_write", "out of bounds: 4 bytes at byte 256 of an allocation of 256 bytes"),
    ("global_write_before", "4 bytes before an allocation of 256 bytes"),
    ("use_after_free", "out of bounds"),
    ("uninitialised_global", "wrong data"),
    ("wild_pointer", "address 0x1000, near no allocation"),
    ("misaligned_vector", "misaligned: global address"),
    ("misaligned_load_128", "misaligned: global address"),
    ("shared_write", "out of bounds: 128 bytes at shared address"),
    ("uninitialised_shared", "reads shared memory that nothing wrote"),
    ("static_shared_read", "out of bounds: 128 bytes at shared address"),
    ("misaligned_ldmatrix", "misaligned: shared address"),
    ("offset_overflow", "wrong data"),
    ("missing_syncthreads", "reads shared memory that nothing wrote"),
    ("write_after_read", "race: reads shared memory"),
    ("overwritten_too_soon", "race: reads shared memory"),
    ("two_writers", "race: writes shared memory"),
    ("missing_syncwarp", "race between lanes: reads shared memory"),
    ("exited_lane", "waits for lanes 0x20, which have exited"),
    ("divergent_collective", "deadlock: the lanes of a warp wait for one another"),
    ("shuffle_outside_mask", "shuffles from lane 20, which takes no part"),
    ("barrier_deadlock", "deadlock"),
    ("named_barrier_count", "mismatched counts"),
    ("missing_copy_wait", "reads shared memory that nothing wrote"),
    ("missing_copy_commit", "cp.async.commit_group is missing"),
    ("missing_copy_sync", "race between lanes: reads shared memory"),
    ("lax_copy_wait", "reads shared memory that nothing wrote"),
    ("tail_without_zero_fill", "out of bounds: 16 bytes at byte 400 of an allocation of 400 bytes"),
    ("turn_too_late", "deadlock"),
    ("turn_taken_twice", "deadlock"),
    ("turn_of_unstarted_block", "deadlock"),
    ("turn_without_wait", "wrong data"),
    ("warp_order", "wrong data"),
    ("load_without_wait", "reads shared memory that nothing wrote"),
    ("wrong_parity", "reads shared memory that nothing wrote"),
    ("wrong_byte_count", "deadlock"),
    ("missing_arrival", "deadlock"),
    ("uninitialised_mbarrier", "no mbarrier is initialised"),
    ("unordered_mbarrier_init", "race: uses the mbarrier"),
    ("swizzle_mismatch", "wrong data"),
    ("missing_full_wait", "reads shared memory that nothing wrote"),
    ("missing_empty_wait", "more arrivals at the mbarrier"),
    ("empty_parity", "deadlock"),
    ("missing_proxy_fence", "missing fence.proxy.async"),
    ("missing_store_commit", "cp.async.bulk.commit_group is missing"),
    ("missing_store_wait", "exits while a bulk store still reads its shared memory"),
    ("missing_store_sync", "reads shared memory that nothing wrote"),
    ("wgmma_without_fence", "wgmma without wgmma.fence"),
    ("missing_wgmma_commit", "wgmma.commit_group is missing"),
    ("missing_wgmma_wait", "uses a register of a wgmma under way"),
    ("wgmma_proxy_fence", "missing fence.proxy.async"),
    ("operand_overwritten", "missing fence.proxy.async"),
    ("descriptor_stride", "wrong data"),
    ("divergent_elect", "deadlock: the lanes of a warp wait for one another"),
    ("unordered_cluster_init", "missing fence.mbarrier_init"),
    ("missing_init_fence", "race: uses the mbarrier"),
    ("missing_cluster_exit", "has exited, and its shared memory with it"),
    ("cluster_barrier", "deadlock"),
    ("missing_peer_release", "deadlock"),
    ("missing_peer_wait", "race: a copy overwrites shared memory"),
    ("multicast_outside", "a copy to blocks 0x5 of a cluster of 2"),
];

/// Faults of the same files that this machine does not find, and why.
const NOT_FOUND: &[(&str, &str)] = &[
    ("block_order", "blocks run in order, and races in global memory are not looked for"),
    ("turn_passed_early", "the memory model between blocks is not modelled"),
    ("turn_without_fence", "fences between the proxies for global memory are not modelled"),
    ("register_pool", "registers have no number here"),
    ("accumulator_read_early", "nvcc moves the read to after the wait"),
    ("local_array", "local memory is not known here"),
];

#[test]
fn the_emulated_devices_planted_faults_are_caught() {
    let Some(cases) = ptx_machine::cases::Cases::build(&CASE_FILES) else { return };
    let names: Vec<String> = CASE_FILES.iter().flat_map(|file| ptx_machine::cases::names(file)).collect();
    for name in &names {
        let known = CASE_FAULTS.iter().chain(NOT_FOUND).filter(|(known, _)| known == name).count();
        assert_eq!(known, 1, "{name} is in one of the tables");
    }
    let planted: Vec<String> = CASE_FAULTS.iter().map(|(name, _)| format!("{name}!")).collect();
    let outcomes = cases.run(Mode::LATE, &planted);
    assert_eq!(outcomes.len(), CASE_FAULTS.len(), "each case has an outcome");
    let missed: Vec<String> = CASE_FAULTS
        .iter()
        .zip(&outcomes)
        .filter(|((_, wanted), (_, what))| !what.as_ref().is_some_and(|what| what.contains(wanted)))
        .map(|((name, wanted), (_, what))| format!("{name}: `{wanted}` is not in: {what:?}"))
        .collect();
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
