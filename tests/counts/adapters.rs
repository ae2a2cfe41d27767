//! What low-rank adapters of rank 64 add to a step over frozen weights, in operations and in bytes that kernels move between
//! memory and multiprocessors, for Llama-3.2-1B with an adapter on every module. Loads of operands count as often as tiles make
//! them, wherever a cache holds them. Left out are the partial sums of gradients with few tiles.
//!
//! Whole gemms of a layer of width 2048 over thousands of tokens take the emulated device minutes. But what a gemm of whole
//! tiles does is linear in each of its sizes: so small ones are counted, in the tiles that large ones take, and continued to
//! the layer's sizes, which is exact.

use mmpo_fast::data::{PairBatch, Sides, TokenizedPair};
use mmpo_fast::device::cuda::{
    CudaDevice, EmulatorCounters, EmulatorOptions, EmulatorVariant, GemmChoice, GemmTile, KernelPath,
};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{
    AdaptedBackwardInput, AdaptedLinear, AdapterTerms, AddRmsNorm, AttentionGradient, AttentionShape,
    BatchBuffers, Dropout, LinearShape, LinearSwiglu, LowRankShape, NormShape, RmsNormBackward,
    RopeDirection, RowPart,
};

use crate::table::Table;
use crate::{ORDINARY, emulator_alone};

/// Watches ordinary loads and stores too.
const VARIANT: EmulatorVariant = EmulatorVariant::Checked;
/// The paper's rank.
const RANK: usize = 64;
/// Tokens of the step, which is one micro-batch.
const TOKENS: usize = 8192;
/// Layers of the model.
const LAYERS: i64 = 16;
const WIDTH: usize = 2048;
const MLP_WIDTH: usize = 8192;
const VOCAB: usize = 128_256;
/// Multiprocessors of an A100: whether tall and large tiles occupy them decides the portable kernels' tiles.
const MULTIPROCESSORS: usize = 108;

/// What launches do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Work {
    flops: i64,
    bytes: i64,
}

impl Work {
    fn of(c: &EmulatorCounters) -> Self {
        let loaded = c.global_load_bytes + c.copy_async_bytes + c.tensor_load_bytes;
        let stored = c.global_store_bytes + c.tensor_store_bytes;
        let signed = |count: u64| i64::try_from(count).unwrap();
        Work { flops: signed(c.mma_flops + c.wgmma_flops), bytes: signed(loaded + stored) }
    }

    /// The work of what `run` launches.
    fn count(run: impl FnOnce()) -> Self {
        VARIANT.reset_counters();
        run();
        Work::of(&VARIANT.counters())
    }

    fn plus(self, other: Work) -> Self {
        Work { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }

    fn times(self, factor: i64) -> Self {
        Work { flops: self.flops * factor, bytes: self.bytes * factor }
    }
}

/// Counts at the least value of each size and at twice that, continued to `wanted`.
fn continued<const SIZES: usize>(
    least: [usize; SIZES],
    wanted: [usize; SIZES],
    count: impl Fn([usize; SIZES]) -> Work,
) -> Work {
    let corner = |corner: usize| {
        let twice = |size: usize| corner >> size & 1 == 1;
        let weights = (0..SIZES).map(|size| {
            assert!(wanted[size].is_multiple_of(least[size]), "{wanted:?} in steps of {least:?}");
            let steps = (wanted[size] / least[size]) as i64 - 1;
            if twice(size) { steps } else { 1 - steps }
        });
        let weight = weights.product();
        count(std::array::from_fn(|size| least[size] << usize::from(twice(size)))).times(weight)
    };
    (0..1 << SIZES).map(corner).fold(Work::default(), Work::plus)
}

/// Tokens that are counted: whole tiles of everything; on Hopper, of clusters of four blocks.
fn rows(path: KernelPath) -> usize {
    if path == KernelPath::Hopper { 512 } else { 128 }
}

/// A device whose frozen gemms take the tiles of large ones.
fn device(path: KernelPath, tile: Option<GemmTile>) -> CudaDevice {
    let device = CudaDevice::emulated(VARIANT).with_path(path);
    let Some(tile) = tile else { return device };
    let number = device.gemm_tiles().unwrap().iter().position(|&other| other == tile).unwrap();
    device.with_gemm_choice(GemmChoice::Tile(number.try_into().unwrap()))
}

/// Tells portable kernels of few multiprocessors, so that they take the tiles that occupy a GPU at the sizes that are meant,
/// or of many, so that they take small tiles.
fn occupied(by_larger_tiles: bool) {
    let multiprocessors = if by_larger_tiles { 1 } else { 1 << 20 };
    VARIANT.configure(EmulatorOptions { multiprocessors, trace_accesses: 0, ..ORDINARY }).unwrap();
}

/// A projection: its inputs, and the outputs of its modules in parts of all of them.
struct Projection {
    inputs: usize,
    outputs: usize,
    /// Each module's share of the outputs, of `shares` in all.
    modules: &'static [usize],
    swiglu: bool,
    /// The tile, and cluster, that Hopper's plan has for the gradient of the adapters' `A` over `TOKENS` tokens.
    gradient_of_a: [i32; 3],
}

/// Query, key and value; output; gate and up; down.
const PROJECTIONS: [Projection; 4] = [
    Projection {
        inputs: WIDTH,
        outputs: 3072,
        modules: &[4, 1, 1],
        swiglu: false,
        gradient_of_a: [128, 128, 2],
    },
    Projection { inputs: WIDTH, outputs: WIDTH, modules: &[1], swiglu: false, gradient_of_a: [64, 128, 1] },
    Projection {
        inputs: WIDTH,
        outputs: 2 * MLP_WIDTH,
        modules: &[1, 1],
        swiglu: true,
        gradient_of_a: [128, 128, 1],
    },
    Projection {
        inputs: MLP_WIDTH,
        outputs: WIDTH,
        modules: &[1],
        swiglu: false,
        gradient_of_a: [64, 128, 1],
    },
];

impl Projection {
    fn shares(&self) -> usize {
        self.modules.iter().sum()
    }

    fn inner_width(&self) -> usize {
        self.modules.len() * RANK
    }

    fn parts(&self, rows: usize, outputs: usize) -> Vec<LowRankShape> {
        let (mut first, inner_width) = (0, self.inner_width());
        let part = |(number, &share): (usize, &usize)| {
            let count = outputs / self.shares() * share;
            first += count;
            LowRankShape {
                rows,
                rank: RANK,
                outputs: count,
                out: RowPart { first: first - count, width: outputs },
                inner: RowPart { first: number * RANK, width: inner_width },
                first_row: first - count,
                scale: 1.0,
            }
        };
        self.modules.iter().enumerate().map(part).collect()
    }

    /// Forward and input gradient over a frozen weight.
    fn frozen(&self, path: KernelPath, [inputs, outputs]: [usize; 2]) -> Work {
        let (rows, device) = (rows(path), &device(path, (path == KernelPath::Hopper).then_some(LARGE)));
        let shape = LinearShape { rows, inputs, outputs };
        let [x, weight] = buffers(device, [rows * inputs, outputs * inputs]);
        let [mut out, mut dx, mut activated] =
            buffers(device, [rows * outputs, rows * inputs, rows * outputs / 2]);
        occupied(true);
        Work::count(|| {
            let (gate_up, weight) = (&mut out, &weight);
            if self.swiglu {
                let operands =
                    LinearSwiglu { out: &mut activated, gate_up, x: &x, weight, bias: None, shape };
                // Without parts this is the frozen gemm, in a tile that can be chosen.
                let terms = AdapterTerms { inner: &x, b: weight, parts: &[] };
                device.adapted_linear_swiglu_forward(operands, terms).unwrap();
            } else {
                device.linear_forward(gate_up, &x, weight, None, shape).unwrap();
            }
            device.linear_backward_input(&mut dx, &out, weight, shape).unwrap();
        })
    }

    /// The same with the adapters of all modules, without the adapters' gradients.
    fn adapted(&self, path: KernelPath, [inputs, outputs]: [usize; 2], dropout: Option<Dropout>) -> Work {
        let large = &device(path, (path == KernelPath::Hopper).then_some(LARGE));
        let rows = rows(path);
        let inner_width = self.inner_width();
        let shape = LinearShape { rows, inputs, outputs };
        let down = LinearShape { outputs: inner_width, ..shape };
        let parts = self.parts(rows, outputs);
        let [x, weight] = buffers(large, [rows * inputs, outputs * inputs]);
        let [a, b] = buffers(large, [inner_width * inputs, outputs * RANK]);
        let [mut inner, mut dinner] = buffers(large, [rows * inner_width, rows * inner_width]);
        let [mut out, mut dx, mut activated] =
            buffers(large, [rows * outputs, rows * inputs, rows * outputs / 2]);
        Work::count(|| {
            occupied(TOKENS / 128 * inner_width.div_ceil(128) * 2 >= MULTIPROCESSORS);
            large.low_rank_inner(&mut inner, &x, &a, down, dropout).unwrap();
            occupied(true);
            let terms = AdapterTerms { inner: &inner, b: &b, parts: &parts };
            if self.swiglu {
                let (out, gate_up) = (&mut activated, &mut out);
                let operands = LinearSwiglu { out, gate_up, x: &x, weight: &weight, bias: None, shape };
                large.adapted_linear_swiglu_forward(operands, terms).unwrap();
            } else {
                let operands =
                    AdaptedLinear { out: &mut out, x: &x, weight: &weight, bias: None, shape, terms };
                large.adapted_linear_forward(operands).unwrap();
            }
            for part in &parts {
                large.low_rank_backward_input(&mut dinner, &out, &b, *part).unwrap();
            }
            let (dx, dout, weight, dinner, a) = (&mut dx, &out, &weight, &dinner, &a);
            let operands = AdaptedBackwardInput { dx, dout, weight, dinner, a, shape, inner_width, dropout };
            large.adapted_linear_backward_input(operands).unwrap();
        })
    }

    /// The gradients of the adapters' `A` and `B`: sums over all tokens, which are added to once.
    fn gradients(
        &self,
        path: KernelPath,
        [rows, inputs, outputs]: [usize; 3],
        dropout: Option<Dropout>,
    ) -> Work {
        let [block_m, block_n, cluster] = self.gradient_of_a;
        let tile = GemmTile { block_m, block_n, cluster };
        let device = &device(path, (path == KernelPath::Hopper).then_some(tile));
        let inner_width = self.inner_width();
        let [x, inner, dout] = buffers(device, [rows * inputs, rows * inner_width, rows * outputs]);
        let mut da = device.alloc(inner_width * inputs).unwrap();
        let mut db = device.alloc(outputs * RANK).unwrap();
        Work::count(|| {
            for (part, share) in self.parts(rows, outputs).iter().zip(self.modules) {
                let module = self.outputs / self.shares() * share;
                occupied(2 * (module / 128) >= MULTIPROCESSORS);
                device.low_rank_backward_weight(&mut db, &dout, &inner, *part).unwrap();
            }
            // Few tiles, so small ones on the portable path.
            occupied(false);
            let down = LinearShape { rows, inputs, outputs: inner_width };
            device.low_rank_inner_backward_weight(&mut da, &inner, &x, down, dropout).unwrap();
        })
    }

    /// The work over all tokens, at the projection's own sizes.
    fn continued_gradients(&self, path: KernelPath, dropout: Option<Dropout>) -> Work {
        let wanted = [TOKENS, self.inputs, self.outputs];
        continued([256, 256, 512 * self.shares()], wanted, |sizes| self.gradients(path, sizes, dropout))
    }

    /// Of `rows` tokens at the projection's own sizes.
    fn continued(&self, count: impl Fn([usize; 2]) -> Work) -> Work {
        continued([256, 256 * self.shares()], [self.inputs, self.outputs], count)
    }
}

/// What plans choose for the frozen gemms of a layer this wide.
const LARGE: GemmTile = GemmTile { block_m: 128, block_n: 256, cluster: 2 };

fn buffers<const COUNT: usize>(
    device: &CudaDevice,
    values: [usize; COUNT],
) -> [mmpo_fast::device::ComputeBuffer<CudaDevice>; COUNT] {
    values.map(|values| device.alloc(values).unwrap())
}

/// What a layer does beside its projections and attention, for `rows` tokens: norms, residual sums, rotary positions, and SwiGLU
/// where no gemm has it.
fn between_gemms(path: KernelPath) -> Work {
    let (rows, device) = (rows(path), &device(path, None));
    let attention = AttentionShape { heads: 32, kv_heads: 8, head_size: 64 };
    let norm = NormShape { rows, width: WIDTH, epsilon: 1e-5 };
    let [x, delta, weight] = buffers(device, [rows * WIDTH, rows * WIDTH, WIDTH]);
    let [mut sum, mut out, mut dx] = buffers(device, [rows * WIDTH, rows * WIDTH, rows * WIDTH]);
    let [mut activated, gate_up, mut dgate_up] =
        buffers(device, [rows * MLP_WIDTH, 2 * rows * MLP_WIDTH, 2 * rows * MLP_WIDTH]);
    let [mut qkv] = buffers(device, [rows * attention.qkv_width()]);
    let mut rstd = device.alloc(rows).unwrap();
    let table = device.alloc(rows * attention.head_size).unwrap();
    let mut positions = device.alloc(rows).unwrap();
    device.upload(&mut positions, 0, &(0..rows as u32).collect::<Vec<_>>()).unwrap();
    occupied(true);
    Work::count(|| {
        for _ in 0..2 {
            let operands = AddRmsNorm {
                sum: &mut sum,
                out: &mut out,
                rstd: &mut rstd,
                x: &x,
                delta: &delta,
                weight: &weight,
                shape: norm,
            };
            device.add_rms_norm_forward(operands).unwrap();
            // Computed again in the backward.
            device.rms_norm_forward(&mut out, &mut rstd, &x, &weight, norm).unwrap();
            let (dx, dout, x, weight, rstd) = (&mut dx, &out, &x, &weight, &rstd);
            let operands = RmsNormBackward { dx, dweight: None, dout, x, weight, rstd, shape: norm };
            device.rms_norm_backward(operands).unwrap();
        }
        for direction in [RopeDirection::Forward, RopeDirection::Backward] {
            device.rope(&mut qkv, &table, &positions, rows, attention, direction).unwrap();
        }
        device.swiglu_forward(&mut activated, &gate_up, rows, MLP_WIDTH).unwrap();
        device.swiglu_backward(&mut dgate_up, &activated, &gate_up, rows, MLP_WIDTH).unwrap();
    })
}

/// Attention of a layer, forward and backward, over pairs of 1024 tokens.
fn attention(path: KernelPath) -> Work {
    const PAIR: [usize; 3] = [512, 256, 256];
    // A key/value head with its query heads, of the layer's eight.
    let shape = AttentionShape { heads: 4, kv_heads: 1, head_size: 64 };
    let device = &device(path, None);
    let [prompt, chosen, rejected] = PAIR.map(|tokens| vec![0; tokens].into());
    let batch = PairBatch::pack(&[TokenizedPair { record: 0, prompt, chosen, rejected }], Sides::Both);
    let rows = batch.tokens();
    let mut pair = BatchBuffers::new(device, rows, 1, batch.scored_tokens()).unwrap();
    pair.load(device, &batch, &[]).unwrap();
    let [qkv, mut dqkv] = buffers(device, [rows * shape.qkv_width(); 2]);
    let [mut out, dout] = buffers(device, [rows * shape.out_width(); 2]);
    let mut lse = device.alloc(rows * shape.heads).unwrap();
    occupied(true);
    let work = Work::count(|| {
        device.attention_forward(&mut out, &mut lse, &qkv, &pair, shape).unwrap();
        let (dqkv, out, lse, qkv, batch) = (&mut dqkv, &out, &lse, &qkv, &pair);
        let operands = AttentionGradient { dqkv, dout: &dout, out, lse, qkv, batch, shape };
        device.attention_backward(operands).unwrap();
    });
    work.times((8 * TOKENS / rows) as i64)
}

/// The head with a frozen vocabulary matrix, as far as its two gemms go; what else it does is left out.
const HEAD: Projection =
    Projection { inputs: WIDTH, outputs: VOCAB, modules: &[1], swiglu: false, gradient_of_a: [0; 3] };

/// A step without the adapters' gradients, half of its tokens scored.
fn step(path: KernelPath, projection: impl Fn(&Projection) -> Work) -> Work {
    let layer = PROJECTIONS.iter().map(projection).fold(between_gemms(path), Work::plus);
    let Work { flops, bytes } = HEAD.continued(|sizes| HEAD.frozen(path, sizes));
    let step = layer.times(LAYERS).plus(Work { flops: flops / 2, bytes: bytes / 2 });
    step.times((TOKENS / rows(path)) as i64).plus(attention(path).times(LAYERS))
}

/// Adapters of all modules at rank 64, with the paper's dropout or without, add at most a tenth to the operations and to the
/// bytes of a step over frozen weights; `adapters.csv` has the numbers.
#[test]
fn adapters_of_llama_3_2_1b_add_at_most_a_tenth_to_a_frozen_step() {
    if cfg!(mmpo_emulated_by_clang) {
        return eprintln!("the table is g++'s: skipped");
    }
    let _alone = emulator_alone();
    let columns = "path;step;operations;bytes;more_operations_per_mille;more_bytes_per_mille";
    let mut table = Table::new("adapters.csv", columns.into());
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let name = if path == KernelPath::Hopper { "hopper" } else { "portable" };
        let frozen = step(path, |projection| projection.continued(|sizes| projection.frozen(path, sizes)));
        let mut row = |what: &str, work: Work| {
            let more = |work: i64, frozen: i64| 1000 * (work - frozen) / frozen;
            let more = [more(work.flops, frozen.flops), more(work.bytes, frozen.bytes)];
            println!("{name} {what}: {work:?}, {more:?} per mille more");
            let cells = [work.flops, work.bytes, more[0], more[1]].map(|cell| cell.to_string());
            table.insert(format!("{name};{what}"), cells.to_vec());
            more
        };
        row("frozen", frozen);
        let adapted = |dropout: Option<Dropout>| {
            let gradients =
                PROJECTIONS.iter().map(|projection| projection.continued_gradients(path, dropout));
            let gradients = gradients.fold(Work::default(), Work::plus).times(LAYERS);
            let sizes = |projection: &Projection| {
                projection.continued(|sizes| projection.adapted(path, sizes, dropout))
            };
            step(path, sizes).plus(gradients)
        };
        let without = adapted(None);
        let with = adapted(Some(Dropout::new(1, 0.01)));
        for (what, work) in [("adapted", without), ("adapted with dropout", with)] {
            let [operations, bytes] = row(what, work);
            assert!(operations <= 100, "{name} {what}: {operations} per mille more operations");
            assert!(bytes <= 100, "{name} {what}: {bytes} per mille more bytes");
        }
        // Values are dropped where they are anyway.
        assert_eq!(with, without, "{name}");
        // Continued counts are those of the sizes themselves.
        let projection = &PROJECTIONS[1];
        let count = |sizes| projection.adapted(path, sizes, None);
        assert_eq!(continued([256, 256], [768, 768], count), count([768, 768]), "{name}");
        let count = |sizes| projection.gradients(path, sizes, None);
        assert_eq!(
            continued([128, 256, 512], [384, 768, 1536], count),
            count([384, 768, 1536]),
            "{name}: gradients"
        );
    }
    table.hold_against_the_committed_one();
}
