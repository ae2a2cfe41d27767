//! Products of bf16 matrices with f32 sums, cut into blocks for the caches and into tasks for the threads.
//!
//! A task computes a block of the result ([`BLOCKS`]). For each [`BLOCK_K`] values of the summed index it packs the right
//! operand's block, which stays in the second-level cache, and goes down the rows in panels, each packed into the first-level
//! cache. Each sum is formed in one fixed order, in `k`, however the work is cut: so the cut may depend on the number of
//! threads, and the bits do not.

use half::bf16;
use rayon::prelude::*;

use super::CpuDevice;
#[cfg(target_arch = "x86_64")]
use super::bf16_kernel as kernel;
use super::bf16_widened as widened;
use super::products::Operand;
use super::scratch::split;

/// Rows and columns of a task, at most. The first that gives every thread [`TASKS`] tasks is taken. Packing a row of a panel
/// costs two cycles for every `columns` of the product, packing a column of the right operand six for every `rows`, so large
/// blocks are faster as long as no thread waits for another.
const BLOCKS: [(usize, usize); 6] = [(1008, 512), (504, 512), (504, 256), (252, 256), (252, 128), (126, 128)];
/// Tasks of a thread, at least.
const TASKS: usize = 3;
/// Values of the summed index that are packed at once: `512 x 1024` of them take 1 MiB.
const BLOCK_K: usize = 1024;
/// Rows of a task of the widened product, both of whose operands are widened as a whole.
const WIDENED_ROWS: usize = 126;
/// Rows of a panel.
pub(super) const PANEL_ROWS: usize = 14;
/// Columns that are packed together.
pub(super) const PANEL_COLUMNS: usize = 32;
/// Bytes of a cache line, to which packed operands are aligned: a load across two lines takes twice as long.
const CACHE_LINE: usize = 64;

/// Whether the processor has instructions for bf16 products.
pub(super) fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    return kernel::is_supported();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Terms of a product: `lhs[m, k] * rhs[k, n]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Term<'a> {
    pub lhs: Operand<'a, bf16>,
    pub rhs: Operand<'a, bf16>,
    pub k: usize,
}

/// Changes sums in place: `(row, first_column, sums)`.
pub(super) type Scale<'a> = &'a (dyn Fn(usize, usize, &mut [f32]) + Sync);

/// How a product is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    rows: usize,
    columns: usize,
    k: usize,
    /// Whether sums stay in registers from the first value of `k` to the last.
    single: bool,
}

impl Cut {
    /// `threads` share the work. With `in_memory`, something happens to the sums between the terms.
    fn new(
        (m, n): (usize, usize),
        terms: &[Term<'_>],
        in_memory: bool,
        has_instructions: bool,
        threads: usize,
    ) -> Self {
        let longest = terms.iter().map(|term| term.k).max().unwrap_or(0);
        let tasks = |(rows, columns): (usize, usize)| m.div_ceil(rows) * n.div_ceil(columns);
        let wanted = if threads > 1 { TASKS * threads } else { 1 };
        let fine_enough = BLOCKS.into_iter().find(|&block| tasks(block) >= wanted);
        let (rows, columns) = fine_enough.unwrap_or(BLOCKS[BLOCKS.len() - 1]);
        let most_rows = if has_instructions { rows } else { WIDENED_ROWS };
        let k = even_part(longest, BLOCK_K, PANEL_COLUMNS);
        Cut {
            rows: even_part(m, most_rows, PANEL_ROWS),
            columns: even_part(n, columns, PANEL_COLUMNS),
            k,
            single: terms.len() == 1 && k >= longest && has_instructions && !in_memory,
        }
    }

    /// Values of a task's memory, as f32: packed rows, packed columns, sums.
    fn sizes(&self, has_instructions: bool) -> [usize; 3] {
        let rows = if self.single { PANEL_ROWS } else { self.rows };
        let sums = rows * self.columns;
        match has_instructions {
            true => [PANEL_ROWS * self.k / 2, self.columns * self.k / 2, sums],
            false => [0, (self.rows + self.columns) * self.k, sums],
        }
    }
}

/// The size of the parts into which `total` is cut: as few of at most `most` as it takes, all but the last equal, a multiple of
/// `multiple` and never 0.
fn even_part(total: usize, most: usize, multiple: usize) -> usize {
    let total = total.max(1);
    total.div_ceil(total.div_ceil(most)).next_multiple_of(multiple)
}

/// Sets aside a task's memory for each of the device's threads.
pub(super) fn reserve(device: &CpuDevice<bf16>) {
    let has_instructions = device.has_bf16;
    let (rows, columns) = BLOCKS[0];
    let rows = if has_instructions { rows } else { WIDENED_ROWS };
    let largest = Cut { rows, columns, k: BLOCK_K, single: false };
    device.scratch.reserve::<f32>(device.threads, memory(largest, has_instructions));
}

/// Values of a task's memory, with those that its alignment takes.
fn memory(cut: Cut, has_instructions: bool) -> usize {
    cut.sizes(has_instructions).iter().sum::<usize>() + CACHE_LINE / size_of::<f32>()
}

/// Computes `m x n` sums over all `terms`, on all threads. `finish(row, first_column, sums)` gets each of them once.
pub(super) fn product(
    device: &CpuDevice<bf16>,
    (m, n): (usize, usize),
    terms: &[Term<'_>],
    finish: &(impl Fn(usize, usize, &[f32]) + Sync),
) {
    scaled_product(device, (m, n), terms, None, finish);
}

/// As [`product`]; `scale` changes the sums of the first term before the others are added to them.
pub(super) fn scaled_product(
    device: &CpuDevice<bf16>,
    (m, n): (usize, usize),
    terms: &[Term<'_>],
    scale: Option<Scale<'_>>,
    finish: &(impl Fn(usize, usize, &[f32]) + Sync),
) {
    let cut = Cut::new((m, n), terms, scale.is_some(), device.has_bf16, device.threads);
    let (row_blocks, column_blocks) = (m.div_ceil(cut.rows), n.div_ceil(cut.columns));
    device.parallel(|| {
        // Tasks of the same columns follow each other.
        (0..row_blocks * column_blocks).into_par_iter().with_max_len(1).for_each(|task| {
            let (column, row) = (task / row_blocks * cut.columns, task % row_blocks * cut.rows);
            let block = Block {
                device,
                cut,
                terms,
                scale,
                rows: (row, cut.rows.min(m - row)),
                columns: (column, cut.columns.min(n - column)),
            };
            block.compute(finish);
        });
    });
}

/// As [`product`], on the thread that calls.
pub(super) fn serial_product(
    device: &CpuDevice<bf16>,
    (m, n): (usize, usize),
    terms: &[Term<'_>],
    mut finish: impl FnMut(usize, usize, &[f32]),
) {
    let cut = Cut::new((m, n), terms, false, device.has_bf16, 1);
    for column in (0..n).step_by(cut.columns) {
        for row in (0..m).step_by(cut.rows) {
            let block = Block {
                device,
                cut,
                terms,
                scale: None,
                rows: (row, cut.rows.min(m - row)),
                columns: (column, cut.columns.min(n - column)),
            };
            block.compute(&mut finish);
        }
    }
}

/// f32 values of memory that [`tile_product`] takes.
pub(super) fn tile_memory(device: &CpuDevice<bf16>, (m, k, n): (usize, usize, usize)) -> usize {
    match device.has_bf16 {
        true => {
            (PANEL_ROWS + n.next_multiple_of(PANEL_COLUMNS)) * packed_k(k) / 2 + CACHE_LINE / size_of::<f32>()
        }
        false => (m + n) * k,
    }
}

/// `k`, rounded up to what is packed together.
fn packed_k(k: usize) -> usize {
    k.next_multiple_of(PANEL_COLUMNS)
}

/// `out[m, n] (+)= lhs * rhs` for a term that is packed as a whole, on the thread that calls; rows of `out` are `stride` values
/// apart. `memory` holds [`tile_memory`] values.
pub(super) fn tile_product(
    device: &CpuDevice<bf16>,
    (out, stride): (&mut [f32], usize),
    accumulate: bool,
    (m, n): (usize, usize),
    term: Term<'_>,
    memory: &mut [f32],
) {
    let (rows, columns, k) = ((0, m), (0, n), (0, term.k));
    if !device.has_bf16 {
        let operands = (term.lhs, term.rhs);
        return widened::add_block(out, stride, accumulate, operands, (rows, columns), k, memory);
    }
    let cut = Cut { rows: m, columns: stride, k: packed_k(term.k), single: false };
    let block = Block { device, cut, terms: &[], scale: None, rows, columns };
    let unaligned = memory.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE / size_of::<f32>());
    let (lhs, rhs) = memory[unaligned..].split_at_mut(PANEL_ROWS * cut.k / 2);
    block.packed(&term, k, accumulate, (lhs, rhs, out), None::<&mut fn(usize, usize, &[f32])>);
}

/// The sums of one task: rows and columns by their first and their number.
struct Block<'a> {
    device: &'a CpuDevice<bf16>,
    cut: Cut,
    terms: &'a [Term<'a>],
    /// Applied to the sums of the first term.
    scale: Option<Scale<'a>>,
    rows: (usize, usize),
    columns: (usize, usize),
}

impl Block<'_> {
    fn compute(&self, mut finish: impl FnMut(usize, usize, &[f32])) {
        let has_instructions = self.device.has_bf16;
        let mut memory = self.device.scratch.take::<f32>(memory(self.cut, has_instructions));
        let unaligned = memory.as_ptr().align_offset(CACHE_LINE).min(CACHE_LINE / size_of::<f32>());
        let [lhs, rhs, sums] = split(&mut memory[unaligned..], self.cut.sizes(has_instructions));
        // Sums that are scaled at the end are handed over after that.
        let steps = |term: &Term<'_>| term.k.div_ceil(self.cut.k);
        let last = self.terms.iter().rposition(|term| term.k > 0);
        let last = last.filter(|&last| last > 0 || self.scale.is_none());
        let mut is_empty = true;
        for (number, term) in self.terms.iter().enumerate() {
            for step in 0..steps(term) {
                let first_k = step * self.cut.k;
                let k = (first_k, self.cut.k.min(term.k - first_k));
                let accumulate = !std::mem::replace(&mut is_empty, false);
                let is_last = last == Some(number) && step + 1 == steps(term);
                let last = is_last.then_some(&mut finish);
                if has_instructions {
                    self.packed(term, k, accumulate, (lhs, rhs, sums), last);
                } else {
                    let operands = (term.lhs, term.rhs);
                    let stride = self.cut.columns;
                    widened::add_block(sums, stride, accumulate, operands, (self.rows, self.columns), k, rhs);
                    if let Some(finish) = last {
                        self.finish(sums, (0, self.rows.1), finish);
                    }
                }
            }
            if let (0, Some(scale), false) = (number, self.scale, is_empty) {
                for (row, sums) in sums.chunks_mut(self.cut.columns).take(self.rows.1).enumerate() {
                    scale(self.rows.0 + row, self.columns.0, &mut sums[..self.columns.1]);
                }
            }
        }
        if last.is_none() {
            self.finish_rest(is_empty, sums, &mut finish);
        }
    }

    /// Hands over sums to which no term was added, or nothing after they were scaled.
    fn finish_rest(&self, is_empty: bool, sums: &mut [f32], finish: &mut impl FnMut(usize, usize, &[f32])) {
        for row in 0..self.rows.1 {
            // There may be room for the rows of one panel alone, where nothing was added.
            let start = if is_empty { 0 } else { row * self.cut.columns };
            let sums = &mut sums[start..][..self.columns.1];
            if is_empty {
                sums.fill(0.0);
            }
            finish(self.rows.0 + row, self.columns.0, sums);
        }
    }

    /// Hands rows `first..first + count` of the block, which begin at `sums`, to `finish`.
    fn finish(
        &self,
        sums: &[f32],
        (first, count): (usize, usize),
        finish: &mut impl FnMut(usize, usize, &[f32]),
    ) {
        for (row, sums) in sums.chunks(self.cut.columns).take(count).enumerate() {
            finish(self.rows.0 + first + row, self.columns.0, &sums[..self.columns.1]);
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn packed(
        &self,
        _: &Term<'_>,
        _: (usize, usize),
        _: bool,
        _: (&mut [f32], &mut [f32], &mut [f32]),
        _: Option<&mut impl FnMut(usize, usize, &[f32])>,
    ) {
        unreachable!("there are no instructions for bf16 products")
    }

    /// Adds `k` values of a term to the block's sums; after the last of them `finish` gets the sums.
    #[cfg(target_arch = "x86_64")]
    fn packed(
        &self,
        term: &Term<'_>,
        k: (usize, usize),
        accumulate: bool,
        (lhs, rhs, sums): (&mut [f32], &mut [f32], &mut [f32]),
        mut finish: Option<&mut impl FnMut(usize, usize, &[f32])>,
    ) {
        let (lhs, rhs): (&mut [bf16], &mut [bf16]) =
            (bytemuck::cast_slice_mut(lhs), bytemuck::cast_slice_mut(rhs));
        let lines = k.1.div_ceil(kernel::LINE);
        let panel = lines * kernel::LINE * PANEL_COLUMNS;
        let panels = || (0..self.columns.1).step_by(PANEL_COLUMNS);
        for (first, out) in panels().zip(rhs.chunks_mut(panel)) {
            let columns = (self.columns.0 + first, PANEL_COLUMNS.min(self.columns.1 - first));
            // SAFETY: the device's `has_bf16` says that the processor has the instructions.
            unsafe { kernel::pack_columns(out, term.rhs, columns, k) };
        }
        let parts = self.rows.1.div_ceil(PANEL_ROWS);
        let mut row = 0;
        for part in 0..parts {
            // As even as possible: a tile of few rows does not fill the processor's pipeline.
            let rows = self.rows.1 / parts + usize::from(part < self.rows.1 % parts);
            // SAFETY: as above.
            unsafe { kernel::pack_rows(lhs, term.lhs, (self.rows.0 + row, rows), k) };
            let sums = if self.cut.single { &mut *sums } else { &mut sums[row * self.cut.columns..] };
            for (first, rhs) in panels().zip(rhs.chunks(panel)) {
                let size = (rows, PANEL_COLUMNS.min(self.columns.1 - first));
                let along_rows = term.lhs.along_rows;
                let tile = kernel::Tile { lhs, along_rows, rhs, lines, size, accumulate };
                // SAFETY: as above.
                unsafe { tile.compute(&mut sums[first..], self.cut.columns) };
            }
            if let Some(finish) = &mut finish {
                self.finish(sums, (row, rows), *finish);
            }
            row += rows;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, whose sums of products are exact in f32 in any order.
    fn integers(count: usize, step: usize) -> Vec<bf16> {
        (0..count).map(|i| bf16::from_f32(((i * step + i / 7) % 3) as f32 - 1.0)).collect()
    }

    /// The element of an operand, by its definition.
    fn element(operand: &Operand<'_, bf16>, i: usize, k: usize) -> f32 {
        let index = if operand.along_rows { i * operand.stride + k } else { k * operand.stride + i };
        operand.values[index].to_f32()
    }

    fn operand(values: &[bf16], along_rows: bool, stride: usize) -> Operand<'_, bf16> {
        Operand { values, stride, along_rows }
    }

    /// Runs a product of one term for each of `depths`, and compares all of its sums with a naive one's.
    fn check(device: &CpuDevice<bf16>, (m, n): (usize, usize), depths: &[usize], layout: (bool, bool)) {
        let pad = 3;
        let memory: Vec<_> = depths
            .iter()
            .map(|&k| {
                let most =
                    |count: usize, along: bool| if along { (count, k + pad) } else { (k, count + pad) };
                let (lhs, rhs) = (most(m, layout.0), most(n, layout.1));
                (integers(lhs.0 * lhs.1, 5), lhs.1, integers(rhs.0 * rhs.1, 7), rhs.1, k)
            })
            .collect();
        let terms: Vec<Term<'_>> = memory
            .iter()
            .map(|(lhs, lhs_stride, rhs, rhs_stride, k)| Term {
                lhs: operand(lhs, layout.0, *lhs_stride),
                rhs: operand(rhs, layout.1, *rhs_stride),
                k: *k,
            })
            .collect();
        let mut wanted = vec![0.0_f32; m * n];
        for term in &terms {
            for row in 0..m {
                for k in 0..term.k {
                    let left = element(&term.lhs, row, k);
                    for column in 0..n {
                        wanted[row * n + column] += left * element(&term.rhs, column, k);
                    }
                }
            }
        }
        let mut serial = vec![f32::NAN; m * n];
        serial_product(device, (m, n), &terms, |row, column, sums| {
            serial[row * n + column..][..sums.len()].copy_from_slice(sums);
        });
        let parallel = std::sync::Mutex::new(vec![f32::NAN; m * n]);
        product(device, (m, n), &terms, &|row, column, sums: &[f32]| {
            let mut parallel = parallel.lock().unwrap();
            assert!(parallel[row * n + column].is_nan(), "row {row}, column {column} twice");
            parallel[row * n + column..][..sums.len()].copy_from_slice(sums);
        });
        let what = format!("{m} x {n} over {depths:?}, {layout:?}, {device:?}");
        assert!(serial == wanted, "serial {what}");
        assert!(*parallel.lock().unwrap() == wanted, "parallel {what}");
        if let [term] = &terms[..]
            && term.k > 0
        {
            check_tile(device, (m, n), *term, &wanted);
        }
    }

    /// The same product as one tile, added to ones, in rows that are further apart than they are long.
    fn check_tile(device: &CpuDevice<bf16>, (m, n): (usize, usize), term: Term<'_>, wanted: &[f32]) {
        let stride = n + 3;
        let mut memory = vec![f32::NAN; tile_memory(device, (m, term.k, n))];
        let mut out = vec![1.0; m * stride];
        tile_product(device, (&mut out, stride), true, (m, n), term, &mut memory);
        for (row, out) in out.chunks(stride).enumerate() {
            let (sums, rest) = out.split_at(n);
            assert!(
                sums.iter().zip(&wanted[row * n..]).all(|(sum, wanted)| *sum == wanted + 1.0),
                "row {row}"
            );
            assert!(rest.iter().all(|value| *value == 1.0), "row {row} of {m} x {n} is overrun");
        }
    }

    /// The sums of the first term are scaled before those of the others are added, and alone where there are no others.
    #[test]
    fn the_first_term_is_scaled() {
        let with = CpuDevice::<bf16>::open(Some(2)).unwrap();
        let without = CpuDevice::<bf16>::open(Some(2)).unwrap().without_bf16_instructions();
        let (m, n) = (29, 70);
        for (device, rest) in [(&with, 40), (&without, 40), (&with, 0), (&without, 0), (&with, 2100)] {
            let values =
                [integers(m * 33, 5), integers(n * 33, 7), integers(m * rest, 3), integers(n * rest, 2)];
            let term = |lhs: usize, k: usize| Term {
                lhs: operand(&values[lhs], true, k),
                rhs: operand(&values[lhs + 1], true, k),
                k,
            };
            let terms = [term(0, 33), term(2, rest)];
            let factor = |row: usize, column: usize| ((row + 3 * column) % 4) as f32;
            let scale = |row: usize, first: usize, sums: &mut [f32]| {
                sums.iter_mut().enumerate().for_each(|(column, sum)| *sum *= factor(row, first + column));
            };
            let got = std::sync::Mutex::new(vec![f32::NAN; m * n]);
            scaled_product(device, (m, n), &terms, Some(&scale), &|row, column, sums: &[f32]| {
                got.lock().unwrap()[row * n + column..][..sums.len()].copy_from_slice(sums);
            });
            let sum = |term: &Term<'_>, row: usize, column: usize| -> f32 {
                (0..term.k).map(|k| element(&term.lhs, row, k) * element(&term.rhs, column, k)).sum()
            };
            for (index, got) in got.lock().unwrap().iter().enumerate() {
                let (row, column) = (index / n, index % n);
                let wanted = sum(&terms[0], row, column) * factor(row, column) + sum(&terms[1], row, column);
                assert_eq!(*got, wanted, "row {row}, column {column}, {rest} more, {device:?}");
            }
        }
    }

    /// Every order of the operands, ragged in every size, across blocks in every direction, in one term and in several.
    #[test]
    fn products_of_integers_are_exact() {
        let with = CpuDevice::<bf16>::open(Some(3)).unwrap();
        let without = CpuDevice::<bf16>::open(Some(2)).unwrap().without_bf16_instructions();
        for device in [&with, &without] {
            for layout in [(true, true), (true, false), (false, true), (false, false)] {
                check(device, (1, 1), &[1], layout);
                check(device, (5, 33), &[31], layout);
                check(device, (15, 70), &[2, 65], layout);
                check(device, (29, 530), &[1050], layout);
                check(device, (1030, 17), &[34], layout);
                check(device, (131, 40), &[1100, 33, 1], layout);
                check(device, (3, 4), &[0], layout);
                check(device, (3, 4), &[], layout);
            }
        }
    }
}
