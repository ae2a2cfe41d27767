//! The number types in which the CPU device may hold weights and activations.

use half::bf16;

use super::products::Products;
use crate::device::{Element, StorageType};
use crate::optimizer::join;

/// A type of stored weights and activations: f32, or bf16. Arithmetic is f32 with either: values are widened as they
/// are read and rounded to the nearest as they are written.
pub trait Storage: Element + Products {
    /// Its name for people: `f32`.
    const NAME: &'static str;
    /// Its name in files.
    const TYPE: StorageType;

    /// The value in f32, exactly.
    fn widen(self) -> f32;

    /// The nearest value of this type; of two equally near ones, the even one.
    fn round(value: f32) -> Self;

    /// The `rows x columns` values of a matrix whose rows are `stride` apart, in this type, and the distance of their rows.
    /// They are copied to `memory` where they have to be rounded, and read in place otherwise.
    fn narrow_rows<'a>(
        values: &'a [f32],
        stride: usize,
        size: (usize, usize),
        memory: &'a mut [Self],
    ) -> (&'a [Self], usize);

    /// The memory of a buffer as f32 values; of a buffer of bf16 at least as many as [`Storage::float_values`] says.
    fn as_floats(values: &mut [Self]) -> &mut [f32];

    /// How many values make room for `floats` f32 values in [`Storage::as_floats`].
    fn float_values(floats: usize) -> usize;

    /// Applies `update` to f32 values of `weight`: to its own, to those of its `master` copy, or to a widened copy, which
    /// `round_at` turns back into what is stored; the number that it gets is the value's place.
    fn update(
        weight: &mut [Self],
        master: MasterSlice<'_>,
        update: impl FnOnce(&mut [f32]),
        round_at: impl Fn(f32, usize) -> bf16,
    );
}

/// A block of a master copy.
pub enum MasterSlice<'a> {
    /// Its values.
    Whole(&'a mut [f32]),
    /// What its values have beyond the weights.
    Remainders(&'a mut [u16]),
    /// There is none.
    None,
}

impl Storage for f32 {
    const NAME: &'static str = "f32";
    const TYPE: StorageType = StorageType::F32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn narrow_rows<'a>(
        values: &'a [f32],
        stride: usize,
        _: (usize, usize),
        _: &'a mut [f32],
    ) -> (&'a [f32], usize) {
        (values, stride)
    }

    fn as_floats(values: &mut [f32]) -> &mut [f32] {
        values
    }

    fn float_values(floats: usize) -> usize {
        floats
    }

    #[inline(always)]
    fn update(
        weight: &mut [f32],
        _: MasterSlice<'_>,
        update: impl FnOnce(&mut [f32]),
        _: impl Fn(f32, usize) -> bf16,
    ) {
        update(weight);
    }
}

impl Storage for bf16 {
    const NAME: &'static str = "bf16";
    const TYPE: StorageType = StorageType::Bf16;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Without the branch of [`bf16::from_f32`], so that loops over it become vector instructions.
    #[inline(always)]
    fn round(value: f32) -> Self {
        let bits = value.to_bits();
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A NaN keeps its sign and is made quiet: rounding could carry it over to infinity or zero.
        let nan = bits >> 16 | 0x40;
        bf16::from_bits(if value.is_nan() { nan as u16 } else { nearest as u16 })
    }

    #[inline(always)]
    fn narrow_rows<'a>(
        values: &'a [f32],
        stride: usize,
        (rows, columns): (usize, usize),
        memory: &'a mut [bf16],
    ) -> (&'a [bf16], usize) {
        for (row, out) in memory.chunks_exact_mut(columns.max(1)).take(rows).enumerate() {
            round(out, &values[row * stride..][..columns]);
        }
        (memory, columns)
    }

    /// A buffer of bf16 may begin between two f32 values.
    fn as_floats(values: &mut [bf16]) -> &mut [f32] {
        bytemuck::pod_align_to_mut(values).1
    }

    fn float_values(floats: usize) -> usize {
        2 * floats + 1
    }

    #[inline(always)]
    fn update(
        weight: &mut [bf16],
        master: MasterSlice<'_>,
        update: impl FnOnce(&mut [f32]),
        round_at: impl Fn(f32, usize) -> bf16,
    ) {
        if let MasterSlice::Whole(master) = master {
            update(master);
            return round(weight, master);
        }
        let mut values = [0.0; super::BLOCK_ELEMENTS];
        let values = &mut values[..weight.len()];
        widen(values, weight);
        if let MasterSlice::Remainders(remainders) = master {
            join(values, remainders);
            update(values);
            for (remainder, value) in remainders.iter_mut().zip(&*values) {
                *remainder = crate::optimizer::remainder(*value);
            }
            return round(weight, values);
        }
        update(values);
        for (index, (weight, value)) in weight.iter_mut().zip(values).enumerate() {
            *weight = round_at(*value, index);
        }
    }
}

/// `out = values`, widened.
#[inline(always)]
pub(super) fn widen<C: Storage>(out: &mut [f32], values: &[C]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.widen();
    }
}

/// `out = values`, rounded.
#[inline(always)]
pub(super) fn round<C: Storage>(out: &mut [C], values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = C::round(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bf16 survives the way to f32 and back, and every kind of f32 between two of them goes where `half` puts it.
    #[test]
    fn bf16_rounds_as_half_does() {
        for upper in 0..=u16::MAX {
            let exact = bf16::from_bits(upper);
            if !exact.is_nan() {
                assert_eq!(<bf16 as Storage>::round(exact.widen()).to_bits(), upper);
            }
            for lower in [0_u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (got, wanted) = (<bf16 as Storage>::round(value), bf16::from_f32(value));
                assert_eq!(got.to_bits(), wanted.to_bits(), "{value:e}");
            }
        }
    }
}
