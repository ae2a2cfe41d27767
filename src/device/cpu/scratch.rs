//! Scratch memory of operations, kept between calls: mapping the pages of a fresh large allocation costs more than
//! filling them.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use crate::device::{MemoryCounter, MemoryPart};

/// Pieces of scratch memory that are not in use. The lock is held only to push and pop, never while work runs: a thread
/// that waits for others may take up another operation, which then finds the pool unlocked.
///
/// A training run reserves the pieces that its operations take before the first step, so that no step allocates any.
#[derive(Debug, Default)]
pub(super) struct ScratchPool {
    /// The pieces, as 64-bit words, so that each is aligned for every type of number that the operations use.
    idle: Mutex<Vec<Piece>>,
    memory: Arc<MemoryCounter>,
    /// Whether pieces hold nothing.
    only_counts: bool,
}

/// A piece of scratch memory.
#[derive(Debug, Default)]
struct Piece {
    /// Its values, none where they are only counted.
    values: Vec<u64>,
    /// Their number.
    words: usize,
}

/// Scratch memory of one operation, which goes back to its pool when dropped. Its values are unspecified.
pub(super) struct Scratch<'a, T> {
    piece: Piece,
    len: usize,
    pool: &'a ScratchPool,
    values: PhantomData<T>,
}

impl ScratchPool {
    /// A pool whose bytes are counted in `memory`.
    pub(super) fn new(memory: &Arc<MemoryCounter>, only_counts: bool) -> Self {
        ScratchPool { idle: Mutex::default(), memory: Arc::clone(memory), only_counts }
    }

    /// `len` values of unspecified content.
    pub(super) fn take<T: Pod>(&self, len: usize) -> Scratch<'_, T> {
        let needed = (len * size_of::<T>()).div_ceil(size_of::<u64>());
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // Take the smallest piece that fits, else the largest, which is then replaced by a larger one.
        let index = (0..idle.len())
            .filter(|&index| idle[index].words >= needed)
            .min_by_key(|&index| idle[index].words)
            .or_else(|| (0..idle.len()).max_by_key(|&index| idle[index].words));
        let mut piece = index.map(|index| idle.swap_remove(index)).unwrap_or_default();
        drop(idle);
        if piece.words < needed {
            self.memory.add((needed - piece.words) * size_of::<u64>(), Some(MemoryPart::Scratch));
            // `resize` would copy the old values, which nobody needs.
            drop(std::mem::take(&mut piece.values));
            piece.values = vec![0; if self.only_counts { 0 } else { needed }];
            piece.words = needed;
        }
        Scratch { piece, len, pool: self, values: PhantomData }
    }

    /// Makes sure that `count` pieces of `len` values can be taken at the same time without an allocation.
    pub(super) fn reserve<T: Pod>(&self, count: usize, len: usize) {
        let held: Vec<Scratch<'_, T>> = (0..count).map(|_| self.take(len)).collect();
        // Give the pool room for all of its pieces: giving them back must not allocate either.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).reserve(count);
        drop(held);
    }
}

impl<T> Drop for Scratch<'_, T> {
    fn drop(&mut self) {
        let piece = std::mem::take(&mut self.piece);
        self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(piece);
    }
}

impl<T: Pod> Deref for Scratch<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.piece.values);
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Scratch<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.piece.values);
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

/// Cuts the front of `memory` into slices of these lengths, one after the other.
pub(super) fn split<const COUNT: usize>(memory: &mut [f32], sizes: [usize; COUNT]) -> [&mut [f32]; COUNT] {
    let mut rest = memory;
    sizes.map(|size| {
        let (slice, tail) = std::mem::take(&mut rest).split_at_mut(size);
        rest = tail;
        slice
    })
}
