//! The 8-bit numbers of block-wise quantised moments: the dynamic map that bitsandbytes publishes (Dettmers et al. 2022,
//! "8-bit Optimizers via Block-wise Quantization").
//!
//! A block of [`BLOCK`] values has one f32 scale, the largest absolute value in it, and a byte for each value, which names
//! an entry of the map from -1 to 1 (first moment) or from 0 to 1 (second moment, never negative). The map has a decade for each power
//! of ten from 1e-6 to 1; a decade's entries are evenly spaced, and the next larger decade has twice as many. So large
//! values keep up to 7 bits, and small ones keep their order of magnitude.
//!
//! The entries are computed, not looked up, by the same operations here and in `kernels/adamw.cu`: both devices give the same
//! codes and the same values for the same numbers.

/// Values that share a scale.
pub const BLOCK: usize = 256;

/// Tensors of fewer values keep f32 moments: they are norms and biases, whose memory does not matter and whose updates are the
/// most sensitive. The number is bitsandbytes' default.
pub const LEAST_VALUES: usize = 4096;

/// `0`, the decades' upper ends, and a place for the entry `1`, which stands alone above the largest decade.
const SCALES: [f32; 9] = [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0];
const INVERSES: [f32; 9] = [0.0, 1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1.0, 0.1];

/// The two maps, of 256 entries each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynamicMap {
    /// For the first moment: 127 negative entries, 0, 127 positive ones and 1. There is no -1.
    Signed,
    /// For the second moment: 0, 254 positive entries and 1.
    Unsigned,
}

impl DynamicMap {
    /// The entry of a code, from -1 to 1; entries ascend with their codes.
    #[inline(always)]
    pub fn decode(self, code: u8) -> f32 {
        match self {
            DynamicMap::Signed => {
                let place = i32::from(code) - 127;
                let magnitude = entry(place.unsigned_abs(), 1);
                if place < 0 { -magnitude } else { magnitude }
            }
            DynamicMap::Unsigned => entry(u32::from(code) + 1, 0),
        }
    }

    /// The code of the entry nearest to `value`, which lies between -1 and 1. A NaN gets the code of 0.
    ///
    /// One rule differs from bitsandbytes: the unsigned map never rounds a value above 0 down to 0. A second moment of 0
    /// would leave epsilon alone as the divisor of the next update.
    #[inline(always)]
    pub fn encode(self, value: f32) -> u8 {
        match self {
            DynamicMap::Signed => {
                let place = place(value.abs(), self.thresholds(), 1) as i32;
                // There is no entry -1: the lowest is -0.993.
                (if value < 0.0 { 127 - place.min(127) } else { 127 + place }) as u8
            }
            DynamicMap::Unsigned => (place(value, self.thresholds(), 0) - 1) as u8,
        }
    }

    /// Where entries of one decade give way to those of the next: to the first decade from 0, then from decade to decade,
    /// and last to the entry 1. Each lies halfway between the two entries beside it.
    #[inline(always)]
    fn thresholds(self) -> &'static [f32; 8] {
        const SIGNED: [f32; 8] = thresholds(1.0);
        const UNSIGNED: [f32; 8] = thresholds(2.0);
        match self {
            DynamicMap::Signed => &SIGNED,
            DynamicMap::Unsigned => &UNSIGNED,
        }
    }
}

/// The thresholds of a map whose lowest decade has `entries` entries.
const fn thresholds(entries: f64) -> [f32; 8] {
    let mut found = [0.0; 8];
    let (mut decade, mut power, mut count) = (0, 1e-6, entries);
    while decade < 7 {
        // In units of the decade's upper end, its entries lie in the middle of `count` parts of 0.1..1. The last entry
        // below is 0.1 - 0.09 / count, as the decade below has half as many.
        found[decade] = (power * (0.1 + 0.18 / count)) as f32;
        decade += 1;
        power *= 10.0;
        count *= 2.0;
    }
    found[7] = (1.0 - 0.225 / (count / 2.0)) as f32;
    found[0] = if entries == 1.0 { (1e-6 * (0.05 + 0.225)) as f32 } else { f32::MIN_POSITIVE };
    found
}

/// The entry of a place. A decade's places begin at a power of two: the exponent of a place names the decade, its mantissa
/// where in the decade the entry lies. `shift` is 1 for the signed map, whose place 0 is the entry 0, and 0 for the unsigned
/// one, whose place 1 is.
#[inline(always)]
fn entry(place: u32, shift: i32) -> f32 {
    let bits = (place as f32 + 0.5).to_bits();
    let decade = (bits >> 23) as i32 - 127 + shift;
    let mantissa = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    // The place above the largest decade would give a little more than 1.
    (SCALES[decade as usize] * 0.9f32.mul_add(mantissa - 1.0, 0.1)).min(1.0)
}

/// The place of the entry nearest to a value of 0..=1.
#[inline(always)]
fn place(value: f32, thresholds: &[f32; 8], shift: u32) -> u32 {
    let decade: u32 = thresholds.iter().map(|&threshold| u32::from(value >= threshold)).sum();
    let entries = ((1u32 << decade) >> shift) as i32;
    // The part of 0.1..1, of as many as there are entries, that the value lies in.
    let part = (value * INVERSES[decade as usize]).mul_add(1.0 / 0.9, -1.0 / 9.0) * entries as f32;
    entries as u32 + (part as i32).min(entries - 1).max(0) as u32
}

/// The scale of a block, from the largest absolute value in it: 0 where that is no normal f32, so that the block is kept as
/// zeros. A NaN stays one.
#[inline(always)]
pub fn block_scale(largest: f32) -> f32 {
    if largest < f32::MIN_POSITIVE { 0.0 } else { largest }
}

/// What a block's values are multiplied by before they are encoded.
#[inline(always)]
pub fn inverse_scale(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// Quantises `values`, of one block at most, and returns the block's scale.
#[inline(always)]
pub fn quantize_block(codes: &mut [u8], values: &[f32], map: DynamicMap) -> f32 {
    // Not `f32::max`, which would drop a NaN.
    let larger = |largest: f32, value: &f32| {
        if largest.is_nan() || value.abs() <= largest { largest } else { value.abs() }
    };
    let scale = block_scale(values.iter().fold(0.0, larger));
    let inverse = inverse_scale(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = map.encode(value * inverse);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: [DynamicMap; 2] = [DynamicMap::Signed, DynamicMap::Unsigned];

    fn entries(map: DynamicMap) -> Vec<f32> {
        (0..=255).map(|code| map.decode(code)).collect()
    }

    /// The map as its authors define it, in f64: in each decade the midpoints of evenly spaced boundaries from 0.1 to 1.
    fn published(map: DynamicMap) -> Vec<f64> {
        let mut entries = vec![0.0, 1.0];
        for decade in 0..7 {
            let count = match map {
                DynamicMap::Signed => 1 << decade,
                DynamicMap::Unsigned => 2 << decade,
            };
            for entry in 0..count {
                let middle = 0.1 + 0.9 * (f64::from(entry) + 0.5) / f64::from(count);
                let value = middle * 10f64.powi(decade - 6);
                entries.push(value);
                if map == DynamicMap::Signed {
                    entries.push(-value);
                }
            }
        }
        entries.sort_by(f64::total_cmp);
        entries
    }

    #[test]
    fn the_entries_are_the_published_ones() {
        for map in MAPS {
            let published = published(map);
            assert_eq!(published.len(), 256, "{map:?}");
            for (code, (entry, wanted)) in entries(map).into_iter().zip(published).enumerate() {
                let error = (f64::from(entry) - wanted).abs();
                assert!(error <= 1.5e-7 * wanted.abs(), "{map:?} {code}: {entry:e}, published {wanted:e}");
            }
        }
        assert_eq!(
            (DynamicMap::Signed.decode(127), DynamicMap::Signed.decode(255), DynamicMap::Unsigned.decode(0)),
            (0.0, 1.0, 0.0)
        );
    }

    #[test]
    fn every_entry_keeps_its_code() {
        for map in MAPS {
            for code in 0..=255 {
                assert_eq!(map.encode(map.decode(code)), code, "{map:?} {:e}", map.decode(code));
            }
        }
    }

    /// The nearest entry, also around every boundary between two, but for the smallest second moments.
    #[test]
    fn codes_are_of_the_nearest_entry() {
        for map in MAPS {
            let entries = entries(map);
            let mut values: Vec<f32> = (0..=20_000).map(|i| (i as f32 / 10_000.0 - 1.0).powi(7)).collect();
            for two in entries.windows(2) {
                let middle = 0.5 * (two[0] + two[1]);
                values.extend([middle * (1.0 - 1e-5), middle * (1.0 + 1e-5)]);
            }
            if map == DynamicMap::Unsigned {
                values.retain(|&value| value >= 0.0);
            }
            assert!(values.len() > 10_000);
            for value in values {
                let nearest = entries.iter().map(|entry| (entry - value).abs()).fold(f32::INFINITY, f32::min);
                let error = (map.decode(map.encode(value)) - value).abs();
                let smallest = map == DynamicMap::Unsigned && value > 0.0 && value < entries[1];
                assert!(
                    error <= nearest * (1.0 + 1e-4) + 1e-12 || smallest,
                    "{map:?}: {value:e} becomes {:e}",
                    map.decode(map.encode(value))
                );
            }
        }
    }

    #[test]
    fn a_second_moment_above_0_stays_above_0() {
        for value in [f32::MIN_POSITIVE, 1e-30, 1e-9, 1.6e-7] {
            assert_eq!(DynamicMap::Unsigned.encode(value), 1, "{value:e}");
        }
        assert_eq!(DynamicMap::Unsigned.encode(0.0), 0);
        assert_eq!(DynamicMap::Signed.encode(2.7e-7), 127);
    }

    #[test]
    fn blocks_of_zeros_of_tiny_values_and_of_a_nan() {
        let mut codes = [9; 3];
        assert_eq!(quantize_block(&mut codes, &[0.0; 3], DynamicMap::Signed), 0.0);
        assert_eq!(codes, [127; 3]);
        assert_eq!(quantize_block(&mut codes, &[1e-40, 0.0, 1e-41], DynamicMap::Unsigned), 0.0);
        assert_eq!(codes, [0; 3]);
        let scale = quantize_block(&mut codes, &[1.0, f32::NAN, 2.0], DynamicMap::Signed);
        assert!(scale.is_nan());
        assert_eq!(quantize_block(&mut codes, &[-3.0, 3.0, 0.3], DynamicMap::Signed), 3.0);
        assert_eq!(codes[..2], [0, 255]);
    }
}
