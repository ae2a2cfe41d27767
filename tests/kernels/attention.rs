use std::ops::Range;

use mmpo_fast::device::{AttentionGradient, AttentionShape, Device};
use proptest::prelude::*;

use crate::harness::*;
use crate::naive::{self, Precision};

type Sizes<'a> = &'a [(usize, usize, usize)];

/// Pairs and heads: every group size, both head sizes, tails of the tiles, sequences longer than a tile, one token.
const CASES: &[(Sizes<'_>, (usize, usize, usize))] = &[
    (&[(1, 0, 0)], (1, 1, 16)),
    (&[(0, 0, 1)], (2, 2, 16)),
    (&[(1, 1, 1)], (3, 1, 64)),
    (RAGGED, (3, 1, 16)),
    (RAGGED, (4, 4, 64)),
    (RAGGED, (8, 1, 128)),
    (&[(20, 40, 33), (37, 1, 9)], (9, 3, 64)),
    (&[(140, 30, 150)], (2, 1, 16)),
    (&[(10, 130, 0), (0, 97, 98)], (4, 1, 16)),
    // The heads of SmolLM2-360M, Llama-3.2-1B and Llama-3-8B; SmolLM2-135M's are above.
    (&[(3, 2, 4)], (15, 5, 64)),
    (&[(3, 2, 4)], (32, 8, 64)),
    (&[(3, 2, 4)], (32, 8, 128)),
];

/// Narrow heads are for the CPU's tails; the CUDA kernels know 64 and 128.
fn shape<D: Device>((heads, kv_heads, head_size): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_size: if is_cpu::<D>() { head_size } else { head_size.max(64) } }
}

/// Weights and their gradients are rounded to bf16 between the two products, and the backward reads a rounded output: twice the
/// error of storage alone.
fn attention_bounds<D: Device>(bounds: Tolerance) -> Tolerance {
    let factor = if is_f32::<D>() { 1.0 } else { 2.0 };
    Tolerance { relative: factor * bounds.relative, absolute: factor * bounds.absolute }
}

/// What a forward and a backward pass gave.
pub struct Passes {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub dqkv: Vec<f32>,
}

/// Runs both passes on `sizes` with the given values.
pub fn run<D: Device>(
    device: &D,
    sizes: Sizes<'_>,
    shape: AttentionShape,
    qkv: &[f32],
    dout: &[f32],
) -> Passes {
    let batch = pair_batch(sizes, 2);
    let buffers = load_batch(device, &batch, &[]);
    let tokens = batch.tokens();
    let (qkv, _) = compute(device, qkv);
    let (dout, _) = compute(device, dout);
    let mut out = unset_compute(device, tokens * shape.out_width());
    let mut lse = unset_floats(device, tokens * shape.heads);
    device.attention_forward(&mut out, &mut lse, &qkv, &buffers, shape).unwrap();
    let mut dqkv = unset_compute(device, tokens * shape.qkv_width());
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
    Passes { out: read_compute(device, &out), lse: read(device, &lse), dqkv: read_compute(device, &dqkv) }
}

/// Queries', keys' and values' gradients one by one: they differ in size.
fn assert_dqkv_no_worse(got: &[f32], exact: &[f64], eager: &[f64], shape: AttentionShape) {
    if got.len() == shape.qkv_width() {
        // A lone token's weight is 1, whatever its score: both versions' dq and dk are what is left of terms that cancel.
        return assert_no_worse("dqkv", got, Stored::Bf16, exact, eager);
    }
    let (queries, keys) = (shape.heads * shape.head_size, shape.kv_heads * shape.head_size);
    for (what, columns) in
        [("dq", 0..queries), ("dk", queries..queries + keys), ("dv", queries + keys..shape.qkv_width())]
    {
        let got: Vec<f32> = part(got, &columns, shape);
        assert_no_worse(
            what,
            &got,
            Stored::Bf16,
            &part(exact, &columns, shape),
            &part(eager, &columns, shape),
        );
    }
}

fn part<T: Copy>(dqkv: &[T], columns: &Range<usize>, shape: AttentionShape) -> Vec<T> {
    dqkv.chunks(shape.qkv_width()).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

path_tests! {
    /// Output and lse against the explicit `T x T` mask.
    fn forward(device, bounds) {
        let bounds = attention_bounds::<D>(bounds);
        for &(sizes, heads) in CASES {
            trying("(pairs, heads)", (sizes, heads));
            let shape = shape::<D>(heads);
            let spans = spans(sizes);
            let tokens = spans.last().unwrap().rows().end;
            // Scores with a standard deviation of about 3: peaked, as trained heads are.
            let (qkv, qkv64) = random_compute(device, 1, tokens * shape.qkv_width(), 1.7);
            let buffers = load_batch(device, &pair_batch(sizes, 2), &[]);
            let mut out = unset_compute(device, tokens * shape.out_width());
            let mut lse = unset_floats(device, tokens * shape.heads);
            device.attention_forward(&mut out, &mut lse, &qkv, &buffers, shape).unwrap();
            let (wanted, wanted_lse) = naive::attention(&qkv64, &spans, shape);
            let (out, lse) = (read_compute(device, &out), read(device, &lse));
            assert_close("out", &out, &wanted, bounds);
            assert_close("lse", &lse, &wanted_lse, bounds);
            let eager = Precision::Bf16.attention(&qkv64, &spans, shape);
            assert_no_worse("out", &out, Stored::Bf16, &wanted, &eager.out);
            assert_no_worse("lse", &lse, Stored::F32, &wanted_lse, &eager.lse);
        }
    }

    /// `dqkv` against central differences, in every part of every pair.
    fn backward(device, bounds) {
        let bounds = attention_bounds::<D>(bounds);
        for &(sizes, heads) in CASES {
            trying("(pairs, heads)", (sizes, heads));
            let shape = shape::<D>(heads);
            let spans = spans(sizes);
            let tokens = spans.last().unwrap().rows().end;
            let qkv = random(1, tokens * shape.qkv_width(), 1.2);
            let (_, qkv64) = compute(device, &qkv);
            let dout = random(2, tokens * shape.out_width(), 1.0);
            let (_, dout64) = compute(device, &dout);
            let passes = run(device, sizes, shape, &qkv, &dout);
            assert_gradient(
                "dqkv",
                &passes.dqkv,
                |qkv| inner(&naive::attention(qkv, &spans, shape).0, &dout64),
                &qkv64,
                if tokens > 60 { 12 } else { 40 },
                bounds,
            );
            let [exact, eager] = naive::both_once((sizes, shape), &[&qkv64, &dout64], |precision| {
                let pass = precision.attention(&qkv64, &spans, shape);
                precision.attention_backward(&dout64, &pass, &qkv64, shape)
            });
            assert_dqkv_no_worse(&passes.dqkv, &exact, &eager, shape);
        }
    }

    /// Generation's single query gives the last row of a plain causal sequence.
    fn decode(device, bounds) {
        for (length, heads) in [
            (1, (3, 1, 64)),
            (9, (8, 2, 64)),
            (128, (2, 2, 64)),
            (129, (4, 1, 128)),
            (150, (9, 3, 64)),
            (300, (4, 4, 128)),
        ] {
            trying("(length, heads)", (length, heads));
            let shape = shape::<D>(heads);
            let spans = spans(&[(length, 0, 0)]);
            let (cache, cache64) = random_compute(device, 1, (length + 2) * shape.qkv_width(), 1.5);
            let mut out = unset_compute(device, shape.out_width());
            device.attention_decode(&mut out, &cache, length, shape).unwrap();
            let (wanted, _) = naive::attention(&cache64[..length * shape.qkv_width()], &spans, shape);
            let last = &wanted[(length - 1) * shape.out_width()..];
            let out = read_compute(device, &out);
            assert_close("out", &out, last, bounds);
            let eager = Precision::Bf16.attention(&cache64[..length * shape.qkv_width()], &spans, shape);
            assert_no_worse("out", &out, Stored::Bf16, last, &eager.out[(length - 1) * shape.out_width()..]);
        }
    }

    /// Two runs give the same bits.
    fn same_bits(device, bounds) {
        let (sizes, heads) = CASES[6];
        let shape = shape::<D>(heads);
        let tokens = spans(sizes).last().unwrap().rows().end;
        let qkv = random(1, tokens * shape.qkv_width(), 1.2);
        let dout = random(2, tokens * shape.out_width(), 1.0);
        let (first, second) =
            (run(device, sizes, shape, &qkv, &dout), run(device, sizes, shape, &qkv, &dout));
        trying("(pairs, heads)", (sizes, heads));
        assert_same_bits("out", &second.out, &first.out);
        assert_same_bits("lse", &second.lse, &first.lse);
        assert_same_bits("dqkv", &second.dqkv, &first.dqkv);
    }

    /// Scores of hundreds of nats stay finite, and the softmax then picks the largest.
    fn large_scores(device, bounds) {
        let shape = shape::<D>((2, 1, 16));
        let sizes = &[(6, 5, 4)];
        trying("(pairs, heads)", (sizes, (2, 1, 16)));
        let tokens = 15;
        let qkv = random(3, tokens * shape.qkv_width(), 40.0);
        let (_, qkv64) = compute(device, &qkv);
        let passes = run(device, sizes, shape, &qkv, &random(4, tokens * shape.out_width(), 1.0));
        let (wanted, wanted_lse) = naive::attention(&qkv64, &spans(sizes), shape);
        assert_close("lse", &passes.lse, &wanted_lse, bounds);
        // A score of 1000 carries an f32 rounding of 6e-5, which the exponential passes on.
        let scores = Tolerance { relative: bounds.relative, absolute: bounds.absolute * 100.0 };
        assert_close("out", &passes.out, &wanted, scores);
        assert!(passes.dqkv.iter().all(|value| value.is_finite()));
    }

    /// Heads that do not divide, and spans that overlap or end after the buffers, are errors.
    fn refused(device, bounds) {
        let batch = pair_batch(&[(3, 2, 2)], 2);
        let mut buffers = load_batch(device, &batch, &[]);
        let good = shape::<D>((2, 1, 16));
        let (qkv, _) = random_compute(device, 1, 7 * good.qkv_width(), 1.0);
        let mut out = unset_compute(device, 7 * good.out_width());
        let mut lse = unset_floats(device, 7 * good.heads);
        let error = device.attention_forward(&mut out, &mut lse, &qkv, &buffers, shape::<D>((3, 2, 16)));
        assert!(error.unwrap_err().to_string().contains("attention_forward: 3 query heads"));
        let mut short = unset_floats(device, 6 * good.heads);
        let error = device.attention_forward(&mut out, &mut short, &qkv, &buffers, good).unwrap_err();
        assert!(error.to_string().contains("attention_forward"), "{error}");
        buffers.host_spans.push(buffers.host_spans[0]);
        let error = device.attention_forward(&mut out, &mut lse, &qkv, &buffers, good).unwrap_err();
        assert!(error.to_string().contains("overlaps"), "{error}");
    }
}

/// Rows of `values[T, width]` in `order`.
fn rows(values: &[f32], width: usize, order: impl IntoIterator<Item = usize>) -> Vec<f32> {
    order.into_iter().flat_map(|row| values[row * width..][..width].to_vec()).collect()
}

/// The packed pair gives each response what it would get alone after its prompt, forward and backward.
fn packed_equals_unpacked<D: Device>(device: &D, (p, c, r): (usize, usize, usize), bounds: Tolerance) {
    let shape = shape::<D>((6, 2, 16));
    let (width, out_width) = (shape.qkv_width(), shape.out_width());
    let tokens = p + c + r;
    let qkv = random(11, tokens * width, 1.3);
    let dout = random(12, tokens * out_width, 1.0);
    let packed = run(device, &[(p, c, r)], shape, &qkv, &dout);
    let mut gradients = vec![0.0_f64; tokens * width];
    for (side, response) in [(0, p..p + c), (1, p + c..tokens)] {
        let order: Vec<usize> = (0..p).chain(response.clone()).collect();
        if order.is_empty() {
            continue;
        }
        let mut side_dout = rows(&dout, out_width, order.iter().copied());
        // The prompt's own outputs exist once in the packed pair: count their gradient with the first side only.
        if side == 1 {
            side_dout[..p * out_width].fill(0.0);
        }
        let sizes = [(p + response.len(), 0, 0)];
        let alone = run(device, &sizes, shape, &rows(&qkv, width, order.iter().copied()), &side_dout);
        for (i, &row) in order.iter().enumerate() {
            let packed_out = &packed.out[row * out_width..][..out_width];
            assert_close("out", packed_out, &wide(&alone.out[i * out_width..][..out_width]), bounds);
            for column in 0..width {
                gradients[row * width + column] += f64::from(alone.dqkv[i * width + column]);
            }
        }
    }
    assert_close("dqkv", &packed.dqkv, &gradients, bounds);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn packed_equals_unpacked_on_the_cpu(p in 0_usize..60, c in 0_usize..50, r in 1_usize..50) {
        let double = Tolerance { relative: 2.0 * Tolerance::F32.relative, absolute: 2.0 * Tolerance::F32.absolute };
        packed_equals_unpacked(&cpu(2), (p, c, r), double);
    }
}
