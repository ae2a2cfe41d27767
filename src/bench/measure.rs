//! How things are timed, and this machine's ceilings.
//!
//! Before anything is timed its outputs are poisoned and checked. A call is timed alone, by events on a GPU, behind a
//! read of other memory that pushes its operands out of the caches; so the launch's own cost on the host hides behind that.

use super::inputs;
use crate::device::{Device, Floats, LinearShape};
use crate::error::Result;

/// How often a thing runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Calls before the timed ones.
    pub warmups: usize,
    /// Timed calls.
    pub calls: usize,
    /// Bytes read before each timed call: several times the last cache.
    pub flush_bytes: usize,
    /// Sides of the square product whose rate is the ceiling.
    pub product_side: usize,
    /// Bytes of the copy whose bandwidth is the ceiling.
    pub copy_bytes: usize,
}

impl Method {
    pub const GPU: Method =
        Method { warmups: 50, calls: 50, flush_bytes: 256 << 20, product_side: 8192, copy_bytes: 2 << 30 };
    pub const CPU: Method =
        Method { warmups: 2, calls: 7, flush_bytes: 128 << 20, product_side: 2048, copy_bytes: 256 << 20 };
    /// To see that everything runs; its times mean nothing.
    pub const EMULATED: Method =
        Method { warmups: 0, calls: 1, flush_bytes: 0, product_side: 64, copy_bytes: 1 << 16 };

    /// For people.
    pub fn describe(&self) -> String {
        let flush = match self.flush_bytes >> 20 {
            0 => String::new(),
            mebibytes => format!(", {mebibytes} MiB read before each to empty the caches"),
        };
        format!("{} calls to warm up, {} timed one by one{flush}", self.warmups, self.calls)
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

    pub fn median(&self) -> f64 {
        self.at(|sorted| (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0)
    }

    pub fn min(&self) -> f64 {
        self.at(|sorted| sorted[0])
    }

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
    pub fn new(device: &'a D, method: Method) -> Result<Self> {
        let mut flush = device.alloc(method.flush_bytes / size_of::<f32>())?;
        // A system may back memory that was never written by one page of zeros.
        device.upload(&mut flush, 0, &vec![1.0f32; method.flush_bytes / size_of::<f32>()])?;
        Ok(Stopwatch { device, method, flush, flushed: device.alloc(2)? })
    }

    /// Times `run`, with an untimed `prepare` before each call.
    pub fn measure(
        &mut self,
        mut prepare: impl FnMut() -> Result<()>,
        mut run: impl FnMut() -> Result<()>,
    ) -> Result<Sample> {
        for _ in 0..self.method.warmups {
            prepare()?;
            run()?;
        }
        let mut seconds = Vec::with_capacity(self.method.calls);
        for _ in 0..self.method.calls {
            prepare()?;
            self.device.gradient_norm(&mut self.flushed, &[&self.flush], None)?;
            seconds.push(self.device.time(&mut run)?);
        }
        Ok(Sample(seconds))
    }
}

/// What this machine can do at best, measured in the same run as all else.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Seconds of a copy of `copy_bytes`; it reads and writes them.
    pub copy: Sample,
    pub copy_bytes: usize,
    /// Seconds of a square product in the device's number type.
    pub product: Sample,
    pub product_side: usize,
}

impl Ceilings {
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

    /// Random values, a few of them again and again: to make gigabytes on the host would take longer than all copies.
    fn copy_source<D: Device>(device: &D, values: usize) -> Result<Floats<D>> {
        let some = inputs::floats(device, 0, values.min(1 << 24), 1.0)?;
        let mut source = device.alloc(values)?;
        for offset in (0..values).step_by(device.len(&some).max(1)) {
            device.copy(&mut source, offset, &some, 0, device.len(&some).min(values - offset))?;
        }
        Ok(source)
    }

    /// Samples of two measurements, one before and one behind all else.
    pub fn join(mut self, later: Ceilings) -> Self {
        self.copy.0.extend(later.copy.0);
        self.product.0.extend(later.product.0);
        self
    }

    pub fn product_flops(&self) -> f64 {
        2.0 * (self.product_side as f64).powi(3)
    }

    /// FLOP/s of the product.
    pub fn rate(&self) -> f64 {
        self.product_flops() / self.product.median()
    }

    /// Bytes/s of the copy, read and written.
    pub fn bandwidth(&self) -> f64 {
        2.0 * self.copy_bytes as f64 / self.copy.median()
    }

    /// The share of the ceilings that work of `flops` and `bytes` reaches in `seconds`: of whichever of the two bounds
    /// it. 1 is as fast as this machine goes.
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
