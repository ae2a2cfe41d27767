//! Optimiser states in pinned host memory, which visit the device piece by piece.
//!
//! The device has a few slots, each with room for the states of one piece of a tensor. Pieces are updated in a fixed order,
//! and slots are taken in turn: while one piece is updated, the states of the next ones are on their way to the device and
//! those of the last ones on their way back. The results have the bits that states on the device give.
//!
//! Three events order the queues for each slot: an update waits for `fetched`, the copy back waits for `updated`, and the
//! next fetch into the slot waits for `stored`. As pieces return in the order in which they are fetched, a piece is
//! back in host memory before it is fetched again.

use half::bf16;

use super::AdamWStep;
use super::dynamic_map::{BLOCK, LEAST_VALUES};
use super::moments::StateOptions;
use super::rounding::StochasticRounding;
use super::state::{OptimizerState, StateBuffer, StateMut, StateRef, StateType};
use crate::device::{ComputeBuffer, Floats, Gradient, Offload, Optimizer, Queue};
use crate::error::{Error, Result};

/// Values of a piece, unless a tensor has fewer: at 12 bytes of state each, a copy takes milliseconds, which hides what
/// starting it costs.
pub const PIECE_VALUES: usize = 16 << 20;
/// Slots where nothing but other updates hides the copies: one arrives, one is updated, one leaves.
const FEWEST_SLOTS: usize = 3;
/// Boundary of each buffer in host memory: what the driver copies best.
const BOUNDARY: usize = 256;

/// Whether the state of a tensor of `len` values is offloaded: small ones are not worth a copy, and stay on the device.
pub fn is_offloaded(len: usize) -> bool {
    len >= LEAST_VALUES
}

/// The tensors whose states are offloaded, and when they are updated.
#[derive(Clone, Debug, Default)]
pub struct OffloadPlan {
    /// Numbers in the model and lengths of the offloaded tensors, in the order of their updates.
    pub tensors: Vec<(usize, usize)>,
    /// How many of `tensors`, from the first on, each group has whose states shall all be on the device before its first update:
    /// those of a layer that is updated inside the backward. Empty where updates follow each other without other work between
    /// them.
    pub ahead: Vec<usize>,
    /// What is kept of each tensor.
    pub options: StateOptions,
    /// Whether the device keeps f32 master copies where `options` asks for them.
    pub needs_master: bool,
    /// Values of a piece, a multiple of [`BLOCK`] and not fewer than the states of a piece need to have the format of the whole.
    pub piece_values: usize,
}

impl OffloadPlan {
    /// Values of the largest piece.
    fn slot_values(&self) -> usize {
        let largest = self.tensors.iter().map(|&(_, len)| len).max().unwrap_or(0);
        largest.min(self.piece_values)
    }

    fn pieces(&self) -> usize {
        self.tensors.iter().map(|&(_, len)| len.div_ceil(self.piece_values)).sum()
    }

    /// Slots on the device.
    fn slots(&self) -> usize {
        let mut first = 0;
        let groups = self.ahead.iter().map(|&count| {
            let group = &self.tensors[first..first + count];
            first += count;
            group.iter().map(|&(_, len)| len.div_ceil(self.piece_values)).sum::<usize>()
        });
        let largest = groups.max().unwrap_or(0);
        (largest + FEWEST_SLOTS - 1).max(FEWEST_SLOTS).min(self.pieces())
    }

    /// Bytes of the slots on the device.
    pub fn device_bytes(&self) -> usize {
        let values = self.slot_values();
        let master = if self.needs_master { self.options.master.bytes() * values } else { 0 };
        self.slots() * (master + self.options.moments.bytes(values))
    }

    /// Bytes of pinned host memory.
    pub fn host_bytes(&self) -> usize {
        self.tensors.iter().map(|&(_, len)| HostLayout::new(self, len).bytes).sum()
    }
}

/// Where the buffers of a tensor's state lie in its host memory.
#[derive(Clone, Debug)]
struct HostLayout {
    /// With the type of its values and the offset of its first byte.
    buffers: Vec<(StateBuffer, StateType, usize)>,
    bytes: usize,
}

impl HostLayout {
    fn new(plan: &OffloadPlan, len: usize) -> Self {
        let (mut buffers, mut bytes) = (Vec::new(), 0);
        for buffer in StateBuffer::ALL {
            let kept = buffer.kept(len, plan.options, plan.needs_master);
            let Some((kind, values)) = kept else { continue };
            buffers.push((buffer, kind, bytes));
            bytes = (bytes + values * kind.size()).next_multiple_of(BOUNDARY);
        }
        HostLayout { buffers, bytes }
    }
}

/// The state of one tensor.
#[derive(Debug)]
struct HostState<H> {
    number: usize,
    len: usize,
    layout: HostLayout,
    memory: H,
}

/// A part of a tensor that is updated at a time.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Place of the tensor in [`OffloadedStates::tensors`].
    tensor: usize,
    first: usize,
    len: usize,
}

#[derive(Debug)]
struct Slot<D: Offload> {
    state: OptimizerState<D>,
    fetched: D::Event,
    updated: D::Event,
    stored: D::Event,
}

/// States in host memory, and the slots through which they visit the device.
#[derive(Debug)]
pub struct OffloadedStates<D: Offload> {
    tensors: Vec<HostState<D::HostBuffer>>,
    pieces: Vec<Piece>,
    slots: Vec<Slot<D>>,
    /// Updates done since the states were made.
    position: usize,
    /// Whether the next pieces were asked for.
    is_primed: bool,
    /// Recorded before the first fetches: the slots are free.
    free: D::Event,
}

impl<D: Offload + Optimizer> OffloadedStates<D> {
    /// Zeros in host memory: [`OffloadedStates::write`] the weights to the master copies, where there are some, before the
    /// first update.
    ///
    /// # Errors
    /// [`Error::Device`] where device or host have no memory for them, [`Error::Config`] for a device that offloads
    /// nothing.
    pub fn new(device: &D, plan: &OffloadPlan) -> Result<Self> {
        device.check_offload()?;
        if plan.piece_values < LEAST_VALUES || !plan.piece_values.is_multiple_of(BLOCK) {
            return Err(Error::bug(format!(
                "offloaded states cannot be cut into pieces of {}",
                plan.piece_values
            )));
        }
        let tensors = plan.tensors.iter().map(|&(number, len)| {
            let layout = HostLayout::new(plan, len);
            Ok(HostState { number, len, memory: device.alloc_host(layout.bytes)?, layout })
        });
        let tensors: Vec<HostState<D::HostBuffer>> = tensors.collect::<Result<_>>()?;
        let (step, values) = (plan.piece_values, plan.slot_values());
        let slots = (0..plan.slots()).map(|_| {
            let rounding = StochasticRounding::default();
            Ok(Slot {
                state: OptimizerState::with_options(device, values, plan.options, rounding)?,
                fetched: device.new_event()?,
                updated: device.new_event()?,
                stored: device.new_event()?,
            })
        });
        let slots = slots.collect::<Result<_>>()?;
        let pieces = tensors.iter().enumerate().flat_map(|(tensor, state)| {
            let len = state.len;
            (0..len).step_by(step).map(move |first| Piece { tensor, first, len: step.min(len - first) })
        });
        let pieces = pieces.collect();
        Ok(OffloadedStates {
            tensors,
            pieces,
            slots,
            position: 0,
            is_primed: false,
            free: device.new_event()?,
        })
    }

    fn find(&self, number: usize) -> Option<usize> {
        self.tensors.iter().position(|tensor| tensor.number == number)
    }

    /// Whether the state of the tensor of this number is here.
    pub fn contains(&self, number: usize) -> bool {
        self.find(number).is_some()
    }

    /// Whether a tensor's state has this buffer here; [`StateBuffer::Weight`] is only where there is a whole master copy.
    pub fn has(&self, number: usize, buffer: StateBuffer) -> bool {
        self.place(number, buffer, 0).is_ok()
    }

    /// Updates a tensor, whose turn it must be: updates come in the order of [`OffloadPlan::tensors`], over and over.
    ///
    /// # Errors
    /// [`Error::Bug`] where it is another tensor's turn; those of the device.
    pub fn update(
        &mut self,
        device: &D,
        tensor: (usize, StochasticRounding),
        weight: &mut ComputeBuffer<D>,
        gradient: Gradient<'_, D>,
        norm: &Floats<D>,
        step: AdamWStep,
    ) -> Result<()> {
        let (number, rounding) = tensor;
        let place = self.find(number).ok_or_else(|| unknown(number))?;
        self.prime(device)?;
        let count = self.pieces.iter().filter(|piece| piece.tensor == place).count();
        for _ in 0..count {
            let piece = self.pieces[self.position % self.pieces.len()];
            if piece.tensor != place {
                return Err(Error::bug(format!("offloaded states: it is not the turn of tensor {number}")));
            }
            let slot_number = self.position % self.slots.len();
            let slot = &mut self.slots[slot_number];
            slot.state.rounding = rounding;
            device.wait(Queue::Compute, &slot.fetched)?;
            let mut update = slot.state.update_from(weight, gradient);
            update.part = Some(piece.first..piece.first + piece.len);
            device.adamw(&mut [update], norm, step)?;
            device.record(&mut slot.updated, Queue::Compute)?;
            device.wait(Queue::ToHost, &slot.updated)?;
            store(device, &mut self.tensors[place], slot, piece)?;
            device.record(&mut slot.stored, Queue::ToHost)?;
            device.wait(Queue::ToDevice, &slot.stored)?;
            let next = self.pieces[(self.position + self.slots.len()) % self.pieces.len()];
            fetch(device, &mut self.slots[slot_number], &self.tensors[next.tensor], next)?;
            self.position += 1;
        }
        Ok(())
    }

    /// Asks for the first pieces, where that was not done since host memory was written last.
    ///
    /// Nothing is on its way back then: writing to host memory waits for all copies.
    fn prime(&mut self, device: &D) -> Result<()> {
        if self.is_primed {
            return Ok(());
        }
        device.record(&mut self.free, Queue::Compute)?;
        device.wait(Queue::ToDevice, &self.free)?;
        for position in self.position..self.position + self.slots.len() {
            let slot = position % self.slots.len();
            let piece = self.pieces[position % self.pieces.len()];
            fetch(device, &mut self.slots[slot], &self.tensors[piece.tensor], piece)?;
        }
        self.is_primed = true;
        Ok(())
    }

    /// Copies the bytes of a buffer from value `offset` on, after all updates so far.
    ///
    /// # Errors
    /// [`Error::Bug`] for a buffer that the tensor does not have; those of the device.
    pub fn read(
        &self,
        device: &D,
        number: usize,
        (buffer, offset): (StateBuffer, usize),
        out: &mut [u8],
    ) -> Result<()> {
        let (tensor, byte) = self.place(number, buffer, offset)?;
        device.read_host(out, &self.tensors[tensor].memory, byte)
    }

    /// Assigns the bytes of a buffer from value `offset` on.
    ///
    /// # Errors
    /// As [`OffloadedStates::read`].
    pub fn write(
        &mut self,
        device: &D,
        number: usize,
        (buffer, offset): (StateBuffer, usize),
        values: &[u8],
    ) -> Result<()> {
        let (tensor, byte) = self.place(number, buffer, offset)?;
        // What the slots hold of the next pieces is old from now on.
        self.is_primed = false;
        device.write_host(&mut self.tensors[tensor].memory, byte, values)
    }

    /// Place of the tensor, and the byte of its memory where value `offset` of `buffer` lies.
    fn place(&self, number: usize, buffer: StateBuffer, offset: usize) -> Result<(usize, usize)> {
        let tensor = self.find(number).ok_or_else(|| unknown(number))?;
        let found = self.tensors[tensor].layout.buffers.iter().find(|(other, ..)| *other == buffer);
        let Some(&(_, kind, start)) = found else {
            return Err(Error::bug(format!("tensor {number} has no {} in host memory", buffer.name())));
        };
        Ok((tensor, start + offset * kind.size()))
    }
}

fn unknown(number: usize) -> Error {
    Error::bug(format!("the state of tensor {number} is not in host memory"))
}

/// A buffer of a tensor's state: the byte of host memory where a piece begins, and its values.
fn of_piece(buffer: StateBuffer, start: usize, kind: StateType, piece: Piece) -> (usize, usize) {
    let (first, len) = match buffer {
        StateBuffer::FirstScales | StateBuffer::SecondScales => {
            (piece.first / BLOCK, piece.len.div_ceil(BLOCK))
        }
        _ => (piece.first, piece.len),
    };
    (start + first * kind.size(), len)
}

/// Queues the copies of a piece into a slot, and records them.
fn fetch<D: Offload + Optimizer>(
    device: &D,
    slot: &mut Slot<D>,
    tensor: &HostState<D::HostBuffer>,
    piece: Piece,
) -> Result<()> {
    for &(buffer, kind, start) in &tensor.layout.buffers {
        let (byte, len) = of_piece(buffer, start, kind, piece);
        match slot.state.get_mut(buffer) {
            Some(StateMut::<D>::F32(out)) => device.fetch::<f32>(out, &tensor.memory, byte, len)?,
            Some(StateMut::<D>::Bf16(out)) => device.fetch::<bf16>(out, &tensor.memory, byte, len)?,
            Some(StateMut::<D>::U16(out)) => device.fetch::<u16>(out, &tensor.memory, byte, len)?,
            Some(StateMut::<D>::U8(out)) => device.fetch::<u8>(out, &tensor.memory, byte, len)?,
            None => {}
        }
    }
    device.record(&mut slot.fetched, Queue::ToDevice)
}

/// Queues the copies of a piece from a slot.
fn store<D: Offload + Optimizer>(
    device: &D,
    tensor: &mut HostState<D::HostBuffer>,
    slot: &Slot<D>,
    piece: Piece,
) -> Result<()> {
    for &(buffer, kind, start) in &tensor.layout.buffers {
        let (byte, len) = of_piece(buffer, start, kind, piece);
        match slot.state.get(buffer) {
            Some(StateRef::<D>::F32(values)) => device.store::<f32>(&mut tensor.memory, byte, values, len)?,
            Some(StateRef::<D>::Bf16(values)) => {
                device.store::<bf16>(&mut tensor.memory, byte, values, len)?
            }
            Some(StateRef::<D>::U16(values)) => device.store::<u16>(&mut tensor.memory, byte, values, len)?,
            Some(StateRef::<D>::U8(values)) => device.store::<u8>(&mut tensor.memory, byte, values, len)?,
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
