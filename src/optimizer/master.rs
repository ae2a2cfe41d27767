//! The f32 master copy of bf16 weights: whole, or as the 16 bits that each weight lacks of it.
//!
//! A bf16 weight is its master copy rounded to the nearest, so its bits are the upper half of the copy's, or one more where it was
//! rounded up. With the lower half, the remainder, the copy is known again: a remainder above 0x8000 was rounded up, one below was
//! rounded down. One of exactly 0x8000 lies in the middle between two weights, goes to the even one, and would not tell which way: such
//! a copy, one in 65,536, is moved by a unit in its last place, away from the middle, to where its weight already is. (NVIDIA's
//! Transformer Engine keeps the remainders of bf16 parameters too.) `kernels/adamw.cu` does the same.

use super::moments::MasterWeights;
use crate::device::{ComputeBuffer, Floats, Memory, MemoryPart};
use crate::error::Result;

/// The remainder of a value in the middle between two bf16 values. A value with a larger one is rounded up, with a smaller one down.
const MIDDLE: u16 = 0x8000;

/// The remainder of an f32 value, which is moved away from the middle between two bf16 values.
#[inline(always)]
pub fn remainder(value: f32) -> u16 {
    let bits = value.to_bits();
    let (upper, lower) = ((bits >> 16) as u16, bits as u16);
    match lower == MIDDLE {
        // An odd upper half is rounded up.
        true if upper & 1 == 1 => MIDDLE + 1,
        true => MIDDLE - 1,
        false => lower,
    }
}

/// The f32 value whose nearest bf16 value is `weight`, given as f32, and whose remainder this is.
#[inline(always)]
pub fn joined(weight: f32, remainder: u16) -> f32 {
    let upper = (weight.to_bits() >> 16) as u16;
    let upper = upper.wrapping_sub(u16::from(remainder > MIDDLE));
    f32::from_bits(u32::from(upper) << 16 | u32::from(remainder))
}

/// The master copy of a tensor, or of the part of it that a state belongs to.
#[derive(Debug)]
pub enum Master<D: Memory> {
    /// The values.
    Whole(Floats<D>),
    /// Their remainders; the weights are the rest.
    Remainders(D::Buffer<u16>),
}

impl<D: Memory> Master<D> {
    /// The master copy of `len` values; `None` where none is asked for. A whole one begins as zeros, to which the weights have to be
    /// uploaded; remainders begin as those of bf16 values.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for it.
    pub fn new(device: &D, len: usize, kind: MasterWeights) -> Result<Option<Self>> {
        device.as_part(MemoryPart::MasterWeights, || {
            Ok(match kind {
                MasterWeights::F32 => Some(Master::Whole(device.alloc(len)?)),
                MasterWeights::Split => Some(Master::Remainders(device.alloc(len)?)),
                MasterWeights::None => None,
            })
        })
    }

    /// How it is kept.
    pub fn kind(&self) -> MasterWeights {
        match self {
            Master::Whole(_) => MasterWeights::F32,
            Master::Remainders(_) => MasterWeights::Split,
        }
    }

    /// Values.
    pub fn len(&self, device: &D) -> usize {
        match self {
            Master::Whole(values) => device.len(values),
            Master::Remainders(values) => device.len(values),
        }
    }

    /// Assigns `values` from value `first` of the copy on. The weights must be these values, rounded to the nearest.
    ///
    /// # Errors
    /// Those of [`Memory::upload`].
    pub fn upload(&mut self, device: &D, first: usize, values: &[f32]) -> Result<()> {
        match self {
            Master::Whole(master) => device.upload(master, first, values),
            Master::Remainders(master) => {
                let remainders: Vec<u16> = values.iter().copied().map(remainder).collect();
                device.upload(master, first, &remainders)
            }
        }
    }

    /// Reads values from value `first` of the copy on; `weight` has the same value at `in_weight`.
    ///
    /// # Errors
    /// Those of [`Memory::download`].
    pub fn download(
        &self,
        device: &D,
        (weight, in_weight): (&ComputeBuffer<D>, usize),
        first: usize,
        out: &mut [f32],
    ) -> Result<()> {
        match self {
            Master::Whole(master) => device.download(out, master, first),
            Master::Remainders(master) => {
                let mut remainders = vec![0; out.len()];
                device.download(&mut remainders, master, first)?;
                device.download_compute(out, weight, in_weight)?;
                join(out, &remainders);
                Ok(())
            }
        }
    }
}

/// Turns weights into their master copies.
pub fn join(weights: &mut [f32], remainders: &[u16]) {
    for (weight, &remainder) in weights.iter_mut().zip(remainders) {
        *weight = joined(*weight, remainder);
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Every upper half with the lower halves at which something changes.
    #[test]
    fn a_weight_and_its_remainder_are_the_value_again() {
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0x8002, 0xfffe, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let weight = bf16::from_f32(value);
                let again = joined(weight.to_f32(), remainder(value));
                if value.is_nan() {
                    assert!(again.is_nan(), "{upper:04x} {lower:04x}");
                    continue;
                }
                assert_eq!(bf16::from_f32(again), weight, "{upper:04x} {lower:04x}: another weight");
                let moved = i64::from(again.to_bits()) - i64::from(value.to_bits());
                assert_eq!(moved.abs(), i64::from(lower == 0x8000), "{upper:04x} {lower:04x}");
            }
        }
    }
}
