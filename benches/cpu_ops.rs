//! Times every operation of the CPU device at the shapes of one SmolLM2-135M training step, and adds them up.
//!
//! `cargo bench --bench cpu_ops -- [threads]`; two pairs of prompt 64 and responses 64, so `T` = 384 and `N` = 256.
//! Prints the best and the median of several runs, and what the best means in GFLOP/s and GB/s.

use std::time::Instant;

use mmpo_fast::Result;
use mmpo_fast::data::{PairBatch, Sides, TokenizedPair};
use mmpo_fast::device::cpu::{CpuBuffer, CpuDevice};
use mmpo_fast::device::{
    AdamWState, AdamWStep, AttentionShape, BatchBuffers, Device, HeadMode, HeadShape, LinearShape, NormShape,
    RawValues, RopeDirection, TokenCoefficients, TokenScores,
};

const PAIRS: usize = 2;
const PROMPT: usize = 64;
const RESPONSE: usize = 64;
const LAYERS: usize = 30;
const WIDTH: usize = 576;
const MLP_WIDTH: usize = 1536;
const VOCAB: usize = 49152;
const ATTENTION: AttentionShape = AttentionShape { heads: 9, kv_heads: 3, head_size: 64 };

fn main() -> Result<()> {
    let threads = std::env::args().filter_map(|argument| argument.parse().ok()).next();
    let device = CpuDevice::new(threads)?;
    println!("{}", device.describe());
    println!(
        "{:34} {:>5} {:>10} {:>10} {:>9} {:>8}",
        "operation", "count", "best ms", "median ms", "GFLOP/s", "GB/s"
    );
    let mut bench = Bench { device, step_seconds: 0.0, product_seconds: 0.0, product_flops: 0.0 };
    bench.products()?;
    bench.rows()?;
    bench.attention()?;
    bench.head()?;
    bench.optimizer()?;
    println!("\none step, sum of the medians: {:.0} ms", bench.step_seconds * 1e3);
    println!(
        "matrix products of it: {:.0} ms, {:.0} GFLOP at {:.0} GFLOP/s",
        bench.product_seconds * 1e3,
        bench.product_flops / 1e9,
        bench.product_flops / bench.product_seconds / 1e9
    );
    Ok(())
}

struct Bench {
    device: CpuDevice,
    step_seconds: f64,
    product_seconds: f64,
    product_flops: f64,
}

/// What one call costs; `count` calls make a step.
#[derive(Clone, Copy)]
struct Cost {
    count: usize,
    flops: f64,
    bytes: f64,
}

impl Bench {
    /// Times `run` for about half a second and prints a line; returns the median in seconds.
    fn time(&mut self, name: &str, cost: Cost, mut run: impl FnMut(&CpuDevice) -> Result<()>) -> Result<f64> {
        let mut seconds = Vec::new();
        let start = Instant::now();
        run(&self.device)?;
        while seconds.len() < 5 || (start.elapsed().as_secs_f64() < 0.5 && seconds.len() < 200) {
            let start = Instant::now();
            run(&self.device)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
        println!(
            "{name:34} {:>5} {:>10.3} {:>10.3} {:>9.0} {:>8.1}",
            cost.count,
            best * 1e3,
            median * 1e3,
            cost.flops / best / 1e9,
            cost.bytes / best / 1e9
        );
        self.step_seconds += median * cost.count as f64;
        Ok(median)
    }

    fn product(&mut self, name: &str, cost: Cost, run: impl FnMut(&CpuDevice) -> Result<()>) -> Result<()> {
        let median = self.time(name, cost, run)?;
        self.product_seconds += median * cost.count as f64;
        self.product_flops += cost.flops * cost.count as f64;
        Ok(())
    }

    /// Values that are neither zero nor equal: zeros would flatter the clock.
    fn values(&self, len: usize) -> Result<CpuBuffer<f32>> {
        let values: Vec<f32> = (0..len).map(|i| ((i * 7919 + i / 61) % 2003) as f32 / 1001.5 - 1.0).collect();
        let mut buffer = self.device.alloc(len)?;
        self.device.upload_values(&mut buffer, 0, RawValues::from_f32(&values))?;
        Ok(buffer)
    }

    fn tokens() -> usize {
        PAIRS * (PROMPT + 2 * RESPONSE)
    }

    fn batch(&self, pairs: usize, prompt: usize, response: usize) -> Result<BatchBuffers<CpuDevice>> {
        let ids =
            |len: usize, seed: usize| (0..len).map(|i| ((i * 911 + seed * 37) % VOCAB) as u32).collect();
        let tokenized: Vec<TokenizedPair> = (0..pairs)
            .map(|record| TokenizedPair {
                record,
                prompt: ids(prompt, record),
                chosen: ids(response, record + 10),
                rejected: ids(response, record + 20),
            })
            .collect();
        let batch = PairBatch::pack(&tokenized, Sides::Both);
        let mut buffers = BatchBuffers::new(&self.device, batch.tokens(), pairs, batch.scored_tokens())?;
        buffers.load(&self.device, &batch, &[])?;
        Ok(buffers)
    }

    fn products(&mut self) -> Result<()> {
        let rows = Self::tokens();
        for (name, inputs, outputs) in [
            ("qkv", WIDTH, ATTENTION.qkv_width()),
            ("attention out", WIDTH, WIDTH),
            ("gate_up", WIDTH, 2 * MLP_WIDTH),
            ("down", MLP_WIDTH, WIDTH),
        ] {
            let shape = LinearShape { rows, inputs, outputs };
            // Weights and gradients for each layer, as in a step: a product then reads memory and not a cache.
            let layers = |len: usize| (0..LAYERS).map(|_| self.values(len)).collect::<Result<Vec<_>>>();
            let (weights, mut dweights) = (layers(outputs * inputs)?, layers(outputs * inputs)?);
            let x = self.values(rows * inputs)?;
            let (mut out, mut dx) = (self.values(rows * outputs)?, self.values(rows * inputs)?);
            let mut layer = 0;
            let mut next_layer = || {
                layer = (layer + 1) % LAYERS;
                layer
            };
            let cost = Cost {
                count: LAYERS,
                flops: 2.0 * (rows * inputs * outputs) as f64,
                bytes: 4.0 * (rows * (inputs + outputs) + inputs * outputs) as f64,
            };
            self.product(&format!("linear_forward {name}"), cost, |device| {
                device.linear_forward(&mut out, &x, &weights[next_layer()], None, shape)
            })?;
            self.product(&format!("linear_backward_input {name}"), cost, |device| {
                device.linear_backward_input(&mut dx, &out, &weights[next_layer()], shape)
            })?;
            self.product(&format!("linear_backward_weight {name}"), cost, |device| {
                device.linear_backward_weight(&mut dweights[next_layer()], None, &out, &x, shape)
            })?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<()> {
        let rows = Self::tokens();
        let (x, delta, weight) =
            (self.values(rows * WIDTH)?, self.values(rows * WIDTH)?, self.values(WIDTH)?);
        let (mut sum, mut out, mut rstd) =
            (self.values(rows * WIDTH)?, self.values(rows * WIDTH)?, self.values(rows)?);
        let shape = NormShape { rows, width: WIDTH, epsilon: 1e-5 };
        let moved = |count, values: usize| Cost { count, flops: 0.0, bytes: 4.0 * (values * rows) as f64 };
        self.time("add_rms_norm_forward", moved(2 * LAYERS, 4 * WIDTH), |device| {
            device.add_rms_norm_forward(&mut sum, &mut out, &mut rstd, &x, &delta, &weight, shape)
        })?;
        let mut dweight = self.values(WIDTH)?;
        self.time("rms_norm_backward", moved(2 * LAYERS + 1, 4 * WIDTH), |device| {
            device.rms_norm_backward(&mut sum, &mut dweight, &delta, &x, &weight, &rstd, shape)
        })?;
        let gate_up = self.values(rows * 2 * MLP_WIDTH)?;
        let (mut dgate_up, mut hidden) = (self.values(rows * 2 * MLP_WIDTH)?, self.values(rows * MLP_WIDTH)?);
        self.time("swiglu_forward", moved(LAYERS, 3 * MLP_WIDTH), |device| {
            device.swiglu_forward(&mut hidden, &gate_up, rows, MLP_WIDTH)
        })?;
        self.time("swiglu_backward", moved(LAYERS, 5 * MLP_WIDTH), |device| {
            device.swiglu_backward(&mut dgate_up, &hidden, &gate_up, rows, MLP_WIDTH)
        })?;
        let batch = self.batch(PAIRS, PROMPT, RESPONSE)?;
        let (mut qkv, table) =
            (self.values(rows * ATTENTION.qkv_width())?, self.values(256 * ATTENTION.head_size)?);
        self.time("rope", moved(2 * LAYERS, 2 * ATTENTION.qkv_width()), |device| {
            device.rope(&mut qkv, &table, &batch.positions, rows, ATTENTION, RopeDirection::Forward)
        })?;
        let (embedding, mut dembedding) = (self.values(VOCAB * WIDTH)?, self.values(VOCAB * WIDTH)?);
        self.time("embedding_forward", moved(1, 2 * WIDTH), |device| {
            device.embedding_forward(&mut out, &embedding, &batch.token_ids, rows, WIDTH)
        })?;
        self.time("embedding_backward", moved(1, 3 * WIDTH), |device| {
            device.embedding_backward(&mut dembedding, &x, &batch, rows, WIDTH)
        })?;
        Ok(())
    }

    /// The step's own pairs, and one long pair that is no part of the step's sum.
    fn attention(&mut self) -> Result<()> {
        self.attention_of("", LAYERS, PAIRS, PROMPT, RESPONSE)?;
        self.attention_of(" long", 0, 1, 1024, 512)
    }

    fn attention_of(
        &mut self,
        name: &str,
        count: usize,
        pairs: usize,
        prompt: usize,
        response: usize,
    ) -> Result<()> {
        let batch = self.batch(pairs, prompt, response)?;
        let rows = pairs * (prompt + 2 * response);
        let qkv = self.values(rows * ATTENTION.qkv_width())?;
        let dout = self.values(rows * ATTENTION.out_width())?;
        let mut out = self.values(rows * ATTENTION.out_width())?;
        let (mut lse, mut dqkv) =
            (self.values(rows * ATTENTION.heads)?, self.values(rows * ATTENTION.qkv_width())?);
        let triangle = |len: usize| len * (len + 1) / 2;
        let seen = pairs * (triangle(prompt) + 2 * (triangle(response) + prompt * response));
        // Two products forward and five backward, of the visible scores alone.
        let product = 2.0 * (seen * ATTENTION.out_width()) as f64;
        let cost = |products: f64| Cost { count, flops: products * product, bytes: 0.0 };
        self.time(&format!("attention_forward{name}"), cost(2.0), |device| {
            device.attention_forward(&mut out, &mut lse, &qkv, &batch, ATTENTION)
        })?;
        self.time(&format!("attention_backward{name}"), cost(5.0), |device| {
            device.attention_backward(&mut dqkv, &dout, &out, &lse, &qkv, &batch, ATTENTION)
        })?;
        Ok(())
    }

    fn head(&mut self) -> Result<()> {
        let (batch, scored) = (self.batch(PAIRS, PROMPT, RESPONSE)?, PAIRS * 2 * RESPONSE);
        let (mut hidden, weight) = (self.values(scored * WIDTH)?, self.values(VOCAB * WIDTH)?);
        let (mut workspace, mut dweight) = (self.values(scored * VOCAB)?, self.values(VOCAB * WIDTH)?);
        let mut scores = TokenScores::new(&self.device, scored)?;
        let coefficients: TokenCoefficients<CpuDevice> =
            TokenCoefficients { logp: self.values(scored)?, entropy: self.values(scored)? };
        let shape =
            HeadShape { rows: 0..scored, width: WIDTH, vocab: VOCAB, entropy: true, mode: HeadMode::Main };
        let product = 2.0 * (scored * WIDTH * VOCAB) as f64;
        let bytes = 4.0 * (VOCAB * (scored + WIDTH)) as f64;
        let cost = Cost { count: 1, flops: product, bytes };
        self.product("logp_head_forward", cost, |device| {
            device.logp_head_forward(&mut scores, &mut workspace, &hidden, &weight, &batch.targets, &shape)
        })?;
        let cost = Cost { count: 1, flops: 2.0 * product, bytes: 2.0 * bytes };
        self.product("logp_head_backward", cost, |device| {
            device.logp_head_backward(
                &mut hidden,
                Some(&mut dweight),
                &mut workspace,
                &weight,
                &batch.targets,
                &scores,
                &coefficients,
                &shape,
            )
        })?;
        Ok(())
    }

    /// All weights as one tensor.
    fn optimizer(&mut self) -> Result<()> {
        let layer = WIDTH * (ATTENTION.qkv_width() + WIDTH + 3 * MLP_WIDTH);
        let len = VOCAB * WIDTH + LAYERS * layer;
        let (mut weight, mut gradient) = (self.values(len)?, self.values(len)?);
        let mut state = AdamWState::new(&self.device, len)?;
        let mut norm = self.values(2)?;
        let moved = |values: usize| Cost { count: 1, flops: 0.0, bytes: 4.0 * (values * len) as f64 };
        self.time("gradient_norm", moved(1), |device| {
            device.gradient_norm(&mut norm, &[&gradient], Some(1.0))
        })?;
        let step = AdamWStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 10,
        };
        self.time("adamw", moved(7), |device| device.adamw(&mut weight, &mut state, &gradient, &norm, step))?;
        self.time("zero", moved(1), |device| device.zero(&mut gradient, 0..len))?;
        Ok(())
    }
}
