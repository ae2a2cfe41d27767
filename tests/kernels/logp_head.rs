use mmpo_fast::device::{
    Device, HeadBackward, HeadForward, HeadMode, HeadShape, Indices, TokenCoefficients, TokenScores,
};

use crate::harness::*;
use crate::naive::{self, Precision};

/// Scored tokens, width, vocabulary: one token, tails of tiles in every direction, widths and vocabularies that are no
/// whole vectors, more tiles than warps that merge them.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 16, 40),
    (5, 24, 77),
    (12, 64, 1000),
    (3, 136, 650),
    (9, 17, 300),
    (131, 32, 264),
    (2, 16, 2500),
    (6, 24, 2048),
];

/// The widths of the paper's models.
const MODEL_WIDTHS: &[(usize, usize, usize)] =
    &[(3, 576, 130), (2, 960, 130), (1, 2048, 130), (1, 4096, 130)];

const GRADIENT_MODES: [HeadMode; 2] = [HeadMode::Main, HeadMode::Recompute];

/// The ways to a gradient: main mode with an entropy term and without go different ones.
const WAYS: [(HeadMode, bool); 3] =
    [(HeadMode::Main, false), (HeadMode::Main, true), (HeadMode::Recompute, false)];

/// A head on a device, with the values it holds.
struct Case<D: Device> {
    scores: TokenScores<D>,
    hidden: D::Buffer<D::Compute>,
    hidden64: Vec<f64>,
    weight: D::Buffer<D::Compute>,
    weight64: Vec<f64>,
    targets: Vec<u32>,
    device_targets: Indices<D>,
    workspace: D::Buffer<D::Compute>,
    shape: HeadShape,
}

impl<D: Device> Case<D> {
    /// The case's shape over all rows; `scale` is the standard deviation of the logits.
    fn new(device: &D, mode: HeadMode, (rows, width, vocab): (usize, usize, usize), scale: f32) -> Self {
        trying("(mode, (rows, width, vocabulary), scale)", (mode, (rows, width, vocab), scale));
        let (hidden, hidden64) = random_compute(device, 1, rows * width, scale / (width as f32).sqrt());
        let (weight, weight64) = random_compute(device, 2, vocab * width, 1.0);
        let targets: Vec<u32> = (0..rows).map(|row| (row * 31 + 7) as u32 % vocab as u32).collect();
        let device_targets = indices(device, &targets);
        let scores = TokenScores {
            lse: unset_floats(device, rows),
            logp: unset_floats(device, rows),
            entropy: unset_floats(device, rows),
        };
        let workspace = unset_compute(device, device.logp_head_workspace(mode, rows, width, vocab).unwrap());
        let shape = HeadShape { rows: 0..rows, width, vocab, entropy: true, mode };
        Case { scores, hidden, hidden64, weight, weight64, targets, device_targets, workspace, shape }
    }

    fn forward(&mut self, device: &D) {
        self.try_forward(device).unwrap();
    }

    fn try_forward(&mut self, device: &D) -> mmpo_fast::error::Result<()> {
        device.logp_head_forward(HeadForward {
            scores: &mut self.scores,
            workspace: &mut self.workspace,
            hidden: &self.hidden,
            weight: &self.weight,
            targets: &self.device_targets,
            shape: &self.shape,
        })
    }

    /// Replaces the rows of `hidden` by their gradient; `a` and `b` are `dL/dlogp` and `dL/dentropy`.
    fn backward(&mut self, device: &D, a: &[f32], b: &[f32], dweight: Option<&mut D::Buffer<f32>>) {
        let coefficients: TokenCoefficients<D> =
            TokenCoefficients { logp: floats(device, a), entropy: floats(device, b) };
        device
            .logp_head_backward(HeadBackward {
                hidden: &mut self.hidden,
                dweight,
                workspace: &mut self.workspace,
                weight: &self.weight,
                targets: &self.device_targets,
                scores: &self.scores,
                coefficients: &coefficients,
                shape: &self.shape,
            })
            .unwrap();
    }

    fn set_targets(&mut self, device: &D, targets: Vec<u32>) {
        self.device_targets = indices(device, &targets);
        self.targets = targets;
    }

    fn naive(&self) -> naive::Head {
        naive::logp_head(&self.hidden64, &self.weight64, &self.targets, self.shape.width)
    }

    fn eager(&self) -> naive::Head {
        Precision::Bf16.logp_head(&self.hidden64, &self.weight64, &self.targets, self.shape.width)
    }
}

/// `dhidden` and `dweight` of a head; `dweight` is added to what was there before.
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

/// What a forward and backward leave: lse, log-probs, entropies, `dhidden`, `dweight`.
fn outputs<D: Device>(
    device: &D,
    mode: HeadMode,
    sizes: (usize, usize, usize),
    entropy: bool,
    workspace: Option<usize>,
) -> [Vec<f32>; 5] {
    let (rows, width, vocab) = sizes;
    let mut case = Case::new(device, mode, sizes, 2.0);
    case.shape.entropy = entropy;
    if !entropy {
        case.scores.entropy = floats(device, &vec![0.0; rows]);
    }
    if let Some(values) = workspace {
        case.workspace = unset_compute(device, values);
    }
    let mut dweight = floats(device, &vec![0.0; vocab * width]);
    case.forward(device);
    case.backward(device, &random(3, rows, 1.0), &random(4, rows, 0.3), Some(&mut dweight));
    [
        read(device, &case.scores.lse),
        read(device, &case.scores.logp),
        read(device, &case.scores.entropy),
        read_compute(device, &case.hidden),
        read(device, &dweight),
    ]
}

/// Log-probs are the same but for f32's rounding. Gradients may differ in the rounding of each term of their sums, so they
/// are compared as wholes.
#[track_caller]
fn assert_agree(got: &[Vec<f32>; 5], wanted: &[Vec<f32>; 5], bounds: Tolerance) {
    for (name, got, wanted) in
        [("lse", &got[0], &wanted[0]), ("logp", &got[1], &wanted[1]), ("entropy", &got[2], &wanted[2])]
    {
        assert_close(name, got, &wide(wanted), Tolerance::F32);
    }
    for (name, got, wanted) in [("dhidden", &got[3], &wanted[3]), ("dweight", &got[4], &wanted[4])] {
        assert_near(name, got, &wide(wanted), bounds.relative);
    }
}

/// Asserts that lse, log-probs, entropies and the gradients, as far as there are, have the same bits.
#[track_caller]
fn assert_equal(got: &[Vec<f32>], wanted: &[Vec<f32>]) {
    for (name, (got, wanted)) in
        ["lse", "logp", "entropy", "dhidden", "dweight"].iter().zip(got.iter().zip(wanted))
    {
        assert_same_bits(name, got, wanted);
    }
}

/// Asserts that the difference is at most `relative` of `wanted`, in the Euclidean norm.
#[track_caller]
fn assert_near(what: &str, got: &[f32], wanted: &[f64], relative: f64) {
    let difference: Vec<f64> = wide(got).iter().zip(wanted).map(|(got, wanted)| got - wanted).collect();
    let distance = (inner(&difference, &difference) / inner(wanted, wanted)).sqrt();
    let furthest =
        (0..got.len()).max_by(|&a, &b| difference[a].abs().total_cmp(&difference[b].abs())).unwrap_or(0);
    assert!(
        distance <= relative,
        "{what}: {distance:e} of its norm off, {relative:e} allowed; furthest [{furthest}] = {:e}, wanted {:e}",
        got[furthest],
        wanted[furthest]
    );
}

path_tests! {
    /// lse, log-prob and entropy, for flat and for peaked distributions.
    fn forward(device, bounds) {
        for (&sizes, scales) in SHAPES
            .iter()
            .map(|sizes| (sizes, &[0.1, 2.0, 12.0][..]))
            .chain(MODEL_WIDTHS.iter().map(|sizes| (sizes, &[2.0][..])))
        {
            for &scale in scales {
                let mode = if scale == 2.0 { HeadMode::Main } else { HeadMode::Score };
                let mut case = Case::new(device, mode, sizes, scale);
                case.forward(device);
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

    /// Log-probs come from f32 accumulators: their error is a fraction of what a log-softmax of logits rounded to bf16
    /// makes, even one in f64.
    fn log_probs_beat_rounded_logits(device, bounds) {
        let mut case = Case::new(device, HeadMode::Score, (40, 64, 1000), 6.0);
        case.forward(device);
        let (width, exact) = (case.shape.width, case.naive().logp);
        let rounded: Vec<f64> = case.hidden64.chunks(width).zip(&case.targets).map(|(hidden, &target)| {
            let logit = |weight: &[f64]| f64::from(half::bf16::from_f64(inner(weight, hidden)));
            let logits: Vec<f64> = case.weight64.chunks(width).map(logit).collect();
            logits[target as usize] - naive::log_sum_exp(&logits)
        }).collect();
        let largest = |values: &[f64]| {
            values.iter().zip(&exact).map(|(value, exact)| (value - exact).abs()).fold(0.0, f64::max)
        };
        let logp = wide(&read(device, &case.scores.logp));
        assert!(logp.iter().all(|logp| logp.is_finite()), "{logp:?}");
        let (ours, theirs) = (largest(&logp), largest(&rounded));
        println!("largest error of a log-prob: {ours:.1e} nats, from bf16 logits {theirs:.1e}: {:.0} times", theirs / ours);
        assert!(4.0 * ours <= theirs, "{ours:e} against {theirs:e} from bf16 logits");
    }

    /// A target in the first and last column of the vocabulary and of a tile.
    fn targets_at_tile_edges(device, bounds) {
        let targets = vec![0, 1, 7, 8, 31, 32, 63, 64, 127, 128, 129, 255, 256, 257, 383, 384, 390];
        for (mode, entropy) in WAYS {
            let mut case = Case::new(device, mode, (targets.len(), 16, 391), 2.0);
            case.shape.entropy = entropy;
            case.set_targets(device, targets.clone());
            case.forward(device);
            assert_close("logp", &read(device, &case.scores.logp), &case.naive().logp, Tolerance::F32);
            let a = random(3, targets.len(), 1.0);
            case.backward(device, &a, &vec![0.0; targets.len()], None);
            let zeros = vec![0.0; targets.len()];
            let [wanted, _] = gradients(Precision::Exact, &case, &wide(&a), &zeros, &vec![0.0; 391 * 16]);
            assert_close("dhidden", &read_compute(device, &case.hidden), &wanted, bounds);
        }
    }

    /// Without entropies the rest is the same, and a call touches only its own rows.
    fn rows_of_a_call(device, bounds) {
        let (rows, width, vocab) = (9, 24, 77);
        for mode in [HeadMode::Score, HeadMode::Main, HeadMode::Recompute] {
            let mut case = Case::new(device, mode, (rows, width, vocab), 2.0);
            case.scores.entropy = unset_floats(device, 0);
            case.shape = HeadShape { rows: 3..7, entropy: false, ..case.shape };
            case.forward(device);
            let wanted = case.naive();
            let (lse, logp) = (read(device, &case.scores.lse), read(device, &case.scores.logp));
            assert_close("lse", &lse[3..7], &wanted.lse[3..7], Tolerance::F32);
            assert_close("logp", &logp[3..7], &wanted.logp[3..7], Tolerance::F32);
            assert!(lse[..3].iter().chain(&lse[7..]).all(|value| value.is_nan()), "{lse:?}");
        }
    }

    /// `dL/dhidden` and `dL/dweight` of `sum a logp + b entropy` against central differences; the weight's accumulates,
    /// and leaving it out changes nothing else.
    fn backward(device, bounds) {
        let cases = SHAPES.iter().enumerate().flat_map(|(index, &sizes)| {
            // With and without entropies the tiles are the same.
            let entropies: &[bool] = if index < 3 { &[true, false] } else { &[false] };
            entropies.iter().flat_map(move |&entropy| GRADIENT_MODES.map(|mode| (sizes, mode, entropy)))
        });
        for (sizes, mode, with_entropy) in cases {
            let (rows, width, vocab) = sizes;
            let a = random(3, rows, 1.0);
            let b = if with_entropy { random(4, rows, 0.7) } else { vec![0.0; rows] };
            let before = random(5, vocab * width, 0.1);
            let mut dweight = floats(device, &before);
            let mut case = Case::new(device, mode, sizes, 2.0);
            case.shape.entropy = with_entropy;
            case.forward(device);
            case.backward(device, &a, &b, Some(&mut dweight));
            let dhidden = read_compute(device, &case.hidden);
            if rows < 100 {
                let mut without = Case::new(device, mode, sizes, 2.0);
                without.shape.entropy = with_entropy;
                without.forward(device);
                without.backward(device, &a, &b, None);
                assert_same_bits("dhidden", &read_compute(device, &without.hidden), &dhidden);
            }
            let (a, b, before) = (wide(&a), wide(&b), wide(&before));
            let dweight = read(device, &dweight);
            let inputs: [&[f64]; 5] = [&case.hidden64, &case.weight64, &a, &b, &before];
            let [exact, eager] = naive::both_once((&case.targets, sizes), &inputs, |precision| {
                gradients(precision, &case, &a, &b, &before)
            });
            assert_no_worse("dhidden", &dhidden, Stored::Bf16, &exact[0], &eager[0]);
            assert_no_worse("dweight", &dweight, Stored::F32, &exact[1], &eager[1]);
            // The exact gradient is that of central differences, which cost a head each.
            if mode != HeadMode::Main || rows > 100 {
                continue;
            }
            let scalar = |hidden: &[f64], weight: &[f64]| {
                let head = naive::logp_head(hidden, weight, &case.targets, width);
                inner(&a, &head.logp) + inner(&b, &head.entropy)
            };
            let samples = if vocab > 1000 { 4 } else { 20 };
            assert_gradient(
                "dhidden", &dhidden, |hidden| scalar(hidden, &case.weight64), &case.hidden64, samples, bounds,
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

    /// Coefficients of zero leave no trace, whatever the log-probs are.
    fn zero_coefficients(device, bounds) {
        let (rows, width, vocab) = (5, 24, 77);
        for mode in GRADIENT_MODES {
            for scale in [0.0, 2.0, 200.0] {
                let mut case = Case::new(device, mode, (rows, width, vocab), scale);
                case.forward(device);
                let before = random(5, vocab * width, 1.0);
                let mut dweight = floats(device, &before);
                case.backward(device, &vec![0.0; rows], &vec![0.0; rows], Some(&mut dweight));
                assert!(read_compute(device, &case.hidden).iter().all(|&value| value == 0.0), "{mode:?} {scale}");
                assert_same_bits("dweight", &read(device, &dweight), &before);
            }
        }
    }

    /// Both ways to the gradient give the same within the rounding of what main mode keeps, whatever the chunks of the
    /// recompute mode; and each gives the same bits every time.
    fn modes_agree(device, bounds) {
        let sizes = (270, 128, 530);
        let (rows, width, vocab) = sizes;
        // Two runs of rows times three of columns on a GPU, many runs of rows on the CPU.
        let of_rows = |rows| device.logp_head_workspace(HeadMode::Main, rows, width, vocab).unwrap();
        let small = if is_cpu::<D>() { of_rows(7) } else { 132_000 };
        assert!(small < device.logp_head_workspace(HeadMode::Recompute, rows, width, vocab).unwrap());
        for entropy in [true, false] {
            let main = outputs(device, HeadMode::Main, sizes, entropy, None);
            assert_equal(&outputs(device, HeadMode::Main, sizes, entropy, None), &main);
            let recompute = outputs(device, HeadMode::Recompute, sizes, entropy, None);
            assert_agree(&recompute, &main, bounds);
            let chunked = outputs(device, HeadMode::Recompute, sizes, entropy, Some(small));
            assert_equal(&chunked[..3], &recompute[..3]);
            assert_agree(&chunked, &main, bounds);
            assert_equal(&outputs(device, HeadMode::Recompute, sizes, entropy, Some(small)), &chunked);
        }
    }

    /// Logits that differ by hundreds, and targets among the unlikeliest: tiles that cannot share the row's reference.
    fn far_logits(device, bounds) {
        let (rows, width, vocab) = (40, 16, 391);
        for mode in GRADIENT_MODES {
            let mut case = Case::new(device, mode, (rows, width, vocab), 60.0);
            case.shape.entropy = false;
            case.forward(device);
            let wanted = case.naive();
            assert!(wanted.logp.iter().any(|&logp| logp < -100.0) && wanted.logp.iter().any(|&logp| logp > -40.0));
            assert_close("lse", &read(device, &case.scores.lse), &wanted.lse, Tolerance::F32);
            assert_close("logp", &read(device, &case.scores.logp), &wanted.logp, Tolerance::F32);
            let a = random(3, rows, 1.0);
            let mut dweight = floats(device, &vec![0.0; vocab * width]);
            case.backward(device, &a, &vec![0.0; rows], Some(&mut dweight));
            let zeros = vec![0.0; vocab * width];
            let [dhidden, wanted] =
                gradients(Precision::Exact, &case, &wide(&a), &vec![0.0; rows], &zeros);
            // An f32 logit of 200 is off by 1e-5, and so is its probability.
            let relative = bounds.relative.max(1e-4);
            assert_near("dhidden", &read_compute(device, &case.hidden), &dhidden, relative);
            assert_near("dweight", &read(device, &dweight), &wanted, relative);
        }
    }

    /// Log-probs alone of more rows than the workspace holds statistics of.
    fn runs_of_the_forward(device, bounds) {
        let (rows, width, vocab) = (300, 16, 391);
        let mut case = Case::new(device, HeadMode::Score, (rows, width, vocab), 2.0);
        case.forward(device);
        let mut small = Case::new(device, HeadMode::Score, (rows, width, vocab), 2.0);
        let of_rows = |rows| device.logp_head_workspace(HeadMode::Main, rows, width, vocab).unwrap();
        let values = if is_cpu::<D>() { of_rows(100) } else { 7_300 };
        assert!(values < device.logp_head_workspace(HeadMode::Score, rows, width, vocab).unwrap());
        small.workspace = unset_compute(device, values);
        small.forward(device);
        for (small, whole) in [
            (&small.scores.lse, &case.scores.lse),
            (&small.scores.logp, &case.scores.logp),
            (&small.scores.entropy, &case.scores.entropy),
        ] {
            assert_same_bits("scores", &read(device, small), &read(device, whole));
        }
    }

    /// Targets that the model is nearly sure of: their gradient, `a (1 - pi)`, must not drown in the rounding of `pi`.
    fn backward_of_sure_targets(device, bounds) {
        let (rows, width, vocab) = (9, 24, 77);
        for (mode, entropy) in WAYS {
            let mut case = Case::new(device, mode, (rows, width, vocab), 6.0);
            case.shape.entropy = entropy;
            let mut surest = 0.0;
            let likeliest = case.hidden64.chunks(width).map(|hidden| {
                let logits: Vec<f64> = case.weight64.chunks(width).map(|weight| inner(weight, hidden)).collect();
                let largest = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                surest = f64::max(surest, (logits[largest] - naive::log_sum_exp(&logits)).exp());
                largest as u32
            }).collect();
            assert!(surest > 0.9, "{surest}");
            case.set_targets(device, likeliest);
            for row in 0..rows {
                // One row at a time, so that each is compared with its own size.
                let a: Vec<f32> = (0..rows).map(|other| if other == row { 1.0 } else { 0.0 }).collect();
                case.hidden = random_compute(device, 1, rows * width, 6.0 / (width as f32).sqrt()).0;
                case.forward(device);
                case.backward(device, &a, &vec![0.0; rows], None);
                let scalar = |hidden: &[f64]| naive::logp_head(hidden, &case.weight64, &case.targets, width).logp[row];
                let gradients: Vec<f64> =
                    (row * width..(row + 1) * width).map(|i| derivative(scalar, &case.hidden64, i)).collect();
                let got = &read_compute(device, &case.hidden)[row * width..(row + 1) * width];
                let terms = dlogit_terms(&case, row);
                for (i, (&got, &wanted)) in got.iter().zip(&gradients).enumerate() {
                    // A kept exponential and a stored dlogit are rounded once each. In f32, 1 - pi is off by 6e-8 of 1.
                    let allowed = bounds.relative.max(1e-4) * (terms[i] + wanted.abs());
                    let error = (f64::from(got) - wanted).abs();
                    assert!(error <= allowed, "row {row}: dhidden[{i}] = {got}, wanted {wanted}: {error:e} > {allowed:e}");
                }
            }
        }
    }

    /// Only rows of the call are replaced by their gradient.
    fn backward_rows(device, bounds) {
        let (rows, width, vocab) = (6, 24, 77);
        for mode in GRADIENT_MODES {
            let mut case = Case::new(device, mode, (rows, width, vocab), 2.0);
            case.shape = HeadShape { rows: 2..5, entropy: false, ..case.shape };
            let before = read_compute(device, &case.hidden);
            case.forward(device);
            let a = random(3, rows, 1.0);
            case.backward(device, &a, &vec![f32::NAN; rows], None);
            let after = read_compute(device, &case.hidden);
            let inside = 2 * width..5 * width;
            assert_same_bits("rows before", &after[..inside.start], &before[..inside.start]);
            assert_same_bits("rows after", &after[inside.end..], &before[inside.end..]);
            let a = wide(&a);
            let scalar = |hidden: &[f64]| {
                inner(&a[2..5], &naive::logp_head(hidden, &case.weight64, &case.targets, width).logp[2..5])
            };
            let gradients: Vec<f64> = inside.clone().map(|i| derivative(scalar, &case.hidden64, i)).collect();
            assert_close("dhidden", &after[inside], &gradients, bounds);
        }
    }

    /// A buffer that is too small is an error, and so is a backward after a forward of log-probs alone.
    fn too_small(device, bounds) {
        let mut case = Case::new(device, HeadMode::Main, (2, 16, 40), 1.0);
        case.shape.rows = 0..3;
        case.set_targets(device, vec![3, 4, 5]);
        let error = case.try_forward(device).unwrap_err().to_string();
        assert!(error.contains("holds"), "{error}");
        let mut case = Case::new(device, HeadMode::Score, (300, 16, 40), 1.0);
        case.workspace = unset_compute(device, 30);
        let error = case.try_forward(device).unwrap_err().to_string();
        assert!(error.contains("workspace"), "{error}");
        let coefficients = TokenCoefficients::new(device, 300).unwrap();
        case.workspace = unset_compute(device, 30_000);
        let error = device.logp_head_backward(HeadBackward {
            hidden: &mut case.hidden,
            dweight: None,
            workspace: &mut case.workspace,
            weight: &case.weight,
            targets: &case.device_targets,
            scores: &case.scores,
            coefficients: &coefficients,
            shape: &case.shape,
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("kept nothing for a backward"), "{error}");
    }
}

/// The large tiles of Hopper's gemm, alone and in clusters, against the portable ones. Only large gemms get them.
#[cfg(mmpo_emulated)]
#[test]
fn large_tiles() {
    let (portable, hopper) = (emulated(), emulated().with_path(KernelPath::Hopper));
    for mode in GRADIENT_MODES {
        for sizes in [(100, 16, 17_003), (250, 16, 9_003)] {
            let (got, wanted) =
                (outputs(&hopper, mode, sizes, false, None), outputs(&portable, mode, sizes, false, None));
            assert_agree(&got, &wanted, Tolerance::BF16);
        }
    }
}

cpu_tests! {
    /// A target beyond the vocabulary is an error that names it.
    fn target_outside_the_vocabulary(device) {
        let mut case = Case::new(device, HeadMode::Main, (2, 16, 40), 1.0);
        case.set_targets(device, vec![3, 40]);
        let error = case.try_forward(device).unwrap_err().to_string();
        assert!(error.contains("logp_head_forward") && error.contains("target 40"), "{error}");
    }
}

/// Tiles of 128 x 256 by one block and by two, which only products of this many rows and tokens choose: both sets of kernels
/// agree.
#[test]
fn gpu_wide_tiles() {
    let (Some(own), Some(portable)) = (gpu(), gpu()) else { return };
    let portable = portable.with_path(KernelPath::Portable).with_gemm_choice(GemmChoice::Ours);
    let own = own.with_gemm_choice(GemmChoice::Ours);
    for sizes in [(1408, 16, 3072), (1024, 16, 4096)] {
        for (mode, entropy) in WAYS {
            let wanted = outputs(&portable, mode, sizes, entropy, None);
            assert_agree(&outputs(&own, mode, sizes, entropy, None), &wanted, Tolerance::BF16);
        }
    }
}
