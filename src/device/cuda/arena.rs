//! The GPU's memory, taken from the driver in large pieces that are cut into buffers. So a model's hundreds of tensors
//! need only a handful of allocations, and freeing a buffer needs no wait, because the one stream orders its last use
//! before the next.

use std::collections::BTreeMap;

/// Boundary of every buffer; what the kernels and cuBLASLt ask for.
const ALIGNMENT: usize = 256;
/// Bytes asked of the driver at once, unless a buffer needs more.
const PIECE_BYTES: usize = 256 << 20;

/// Where pieces come from.
pub(super) trait PieceSource {
    type Error;
    /// A piece on a 256-byte boundary.
    fn take(&mut self, bytes: usize) -> Result<u64, Self::Error>;
    /// Gives a piece back, after waiting for the work that may still use it.
    fn give_back(&mut self, address: u64) -> Result<(), Self::Error>;
}

/// Pieces and the free ranges inside them.
#[derive(Debug)]
pub(super) struct Arena {
    /// The pieces, by address.
    pieces: BTreeMap<u64, Piece>,
    /// Every buffer's length is a multiple of this many bytes.
    alignment: usize,
    /// Bytes asked of the source at once, unless a buffer needs more.
    piece_bytes: usize,
}

impl Default for Arena {
    fn default() -> Self {
        Arena { pieces: BTreeMap::new(), alignment: ALIGNMENT, piece_bytes: PIECE_BYTES }
    }
}

#[derive(Debug)]
struct Piece {
    bytes: usize,
    /// Lengths of the free ranges by offset; no two touch.
    free: BTreeMap<usize, usize>,
    /// Lengths of the buffers by offset.
    used: BTreeMap<usize, usize>,
}

impl Arena {
    /// An arena in which every buffer is a piece of its own, and not a byte longer than it was asked to be, so that
    /// accesses can be checked by allocation.
    pub(super) fn exact() -> Self {
        Arena { pieces: BTreeMap::new(), alignment: 1, piece_bytes: 0 }
    }

    /// Allocates `bytes` bytes from the first free range that is large enough, else from a new piece; returns their
    /// address.
    pub(super) fn allocate<S: PieceSource>(&mut self, bytes: usize, source: &mut S) -> Result<u64, S::Error> {
        let bytes = bytes.max(1).next_multiple_of(self.alignment);
        for (address, piece) in &mut self.pieces {
            if let Some(offset) = piece.cut(bytes) {
                return Ok(address + offset as u64);
            }
        }
        let whole = bytes.max(self.piece_bytes);
        // Near the end of the memory, a piece of just this size may still fit.
        let (address, size) = match source.take(whole) {
            Ok(address) => (address, whole),
            Err(_) if whole > bytes => (source.take(bytes)?, bytes),
            Err(error) => return Err(error),
        };
        let mut piece = Piece { bytes: size, free: BTreeMap::from([(0, size)]), used: BTreeMap::new() };
        let offset = piece.cut(bytes).unwrap_or_default();
        self.pieces.insert(address, piece);
        Ok(address + offset as u64)
    }

    /// Takes a buffer back; a piece that holds no buffer any more goes back to its source.
    pub(super) fn free<S: PieceSource>(&mut self, address: u64, source: &mut S) -> Result<(), S::Error> {
        let Some((&start, piece)) = self.pieces.range_mut(..=address).next_back() else { return Ok(()) };
        piece.join((address - start) as usize);
        if piece.used.is_empty() {
            self.pieces.remove(&start);
            source.give_back(start)?;
        }
        Ok(())
    }

    /// Bytes of the largest free range of all pieces.
    #[cfg_attr(not(mmpo_gpu_kernels), allow(dead_code, reason = "only a real GPU is asked"))]
    pub(super) fn largest_free(&self) -> usize {
        self.pieces.values().flat_map(|piece| piece.free.values()).copied().max().unwrap_or(0)
    }

    /// The addresses of all pieces, with which they are given back at the end.
    #[cfg_attr(
        not(mmpo_gpu_kernels),
        allow(dead_code, reason = "only a real GPU's driver must have them back")
    )]
    pub(super) fn pieces(&self) -> impl Iterator<Item = u64> {
        self.pieces.keys().copied()
    }
}

impl Piece {
    /// Cuts a buffer from the first free range that holds it.
    fn cut(&mut self, bytes: usize) -> Option<usize> {
        let (&offset, &length) = self.free.iter().find(|&(_, &length)| length >= bytes)?;
        self.free.remove(&offset);
        if length > bytes {
            self.free.insert(offset + bytes, length - bytes);
        }
        self.used.insert(offset, bytes);
        Some(offset)
    }

    /// Frees the buffer at `offset`, and joins the range with its free neighbours.
    fn join(&mut self, mut offset: usize) {
        let Some(mut length) = self.used.remove(&offset) else { return };
        if let Some(following) = self.free.remove(&(offset + length)) {
            length += following;
        }
        if let Some((&before, &before_length)) = self.free.range(..offset).next_back()
            && before + before_length == offset
        {
            self.free.remove(&before);
            (offset, length) = (before, length + before_length);
        }
        debug_assert!(offset + length <= self.bytes);
        self.free.insert(offset, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands out pieces while there is memory left.
    struct Memory {
        left: usize,
        next: u64,
        sizes: BTreeMap<u64, usize>,
    }

    impl Memory {
        fn new(left: usize) -> Self {
            Memory { left, next: 1 << 32, sizes: BTreeMap::new() }
        }
    }

    impl PieceSource for Memory {
        type Error = String;

        fn take(&mut self, bytes: usize) -> Result<u64, String> {
            self.left = self.left.checked_sub(bytes).ok_or_else(|| format!("no {bytes} bytes"))?;
            let address = self.next;
            self.next += 2 * bytes.next_multiple_of(1 << 20) as u64;
            self.sizes.insert(address, bytes);
            Ok(address)
        }

        fn give_back(&mut self, address: u64) -> Result<(), String> {
            self.left += self.sizes.remove(&address).ok_or("a piece that was never taken")?;
            Ok(())
        }
    }

    /// Live buffers never overlap, lie inside a piece and on a boundary, whatever is freed between them; in the end
    /// everything is back.
    #[test]
    fn buffers_never_overlap_and_all_comes_back() {
        let (mut memory, mut arena) = (Memory::new(4 << 30), Arena::default());
        let mut live: Vec<(u64, usize)> = Vec::new();
        let mut random = 1_u64;
        for _ in 0..4000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let draw = (random >> 33) as usize;
            if draw % 5 < 3 || live.is_empty() {
                let bytes = (draw / 5) % (8 << 20);
                let address = arena.allocate(bytes, &mut memory).unwrap();
                assert_eq!(address % ALIGNMENT as u64, 0);
                let (start, size) = memory.sizes.range(..=address).next_back().unwrap();
                assert!(
                    address + bytes as u64 <= start + *size as u64,
                    "{address} + {bytes} leaves its piece"
                );
                let end = address + bytes.max(1) as u64;
                let apart =
                    |&(other, length): &(u64, usize)| end <= other || other + length as u64 <= address;
                assert!(live.iter().all(apart), "{address} + {bytes} overlaps a live buffer");
                live.push((address, bytes.max(1)));
            } else {
                let (address, _) = live.swap_remove(draw / 5 % live.len());
                arena.free(address, &mut memory).unwrap();
            }
            // Keeps the random walk inside the memory there is.
            while live.iter().map(|(_, bytes)| bytes).sum::<usize>() > 1 << 30 {
                arena.free(live.swap_remove(0).0, &mut memory).unwrap();
            }
        }
        for (address, _) in live.drain(..) {
            arena.free(address, &mut memory).unwrap();
        }
        assert_eq!(arena.pieces().count(), 0);
        assert_eq!(memory.left, 4 << 30);
    }

    /// A freed range between buffers is used again, and neighbours that are free become one range.
    #[test]
    fn free_neighbours_are_joined() {
        let (mut memory, mut arena) = (Memory::new(PIECE_BYTES), Arena::default());
        let quarter = PIECE_BYTES / 4;
        let buffers: Vec<u64> = (0..4).map(|_| arena.allocate(quarter, &mut memory).unwrap()).collect();
        assert!(arena.allocate(1, &mut memory).is_err(), "the piece is full");
        arena.free(buffers[1], &mut memory).unwrap();
        arena.free(buffers[2], &mut memory).unwrap();
        assert_eq!(arena.allocate(2 * quarter, &mut memory), Ok(buffers[1]));
    }

    /// What is left of a GPU's memory may be less than a piece.
    #[test]
    fn near_the_end_a_piece_is_as_large_as_its_buffer() {
        let (mut memory, mut arena) = (Memory::new(1 << 20), Arena::default());
        assert!(arena.allocate(1 << 19, &mut memory).is_ok());
        assert_eq!(memory.left, 1 << 19);
        assert_eq!(arena.allocate(1 << 20, &mut memory), Err(format!("no {} bytes", 1 << 20)));
    }
}
