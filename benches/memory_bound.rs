//! The memory-bound kernels on a GPU, beside the copy bandwidth of the same run.
//!
//! `cargo bench --bench memory_bound` prints a CSV row for each kernel and width: the median of several rounds, its range, and
//! the share of the copy's bandwidth. Bytes are the least the operation can move. `--emulated` runs tiny sizes on the
//! emulated GPU, to see that the program works; its times mean nothing.

use std::time::Instant;

use mmpo_fast::Result;
use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};
use mmpo_fast::device::{
    AdamWState, AdamWStep, AttentionShape, Device, Element, NormShape, RawValues, RopeDirection,
};

type Buffer<T> = <CudaDevice as Device>::Buffer<T>;
type Half = <CudaDevice as Device>::Compute;

const BF16: usize = 2;
const F32: usize = 4;

struct Bench {
    device: CudaDevice,
    rows: usize,
    warmups: usize,
    iterations: usize,
    rounds: usize,
}

fn main() -> Result<()> {
    let emulated = std::env::args().any(|argument| argument == "--emulated");
    let bench = match emulated {
        true => Bench {
            device: CudaDevice::emulated(EmulatorVariant::Plain),
            rows: 4,
            warmups: 0,
            iterations: 1,
            rounds: 1,
        },
        false => Bench { device: CudaDevice::open(0)?, rows: 8192, warmups: 50, iterations: 200, rounds: 7 },
    };
    println!(
        "kernel,rows,width,bytes,microseconds_median,microseconds_min,microseconds_max,gb_per_s,share_of_copy"
    );
    for width in [576, 2048, 4096] {
        bench.width(width)?;
    }
    Ok(())
}

impl Bench {
    fn width(&self, width: usize) -> Result<()> {
        let (device, rows) = (&self.device, self.rows);
        let values = rows * width;
        let shape = NormShape { rows, width, epsilon: 1e-5 };
        let x = self.random(1, values)?;
        let delta = self.random(2, values)?;
        let weight = self.random(3, width)?;
        let mut sum = device.alloc(values)?;
        let out = device.alloc(values)?;
        let mut rstd = device.alloc(rows)?;
        let mut dweight = device.alloc(width)?;

        let copy = self.time(&out, |out| device.copy(out, 0, &x, 0, values))?;
        let copy = self.report("copy", width, 2 * BF16 * values, &copy, None);
        let copy = Some(copy);
        let times = self.time(&out, |out| device.rms_norm_forward(out, &mut rstd, &x, &weight, shape))?;
        self.report("rms_norm_forward", width, 2 * BF16 * values, &times, copy);
        let times = self.time(&out, |out| {
            device.add_rms_norm_forward(&mut sum, out, &mut rstd, &x, &delta, &weight, shape)
        })?;
        self.report("add_rms_norm_forward", width, 4 * BF16 * values, &times, copy);
        let times = self.time(&out, |out| {
            device.rms_norm_backward(out, &mut dweight, &delta, &x, &weight, &rstd, shape)
        })?;
        self.report("rms_norm_backward", width, 4 * BF16 * values, &times, copy);

        let gate_up = self.random(4, 2 * values)?;
        let mut dgate_up: Buffer<Half> = device.alloc(2 * values)?;
        let times = self.time(&out, |out| device.swiglu_forward(out, &gate_up, rows, width))?;
        self.report("swiglu_forward", width, 3 * BF16 * values, &times, copy);
        let times =
            self.time(&out, |_| device.swiglu_backward(&mut dgate_up, &delta, &gate_up, rows, width))?;
        self.report("swiglu_backward", width, 5 * BF16 * values, &times, copy);

        let heads = AttentionShape { heads: width / 64, kv_heads: 1, head_size: 64 };
        let mut qkv = self.random(5, rows * heads.qkv_width())?;
        let table = self.floats(6, rows * heads.head_size)?;
        let positions = self.filled(&(0..rows as u32).collect::<Vec<_>>())?;
        let times = self
            .time(&out, |_| device.rope(&mut qkv, &table, &positions, rows, heads, RopeDirection::Forward))?;
        let rotated = rows * (heads.heads + heads.kv_heads) * heads.head_size;
        self.report("rope", width, 2 * BF16 * rotated + F32 * rows * heads.head_size, &times, copy);
        self.adamw(width, copy)
    }

    /// As many weights as the other kernels have values.
    fn adamw(&self, width: usize, copy: Option<f64>) -> Result<()> {
        let device = &self.device;
        let values = self.rows * width;
        let mut weight = self.random(7, values)?;
        let mut state = AdamWState::new(device, values)?;
        let gradient = self.floats(8, values)?;
        let norm = self.floats(9, 2)?;
        let step = AdamWStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 1,
        };
        let sentinel = self.random(10, 1)?;
        let times =
            self.time(&sentinel, |_| device.adamw(&mut weight, &mut state, &gradient, &norm, step))?;
        self.report("adamw", width, (7 * F32 + BF16) * values, &times, copy);
        Ok(())
    }

    /// Seconds of one call in each round. A download waits for all calls of a round; `out` is what it reads, and what
    /// the operation may write.
    fn time(
        &self,
        out: &Buffer<Half>,
        mut operation: impl FnMut(&mut Buffer<Half>) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut target = self.device.alloc(self.device.len(out))?;
        for _ in 0..self.warmups {
            operation(&mut target)?;
        }
        let mut first = [Half::default()];
        self.device.download(&mut first, &target, 0)?;
        (0..self.rounds)
            .map(|_| {
                let started = Instant::now();
                for _ in 0..self.iterations {
                    operation(&mut target)?;
                }
                self.device.download(&mut first, &target, 0)?;
                Ok(started.elapsed().as_secs_f64() / self.iterations as f64)
            })
            .collect()
    }

    /// Prints a row and returns the bandwidth in GB/s.
    fn report(&self, name: &str, width: usize, bytes: usize, seconds: &[f64], copy: Option<f64>) -> f64 {
        let mut seconds = seconds.to_vec();
        seconds.sort_by(f64::total_cmp);
        let [low, median, high] = [seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]];
        let bandwidth = bytes as f64 / median / 1e9;
        println!(
            "{name},{},{width},{bytes},{:.2},{:.2},{:.2},{bandwidth:.0},{:.3}",
            self.rows,
            median * 1e6,
            low * 1e6,
            high * 1e6,
            bandwidth / copy.unwrap_or(bandwidth),
        );
        bandwidth
    }

    fn random(&self, seed: u64, len: usize) -> Result<Buffer<Half>> {
        let mut buffer = self.device.alloc(len)?;
        self.device.upload_values(&mut buffer, 0, RawValues::from_f32(&normal(seed, len)))?;
        Ok(buffer)
    }

    fn floats(&self, seed: u64, len: usize) -> Result<Buffer<f32>> {
        self.filled(&normal(seed, len))
    }

    fn filled<T: Element>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.device.alloc(values.len())?;
        self.device.upload(&mut buffer, 0, values)?;
        Ok(buffer)
    }
}

/// Never zeros, which a GPU computes faster: the sum of four uniform numbers of a linear congruential generator.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect()
}
