//! Working memory of operations, kept between calls: the pages of a fresh large allocation cost more than filling them.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::memory::MemoryCounter;

/// Vectors that nobody uses now. The lock is held only to push and pop, never while work runs: a thread that waits for
/// others may take up another operation, which then finds the pool unlocked.
#[derive(Debug, Default)]
pub(super) struct ScratchPool {
    idle: Mutex<Vec<Vec<f32>>>,
    memory: Arc<MemoryCounter>,
}

/// Working memory of one operation; goes back to its pool when dropped. The values are whatever was there.
pub(super) struct Scratch<'a> {
    values: Vec<f32>,
    len: usize,
    pool: &'a ScratchPool,
}

impl ScratchPool {
    /// A pool whose bytes are counted in `memory`.
    pub(super) fn new(memory: &Arc<MemoryCounter>) -> Self {
        ScratchPool { idle: Mutex::default(), memory: Arc::clone(memory) }
    }

    /// `len` values of unspecified content.
    pub(super) fn take(&self, len: usize) -> Scratch<'_> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that fits; else the largest, to be grown.
        let index = (0..idle.len())
            .filter(|&index| idle[index].len() >= len)
            .min_by_key(|&index| idle[index].len())
            .or_else(|| (0..idle.len()).max_by_key(|&index| idle[index].len()));
        let mut values = index.map(|index| idle.swap_remove(index)).unwrap_or_default();
        drop(idle);
        if values.len() < len {
            self.memory.add((len - values.len()) * size_of::<f32>());
            // Not `resize`, which would copy what nobody wants to keep.
            drop(std::mem::take(&mut values));
            values = vec![0.0; len];
        }
        Scratch { values, len, pool: self }
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(values);
    }
}

impl Deref for Scratch<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Scratch<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}
