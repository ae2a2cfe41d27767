//! AdamW's two moments of a tensor, in one of three formats.

use half::bf16;

use super::dynamic_map::{BLOCK, LEAST_VALUES};
use crate::device::{Floats, Memory};
use crate::error::Result;

/// How moments are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MomentFormat {
    /// 8 bytes per parameter.
    #[default]
    F32,
    /// 4 bytes per parameter, each moment rounded to the nearest bf16.
    Bf16,
    /// 2 bytes per parameter, and 8 for each block of 256: [`super::DynamicMap`].
    EightBit,
}

impl MomentFormat {
    /// The format of a tensor of `len` values: small ones stay f32 where the others are 8-bit.
    pub fn of_tensor(self, len: usize) -> Self {
        match self {
            MomentFormat::EightBit if len < LEAST_VALUES => MomentFormat::F32,
            format => format,
        }
    }

    /// Bytes of both moments of a tensor of `len` values.
    pub fn bytes(self, len: usize) -> usize {
        match self.of_tensor(len) {
            MomentFormat::F32 => 8 * len,
            MomentFormat::Bf16 => 4 * len,
            MomentFormat::EightBit => 2 * len + 8 * len.div_ceil(BLOCK),
        }
    }
}

/// How an f32 copy of the weights is kept beside bf16 ones. Where weights are f32, as on the CPU by default, nothing is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MasterWeights {
    /// 4 bytes per parameter: the weight is the copy's value, rounded to the nearest bf16.
    #[default]
    F32,
    /// 2 bytes per parameter: the bits of the copy that the weight lacks ([`super::Master`]).
    Split,
    /// No copy: the weight is its own master copy and is rounded stochastically. A weight that is f32 is not rounded.
    None,
}

impl MasterWeights {
    /// Bytes of the copy for each value.
    pub fn bytes(self) -> usize {
        match self {
            MasterWeights::F32 => 4,
            MasterWeights::Split => 2,
            MasterWeights::None => 0,
        }
    }
}

/// What AdamW keeps of a trained tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateOptions {
    /// The moments.
    pub moments: MomentFormat,
    /// The master copy.
    pub master: MasterWeights,
}

/// Both moments of a tensor.
#[derive(Debug)]
pub enum Moments<D: Memory> {
    /// One number per value.
    F32(MomentPair<Floats<D>>),
    /// One number per value.
    Bf16(MomentPair<D::Buffer<bf16>>),
    /// One code per value, and a scale for every [`BLOCK`] of them.
    EightBit {
        /// Codes of [`super::DynamicMap::Signed`] and [`super::DynamicMap::Unsigned`].
        codes: MomentPair<D::Buffer<u8>>,
        /// `[ceil(len / BLOCK)]`
        scales: MomentPair<Floats<D>>,
    },
}

/// One value of type `T` for each moment.
#[derive(Clone, Copy, Debug)]
pub struct MomentPair<T> {
    /// For the running mean of the gradient.
    pub first: T,
    /// For the running mean of the squared gradient.
    pub second: T,
}

impl<T> MomentPair<T> {
    fn try_new(mut make: impl FnMut() -> Result<T>) -> Result<Self> {
        Ok(MomentPair { first: make()?, second: make()? })
    }
}

impl<D: Memory> Moments<D> {
    /// Moments of 0 for a tensor of `len` values.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the device has no memory for them.
    pub fn new(device: &D, len: usize, format: MomentFormat) -> Result<Self> {
        Self::of_format(device, len, format.of_tensor(len))
    }

    /// Moments of 0 in this very format for `len` values, which may be a part of a tensor.
    ///
    /// # Errors
    /// As [`Moments::new`].
    pub fn of_format(device: &D, len: usize, format: MomentFormat) -> Result<Self> {
        Ok(match format {
            MomentFormat::F32 => Moments::F32(MomentPair::try_new(|| device.alloc(len))?),
            MomentFormat::Bf16 => Moments::Bf16(MomentPair::try_new(|| device.alloc(len))?),
            // A scale of 0 makes every code a 0.
            MomentFormat::EightBit => Moments::EightBit {
                codes: MomentPair::try_new(|| device.alloc(len))?,
                scales: MomentPair::try_new(|| device.alloc(len.div_ceil(BLOCK)))?,
            },
        })
    }

    /// The format of these moments.
    pub fn format(&self) -> MomentFormat {
        match self {
            Moments::F32(_) => MomentFormat::F32,
            Moments::Bf16(_) => MomentFormat::Bf16,
            Moments::EightBit { .. } => MomentFormat::EightBit,
        }
    }
}
