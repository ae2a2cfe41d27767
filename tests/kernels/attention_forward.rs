//! The forward kernels where their tiles end: slabs and tiles of packed rows, blocks of keys, the seam between a
//! prompt's keys and a rejected response's own, with each number of query heads per key/value head. And what must not
//! change a bit.

use std::sync::OnceLock;

use half::bf16;
use mmpo_fast::data::PairSpan;
use mmpo_fast::device::{AttentionShape, Device};

use crate::harness::*;
use crate::naive::Precision;

type Sizes = Vec<(usize, usize, usize)>;

/// Tokens of tiles and blocks, as the kernels cut them: slabs of 64 rows, two or three a tile, blocks of 64 and 128 keys.
fn edges(group: usize, slabs: usize) -> Vec<usize> {
    let slab = 64 / group;
    let mut edges = vec![slab, 2 * slab, slabs * slab, 64, 128];
    edges.sort_unstable();
    edges.dedup();
    edges
}

/// Pairs whose prompt, chosen and rejected rows end at, just before and just after each edge.
fn around(edges: &[usize]) -> Sizes {
    let at = |edge: usize| {
        [(edge - 1, 0, edge + 1), (edge, 1, edge - 1), (edge / 2, edge - edge / 2 + 1, edge), (0, edge, 1)]
    };
    edges.iter().flat_map(|&edge| at(edge)).collect()
}

/// More pairs than a warp has lanes, of lengths from 0 to 39, a few of them empty.
fn many() -> Sizes {
    (0..45).map(|i| (i * 7 % 23, i * 11 % 40, if i % 5 == 0 { 0 } else { i * 13 % 37 })).collect()
}

struct Case {
    shape: AttentionShape,
    sizes: Sizes,
}

impl Case {
    fn new((heads, kv_heads, head_size): (usize, usize, usize), sizes: Sizes) -> Self {
        Case { shape: AttentionShape { heads, kv_heads, head_size }, sizes }
    }

    fn spans(&self) -> Vec<PairSpan> {
        spans(&self.sizes)
    }

    /// Values that bf16 holds exactly, so that all devices compute the same problem. Scores have a standard deviation of
    /// about 3: peaked, as trained heads are.
    fn qkv(&self) -> Vec<f32> {
        let rows = self.sizes.iter().map(|(p, c, r)| p + c + r).sum::<usize>();
        let values = random(7, rows * self.shape.qkv_width(), 1.7);
        values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect()
    }
}

fn cases() -> Vec<Case> {
    let edge_case = |(heads, kv_heads, head_size)| {
        let slabs = if head_size == 64 { 3 } else { 2 };
        Case::new((heads, kv_heads, head_size), around(&edges(heads / kv_heads, slabs)))
    };
    vec![
        edge_case((1, 1, 64)),
        edge_case((3, 1, 64)),
        edge_case((4, 1, 64)),
        edge_case((8, 1, 64)),
        edge_case((1, 1, 128)),
        edge_case((3, 1, 128)),
        // Two groups, so that a tile's key/value head is not the first.
        Case::new((8, 2, 128), vec![(31, 33, 32), (16, 0, 17), (130, 20, 15)]),
        Case::new((6, 2, 64), many()),
        // Groups that are not packed whole: 11 heads would leave 9 of 64 rows idle, 24 are packed by twelve.
        Case::new((11, 1, 64), vec![(70, 20, 75)]),
        Case::new((24, 1, 64), vec![(9, 7, 8)]),
        Case::new((1, 1, 64), vec![(400, 90, 210)]),
    ]
}

/// A pass in f64, and as an eager bf16 implementation gives it.
struct Reference {
    out: [Vec<f64>; 2],
    lse: [Vec<f64>; 2],
}

impl Reference {
    fn of(case: &Case) -> Self {
        let qkv = wide(&case.qkv());
        let mut reference = Reference { out: Default::default(), lse: Default::default() };
        // Pair by pair: the naive mask is the square of its rows.
        for span in case.spans() {
            let width = case.shape.qkv_width();
            let rows = &qkv[span.rows().start * width..span.rows().end * width];
            for (i, precision) in [Precision::Exact, Precision::Bf16].into_iter().enumerate() {
                let pass = precision.attention(rows, &[PairSpan { start: 0, ..span }], case.shape);
                reference.out[i].extend(pass.out);
                reference.lse[i].extend(pass.lse);
            }
        }
        reference
    }
}

/// The cases with their references, worked out once for all devices.
fn references() -> &'static [(Case, OnceLock<Reference>)] {
    static REFERENCES: OnceLock<Vec<(Case, OnceLock<Reference>)>> = OnceLock::new();
    REFERENCES.get_or_init(|| cases().into_iter().map(|case| (case, OnceLock::new())).collect())
}

/// `out[T, H * E]` and `lse[T, H]`.
fn forward<D: Device>(device: &D, case: &Case, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
    trying("(pairs, shape)", (&case.sizes, case.shape));
    let rows = qkv.len() / case.shape.qkv_width();
    let buffers = load_batch(device, &pair_batch(&case.sizes, 2), &[]);
    let (qkv, _) = compute(device, qkv);
    let mut out = unset_compute(device, rows * case.shape.out_width());
    let mut lse = unset_floats(device, rows * case.shape.heads);
    device.attention_forward(&mut out, &mut lse, &qkv, &buffers, case.shape).unwrap();
    (read_compute(device, &out), read(device, &lse))
}

fn times(bounds: Tolerance, factor: f64) -> Tolerance {
    Tolerance { relative: factor * bounds.relative, absolute: factor * bounds.absolute }
}

/// Rows of a matrix that has `rows` of them, in `order`.
fn gather(values: &[f32], rows: usize, order: &[usize]) -> Vec<f32> {
    let width = values.len() / rows;
    order.iter().flat_map(|row| &values[row * width..][..width]).copied().collect()
}

path_tests! {
    /// Twice a naive bf16 version's own error at the most.
    fn boundaries(device, bounds) {
        // In f32 storage rounds nothing, but a score of 10 carries an f32 rounding of 1e-6, which the exponential passes on.
        let bounds = times(bounds, if is_f32::<D>() { 4.0 } else { 2.0 });
        for (case, reference) in references() {
            let reference = reference.get_or_init(|| Reference::of(case));
            let (out, lse) = forward(device, case, &case.qkv());
            assert_no_worse("out", &out, Stored::Bf16, &reference.out[0], &reference.out[1]);
            assert_no_worse("lse", &lse, Stored::F32, &reference.lse[0], &reference.lse[1]);
            assert_close("out", &out, &reference.out[0], bounds);
            assert_close("lse", &lse, &reference.lse[0], Tolerance { relative: 1e-5, absolute: 1e-5 });
        }
    }

    /// A response after its prompt in a packed pair gets what it gets as a causal sequence of its own. The kernels take
    /// the same keys in the same order where the prompt is a multiple of 16 tokens: then to the last bit.
    fn packed_equals_unpacked(device, bounds) {
        // Both results are rounded.
        let bounds = times(bounds, 2.0);
        for heads in [(6, 2, 64), (4, 1, 128), (1, 1, 64)] {
            for (p, c, r) in [(144, 30, 71), (16, 65, 200), (0, 20, 130), (77, 60, 90)] {
                let packed = Case::new(heads, vec![(p, c, r)]);
                let (qkv, rows) = (packed.qkv(), p + c + r);
                let (out, lse) = forward(device, &packed, &qkv);
                for response in [p..p + c, p + c..rows] {
                    let order: Vec<usize> = (0..p).chain(response).collect();
                    let alone = Case::new(heads, vec![(order.len(), 0, 0)]);
                    let (alone_out, alone_lse) = forward(device, &alone, &gather(&qkv, rows, &order));
                    let (packed_out, packed_lse) = (gather(&out, rows, &order), gather(&lse, rows, &order));
                    if p % 16 == 0 && !is_cpu::<D>() {
                        assert_same_bits("out", &packed_out, &alone_out);
                        assert_same_bits("lse", &packed_lse, &alone_lse);
                    }
                    assert_close("out", &packed_out, &wide(&alone_out), bounds);
                    assert_close("lse", &packed_lse, &wide(&alone_lse), Tolerance { relative: 1e-5, absolute: 1e-5 });
                }
            }
        }
    }

    /// A pair's results do not depend on what else is in the batch, to the last bit.
    fn neighbours_change_nothing(device, bounds) {
        let batch = Case::new((6, 2, 64), vec![(20, 33, 41), (150, 75, 75), (3, 0, 70), (64, 64, 64)]);
        let (qkv, spans) = (batch.qkv(), batch.spans());
        let rows = spans.last().unwrap().rows().end;
        let (out, lse) = forward(device, &batch, &qkv);
        for (span, &sizes) in spans.iter().zip(&batch.sizes) {
            let order: Vec<usize> = span.rows().collect();
            let alone = forward(device, &Case::new((6, 2, 64), vec![sizes]), &gather(&qkv, rows, &order));
            assert_same_bits(&format!("out of {span:?}"), &gather(&out, rows, &order), &alone.0);
            assert_same_bits(&format!("lse of {span:?}"), &gather(&lse, rows, &order), &alone.1);
        }
    }

    /// Rows after the batch, which copies of whole blocks reach, are as good as absent, NaN or not.
    fn rows_after_the_batch(device, bounds) {
        let case = Case::new((3, 1, 64), vec![(20, 33, 41)]);
        let qkv = case.qkv();
        let mut longer = qkv.clone();
        longer.resize(qkv.len() + 200 * case.shape.qkv_width(), f32::NAN);
        let buffers = load_batch(device, &pair_batch(&case.sizes, 2), &[]);
        let (longer, _) = compute(device, &longer);
        let rows = qkv.len() / case.shape.qkv_width();
        let mut out = unset_compute(device, rows * case.shape.out_width());
        let mut lse = unset_floats(device, rows * case.shape.heads);
        device.attention_forward(&mut out, &mut lse, &longer, &buffers, case.shape).unwrap();
        let alone = forward(device, &case, &qkv);
        assert_same_bits("out", &read_compute(device, &out), &alone.0);
        assert_same_bits("lse", &read(device, &lse), &alone.1);
    }
}
