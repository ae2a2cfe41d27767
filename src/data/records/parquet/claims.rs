//! What a page of a Parquet file claims to hold, against the bytes that it has. The layouts are those of the Parquet
//! format's `Encodings.md`.

use parquet::basic::{Compression, Encoding};

/// Items that the list of one row may have. Longer lists are no conversation, and a run of levels claims any number of
/// them in five bytes.
const MAX_ITEMS: u64 = 1 << 20;

/// Lengths that one byte of a page may stand for. The most that known writers reach is 228, in blocks of 2048 equal
/// differences.
const LENGTHS_PER_BYTE: u64 = 1024;

/// Bytes that a page may have after decompression. A page is about a megabyte, or a value where that is larger.
const MAX_PAGE_BYTES: i64 = 1 << 30;

/// Bytes that one byte of a Snappy stream stands for at most, which are 64 for each three. Of this codec alone, the
/// crate makes room for what is claimed; with the others, for what is there.
const SNAPPY_RATIO: i64 = 22;

/// Holds the size that a page's header claims against that of its compressed bytes. The header is Thrift's compact
/// encoding of the fields `type`, `uncompressed_page_size` and `compressed_page_size`, and of more after them.
pub(super) fn page(header: &[u8], codec: Compression) -> Option<String> {
    /// A field of 32 bits that comes one number after the last one.
    const FIELD: u8 = 0x15;
    let mut bytes = Bytes(header);
    let mut field = || match bytes.take(1)? {
        [FIELD] => bytes.number().map(|number| (number >> 1) as i64 ^ -((number & 1) as i64)),
        _ => None,
    };
    let (Some(_kind), Some(size), Some(compressed)) = (field(), field(), field()) else {
        return Some("a page's header does not begin with its sizes".into());
    };
    let most = match codec {
        Compression::SNAPPY => compressed.saturating_mul(SNAPPY_RATIO),
        _ => i64::MAX,
    };
    (size > most.min(MAX_PAGE_BYTES))
        .then(|| format!("a page of {compressed} compressed bytes claims {size} bytes"))
}

/// Holds the `count` values of a dictionary page, each of which takes `bits` at least, against its bytes.
pub(super) fn dictionary(count: u32, bytes: &[u8], bits: u64) -> Option<String> {
    let most = 8 * bytes.len() as u64 / bits;
    (u64::from(count) > most).then(|| {
        format!("a dictionary claims {count} values, and its {} bytes hold {most} at most", bytes.len())
    })
}

/// Splits the levels from the front of a data page of version 1: run-length encoded levels, if there are any, and what
/// comes after them. `None` if the page is too short, which the crate reports.
pub(super) fn levels(
    bytes: &[u8],
    count: u32,
    encoding: Encoding,
    max_level: i16,
) -> Option<(Option<&[u8]>, &[u8])> {
    if max_level <= 0 {
        return Some((None, bytes));
    }
    if encoding == Encoding::RLE {
        let (length, rest) = bytes.split_first_chunk()?;
        let (levels, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        return Some((Some(levels), rest));
    }
    // Packed levels have their bits for each value.
    let bits = u64::from(count) * u64::from(bits_of_level(max_level));
    Some((None, bytes.get(usize::try_from(bits.div_ceil(8)).ok()?..)?))
}

/// Bits of a level that is `max_level` at most.
fn bits_of_level(max_level: i16) -> u32 {
    i16::BITS - max_level.leading_zeros()
}

/// Counts the items of each row's list in a column that has lists.
pub(super) struct Lists {
    /// Bits of a repetition level; 0 where the column has no lists.
    bits: u32,
    /// Items of the newest row until now.
    items: u64,
}

impl Lists {
    pub fn new(max_level: i16) -> Self {
        Lists { bits: bits_of_level(max_level), items: 0 }
    }

    /// Adds the repetition levels of a page with `count` values. They are runs of one level and groups of eight packed
    /// levels; level 0 begins a row.
    pub fn add(&mut self, levels: &[u8], count: u32) -> Option<String> {
        let mut left = u64::from(count);
        let mut bytes = Bytes(levels);
        while self.bits > 0 && left > 0 {
            // Levels that are cut short are reported by the crate.
            let header = bytes.number()?;
            let length = header >> 1;
            if length > u64::from(u32::MAX) {
                return Some(format!("a run claims {length} levels"));
            }
            if header & 1 == 0 {
                let level = bytes.take(u64::from(self.bits.div_ceil(8)))?;
                let run = length.min(left);
                let begins_rows = level.iter().all(|&byte| byte == 0);
                self.items = if begins_rows { 1 } else { self.items + run };
                left -= run;
            } else {
                let packed = bytes.take_up_to(length * u64::from(self.bits));
                let group = (8 * length).min(left).min(8 * packed.len() as u64 / u64::from(self.bits));
                self.add_packed(packed, group);
                left -= group;
            }
            if self.items > MAX_ITEMS {
                return Some(format!("the list of a row claims more than {MAX_ITEMS} items"));
            }
        }
        None
    }

    fn add_packed(&mut self, packed: &[u8], count: u64) {
        let bits = u64::from(self.bits);
        for place in 0..count {
            let is_set = |bit: u64| packed[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
            let repeats = (place * bits..(place + 1) * bits).any(is_set);
            self.items = if repeats { self.items + 1 } else { 1 };
        }
    }
}

/// Holds a stream of lengths, stored as differences from one to the next, against its bytes and the `count` values of
/// its page; returns what comes after the stream.
pub(super) fn lengths(stream: &[u8], count: u32) -> Result<&[u8], String> {
    let cut_short = || "the lengths of a page's texts are cut short".to_string();
    let mut bytes = Bytes(stream);
    let mut header = || bytes.number().ok_or_else(cut_short);
    let (block, parts, claimed, _first) = (header()?, header()?, header()?, header()?);
    let most = u64::from(count).min((stream.len() as u64).saturating_mul(LENGTHS_PER_BYTE));
    if claimed > most {
        return Err(format!("a page of {count} values claims {claimed} lengths in {} bytes", stream.len()));
    }
    let in_part = block.checked_div(parts).unwrap_or(0);
    let mut left = claimed.saturating_sub(1);
    while left > 0 {
        let _smallest = bytes.number().ok_or_else(cut_short)?;
        let widths = bytes.take(parts).ok_or_else(cut_short)?;
        for &width in widths {
            // Parts after the last length have a width, and no bytes.
            if left > 0 {
                bytes.take(u64::from(width).saturating_mul(in_part) / 8).ok_or_else(cut_short)?;
                left = left.saturating_sub(in_part);
            }
        }
    }
    Ok(bytes.0)
}

/// Bytes that are read from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn take_up_to(&mut self, count: u64) -> &'a [u8] {
        let count = usize::try_from(count).map_or(self.0.len(), |count| count.min(self.0.len()));
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    /// A number of seven bits a byte, the lowest first (unsigned LEB128).
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [u8; 7] = [0x15, 4, 0x15, 0x80, 0x08, 0x15, 100];

    #[test]
    fn a_header_is_held_against_the_compressed_bytes() {
        // 512 bytes out of 50.
        assert_eq!(page(&HEADER, Compression::SNAPPY), None);
        let mut large = HEADER;
        large[6] = 46;
        let fault = page(&large, Compression::SNAPPY).unwrap();
        assert_eq!(fault, "a page of 23 compressed bytes claims 512 bytes");
        assert_eq!(page(&large, Compression::ZSTD(Default::default())), None);
        // Two gigabytes, whatever the codec is.
        let huge = [0x15, 4, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f];
        assert!(page(&huge, Compression::UNCOMPRESSED).unwrap().contains("claims 2147483647 bytes"));
        for cut in 0..7 {
            assert!(page(&HEADER[..cut], Compression::SNAPPY).unwrap().contains("does not begin"), "{cut}");
        }
    }

    #[test]
    fn a_dictionary_holds_a_length_for_each_text() {
        assert_eq!(dictionary(4, &[0; 16], 32), None);
        assert_eq!(dictionary(8, &[0], 1), None);
        let fault = dictionary(5, &[0; 19], 32).unwrap();
        assert_eq!(fault, "a dictionary claims 5 values, and its 19 bytes hold 4 at most");
    }

    /// A run of `count` times `level`, which has less than nine bits.
    fn run(count: u64, level: u8) -> Vec<u8> {
        let mut bytes = number(count << 1);
        bytes.push(level);
        bytes
    }

    fn number(mut number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
        bytes
    }

    #[test]
    fn the_items_of_a_list_are_counted_over_runs_groups_and_pages() {
        let most = MAX_ITEMS as u32;
        let begins = run(1, 0);
        let full = [begins.clone(), run(MAX_ITEMS - 1, 1)].concat();
        assert_eq!(Lists::new(1).add(&full, most), None);
        // Another list begins, so that nothing adds up.
        let two = [full.clone(), full.clone()].concat();
        assert_eq!(Lists::new(1).add(&two, 2 * most), None);
        // Levels that the page's values leave out do not count.
        let long = [begins.clone(), run(u32::MAX.into(), 1)].concat();
        assert_eq!(Lists::new(1).add(&long, most), None);
        assert!(Lists::new(1).add(&long, most + 1).is_some());
        let mut lists = Lists::new(3);
        assert_eq!(lists.add(&full, most), None);
        let next_page = [3, 0b01];
        assert!(lists.add(&next_page, 1).is_some(), "a page goes on with the list of the one before");
        // Groups of packed levels: with levels up to 3, the second value of the first byte begins a row.
        let mut lists = Lists::new(3);
        assert_eq!(lists.add(&[3, 0b0000_0001, 0b1111_1110], 8), None);
        assert_eq!(lists.items, 5);
        assert!(lists.add(&run(1 << 40, 1), 8).unwrap().contains("a run claims"));
    }

    #[test]
    fn levels_are_split_from_the_front() {
        let bytes = [2, 0, 0, 0, 7, 8, 9];
        let expected: (Option<&[u8]>, &[u8]) = (Some(&[7, 8]), &[9]);
        assert_eq!(levels(&bytes, 5, Encoding::RLE, 1), Some(expected));
        assert_eq!(levels(&bytes, 5, Encoding::RLE, 0), Some((None, &bytes[..])));
        assert_eq!(levels(&bytes[..5], 5, Encoding::RLE, 1), None);
        #[expect(deprecated, reason = "old files have it")]
        let packed = Encoding::BIT_PACKED;
        assert_eq!(levels(&bytes, 9, packed, 3), Some((None, &bytes[3..])));
    }

    #[test]
    fn the_lengths_of_texts_are_walked_to_their_end() {
        // Blocks of 128 lengths in four parts; 33 lengths, so that two parts hold something: 32 differences of 2 bits.
        let header = [number(128), number(4), number(33), number(0)].concat();
        let block = [&[0, 2, 0, 9, 9], [0xff; 8].as_slice()].concat();
        let stream = [&header[..], &block, b"rest"].concat();
        assert_eq!(lengths(&stream, 33), Ok(&b"rest"[..]));
        assert!(lengths(&stream, 32).unwrap_err().contains("a page of 32 values claims 33 lengths"));
        let cut = lengths(&stream[..header.len() + 8], 33).unwrap_err();
        assert!(cut.contains("cut short"), "{cut}");
        // One length has no block.
        let one = [number(128), number(4), number(1), number(6)].concat();
        assert_eq!(lengths(&[&one[..], b"text"].concat(), 1), Ok(&b"text"[..]));
        // A block may be as large as it says: what is claimed is held against the bytes.
        let claim = [number(1 << 30), number(1), number(1 << 20), number(0), vec![0, 0]].concat();
        assert!(lengths(&claim, u32::MAX).unwrap_err().contains("lengths in"));
        // Nothing turns round for ever.
        let empty = [number(0), number(0), number(100), number(0), vec![0; 50]].concat();
        assert!(lengths(&empty, 100).unwrap_err().contains("cut short"));
    }
}
