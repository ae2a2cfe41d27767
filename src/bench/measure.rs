//! How things are timed, and this machine's ceilings.
//!
//! Before anything is timed its outputs are poisoned and checked. A call is timed alone, by events on a GPU, after a
//! read of other memory that pushes its operands out of the caches. That read also hides the cost of the launch on the host.

use std::time::{Duration, Instant};

use super::inputs;
use crate::device::{Device, Floats, LinearShape};
use crate::error::Result;

/// How often something runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Method {
    /// Calls before the timed ones, at most.
    pub warmups: usize,
    /// Timed calls, at most.
    pub calls: usize,
    /// Device seconds that warm an operation up; twice as many are timed. A long operation then runs less often than
    /// `warmups` and `calls` say: a GPU is warm after so much work, whether that is one call or fifty. Infinite where a
    /// number of calls was asked for.
    pub enough: f64,
    /// Bytes read before each timed call: several times the last cache.
    pub flush_bytes: usize,
    /// Side of the square matrices whose gemm gives the ceiling.
    pub product_side: usize,
    /// Bytes of the copy whose bandwidth is the ceiling.
    pub copy_bytes: usize,
}

impl Method {
    /// For a GPU, whose calls are short and whose clock settles.
    pub const GPU: Method = Method {
        warmups: 50,
        calls: 50,
        enough: 0.04,
        flush_bytes: 256 << 20,
        product_side: 8192,
        copy_bytes: 2 << 30,
    };
    /// For the CPU.
    pub const CPU: Method = Method {
        warmups: 2,
        calls: 7,
        enough: f64::INFINITY,
        flush_bytes: 128 << 20,
        product_side: 2048,
        copy_bytes: 256 << 20,
    };
    /// To see that everything runs; the times mean nothing.
    pub const EMULATED: Method = Method {
        warmups: 0,
        calls: 1,
        enough: f64::INFINITY,
        flush_bytes: 0,
        product_side: 64,
        copy_bytes: 1 << 16,
    };

    /// The method with exactly these numbers of calls, where they are given.
    pub fn with_calls(self, warmups: Option<usize>, calls: Option<usize>) -> Self {
        let asked = warmups.or(calls).is_some();
        Method {
            warmups: warmups.unwrap_or(self.warmups),
            calls: calls.unwrap_or(self.calls),
            enough: if asked { f64::INFINITY } else { self.enough },
            ..self
        }
    }

    /// Warm-up calls and timed calls of an operation that takes this many seconds.
    pub fn calls_of(&self, seconds: f64) -> (usize, usize) {
        let within = |enough: f64, least: usize, most: usize| {
            let calls = (enough / seconds.max(1e-9)).ceil();
            // The least may be more than the most that was asked for.
            if calls >= most as f64 { most } else { (calls as usize).max(least).min(most) }
        };
        (within(self.enough, 3, self.warmups), within(2.0 * self.enough, 7, self.calls))
    }

    /// The method in words.
    pub fn describe(&self) -> String {
        let flush = match self.flush_bytes >> 20 {
            0 => String::new(),
            mebibytes => format!(", {mebibytes} MiB read before each to empty the caches"),
        };
        let (most, long) = match self.enough.is_finite() {
            true => ("up to ", ", fewer where a call is long"),
            false => ("", ""),
        };
        format!("{most}{} calls to warm up, {most}{} timed one by one{long}{flush}", self.warmups, self.calls)
    }
}

/// The time after which nothing more is begun; the results are those measured by then.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// A deadline this many seconds from now; `None` never comes.
    pub fn of(seconds: Option<f64>) -> Self {
        Deadline(seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds)))
    }

    /// Whether the time given for the calls is over.
    pub fn is_over(&self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }
}

/// Seconds of the timed calls, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample(pub Vec<f64>);

impl Sample {
    fn at(&self, choose: impl Fn(&[f64]) -> f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        if sorted.is_empty() { f64::NAN } else { choose(&sorted) }
    }

    /// Median of the seconds per call.
    pub fn median(&self) -> f64 {
        self.at(|sorted| (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0)
    }

    /// Seconds of the fastest call.
    pub fn min(&self) -> f64 {
        self.at(|sorted| sorted[0])
    }

    /// Seconds of the slowest call.
    pub fn max(&self) -> f64 {
        self.at(|sorted| sorted[sorted.len() - 1])
    }
}

/// Times calls on one device.
pub struct Stopwatch<'a, D: Device> {
    device: &'a D,
    method: Method,
    flush: Floats<D>,
    flushed: Floats<D>,
}

impl<'a, D: Device> Stopwatch<'a, D> {
    /// A stopwatch for `device`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device cannot make its events.
    pub fn new(device: &'a D, method: Method) -> Result<Self> {
        let mut flush = device.alloc(method.flush_bytes / size_of::<f32>())?;
        // A system may back memory that was never written by one page of zeros.
        device.upload(&mut flush, 0, &vec![1.0f32; method.flush_bytes / size_of::<f32>()])?;
        Ok(Stopwatch { device, method, flush, flushed: device.alloc(2)? })
    }

    /// Times `run`, with an untimed `prepare` before each call.
    ///
    /// # Errors
    /// Those of `prepare`, of `run` and of the device.
    pub fn measure(
        &mut self,
        mut prepare: impl FnMut() -> Result<()>,
        mut run: impl FnMut() -> Result<()>,
    ) -> Result<Sample> {
        let (mut warmups, mut calls) = (self.method.warmups, self.method.calls);
        let mut warm = 0;
        while warm < warmups {
            prepare()?;
            if self.method.enough.is_finite() && warm < 2 {
                // The first call also loads the kernel.
                (warmups, calls) = self.method.calls_of(self.device.time(&mut run)?);
            } else {
                run()?;
            }
            warm += 1;
        }
        let mut seconds = Vec::with_capacity(calls);
        for _ in 0..calls {
            prepare()?;
            self.device.gradient_norm(&mut self.flushed, &[&self.flush], None)?;
            seconds.push(self.device.time(&mut run)?);
        }
        Ok(Sample(seconds))
    }
}

/// The best that this machine can do, measured in the same run as everything else.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Seconds of a copy of `copy_bytes`, which it both reads and writes.
    pub copy: Sample,
    /// Bytes that the measured copy moves.
    pub copy_bytes: usize,
    /// Seconds of a square gemm in the device's number type.
    pub product: Sample,
    /// Rows, columns and depth of the measured square gemm.
    pub product_side: usize,
}

impl Ceilings {
    /// Measures the ceilings of a device: its copy and its largest gemm.
    ///
    /// # Errors
    /// Those of the device.
    pub fn measure<D: Device>(stopwatch: &mut Stopwatch<'_, D>) -> Result<Self> {
        let (device, method) = (stopwatch.device, stopwatch.method);
        let values = method.copy_bytes / size_of::<f32>();
        let source = Self::copy_source(device, values)?;
        let mut target: Floats<D> = device.alloc(values)?;
        let copy = stopwatch.measure(|| Ok(()), || device.copy(&mut target, 0, &source, 0, values))?;
        drop((source, target));

        let side = method.product_side;
        let shape = LinearShape { rows: side, inputs: side, outputs: side };
        let (x, weight) =
            (inputs::compute(device, 1, side * side, 1.0)?, inputs::compute(device, 2, side * side, 1.0)?);
        let mut out = device.alloc(side * side)?;
        let product =
            stopwatch.measure(|| Ok(()), || device.linear_forward(&mut out, &x, &weight, None, shape))?;
        Ok(Ceilings { copy, copy_bytes: method.copy_bytes, product, product_side: side })
    }

    /// Random values, a few of them repeated again and again: to make gigabytes on the host would take longer than all
    /// copies.
    fn copy_source<D: Device>(device: &D, values: usize) -> Result<Floats<D>> {
        let some = inputs::floats(device, 0, values.min(1 << 24), 1.0)?;
        let mut source = device.alloc(values)?;
        for offset in (0..values).step_by(device.len(&some).max(1)) {
            device.copy(&mut source, offset, &some, 0, device.len(&some).min(values - offset))?;
        }
        Ok(source)
    }

    /// Joins the samples of two measurements, one before and one after everything else.
    pub fn join(mut self, later: Ceilings) -> Self {
        self.copy.0.extend(later.copy.0);
        self.product.0.extend(later.product.0);
        self
    }

    /// Floating-point operations of the measured gemm.
    pub fn product_flops(&self) -> f64 {
        2.0 * (self.product_side as f64).powi(3)
    }

    /// FLOP/s of the gemm.
    pub fn rate(&self) -> f64 {
        self.product_flops() / self.product.median()
    }

    /// Bytes per second of the copy, read and written.
    pub fn bandwidth(&self) -> f64 {
        2.0 * self.copy_bytes as f64 / self.copy.median()
    }

    /// The share of the ceiling that work of `flops` and `bytes` reaches in `seconds`, where the ceiling is whichever
    /// of the two limits the work. 1 is as fast as this machine goes.
    pub fn share(&self, flops: f64, bytes: f64, seconds: f64) -> f64 {
        (flops / self.rate()).max(bytes / self.bandwidth()) / seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ranges() {
        let sample = Sample(vec![3.0, 1.0, 2.0, 10.0]);
        assert_eq!((sample.median(), sample.min(), sample.max()), (2.5, 1.0, 10.0));
        assert!(Sample::default().median().is_nan());
    }

    #[test]
    fn long_operations_are_called_less_often() {
        assert_eq!(Method::GPU.calls_of(1e-5), (50, 50));
        assert_eq!(Method::GPU.calls_of(2e-3), (20, 40));
        assert_eq!(Method::GPU.calls_of(0.035), (3, 7));
        assert_eq!(Method::CPU.calls_of(10.0), (2, 7), "nothing is cut where it was not meant to be");
        assert_eq!(Method::GPU.with_calls(Some(0), Some(2)).calls_of(10.0), (0, 2));
        assert_eq!(Method::GPU.with_calls(None, Some(5)).calls_of(10.0), (50, 5));
    }

    #[test]
    fn a_deadline_passes() {
        assert!(!Deadline::of(None).is_over() && !Deadline::of(Some(3600.0)).is_over());
        assert!(Deadline::of(Some(0.0)).is_over());
    }

    #[test]
    fn the_ceiling_that_binds_is_the_one_that_counts() {
        let ceilings = Ceilings {
            copy: Sample(vec![1.0]),
            copy_bytes: 50,
            product: Sample(vec![2.0]),
            product_side: 10,
        };
        assert_eq!((ceilings.bandwidth(), ceilings.rate()), (100.0, 1000.0));
        assert_eq!(ceilings.share(500.0, 10.0, 1.0), 0.5, "arithmetic");
        assert_eq!(ceilings.share(500.0, 80.0, 1.0), 0.8, "traffic");
    }
}
