//! The CPU device gives the same bits at any number of threads.

use mmpo_fast::device::{
    AttentionShape, Device, HeadBackward, HeadForward, HeadMode, HeadShape, LinearShape, NormShape,
    RmsNormBackward, TokenCoefficients, TokenScores,
};

use crate::attention::{self, Passes};
use crate::harness::*;

/// The bits of every output of an operation.
type Outputs = Vec<(&'static str, Vec<f32>)>;

fn gemms<D: Device>(device: &D) -> Outputs {
    let mut outputs = Outputs::new();
    for (rows, inputs, outputs_width) in [(1, 96, 400), (20, 576, 300), (130, 1536, 576), (300, 100, 250)] {
        let shape = LinearShape { rows, inputs, outputs: outputs_width };
        let (x, _) = random_compute(device, 1, rows * inputs, 1.0);
        let (weight, _) = random_compute(device, 2, outputs_width * inputs, 1.0);
        let (dout, _) = random_compute(device, 3, rows * outputs_width, 1.0);
        let (mut out, mut dx) =
            (unset_compute(device, rows * outputs_width), unset_compute(device, rows * inputs));
        let mut dweight = floats(device, &vec![0.0; outputs_width * inputs]);
        let mut dbias = floats(device, &vec![0.0; outputs_width]);
        device.linear_forward(&mut out, &x, &weight, None, shape).unwrap();
        device.linear_backward_input(&mut dx, &dout, &weight, shape).unwrap();
        device.linear_backward_weight(Some(&mut dweight), Some(&mut dbias), &dout, &x, shape).unwrap();
        outputs.push(("out", read_compute(device, &out)));
        outputs.push(("dx", read_compute(device, &dx)));
        outputs.push(("dweight", read(device, &dweight)));
        outputs.push(("dbias", read(device, &dbias)));
    }
    outputs
}

fn attention<D: Device>(device: &D) -> Outputs {
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_size: 64 };
    let sizes = [(100, 70, 33), (5, 1, 140)];
    let tokens = pair_batch(&sizes, 7).tokens();
    let qkv = random(1, tokens * shape.qkv_width(), 1.0);
    let dout = random(2, tokens * shape.out_width(), 1.0);
    let Passes { out, lse, dqkv } = attention::run(device, &sizes, shape, &qkv, &dout);
    vec![("out", out), ("lse", lse), ("dqkv", dqkv)]
}

fn norms<D: Device>(device: &D) -> Outputs {
    let (rows, width) = (300, 96);
    let shape = NormShape { rows, width, epsilon: 1e-5 };
    let (x, _) = random_compute(device, 1, rows * width, 1.0);
    let (weight, _) = random_compute(device, 2, width, 1.0);
    let (mut out, mut rstd) = (unset_compute(device, rows * width), unset_floats(device, rows));
    device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, shape).unwrap();
    let (mut dx, _) = compute(device, &vec![0.0; rows * width]);
    let mut dweight = floats(device, &vec![0.0; width]);
    device
        .rms_norm_backward(RmsNormBackward {
            dx: &mut dx,
            dweight: Some(&mut dweight),
            dout: &out,
            x: &x,
            weight: &weight,
            rstd: &rstd,
            shape,
        })
        .unwrap();
    let gradient = floats(device, &random(3, 300_000, 1.0));
    let mut norm = unset_floats(device, 2);
    device.gradient_norm(&mut norm, &[&gradient, &dweight], Some(1.0)).unwrap();
    vec![
        ("dx", read_compute(device, &dx)),
        ("dweight", read(device, &dweight)),
        ("norm", read(device, &norm)),
    ]
}

fn head<D: Device>(device: &D) -> Outputs {
    let (rows, width, vocab) = (300, 64, 2500);
    let (mut hidden, _) = random_compute(device, 1, rows * width, 0.3);
    let (weight, _) = random_compute(device, 2, vocab * width, 1.0);
    let targets: Vec<u32> = (0..rows).map(|row| (row * 31 % vocab) as u32).collect();
    let targets = indices(device, &targets);
    let mut scores = TokenScores::new(device, rows).unwrap();
    let shape = HeadShape { rows: 0..rows, width, vocab, entropy: true, mode: HeadMode::Main };
    let mut workspace =
        unset_compute(device, device.logp_head_workspace(shape.mode, rows, width, vocab).unwrap());
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
    let coefficients: TokenCoefficients<D> = TokenCoefficients {
        logp: floats(device, &random(3, rows, 1.0)),
        entropy: floats(device, &random(4, rows, 0.1)),
    };
    let mut dweight = floats(device, &vec![0.0; vocab * width]);
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
    vec![
        ("lse", read(device, &scores.lse)),
        ("logp", read(device, &scores.logp)),
        ("entropy", read(device, &scores.entropy)),
        ("dhidden", read_compute(device, &hidden)),
        ("dweight", read(device, &dweight)),
    ]
}

#[test]
fn threads_do_not_change_bits() {
    let all = |threads| {
        let device = cpu(threads);
        [gemms(&device), attention(&device), norms(&device), head(&device)].concat()
    };
    let wanted = all(1);
    for threads in [2, 3, 5] {
        for ((name, got), (_, wanted)) in all(threads).iter().zip(&wanted) {
            let differing = got.iter().zip(wanted).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(differing, 0, "{name} at {threads} threads, of {} values", wanted.len());
        }
    }
}
