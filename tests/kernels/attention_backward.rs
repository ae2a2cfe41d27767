//! Attention backward on both kernel paths: every boundary of the tiles, shared heads, shared prompts, and the order in which
//! dQ receives its terms, which may be none.

use std::ops::Range;

use mmpo_fast::device::cuda::CudaDevice;
#[cfg(mmpo_emulated)]
use mmpo_fast::device::cuda::EmulatorOptions;
use mmpo_fast::device::{AttentionGradient, AttentionShape, BatchBuffers, ComputeBuffer, Device, Floats};

use crate::harness::*;
use crate::naive::{self, Precision};

type Sizes<'a> = &'a [(usize, usize, usize)];

/// Values of queries, keys and values, and gradients of outputs, for `sizes`.
struct Problem {
    sizes: Vec<(usize, usize, usize)>,
    shape: AttentionShape,
    qkv: Vec<f32>,
    dout: Vec<f32>,
}

/// A problem on a device, after the forward pass.
struct Loaded<D: Device> {
    shape: AttentionShape,
    batch: BatchBuffers<D>,
    qkv: ComputeBuffer<D>,
    dout: ComputeBuffer<D>,
    out: ComputeBuffer<D>,
    lse: Floats<D>,
}

impl Problem {
    fn new(sizes: Sizes<'_>, (heads, kv_heads, head_size): (usize, usize, usize)) -> Self {
        let shape = AttentionShape { heads, kv_heads, head_size };
        let tokens: usize = sizes.iter().map(|(p, c, r)| p + c + r).sum();
        Problem {
            sizes: sizes.to_vec(),
            shape,
            qkv: random(1, tokens * shape.qkv_width(), 1.2),
            dout: random(2, tokens * shape.out_width(), 1.0),
        }
    }

    fn load<D: Device>(&self, device: &D) -> Loaded<D> {
        let shape = self.shape;
        let batch = pair_batch(&self.sizes, 2);
        let tokens = batch.tokens();
        let batch = load_batch(device, &batch, &[]);
        let (qkv, dout) = (compute(device, &self.qkv).0, compute(device, &self.dout).0);
        let mut out = unset_compute(device, tokens * shape.out_width());
        let mut lse = unset_floats(device, tokens * shape.heads);
        device.attention_forward(&mut out, &mut lse, &qkv, &batch, shape).unwrap();
        Loaded { shape, batch, qkv, dout, out, lse }
    }

    /// Holds dQ, dK and dV, each by itself, to twice the error of the naive bf16 version.
    #[track_caller]
    fn check<D: Device>(&self, device: &D) {
        trying("(pairs, shape)", (&self.sizes, self.shape));
        let got = self.load(device).gradients(device);
        let (_, qkv) = compute(device, &self.qkv);
        let (_, dout) = compute(device, &self.dout);
        let spans = spans(&self.sizes);
        let [exact, eager] =
            naive::both_once((&self.sizes, self.shape), &[&qkv, &dout], |precision: Precision| {
                let pass = precision.attention(&qkv, &spans, self.shape);
                precision.attention_backward(&dout, &pass, &qkv, self.shape)
            });
        for (what, columns) in parts(self.shape) {
            assert_no_worse(
                &format!("{what} of {:?}, {:?}", self.sizes, self.shape),
                &part(&got, &columns, self.shape),
                Stored::Bf16,
                &part(&exact, &columns, self.shape),
                &part(&eager, &columns, self.shape),
            );
        }
    }
}

impl<D: Device> Loaded<D> {
    /// `dqkv[T, (H + 2K) * E]`.
    fn gradients(&self, device: &D) -> Vec<f32> {
        let mut dqkv = unset_compute(device, device.len(&self.qkv));
        let Loaded { shape, batch, qkv, dout, out, lse } = self;
        device
            .attention_backward(AttentionGradient {
                dqkv: &mut dqkv,
                dout,
                out,
                lse,
                qkv,
                batch,
                shape: *shape,
            })
            .unwrap();
        read_compute(device, &dqkv)
    }
}

/// The columns of queries, keys and values.
fn parts(shape: AttentionShape) -> [(&'static str, Range<usize>); 3] {
    let (queries, keys) = (shape.heads * shape.head_size, shape.kv_heads * shape.head_size);
    [("dQ", 0..queries), ("dK", queries..queries + keys), ("dV", queries + keys..queries + 2 * keys)]
}

fn part<T: Copy>(values: &[T], columns: &Range<usize>, shape: AttentionShape) -> Vec<T> {
    values.chunks(shape.qkv_width()).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

/// Both sets of kernels on the emulated GPU, in order.
#[cfg(mmpo_emulated)]
fn both_paths() -> [CudaDevice; 2] {
    [KernelPath::Portable, KernelPath::Hopper].map(|path| emulated().with_path(path))
}

/// Both sets of kernels, each with dQ's terms in the fixed order and in any.
#[cfg(mmpo_emulated)]
fn all_ways() -> [CudaDevice; 4] {
    let [portable, hopper] = both_paths();
    let any_order = |device: &CudaDevice| device.with_attention_order(AttentionOrder::Any);
    [any_order(&portable), any_order(&hopper), portable, hopper]
}

order_tests! {
    /// Pairs of every kind in one batch, and a pair whose every part ends inside a tile.
    fn kinds_of_pairs(device, bounds) {
        Problem::new(RAGGED, (3, 1, 64)).check(device);
        Problem::new(&[(1, 0, 0), (130, 1, 66)], (1, 1, 128)).check(device);
        Problem::new(&[(40, 90, 70), (0, 1, 1), (65, 0, 130)], (4, 2, 64)).check(device);
    }
}

/// As [`all_ways`], on a real GPU: its own kernels and the portable ones.
fn all_ways_of_a_gpu() -> Vec<CudaDevice> {
    let (Some(own), Some(other)) = (gpu(), gpu()) else { return Vec::new() };
    let portable = other.with_path(KernelPath::Portable);
    let any_order = |device: &CudaDevice| device.with_attention_order(AttentionOrder::Any);
    vec![any_order(&own), any_order(&portable), own, portable]
}

/// Tiles hold 32, 64 or 128 rows of queries and 128 keys. Each of prompt, prompt and chosen together, and rejected ends
/// one before, at and one after a boundary, alone and in step with the others; with two heads in a tile also at half of
/// it.
fn check_boundaries(devices: &[CudaDevice]) {
    let mut all = Vec::new();
    for boundary in [16, 32, 64, 128] {
        for n in [boundary - 1, boundary, boundary + 1] {
            all.extend([(n, 0, 0), (n, 3, 2), (2, n - 2, 1), (5, 2, n), (n, 129 - n.min(129), n)]);
        }
    }
    all.extend([(257, 0, 0), (127, 129, 130), (255, 2, 193), (0, 129, 257), (256, 1, 1), (1, 255, 256)]);
    for sizes in all {
        for heads in [(1, 1, 64), (2, 1, 64), (1, 1, 128), (2, 1, 128)] {
            let problem = Problem::new(&[sizes], heads);
            devices.iter().for_each(|device| problem.check(device));
        }
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn every_boundary_of_the_tiles() {
    check_boundaries(&all_ways());
}

#[test]
fn gpu_every_boundary_of_the_tiles() {
    let devices = all_ways_of_a_gpu();
    if !devices.is_empty() {
        check_boundaries(&devices);
    }
}

/// Query heads per key/value head: 1, 3, 4 and 8, with several key/value heads; with 5, 6 and 7, rows of a tile stay
/// idle.
fn check_shared_heads(devices: &[CudaDevice]) {
    for heads in [
        (2, 2, 64),
        (3, 1, 128),
        (9, 3, 64),
        (4, 1, 64),
        (8, 2, 128),
        (8, 1, 64),
        (5, 1, 64),
        (6, 1, 64),
        (7, 1, 128),
    ] {
        let problem = Problem::new(&[(60, 40, 77), (0, 5, 1), (31, 1, 0)], heads);
        devices.iter().for_each(|device| problem.check(device));
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn heads_that_share_keys() {
    check_shared_heads(&all_ways());
}

#[test]
fn gpu_heads_that_share_keys() {
    check_shared_heads(&all_ways_of_a_gpu());
}

/// Many short pairs, of which few have the same length, and long ones among them.
fn check_many_pairs(devices: &[CudaDevice]) {
    let mut sizes: Vec<(usize, usize, usize)> = (0..40).map(|i| (i % 7, i % 5 + 1, (i * 3) % 11)).collect();
    sizes.insert(3, (150, 40, 30));
    sizes.push((20, 1, 160));
    let problem = Problem::new(&sizes, (2, 1, 64));
    devices.iter().for_each(|device| problem.check(device));
}

#[cfg(mmpo_emulated)]
#[test]
fn many_pairs() {
    check_many_pairs(&all_ways());
}

#[test]
fn gpu_many_pairs() {
    check_many_pairs(&all_ways_of_a_gpu());
}

/// Blocks of one sequence add to the same rows of dQ in turns: 20 runs on a real GPU, which starts and delays blocks as it
/// likes, give the same bits.
#[test]
fn gpu_same_bits_again_and_again() {
    let (Some(own), Some(other)) = (gpu(), gpu()) else { return };
    let problems = [
        Problem::new(&[(300, 70, 140), (10, 130, 0), (0, 97, 298), (900, 256, 256)], (8, 2, 64)),
        Problem::new(&[(200, 60, 270), (900, 256, 256)], (8, 2, 128)),
    ];
    for device in [own, other.with_path(KernelPath::Portable)] {
        for problem in &problems {
            trying("(kernels, pairs, shape)", (device.path(), &problem.sizes, problem.shape));
            let loaded = problem.load(&device);
            let wanted = loaded.gradients(&device);
            assert!(wanted.iter().all(|value| value.is_finite()));
            (0..20).for_each(|_| assert_same_bits("dqkv", &loaded.gradients(&device), &wanted));
        }
    }
}

/// A response gets what it would get alone after its prompt, and the prompt the sum of what both sequences give it.
#[cfg(mmpo_emulated)]
#[test]
fn packed_equals_unpacked() {
    for ((p, c, r), heads) in
        [((70, 50, 90), (2, 1, 64)), ((129, 1, 140), (2, 1, 128)), ((0, 33, 65), (4, 2, 64))]
    {
        let packed = Problem::new(&[(p, c, r)], heads);
        let (width, out_width) = (packed.shape.qkv_width(), packed.shape.out_width());
        let alone = |response: Range<usize>, count_prompt: bool| {
            let order: Vec<usize> = (0..p).chain(response).collect();
            let rows = |values: &[f32], width: usize| -> Vec<f32> {
                order.iter().flat_map(|&row| values[row * width..][..width].to_vec()).collect()
            };
            let mut problem = Problem::new(&[(order.len(), 0, 0)], heads);
            problem.qkv = rows(&packed.qkv, width);
            problem.dout = rows(&packed.dout, out_width);
            if !count_prompt {
                // The prompt's own outputs exist once in the packed pair.
                problem.dout[..p * out_width].fill(0.0);
            }
            (order, problem)
        };
        for device in all_ways() {
            let got = packed.load(&device).gradients(&device);
            let (mut sums, mut magnitudes) = (vec![0.0_f64; got.len()], vec![0.0_f64; got.len()]);
            for (order, problem) in [alone(p..p + c, true), alone(p + c..p + c + r, false)] {
                let side = problem.load(&device).gradients(&device);
                for (i, &row) in order.iter().enumerate() {
                    for column in 0..width {
                        let value = f64::from(side[i * width + column]);
                        sums[row * width + column] += value;
                        magnitudes[row * width + column] += value.abs();
                    }
                }
            }
            let mean_square = inner(&sums, &sums) / sums.len() as f64;
            for (i, ((&got, sum), magnitude)) in got.iter().zip(&sums).zip(&magnitudes).enumerate() {
                // Each side is rounded to bf16, and so is the packed sum; outputs that differ in their last bit, for their
                // order of summation, move delta.
                let (error, allowed) = (
                    (f64::from(got) - sum).abs(),
                    (magnitude + sum.abs()) / 256.0 + 4e-3 * mean_square.sqrt(),
                );
                assert!(error <= allowed, "dqkv[{i}] = {got}, not {sum}: {error:e} > {allowed:e}");
            }
        }
    }
}

/// In any order the sums are other ones, none of them worse, whichever block runs first or faster.
#[cfg(mmpo_emulated)]
#[test]
fn any_order_is_as_exact() {
    let own_options = OwnOptions::take();
    let problem = Problem::new(&[(300, 70, 140), (0, 97, 298)], (2, 1, 64));
    let wide = Problem::new(&[(200, 60, 270)], (2, 2, 128));
    for device in both_paths() {
        let device = device.with_attention_order(AttentionOrder::Any);
        for (seed, host_threads, asynchronous) in [(1, 1, 0), (2, 2, 2), (3, 2, 1)] {
            let options = EmulatorOptions { host_threads, async_: asynchronous, ..emulator_options(seed) };
            own_options.set(options);
            problem.check(&device);
            wide.check(&device);
        }
    }
}

/// Blocks of one sequence add to the same rows of dQ: whichever runs first or faster, on one or two cores, with copies that
/// land early or late, the bits are those of the first run.
#[cfg(mmpo_emulated)]
#[test]
fn same_bits_however_blocks_run() {
    let own_options = OwnOptions::take();
    let problems = [
        Problem::new(&[(300, 70, 140), (10, 130, 0), (0, 97, 298)], (2, 1, 64)),
        Problem::new(&[(200, 60, 270)], (2, 2, 128)),
    ];
    for device in both_paths() {
        for problem in &problems {
            own_options.set(emulator_options(0));
            let loaded = problem.load(&device);
            let wanted = loaded.gradients(&device);
            for (seed, host_threads, asynchronous) in [(1, 1, 0), (2, 2, 2), (3, 2, 1), (4, 1, 2), (5, 2, 0)]
            {
                let options =
                    EmulatorOptions { host_threads, async_: asynchronous, ..emulator_options(seed) };
                own_options.set(options);
                let got = loaded.gradients(&device);
                let differing = wanted.iter().zip(&got).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(differing, 0, "values of {}, seed {seed}, {:?}", wanted.len(), device.path());
            }
        }
    }
}
