//! What AdamW keeps of a trained tensor between updates, each buffer under the name that checkpoints give it.

use std::ops::Range;

use half::bf16;

use super::dynamic_map::BLOCK;
use super::master::Master;
use super::moments::{MasterWeights, MomentFormat, Moments, StateOptions};
use super::rounding::StochasticRounding;
use crate::device::{AdamWUpdate, ComputeBuffer, Floats, Gradient, Memory, MemoryPart, Optimizer};
use crate::error::Result;

/// A buffer of an optimiser's state, as checkpoints know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateBuffer {
    /// The weight in f32: the master copy, or the weight itself where there is no copy.
    Weight,
    /// What the weight lacks of a master copy that is split between the two. Checkpoints hold the copy instead, as
    /// [`StateBuffer::Weight`].
    Remainder,
    /// Running mean of the gradient.
    FirstMoment,
    /// Running mean of the squared gradient.
    SecondMoment,
    /// The scales of an 8-bit first moment.
    FirstScales,
    /// The scales of an 8-bit second moment.
    SecondScales,
}

/// The type in which a checkpoint stores a buffer, to the bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateType {
    /// Weights, f32 moments and scales.
    F32,
    /// bf16 moments.
    Bf16,
    /// Remainders of master copies.
    U16,
    /// Codes of 8-bit moments.
    U8,
}

impl StateType {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            StateType::F32 => 4,
            StateType::Bf16 | StateType::U16 => 2,
            StateType::U8 => 1,
        }
    }
}

impl StateBuffer {
    /// All buffers that a trained tensor may have.
    pub const ALL: [StateBuffer; 6] = [
        StateBuffer::Weight,
        StateBuffer::Remainder,
        StateBuffer::FirstMoment,
        StateBuffer::SecondMoment,
        StateBuffer::FirstScales,
        StateBuffer::SecondScales,
    ];

    /// The name in a checkpoint: the file holds a tensor `NAME/TENSOR` for each buffer.
    pub fn name(self) -> &'static str {
        match self {
            StateBuffer::Weight => "weight",
            StateBuffer::Remainder => "remainder",
            StateBuffer::FirstMoment => "first_moment",
            StateBuffer::SecondMoment => "second_moment",
            StateBuffer::FirstScales => "first_scales",
            StateBuffer::SecondScales => "second_scales",
        }
    }

    /// The values of this buffer that belong to the values `part` of a tensor, which begin at a block.
    pub fn part(self, part: Range<usize>) -> Range<usize> {
        match self {
            StateBuffer::FirstScales | StateBuffer::SecondScales => {
                part.start / BLOCK..part.end.div_ceil(BLOCK)
            }
            _ => part,
        }
    }

    /// Type and length of the buffer of a tensor of `len` values in a checkpoint; `None` where moments of this format have none.
    pub fn stored(self, len: usize, moments: MomentFormat) -> Option<(StateType, usize)> {
        match (self, moments.of_tensor(len)) {
            (StateBuffer::Weight, _) => Some((StateType::F32, len)),
            (StateBuffer::Remainder, _) => None,
            (StateBuffer::FirstMoment | StateBuffer::SecondMoment, format) => Some(match format {
                MomentFormat::F32 => (StateType::F32, len),
                MomentFormat::Bf16 => (StateType::Bf16, len),
                MomentFormat::EightBit => (StateType::U8, len),
            }),
            (StateBuffer::FirstScales | StateBuffer::SecondScales, MomentFormat::EightBit) => {
                Some((StateType::F32, len.div_ceil(BLOCK)))
            }
            (StateBuffer::FirstScales | StateBuffer::SecondScales, _) => None,
        }
    }

    /// Type and length of the buffer that AdamW keeps of a tensor of `len` values beside the weight, which is narrower than f32 where
    /// `needs_master`.
    pub fn kept(self, len: usize, options: StateOptions, needs_master: bool) -> Option<(StateType, usize)> {
        let is_kept = |kind| needs_master && options.master == kind;
        match self {
            StateBuffer::Weight => is_kept(MasterWeights::F32).then_some((StateType::F32, len)),
            StateBuffer::Remainder => is_kept(MasterWeights::Split).then_some((StateType::U16, len)),
            _ => self.stored(len, options.moments),
        }
    }
}

/// A buffer on the device, by the type of its values.
#[derive(Debug)]
pub enum StateValues<F, B, R, C> {
    /// f32.
    F32(F),
    /// bf16.
    Bf16(B),
    /// Remainders.
    U16(R),
    /// Codes.
    U8(C),
}

/// A buffer that is read.
pub type StateRef<'a, D> = StateValues<
    &'a Floats<D>,
    &'a <D as Memory>::Buffer<bf16>,
    &'a <D as Memory>::Buffer<u16>,
    &'a <D as Memory>::Buffer<u8>,
>;
/// A buffer that is written.
pub type StateMut<'a, D> = StateValues<
    &'a mut Floats<D>,
    &'a mut <D as Memory>::Buffer<bf16>,
    &'a mut <D as Memory>::Buffer<u16>,
    &'a mut <D as Memory>::Buffer<u8>,
>;

/// AdamW's state of one trained tensor.
#[derive(Debug)]
pub struct OptimizerState<D: Memory> {
    /// The weights' f32 copy, where [`Memory::Compute`] is narrower and one is asked for.
    pub master: Option<Master<D>>,
    /// Both moments.
    pub moments: Moments<D>,
    /// How a weight without a master copy is rounded.
    pub rounding: StochasticRounding,
    /// The values of the tensor that this is the state of, where other ranks have those of the others; `None` is all of them.
    pub part: Option<Range<usize>>,
}

impl<D: Optimizer> OptimizerState<D> {
    /// As [`OptimizerState::with_options`], with f32 moments and master copy.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, len: usize) -> Result<Self> {
        Self::with_options(device, len, StateOptions::default(), StochasticRounding::default())
    }

    /// Zero moments for `len` weights. A whole master copy starts as zero too: upload the weights to it before the first update.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn with_options(
        device: &D,
        len: usize,
        options: StateOptions,
        rounding: StochasticRounding,
    ) -> Result<Self> {
        let whole = StateOptions { moments: options.moments.of_tensor(len), ..options };
        Self::of_values(device, len, whole, rounding)
    }

    /// The state of `len` values, with moments of this very format.
    fn of_values(
        device: &D,
        len: usize,
        options: StateOptions,
        rounding: StochasticRounding,
    ) -> Result<Self> {
        Ok(OptimizerState {
            master: match device.needs_master() {
                true => Master::new(device, len, options.master)?,
                false => None,
            },
            moments: device
                .as_part(MemoryPart::OptimizerStates, || Moments::of_format(device, len, options.moments))?,
            rounding,
            part: None,
        })
    }

    /// As [`OptimizerState::before_first`], of the values `part` of a tensor of `whole` values; the first is a multiple of [`BLOCK`].
    /// `weight` is the whole tensor, or that part alone. The format of the moments is that of the whole tensor.
    ///
    /// # Errors
    /// As [`OptimizerState::new`].
    pub fn before_first_of_part(
        device: &D,
        weight: &ComputeBuffer<D>,
        (part, whole): (Range<usize>, usize),
        options: StateOptions,
        rounding: StochasticRounding,
    ) -> Result<Self> {
        let format = StateOptions { moments: options.moments.of_tensor(whole), ..options };
        let mut state = Self::of_values(device, part.len(), format, rounding)?;
        let first = if device.len(weight) == whole { part.start } else { 0 };
        if let Some(Master::Whole(master)) = &mut state.master {
            let mut values = vec![0.0; part.len()];
            device.download_compute(&mut values, weight, first)?;
            device.upload(master, 0, &values)?;
        }
        state.part = Some(part);
        Ok(state)
    }

    /// The state before the first update of `weight`: f32 moments of 0, and a master copy with the weight's values.
    ///
    /// # Errors
    /// As [`OptimizerState::new`].
    pub fn of(device: &D, weight: &ComputeBuffer<D>) -> Result<Self> {
        Self::before_first(device, weight, StateOptions::default(), StochasticRounding::default())
    }

    /// As [`OptimizerState::of`], with these options.
    ///
    /// # Errors
    /// As [`OptimizerState::new`].
    pub fn before_first(
        device: &D,
        weight: &ComputeBuffer<D>,
        options: StateOptions,
        rounding: StochasticRounding,
    ) -> Result<Self> {
        let mut state = OptimizerState::with_options(device, device.len(weight), options, rounding)?;
        if let Some(Master::Whole(master)) = &mut state.master {
            let mut values = vec![0.0; device.len(weight)];
            device.download_compute(&mut values, weight, 0)?;
            device.upload(master, 0, &values)?;
        }
        Ok(state)
    }
}

impl<D: Memory> OptimizerState<D> {
    /// The buffer of this kind; `None` for one that the state does not have, such as [`StateBuffer::Weight`] where the weight
    /// is its own master copy.
    pub fn get(&self, buffer: StateBuffer) -> Option<StateRef<'_, D>> {
        use StateBuffer::{FirstMoment, FirstScales, Remainder, SecondMoment, SecondScales, Weight};
        match (buffer, &self.moments) {
            (Weight, _) => match &self.master {
                Some(Master::Whole(values)) => Some(StateValues::F32(values)),
                _ => None,
            },
            (Remainder, _) => match &self.master {
                Some(Master::Remainders(values)) => Some(StateValues::U16(values)),
                _ => None,
            },
            (FirstMoment, Moments::F32(moments)) => Some(StateValues::F32(&moments.first)),
            (SecondMoment, Moments::F32(moments)) => Some(StateValues::F32(&moments.second)),
            (FirstMoment, Moments::Bf16(moments)) => Some(StateValues::Bf16(&moments.first)),
            (SecondMoment, Moments::Bf16(moments)) => Some(StateValues::Bf16(&moments.second)),
            (FirstMoment, Moments::EightBit { codes, .. }) => Some(StateValues::U8(&codes.first)),
            (SecondMoment, Moments::EightBit { codes, .. }) => Some(StateValues::U8(&codes.second)),
            (FirstScales, Moments::EightBit { scales, .. }) => Some(StateValues::F32(&scales.first)),
            (SecondScales, Moments::EightBit { scales, .. }) => Some(StateValues::F32(&scales.second)),
            (FirstScales | SecondScales, _) => None,
        }
    }

    /// As [`OptimizerState::get`].
    pub fn get_mut(&mut self, buffer: StateBuffer) -> Option<StateMut<'_, D>> {
        use StateBuffer::{FirstMoment, FirstScales, Remainder, SecondMoment, SecondScales, Weight};
        match (buffer, &mut self.moments) {
            (Weight, _) => match &mut self.master {
                Some(Master::Whole(values)) => Some(StateValues::F32(values)),
                _ => None,
            },
            (Remainder, _) => match &mut self.master {
                Some(Master::Remainders(values)) => Some(StateValues::U16(values)),
                _ => None,
            },
            (FirstMoment, Moments::F32(moments)) => Some(StateValues::F32(&mut moments.first)),
            (SecondMoment, Moments::F32(moments)) => Some(StateValues::F32(&mut moments.second)),
            (FirstMoment, Moments::Bf16(moments)) => Some(StateValues::Bf16(&mut moments.first)),
            (SecondMoment, Moments::Bf16(moments)) => Some(StateValues::Bf16(&mut moments.second)),
            (FirstMoment, Moments::EightBit { codes, .. }) => Some(StateValues::U8(&mut codes.first)),
            (SecondMoment, Moments::EightBit { codes, .. }) => Some(StateValues::U8(&mut codes.second)),
            (FirstScales, Moments::EightBit { scales, .. }) => Some(StateValues::F32(&mut scales.first)),
            (SecondScales, Moments::EightBit { scales, .. }) => Some(StateValues::F32(&mut scales.second)),
            (FirstScales | SecondScales, _) => None,
        }
    }

    /// The operands of this tensor's update from an f32 gradient.
    pub fn update<'a>(
        &'a mut self,
        weight: &'a mut ComputeBuffer<D>,
        gradient: &'a Floats<D>,
    ) -> AdamWUpdate<'a, D> {
        self.update_from(weight, Gradient::F32(gradient))
    }

    /// The operands of this tensor's update.
    pub fn update_from<'a>(
        &'a mut self,
        weight: &'a mut ComputeBuffer<D>,
        gradient: Gradient<'a, D>,
    ) -> AdamWUpdate<'a, D> {
        let OptimizerState { master, moments, rounding, part } = self;
        AdamWUpdate {
            weight,
            master: master.as_mut(),
            moments,
            rounding: *rounding,
            gradient,
            part: part.clone(),
            first_weight: 0,
            first_gradient: 0,
        }
    }
}
