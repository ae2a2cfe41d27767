//! Kernels that sum over rows or blocks give the same bits whatever order blocks, warps and lanes run in.

use mmpo_fast::device::cuda::CudaDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{
    ComputeBuffer, HeadForward, HeadMode, HeadShape, LinearShape, NormShape, RmsNormBackward, TokenScores,
};

use crate::harness::*;

const ROWS: usize = 75;
const WIDTH: usize = 192;

/// The bits of everything that a few launches leave.
fn bits(device: &CudaDevice) -> Vec<u32> {
    let (x, _) = random_compute(device, 1, ROWS * WIDTH, 1.0);
    let (weight, _) = random_compute(device, 2, WIDTH, 1.0);
    let (mut dx, _) = random_compute(device, 3, ROWS * WIDTH, 1.0);
    let mut out = unset_compute(device, ROWS * WIDTH);
    let mut rstd = unset_floats(device, ROWS);
    let mut dweight = floats(device, &[0.0; WIDTH]);
    let norm = NormShape { rows: ROWS, width: WIDTH, epsilon: 1e-5 };
    device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, norm).unwrap();
    device
        .rms_norm_backward(RmsNormBackward {
            dx: &mut dx,
            dweight: Some(&mut dweight),
            dout: &out,
            x: &x,
            weight: &weight,
            rstd: &rstd,
            shape: norm,
        })
        .unwrap();

    let batch = pair_batch(&[(40, 20, 15)], 2);
    let buffers = load_batch(device, &batch, &[]);
    let mut dtable = floats(device, &[0.0; 2 * WIDTH]);
    device.embedding_backward(&mut dtable, &x, &buffers, ROWS, WIDTH).unwrap();

    let linear = LinearShape { rows: ROWS, inputs: WIDTH, outputs: WIDTH };
    let mut dlinear = floats(device, &[0.0; WIDTH * WIDTH]);
    let mut dbias = floats(device, &[0.0; WIDTH]);
    device.linear_backward_weight(Some(&mut dlinear), Some(&mut dbias), &out, &x, linear).unwrap();
    // Many rows for a small weight: on Hopper their sum is made in parts.
    let tall = LinearShape { rows: 16 * ROWS, inputs: 8, outputs: WIDTH };
    let (dtall, _) = random_compute(device, 5, tall.rows * tall.outputs, 1.0);
    let mut dparts = floats(device, &vec![0.0; tall.inputs * tall.outputs]);
    device.linear_backward_weight(Some(&mut dparts), None, &dtall, &x, tall).unwrap();
    let mut gradient_norm = unset_floats(device, 2);
    device.gradient_norm(&mut gradient_norm, &[&dlinear, &dbias, &dweight], Some(1.0)).unwrap();

    let (scores, workspace) = head(device, &x);
    [
        &rstd,
        &dweight,
        &dtable,
        &dlinear,
        &dparts,
        &dbias,
        &gradient_norm,
        &scores.lse,
        &scores.logp,
        &scores.entropy,
    ]
    .into_iter()
    .flat_map(|buffer| read(device, buffer))
    .chain([&dx, &out, &workspace].into_iter().flat_map(|buffer| read_compute(device, buffer)))
    .map(f32::to_bits)
    .collect()
}

/// What the log-prob head's forward leaves of the first rows of `hidden`.
fn head(
    device: &CudaDevice,
    hidden: &ComputeBuffer<CudaDevice>,
) -> (TokenScores<CudaDevice>, ComputeBuffer<CudaDevice>) {
    let (vocab, scored) = (501, 3);
    let (weight, _) = random_compute(device, 4, vocab * WIDTH, 0.3);
    let targets = indices(device, &[1, 0, 500]);
    let mut scores = TokenScores::new(device, scored).unwrap();
    let shape = HeadShape { rows: 0..scored, width: WIDTH, vocab, entropy: true, mode: HeadMode::Main };
    let mut workspace =
        unset_compute(device, device.logp_head_workspace(shape.mode, scored, WIDTH, vocab).unwrap());
    device
        .logp_head_forward(HeadForward {
            scores: &mut scores,
            workspace: &mut workspace,
            hidden,
            weight: &weight,
            targets: &targets,
            shape: &shape,
        })
        .unwrap();
    (scores, workspace)
}

/// A real GPU runs blocks as it likes: the same launches again and again give the same bits on both sets of kernels.
#[test]
fn gpu_again_and_again() {
    let (Some(device), Some(other)) = (gpu(), gpu()) else { return };
    for device in [device, other.with_path(KernelPath::Portable).with_gemm_choice(GemmChoice::Ours)] {
        trying("(kernels, gemms)", (device.path(), device.gemm_choice()));
        let wanted = bits(&device);
        for _ in 0..20 {
            let got = bits(&device);
            let differing = wanted.iter().zip(&got).filter(|(wanted, got)| wanted != got).count();
            assert_eq!(differing, 0, "values differ, of {}", wanted.len());
        }
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn whatever_the_order() {
    let options = OwnOptions::take();
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = emulated().with_path(path);
        options.set(emulator_options(0));
        let wanted = bits(&device);
        for seed in 1..=4 {
            options.set(emulator_options(seed));
            let got = bits(&device);
            let differing = wanted.iter().zip(&got).filter(|(wanted, got)| wanted != got).count();
            assert_eq!(differing, 0, "{path:?} values differ under schedule {seed}, of {}", wanted.len());
        }
    }
}
