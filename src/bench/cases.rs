//! One case for each operation of the `Device` trait: its operands, the floating-point operations it must do, and the
//! fewest bytes it can move (each input read once, each output written once, what is updated both).

mod adapter;
mod head;
mod layer;
mod optimizer;

pub use layer::{head_gemms, linear_shape};

use super::shapes::Shape;
use crate::data::{PairBatch, Sides};
use crate::device::{BatchBuffers, ComputeBuffer, Device, Floats};
use crate::error::Result;
use crate::objective::{PairConstants, ReferencePair};

/// Bytes of an f32 or an index.
const WORD: usize = 4;

/// What an operation writes or updates; its inputs live in its closure.
pub struct Outputs<D: Device> {
    /// Buffers of the storage type, in the order in which the case made them.
    pub compute: Vec<ComputeBuffer<D>>,
    /// Buffers of f32.
    pub floats: Vec<Floats<D>>,
}

type Work<D> = Box<dyn FnMut(&D, &mut Outputs<D>) -> Result<()>>;

/// An operation with operands.
pub struct Case<D: Device> {
    /// Its name in the `Device` trait.
    pub operation: &'static str,
    /// Which of several uses of the operation; empty where there is one.
    pub part: &'static str,
    /// Floating-point operations of its gemms; 0 where memory bounds it anyway.
    pub flops: f64,
    /// The fewest bytes it can move.
    pub bytes: f64,
    /// Bytes of memory that it needs beside operands and results; 0 where they are not compared.
    pub workspace: f64,
    /// What the operation writes, compared between devices.
    pub outputs: Outputs<D>,
    /// Whether another case measures the same on this device, so that there is nothing to measure.
    pub redundant: bool,
    /// Whether outputs are assigned, and so may hold anything before a call.
    assigns: bool,
    prepare: Option<Work<D>>,
    run: Work<D>,
}

impl<D: Device> Case<D> {
    /// An operation that assigns `outputs`.
    fn new(
        operation: &'static str,
        outputs: Outputs<D>,
        run: impl FnMut(&D, &mut Outputs<D>) -> Result<()> + 'static,
    ) -> Self {
        let run = Box::new(run);
        Case {
            operation,
            part: "",
            flops: 0.0,
            bytes: 0.0,
            workspace: 0.0,
            outputs,
            redundant: false,
            assigns: true,
            prepare: None,
            run,
        }
    }

    fn part(self, part: &'static str) -> Self {
        Case { part, ..self }
    }

    fn redundant(self, redundant: bool) -> Self {
        Case { redundant, ..self }
    }

    fn flops(self, flops: usize) -> Self {
        Case { flops: flops as f64, ..self }
    }

    fn bytes(self, bytes: usize) -> Self {
        Case { bytes: bytes as f64, ..self }
    }

    fn workspace(self, bytes: usize) -> Self {
        Case { workspace: bytes as f64, ..self }
    }

    /// Marks an operation that updates its outputs: they are not poisoned.
    fn updates(self) -> Self {
        Case { assigns: false, ..self }
    }

    /// Sets the work that brings the operands back to their values before a call.
    fn prepare(self, prepare: impl FnMut(&D, &mut Outputs<D>) -> Result<()> + 'static) -> Self {
        Case { prepare: Some(Box::new(prepare)), ..self }
    }

    /// The case's name: `rope`, or `linear_forward qkv`.
    pub fn name(&self) -> String {
        format!("{} {}", self.operation, self.part).trim_end().to_owned()
    }

    /// Brings operands that the operation updates in place back to their first values.
    ///
    /// # Errors
    /// Those of the device.
    pub fn prepare_operands(&mut self, device: &D) -> Result<()> {
        match &mut self.prepare {
            Some(prepare) => prepare(device, &mut self.outputs),
            None => Ok(()),
        }
    }

    /// Calls the operation once.
    ///
    /// # Errors
    /// Those of the device.
    pub fn run(&mut self, device: &D) -> Result<()> {
        (self.run)(device, &mut self.outputs)
    }

    /// Poisons what the operation assigns, or the first and last `most` values of each output, and runs it once.
    fn poisoned_run(&mut self, device: &D, most: usize) -> Result<()> {
        if self.assigns {
            for buffer in &mut self.outputs.compute {
                for part in ends(device.len(buffer), most) {
                    let poison = vec![f32::NAN; part.len()];
                    device.upload_values(buffer, part.start, crate::device::RawValues::from_f32(&poison))?;
                }
            }
            for buffer in &mut self.outputs.floats {
                for part in ends(device.len(buffer), most) {
                    device.upload(buffer, part.start, &vec![f32::NAN; part.len()])?;
                }
            }
        }
        self.prepare_operands(device)?;
        self.run(device)
    }

    /// Runs once on poisoned outputs, and says what is not finite in them. Sums of gradients may be gigabytes, so their
    /// norm stands for them.
    ///
    /// # Errors
    /// Those of the device.
    pub fn not_finite(&mut self, device: &D) -> Result<Option<String>> {
        self.poisoned_run(device, usize::MAX)?;
        for buffer in &self.outputs.compute {
            let mut values = vec![0.0; device.len(buffer)];
            device.download_compute(&mut values, buffer, 0)?;
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                return Ok(Some(format!("value {at} of its output is {}", values[at])));
            }
        }
        let (mut norm, mut found) = (device.alloc(2)?, [0.0f32; 2]);
        for buffer in &self.outputs.floats {
            device.gradient_norm(&mut norm, &[buffer], None)?;
            device.download(&mut found, &norm, 0)?;
            if !found[0].is_finite() {
                return Ok(Some(format!("the norm of its output is {}", found[0])));
            }
        }
        Ok(None)
    }

    /// Runs once on poisoned outputs, and returns all of them.
    ///
    /// # Errors
    /// Those of the device.
    pub fn checked_run(&mut self, device: &D) -> Result<Vec<f32>> {
        self.sampled_run(device, usize::MAX)
    }

    /// Runs once on poisoned outputs, and returns at most `most` values of the start and of the end of each: the host
    /// takes longer to look at all of a large output than a GPU to make it.
    ///
    /// # Errors
    /// Those of the device.
    pub fn sampled_run(&mut self, device: &D, most: usize) -> Result<Vec<f32>> {
        self.poisoned_run(device, most)?;
        let mut values = Vec::new();
        for buffer in &self.outputs.compute {
            for part in ends(device.len(buffer), most) {
                let mut found = vec![0.0; part.len()];
                device.download_compute(&mut found, buffer, part.start)?;
                values.append(&mut found);
            }
        }
        for buffer in &self.outputs.floats {
            for part in ends(device.len(buffer), most) {
                let mut found = vec![0.0; part.len()];
                device.download(&mut found, buffer, part.start)?;
                values.append(&mut found);
            }
        }
        Ok(values)
    }
}

/// Ranges that cover all of `len` values, or the first and the last `most`.
fn ends(len: usize, most: usize) -> Vec<std::ops::Range<usize>> {
    match len / 2 >= most {
        true => vec![0..most, len - most..len],
        false => std::iter::once(0..len).collect(),
    }
}

/// Makes a case just before it is measured, so that only one case's operands exist at a time.
pub type Maker<D> = fn(&D, &Shape) -> Result<Case<D>>;

/// Every operation of a training step, with and without adapters, and of generation.
pub fn all<D: Device>() -> Vec<Maker<D>> {
    [layer::makers(), adapter::makers(), head::makers(), optimizer::makers()].concat()
}

/// Bytes of a weight or activation.
fn compute_size<D: Device>() -> usize {
    size_of::<D::Compute>()
}

/// Outputs of these lengths.
fn outputs<D: Device>(device: &D, compute: &[usize], floats: &[usize]) -> Result<Outputs<D>> {
    Ok(Outputs {
        compute: compute.iter().map(|&len| device.alloc(len)).collect::<Result<_>>()?,
        floats: floats.iter().map(|&len| device.alloc(len)).collect::<Result<_>>()?,
    })
}

/// The batch of `shape`, with the constants that a reference would give.
fn batch<D: Device>(device: &D, shape: &Shape) -> Result<BatchBuffers<D>> {
    let pairs = super::inputs::pairs(shape.lengths, shape.pairs, shape.config.vocab_size);
    let packed = PairBatch::pack(&pairs, Sides::Both);
    let references: Vec<ReferencePair> = (0..shape.pairs)
        .map(|pair| ReferencePair {
            logp_chosen: -80.0 - pair as f32,
            logp_rejected: -90.0 - pair as f32,
            tokens_chosen: shape.lengths.chosen as u32,
            tokens_rejected: shape.lengths.rejected as u32,
        })
        .collect();
    let objective = super::shapes::settings()?.objective(shape.pairs);
    let chosen = vec![shape.lengths.chosen; shape.pairs];
    let constants: Vec<PairConstants> = objective.batch_constants(&references, &chosen);
    let mut buffers = BatchBuffers::new(device, packed.tokens(), shape.pairs, packed.scored_tokens())?;
    buffers.load(device, &packed, &constants)?;
    Ok(buffers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_an_output() {
        let ends =
            |len, most| ends(len, most).into_iter().map(|part| (part.start, part.end)).collect::<Vec<_>>();
        assert_eq!(ends(10, usize::MAX), [(0, 10)]);
        assert_eq!(ends(10, 6), [(0, 10)]);
        assert_eq!(ends(10, 2), [(0, 2), (8, 10)]);
        assert_eq!(ends(0, 2), [(0, 0)]);
    }
}
