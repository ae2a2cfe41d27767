//! Writing to disjoint blocks of one matrix from several threads.

use std::marker::PhantomData;
use std::ops::Range;

/// A row-major matrix whose blocks `(row, columns)` are written by several threads, each block by one of them.
/// Rayon's `par_chunks_mut` covers whole rows; this covers the columns of one head.
pub(super) struct SharedRows<'a> {
    values: *mut f32,
    len: usize,
    width: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from a unique borrow that lives as long as this value, and `row_mut` (unsafe) obliges its
// callers to take disjoint blocks, so no two threads ever reach the same value.
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    pub(super) fn new(values: &'a mut [f32], width: usize) -> Self {
        SharedRows { values: values.as_mut_ptr(), len: values.len(), width, lifetime: PhantomData }
    }

    /// The values of `row` in `columns`.
    ///
    /// # Safety
    /// No other live slice of this matrix may overlap the block.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn row_mut(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = row * self.width + columns.start;
        assert!(
            columns.start <= columns.end && start + columns.len() <= self.len,
            "row {row}, columns {columns:?}, width {}, {} values",
            self.width,
            self.len
        );
        // SAFETY: inside the borrowed slice by the assertion; unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(start), columns.len()) }
    }

    /// Distance of rows.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The start of `columns` in row 0, checked to lie inside for `rows` rows.
    pub(super) fn columns(&self, rows: usize, columns: Range<usize>) -> *mut f32 {
        assert!(
            columns.start <= columns.end && columns.end <= self.width && rows * self.width <= self.len,
            "columns {columns:?} of {rows} rows, width {}, {} values",
            self.width,
            self.len
        );
        self.values.wrapping_add(columns.start)
    }
}
