//! What a device is, and how long its work takes.

use super::OperationTime;
use crate::error::Result;

/// A processor that computes: the CPU, a CUDA GPU, or the emulated one.
pub trait Hardware: Sized + Send + Sync + 'static {
    /// Whether this is the CPU, which takes any head size and keeps buffers in main memory.
    const IS_CPU: bool;

    /// One line for people: `cpu (AMD EPYC, 2 threads, AVX-512, f32)`.
    fn describe(&self) -> String;

    /// Kind of device and number format, `cpu f32`: results of different arithmetic differ in their last bits.
    fn arithmetic(&self) -> String;

    /// Runs `work`, which does many small operations. The CPU runs it on its pool of threads, which otherwise takes over each
    /// operation from the caller (some microseconds each, and a token of a small model has hundreds of them).
    fn together<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    /// Seconds of the device's own time for what `work` queues: between two events on a GPU, by the clock elsewhere.
    ///
    /// # Errors
    /// Those of `work`, and those of the device's clock.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64>;

    /// Runs `work` and says how long each operation in it took, in order. Recording the moments costs a few
    /// microseconds per operation.
    ///
    /// # Errors
    /// Those of `work`, and those of the device's clock.
    fn trace<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Vec<OperationTime>)>;
}
