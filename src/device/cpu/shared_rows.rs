//! Writing to disjoint blocks of one matrix from several threads.

use std::marker::PhantomData;
use std::ops::Range;

/// A row-major matrix whose blocks `(row, columns)` are written by several threads, each block by one of them.
/// Rayon's `par_chunks_mut` covers whole rows; this covers the columns of one head, and rows in any order.
pub(super) struct SharedRows<'a, T = f32> {
    values: *mut T,
    len: usize,
    width: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from a unique borrow that lives as long as this value, and the methods that reach values are
// unsafe and oblige their callers to take disjoint blocks, so no two threads ever reach the same value.
unsafe impl<T: Send> Send for SharedRows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T> SharedRows<'a, T> {
    pub(super) fn new(values: &'a mut [T], width: usize) -> Self {
        SharedRows { values: values.as_mut_ptr(), len: values.len(), width, lifetime: PhantomData }
    }

    /// The values of `row` in `columns`.
    ///
    /// # Safety
    /// No other live slice of this matrix may overlap the block.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn row_mut(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(columns.start <= columns.end && columns.end <= self.width, "{columns:?} of {}", self.width);
        // SAFETY: the caller's promise.
        unsafe { self.values_mut(row * self.width + columns.start, columns.len()) }
    }

    /// The values of whole `rows`.
    ///
    /// # Safety
    /// No other live slice of this matrix may overlap the rows.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn rows_mut(&self, rows: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.values_mut(rows.start * self.width, rows.len() * self.width) }
    }

    /// # Safety
    /// No other live slice of this matrix may overlap these values.
    #[allow(clippy::mut_from_ref)]
    unsafe fn values_mut(&self, start: usize, count: usize) -> &mut [T] {
        assert!(start + count <= self.len, "{start} and {count} more of {} values", self.len);
        // SAFETY: inside the borrowed slice by the assertion; unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), count) }
    }

    /// Distance from one row to the next, in values.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The start of `columns` in row 0, checked to lie inside for `rows` rows.
    pub(super) fn columns(&self, rows: usize, columns: Range<usize>) -> *mut T {
        assert!(
            columns.start <= columns.end && columns.end <= self.width && rows * self.width <= self.len,
            "columns {columns:?} of {rows} rows, width {}, {} values",
            self.width,
            self.len
        );
        self.values.wrapping_add(columns.start)
    }
}
