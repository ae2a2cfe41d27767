//! What AdamW keeps of a trained tensor between updates, each buffer under the name that checkpoints give it.

use crate::device::{AdamWUpdate, ComputeBuffer, Floats, Memory, Optimizer};
use crate::error::Result;

/// A buffer of an optimiser's state. A checkpoint stores each of them as f32, whatever the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateBuffer {
    /// The weight in f32: the master copy, or the weight itself where the device keeps no copy.
    Weight,
    /// Running mean of the gradient.
    FirstMoment,
    /// Running mean of the squared gradient.
    SecondMoment,
}

impl StateBuffer {
    /// All buffers of a trained tensor.
    pub const ALL: [StateBuffer; 3] =
        [StateBuffer::Weight, StateBuffer::FirstMoment, StateBuffer::SecondMoment];

    /// The name in a checkpoint: the file holds a tensor `NAME/TENSOR` for each buffer.
    pub fn name(self) -> &'static str {
        match self {
            StateBuffer::Weight => "weight",
            StateBuffer::FirstMoment => "first_moment",
            StateBuffer::SecondMoment => "second_moment",
        }
    }
}

/// AdamW's state of one trained tensor.
#[derive(Debug)]
pub struct OptimizerState<D: Memory> {
    /// The weights in f32, where [`Memory::Compute`] is narrower.
    pub master: Option<Floats<D>>,
    /// Running mean of the gradient.
    pub first_moment: Floats<D>,
    /// Running mean of the squared gradient.
    pub second_moment: Floats<D>,
}

impl<D: Optimizer> OptimizerState<D> {
    /// Zero moments for `len` weights. The f32 master copy, where the device keeps one, starts as zero too: upload the
    /// weights to it before the first update.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, len: usize) -> Result<Self> {
        Ok(OptimizerState {
            master: if device.needs_master() { Some(device.alloc(len)?) } else { None },
            first_moment: device.alloc(len)?,
            second_moment: device.alloc(len)?,
        })
    }

    /// The state before the first update of `weight`: zero moments, and a master copy with the weight's values.
    ///
    /// # Errors
    /// As [`OptimizerState::new`].
    pub fn of(device: &D, weight: &ComputeBuffer<D>) -> Result<Self> {
        let mut state = OptimizerState::new(device, device.len(weight))?;
        if let Some(master) = &mut state.master {
            let mut values = vec![0.0; device.len(weight)];
            device.download_compute(&mut values, weight, 0)?;
            device.upload(master, 0, &values)?;
        }
        Ok(state)
    }
}

impl<D: Memory> OptimizerState<D> {
    /// The buffer of this kind; `None` for [`StateBuffer::Weight`] where the weight is its own master copy.
    pub fn get(&self, buffer: StateBuffer) -> Option<&Floats<D>> {
        match buffer {
            StateBuffer::Weight => self.master.as_ref(),
            StateBuffer::FirstMoment => Some(&self.first_moment),
            StateBuffer::SecondMoment => Some(&self.second_moment),
        }
    }

    /// As [`OptimizerState::get`].
    pub fn get_mut(&mut self, buffer: StateBuffer) -> Option<&mut Floats<D>> {
        match buffer {
            StateBuffer::Weight => self.master.as_mut(),
            StateBuffer::FirstMoment => Some(&mut self.first_moment),
            StateBuffer::SecondMoment => Some(&mut self.second_moment),
        }
    }

    /// The operands of this tensor's update.
    pub fn update<'a>(
        &'a mut self,
        weight: &'a mut ComputeBuffer<D>,
        gradient: &'a Floats<D>,
    ) -> AdamWUpdate<'a, D> {
        let OptimizerState { master, first_moment, second_moment } = self;
        AdamWUpdate { weight, master: master.as_mut(), first_moment, second_moment, gradient }
    }
}
