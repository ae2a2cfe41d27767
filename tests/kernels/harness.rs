//! What the kernel tests share: devices to run on, values in their memory, and batches of pairs. [`on_devices`] has the
//! macros that make tests of a body, and [`comparison`] the assertions.

mod comparison;
mod on_devices;

use half::bf16;
use mmpo_fast::data::{PairBatch, PairSpan, Sides, TokenizedPair};
use mmpo_fast::device::cpu::CpuDevice;
pub use mmpo_fast::device::cuda::AttentionOrder;
use mmpo_fast::device::cuda::{self, CudaDevice};
pub use mmpo_fast::device::cuda::{GemmChoice, KernelPath};
use mmpo_fast::device::{BatchBuffers, ComputeBuffer, Device, Floats, Indices, RawValues};
use mmpo_fast::objective::PairConstants;

#[cfg(mmpo_emulated)]
pub use crate::emulated::{OwnOptions, checked, emulated, emulator_options};
pub use comparison::*;
pub(crate) use on_devices::*;

pub fn cpu(threads: usize) -> CpuDevice {
    CpuDevice::new(Some(threads)).expect("the CPU device starts")
}

/// The CPU with bf16 storage.
pub fn cpu_bf16(threads: usize) -> CpuDevice<bf16> {
    CpuDevice::open(Some(threads)).expect("the CPU device starts")
}

/// Whether this is the CPU device: it takes any head size, and looks at indices before it uses them, which a GPU cannot
/// without waiting for the batch.
pub fn is_cpu<D: Device>() -> bool {
    D::IS_CPU
}

/// Whether weights and activations are stored in f32.
pub fn is_f32<D: Device>() -> bool {
    size_of::<D::Compute>() == size_of::<f32>()
}

/// The first GPU, or the PTX machine's device where `MMPO_FAST_PTX` asks for it. Where driver, kernels or GPU are
/// missing it says so and gives `None`; with `MMPO_FAST_REQUIRE_GPU` set that is a failure, because on a GPU machine a
/// test that skips itself proves nothing.
pub fn gpu() -> Option<CudaDevice> {
    #[cfg(mmpo_gpu_kernels)]
    if let Some(device) = crate::ptx_machine::device_of_environment() {
        return Some(device);
    }
    let missing = match cuda::gpus() {
        Ok(gpus) if !gpus.is_empty() => return Some(CudaDevice::open(0).expect("the first GPU opens")),
        Ok(_) => "no GPU".to_owned(),
        Err(error) => format!("no GPU ({error})"),
    };
    assert!(std::env::var_os("MMPO_FAST_REQUIRE_GPU").is_none(), "{missing}");
    eprintln!("{missing}: skipped");
    None
}

/// Pseudo-random values (SplitMix64), roughly normal with standard deviation `scale`.
pub fn random(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1_u64 << 24) as f32
    };
    // Irwin-Hall: the sum of three uniforms has variance 1/4.
    (0..len).map(|_| (uniform() + uniform() + uniform() - 1.5) * 2.0 * scale).collect()
}

/// A buffer of weights or activations and what it holds after rounding to the device's type.
pub fn compute<D: Device>(device: &D, values: &[f32]) -> (ComputeBuffer<D>, Vec<f64>) {
    let mut buffer = device.alloc(values.len()).unwrap();
    device.upload_values(&mut buffer, 0, RawValues::from_f32(values)).unwrap();
    let rounded = read_compute(device, &buffer).into_iter().map(f64::from).collect();
    (buffer, rounded)
}

/// As [`compute`], of [`random`] values.
pub fn random_compute<D: Device>(
    device: &D,
    seed: u64,
    len: usize,
    scale: f32,
) -> (ComputeBuffer<D>, Vec<f64>) {
    compute(device, &random(seed, len, scale))
}

/// A buffer that starts as NaN: an operation that assigns must overwrite all of it.
pub fn unset_compute<D: Device>(device: &D, len: usize) -> ComputeBuffer<D> {
    compute(device, &vec![f32::NAN; len]).0
}

pub fn floats<D: Device>(device: &D, values: &[f32]) -> Floats<D> {
    let mut buffer = device.alloc(values.len()).unwrap();
    device.upload(&mut buffer, 0, values).unwrap();
    buffer
}

/// A buffer of bf16 values, and these in f32.
pub fn narrow<D: Device>(device: &D, values: &[f32]) -> (D::Buffer<bf16>, Vec<f32>) {
    let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
    let mut buffer = device.alloc(values.len()).unwrap();
    device.upload(&mut buffer, 0, &values).unwrap();
    (buffer, values.into_iter().map(bf16::to_f32).collect())
}

pub fn unset_floats<D: Device>(device: &D, len: usize) -> Floats<D> {
    floats(device, &vec![f32::NAN; len])
}

pub fn indices<D: Device>(device: &D, values: &[u32]) -> Indices<D> {
    let mut buffer = device.alloc(values.len()).unwrap();
    device.upload(&mut buffer, 0, values).unwrap();
    buffer
}

pub fn read_compute<D: Device>(device: &D, buffer: &ComputeBuffer<D>) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.download_compute(&mut values, buffer, 0).unwrap();
    values
}

pub fn read<D: Device>(device: &D, buffer: &Floats<D>) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.download(&mut values, buffer, 0).unwrap();
    values
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// A batch of pairs `(P, C, R)` with pseudo-random token ids below `vocab`.
pub fn pair_batch(sizes: &[(usize, usize, usize)], vocab: u32) -> PairBatch {
    let mut seed = 17_u32;
    let mut tokens = |len: usize| -> Vec<u32> {
        (0..len)
            .map(|_| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) % vocab
            })
            .collect()
    };
    let pairs: Vec<TokenizedPair> = sizes
        .iter()
        .enumerate()
        .map(|(record, &(prompt, chosen, rejected))| TokenizedPair {
            record,
            prompt: tokens(prompt).into(),
            chosen: tokens(chosen).into(),
            rejected: tokens(rejected).into(),
        })
        .collect();
    PairBatch::pack(&pairs, Sides::Both)
}

/// `batch` on the device, in buffers a little larger than it.
pub fn load_batch<D: Device>(device: &D, batch: &PairBatch, constants: &[PairConstants]) -> BatchBuffers<D> {
    let (tokens, pairs, scored) = (batch.tokens() + 3, batch.spans.len() + 1, batch.scored_tokens() + 2);
    let mut buffers = BatchBuffers::new(device, tokens, pairs, scored).unwrap();
    buffers.load(device, batch, constants).unwrap();
    buffers
}

/// Ragged pairs: usual ones, an empty prompt, single-token responses, no response at all, a prompt alone.
pub const RAGGED: &[(usize, usize, usize)] =
    &[(5, 4, 7), (0, 3, 2), (3, 1, 1), (1, 0, 4), (6, 0, 0), (0, 0, 1), (2, 5, 0)];

/// The spans of `sizes`, back to back.
pub fn spans(sizes: &[(usize, usize, usize)]) -> Vec<PairSpan> {
    pair_batch(sizes, 2).spans
}
