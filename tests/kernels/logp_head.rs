use mmpo_fast::device::{Device, HeadShape, TokenCoefficients, TokenScores};

use crate::harness::*;
use crate::naive::{self, Precision};

/// Scored tokens, width, vocabulary: the paper's models' widths, and rows longer than what a block of the kernels takes in at
/// once.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 16, 40),
    (5, 24, 77),
    (12, 64, 1000),
    (3, 576, 5003),
    (2, 960, 130),
    (1, 2048, 130),
    (1, 4096, 130),
    (2, 16, 16_400),
    (2, 16, 49_155),
];

/// A head on a device, with the values it holds.
struct Case<D: Device> {
    scores: TokenScores<D>,
    hidden: D::Buffer<D::Compute>,
    hidden64: Vec<f64>,
    weight: D::Buffer<D::Compute>,
    weight64: Vec<f64>,
    targets: Vec<u32>,
    logits: D::Buffer<D::Compute>,
    shape: HeadShape,
}

impl<D: Device> Case<D> {
    /// Runs the forward pass over all rows; `scale` is the standard deviation of the logits.
    fn forward(device: &D, (rows, width, vocab): (usize, usize, usize), scale: f32) -> Self {
        let (hidden, hidden64) = random_compute(device, 1, rows * width, scale / (width as f32).sqrt());
        let (weight, weight64) = random_compute(device, 2, vocab * width, 1.0);
        let targets: Vec<u32> = (0..rows).map(|row| (row * 31 + 7) as u32 % vocab as u32).collect();
        let mut scores = TokenScores::new(device, rows).unwrap();
        let mut logits = unset_compute(device, rows * vocab);
        let shape = HeadShape { rows: 0..rows, width, vocab, entropy: true };
        let device_targets = indices(device, &targets);
        device
            .logp_head_forward(&mut scores, &mut logits, &hidden, &weight, &device_targets, &shape)
            .unwrap();
        Case { scores, hidden, hidden64, weight, weight64, targets, logits, shape }
    }

    fn naive(&self) -> naive::Head {
        naive::logp_head(&self.hidden64, &self.weight64, &self.targets, self.shape.width)
    }

    fn eager(&self) -> naive::Head {
        Precision::Bf16.logp_head(&self.hidden64, &self.weight64, &self.targets, self.shape.width)
    }
}

/// `dhidden` and `dweight` of a head, the latter behind what was there before.
fn gradients<D: Device>(
    precision: Precision,
    case: &Case<D>,
    a: &[f64],
    b: &[f64],
    before: &[f64],
) -> [Vec<f64>; 2] {
    let (width, vocab) = (case.shape.width, case.shape.vocab);
    let head = precision.logp_head(&case.hidden64, &case.weight64, &case.targets, width);
    let dlogits = precision.logp_head_dlogits(&head, &case.targets, a, b);
    let dweight = precision.linear_backward_weight(&dlogits, &case.hidden64, width);
    assert_eq!(dlogits.len(), case.targets.len() * vocab);
    [precision.linear_backward_input(&dlogits, &case.weight64, width), precision.accumulate(before, &dweight)]
}

/// `sum_v |dlogits_v| |weight_v|` of a row, for `dL/dlogp = 1`: the size of what its gradient is a sum of.
fn dlogit_terms<D: Device>(case: &Case<D>, row: usize) -> Vec<f64> {
    let width = case.shape.width;
    let hidden = &case.hidden64[row * width..][..width];
    let logits: Vec<f64> = case.weight64.chunks(width).map(|weight| inner(weight, hidden)).collect();
    let lse = naive::log_sum_exp(&logits);
    let mut terms = vec![0.0; width];
    for (v, weight) in case.weight64.chunks(width).enumerate() {
        let target = if v == case.targets[row] as usize { 1.0 } else { 0.0 };
        let dlogit = (target - (logits[v] - lse).exp()).abs();
        terms.iter_mut().zip(weight).for_each(|(term, weight)| *term += dlogit * weight.abs());
    }
    terms
}

path_tests! {
    /// lse, log-prob and entropy, for flat and for peaked distributions.
    fn forward(device, bounds) {
        for &sizes in SHAPES {
            for scale in [0.1, 2.0, 12.0] {
                let case = Case::forward(device, sizes, scale);
                let wanted = case.naive();
                let (lse, logp) = (read(device, &case.scores.lse), read(device, &case.scores.logp));
                let entropy = read(device, &case.scores.entropy);
                assert_close("lse", &lse, &wanted.lse, Tolerance::F32);
                assert_close("logp", &logp, &wanted.logp, Tolerance::F32);
                // An entropy is a difference of numbers of the size of the logits.
                let size = f64::from(scale).max(1.0);
                let bounds = Tolerance { absolute: size * Tolerance::F32.absolute, ..Tolerance::F32 };
                assert_close("entropy", &entropy, &wanted.entropy, bounds);
                let eager = case.eager();
                assert_no_worse("lse", &lse, Stored::F32, &wanted.lse, &eager.lse);
                assert_no_worse("logp", &logp, Stored::F32, &wanted.logp, &eager.logp);
                assert_no_worse("entropy", &entropy, Stored::F32, &wanted.entropy, &eager.entropy);
            }
        }
    }

    /// Without entropies the rest is the same, and a call touches only its own rows.
    fn rows_of_a_call(device, bounds) {
        let (rows, width, vocab) = (9, 24, 77);
        let whole = Case::forward(device, (rows, width, vocab), 2.0);
        let mut scores = TokenScores {
            lse: unset_floats(device, rows),
            logp: unset_floats(device, rows),
            entropy: unset_floats(device, 0),
        };
        let mut logits = unset_compute(device, 4 * vocab);
        let targets = indices(device, &whole.targets);
        let shape = HeadShape { rows: 3..7, width, vocab, entropy: false };
        device.logp_head_forward(&mut scores, &mut logits, &whole.hidden, &whole.weight, &targets, &shape).unwrap();
        let wanted = whole.naive();
        let (lse, logp) = (read(device, &scores.lse), read(device, &scores.logp));
        assert_close("lse", &lse[3..7], &wanted.lse[3..7], Tolerance::F32);
        assert_close("logp", &logp[3..7], &wanted.logp[3..7], Tolerance::F32);
        assert!(lse[..3].iter().chain(&lse[7..]).all(|value| value.is_nan()), "{lse:?}");
    }

    /// `dL/dhidden` and `dL/dweight` of `sum a logp + b entropy` against central differences; the weight's accumulates,
    /// and leaving it out changes nothing else.
    fn backward(device, bounds) {
        for &sizes in SHAPES {
            for with_entropy in [false, true] {
                let (rows, width, vocab) = sizes;
                // A difference costs four walks over the vocabulary.
                let samples = if vocab > 10_000 { 4 } else { 20 };
                let a = random(3, rows, 1.0);
                let b = if with_entropy { random(4, rows, 0.7) } else { vec![0.0; rows] };
                let coefficients: TokenCoefficients<_> =
                    TokenCoefficients { logp: floats(device, &a), entropy: floats(device, &b) };
                let before = random(5, vocab * width, 0.1);
                let mut dweight = floats(device, &before);
                let mut hidden_gradients = Vec::new();
                for with_weight in [true, false] {
                    let mut case = Case::forward(device, sizes, 2.0);
                    let targets = indices(device, &case.targets);
                    device.logp_head_backward(
                        &mut case.hidden,
                        with_weight.then_some(&mut dweight),
                        &mut case.logits,
                        &case.weight,
                        &targets,
                        &case.scores,
                        &coefficients,
                        &case.shape,
                    ).unwrap();
                    hidden_gradients.push(read_compute(device, &case.hidden));
                }
                assert_eq!(hidden_gradients[0], hidden_gradients[1]);
                let case = Case::forward(device, sizes, 2.0);
                let (a, b, before) = (wide(&a), wide(&b), wide(&before));
                let dweight = read(device, &dweight);
                let [exact, eager] = naive::both(|precision| gradients(precision, &case, &a, &b, &before));
                assert_no_worse("dhidden", &hidden_gradients[0], Stored::Bf16, &exact[0], &eager[0]);
                assert_no_worse("dweight", &dweight, Stored::F32, &exact[1], &eager[1]);
                let scalar = |hidden: &[f64], weight: &[f64]| {
                    let head = naive::logp_head(hidden, weight, &case.targets, width);
                    inner(&a, &head.logp) + inner(&b, &head.entropy)
                };
                assert_gradient(
                    "dhidden",
                    &hidden_gradients[0],
                    |hidden| scalar(hidden, &case.weight64),
                    &case.hidden64,
                    samples,
                    bounds,
                );
                assert_gradient(
                    "dweight",
                    &dweight,
                    |weight| scalar(&case.hidden64, weight) + inner(&before, weight),
                    &case.weight64,
                    samples,
                    bounds,
                );
            }
        }
    }

    /// Targets that the model is nearly sure of: their gradient, `a (1 - pi)`, must not drown in the rounding of `pi`.
    fn backward_of_sure_targets(device, bounds) {
        let (rows, width, vocab) = (9, 24, 77);
        let mut case = Case::forward(device, (rows, width, vocab), 6.0);
        let mut surest = 0.0;
        for row in 0..rows {
            let logits: Vec<f64> =
                case.weight64.chunks(width).map(|weight| inner(weight, &case.hidden64[row * width..][..width])).collect();
            let largest = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            case.targets[row] = largest as u32;
            surest = f64::max(surest, (logits[largest] - naive::log_sum_exp(&logits)).exp());
        }
        assert!(surest > 0.9, "{surest}");
        let targets = indices(device, &case.targets);
        for row in 0..rows {
            // One row at a time, so that each is compared with its own size.
            let a: Vec<f32> = (0..rows).map(|other| if other == row { 1.0 } else { 0.0 }).collect();
            let coefficients =
                TokenCoefficients { logp: floats(device, &a), entropy: floats(device, &vec![0.0; rows]) };
            case.hidden = random_compute(device, 1, rows * width, 6.0 / (width as f32).sqrt()).0;
            device.logp_head_forward(
                &mut case.scores, &mut case.logits, &case.hidden, &case.weight, &targets, &case.shape,
            ).unwrap();
            device.logp_head_backward(
                &mut case.hidden, None, &mut case.logits, &case.weight, &targets, &case.scores, &coefficients, &case.shape,
            ).unwrap();
            let scalar = |hidden: &[f64]| naive::logp_head(hidden, &case.weight64, &case.targets, width).logp[row];
            let gradients: Vec<f64> =
                (row * width..(row + 1) * width).map(|i| derivative(scalar, &case.hidden64, i)).collect();
            let got = &read_compute(device, &case.hidden)[row * width..(row + 1) * width];
            let terms = dlogit_terms(&case, row);
            for (i, (&got, &wanted)) in got.iter().zip(&gradients).enumerate() {
                // A kept probability and a stored dlogit are rounded once each. In f32, 1 - pi is off by 6e-8 of 1.
                let allowed = bounds.relative.max(1e-4) * (terms[i] + wanted.abs());
                let error = (f64::from(got) - wanted).abs();
                assert!(error <= allowed, "row {row}: dhidden[{i}] = {got}, wanted {wanted}: {error:e} > {allowed:e}");
            }
        }
    }

    /// Only rows of the call are replaced by their gradient.
    fn backward_rows(device, bounds) {
        let (rows, width, vocab) = (6, 24, 77);
        let mut case = Case::forward(device, (rows, width, vocab), 2.0);
        let before = read_compute(device, &case.hidden);
        let targets = indices(device, &case.targets);
        let shape = HeadShape { rows: 2..5, entropy: false, ..case.shape.clone() };
        let mut logits = unset_compute(device, 3 * vocab);
        device.logp_head_forward(&mut case.scores, &mut logits, &case.hidden, &case.weight, &targets, &shape).unwrap();
        let a = random(3, rows, 1.0);
        let coefficients = TokenCoefficients { logp: floats(device, &a), entropy: floats(device, &vec![f32::NAN; rows]) };
        device.logp_head_backward(
            &mut case.hidden, None, &mut logits, &case.weight, &targets, &case.scores, &coefficients, &shape,
        ).unwrap();
        let after = read_compute(device, &case.hidden);
        let inside = 2 * width..5 * width;
        assert_eq!(before[..inside.start], after[..inside.start]);
        assert_eq!(before[inside.end..], after[inside.end..]);
        let a = wide(&a);
        let scalar = |hidden: &[f64]| {
            inner(&a[2..5], &naive::logp_head(hidden, &case.weight64, &case.targets, width).logp[2..5])
        };
        let gradients: Vec<f64> = inside.clone().map(|i| derivative(scalar, &case.hidden64, i)).collect();
        assert_close("dhidden", &after[inside], &gradients, bounds);
    }

    /// A buffer that is too small is an error.
    fn too_small(device, bounds) {
        let mut case = Case::forward(device, (2, 16, 40), 1.0);
        let shape = HeadShape { rows: 0..3, ..case.shape.clone() };
        let targets = indices(device, &[3, 4, 5]);
        let error = device.logp_head_forward(
            &mut case.scores, &mut case.logits, &case.hidden, &case.weight, &targets, &shape,
        );
        assert!(error.unwrap_err().to_string().contains("holds"));
    }
}

cpu_tests! {
    /// A target behind the vocabulary is an error that names it.
    fn target_outside_the_vocabulary(device) {
        let mut case = Case::forward(device, (2, 16, 40), 1.0);
        let targets = indices(device, &[3, 40]);
        let error = device.logp_head_forward(
            &mut case.scores, &mut case.logits, &case.hidden, &case.weight, &targets, &case.shape,
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains("logp_head_forward") && error.contains("target 40"), "{error}");
    }
}
