//! bf16 products in the instructions of AVX-512 BF16: packing of operands, and sums in registers.
//!
//! `vdpbf16ps` adds the products of two neighbours in the summed index `k` to each of 16 sums in f32. So operands are packed
//! in pairs of neighbours: 32 values of `k` ([`LINE`]) for each row of the left operand, and for each pair the 32 columns
//! of the right one. A tile of 14 x 32 sums fills 28 of the 32 registers, and takes two loads and 14 broadcasts for 28
//! instructions, which is more than a core of one such instruction per cycle can use.

use std::arch::x86_64::*;
use std::mem::transmute;

use half::bf16;

use super::products::Operand;

/// Values of the summed index that are packed together; operands are filled with zeros to a whole number of them.
pub(super) const LINE: usize = 32;
/// Pairs in a line.
const PAIRS: usize = LINE / 2;
/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = super::bf16_gemm::PANEL_ROWS;
/// Columns of a tile.
pub(super) const TILE_COLUMNS: usize = super::bf16_gemm::PANEL_COLUMNS;
/// Registers that a row of a tile takes.
const VECTORS: usize = 2;
/// Rows of `x` that [`dots`] takes at once.
pub(super) const DOT_ROWS: usize = 4;
/// Rows of the weight that [`dots`] takes at once.
pub(super) const DOT_OUTPUTS: usize = 4;
/// How many groups of [`DOT_OUTPUTS`] rows before their use the weights are asked for, because the processor's own prefetching
/// is too late for rows as short as those of SmolLM2-135M. Farther ahead gains nothing.
const PREFETCH_GROUPS: usize = 2;

/// Whether this processor has what the functions of this file are compiled for.
pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Rows for which a packed panel of `rows` rows has room. Tiles exist in even sizes.
pub(super) fn panel_rows(rows: usize) -> usize {
    rows.next_multiple_of(2)
}

/// A mask of the first `count` of 32 lanes.
#[inline(always)]
fn first_lanes(count: usize) -> __mmask32 {
    if count >= 32 { u32::MAX } else { (1 << count) - 1 }
}

/// The sums of one tile: `sums[r * stride + c] (+)= rows[r] * columns[c]` for `rows x columns` of them.
pub(super) struct Tile<'a> {
    /// As [`pack_rows`] left them.
    pub lhs: &'a [bf16],
    /// Whether the left operand's rows run along the summed index.
    pub along_rows: bool,
    /// As [`pack_columns`] left them.
    pub rhs: &'a [bf16],
    pub lines: usize,
    /// Rows, at most [`TILE_ROWS`], and columns, at most [`TILE_COLUMNS`].
    pub size: (usize, usize),
    /// Whether the sums go on from what is there.
    pub accumulate: bool,
}

impl Tile<'_> {
    /// Computes the tile.
    ///
    /// # Safety
    /// The processor must have what [`is_supported`] asks for.
    pub(super) unsafe fn compute(&self, sums: &mut [f32], stride: usize) {
        let (rows, columns) = self.size;
        let room = panel_rows(rows);
        assert!(rows > 0 && columns <= stride && (rows - 1) * stride + columns <= sums.len());
        assert!(self.lhs.len() >= self.lines * LINE * room);
        assert!(self.rhs.len() >= self.lines * LINE * TILE_COLUMNS);
        macro_rules! pick {
            ($($rows:literal)*) => {
                match (room, self.along_rows) {
                    $(
                        // SAFETY: the assertions keep what is read and written inside the slices; the processor is the
                        // caller's promise.
                        ($rows, true) => unsafe { self.run::<$rows, true>(sums.as_mut_ptr(), stride) },
                        // SAFETY: as above.
                        ($rows, false) => unsafe { self.run::<$rows, false>(sums.as_mut_ptr(), stride) },
                    )*
                    _ => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        pick!(2 4 6 8 10 12 14)
    }

    /// # Safety
    /// `sums` must hold the tile, `stride` apart; `ROWS` must be the panel's, and the packed operands of `lines` lines.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn run<const ROWS: usize, const ALONG: bool>(&self, sums: *mut f32, stride: usize) {
        let (rows, columns) = self.size;
        let lanes = first_lanes(columns);
        let masks = [lanes as __mmask16, (lanes >> 16) as __mmask16];
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if self.accumulate {
            for (r, acc) in acc.iter_mut().enumerate() {
                if r < rows {
                    for v in 0..VECTORS {
                        // SAFETY: the row lies inside; the mask keeps to its columns.
                        acc[v] = unsafe {
                            _mm512_maskz_loadu_ps(masks[v], sums.wrapping_add(r * stride + v * 16))
                        };
                    }
                }
            }
        }
        let (mut lhs, mut rhs) = (self.lhs.as_ptr(), self.rhs.as_ptr());
        for _ in 0..self.lines {
            for pair in 0..PAIRS {
                let mut values = [_mm512_setzero_si512(); VECTORS];
                for (v, values) in values.iter_mut().enumerate() {
                    // SAFETY: a line of the right operand holds `PAIRS x VECTORS` registers.
                    *values = unsafe { _mm512_loadu_si512(rhs.add((pair * VECTORS + v) * LINE).cast()) };
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let at = if ALONG { r * LINE + pair * 2 } else { (pair * ROWS + r) * 2 };
                    // SAFETY: a line of the left operand holds `ROWS x PAIRS` pairs.
                    let two = unsafe { _mm512_set1_epi32(lhs.add(at).cast::<i32>().read_unaligned()) };
                    for v in 0..VECTORS {
                        // SAFETY: both types are 512 bits, and any bits are a value of either.
                        let (two, values) = unsafe {
                            (transmute::<__m512i, __m512bh>(two), transmute::<__m512i, __m512bh>(values[v]))
                        };
                        acc[v] = _mm512_dpbf16_ps(acc[v], two, values);
                    }
                }
            }
            // SAFETY: there are `lines` of them.
            (lhs, rhs) = unsafe { (lhs.add(LINE * ROWS), rhs.add(LINE * TILE_COLUMNS)) };
        }
        for (r, acc) in acc.iter().enumerate() {
            if r < rows {
                for v in 0..VECTORS {
                    // SAFETY: as for the loads.
                    unsafe {
                        _mm512_mask_storeu_ps(sums.wrapping_add(r * stride + v * 16), masks[v], acc[v])
                    };
                }
            }
        }
    }
}

/// Packs `k` values from `first_k` on of the columns `first..first + count`, at most [`TILE_COLUMNS`]:
/// `out[line][pair][column]`, pairs of values. What is missing is zero.
///
/// # Safety
/// The processor must have what [`is_supported`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_columns(
    out: &mut [bf16],
    operand: Operand<'_, bf16>,
    (first, count): (usize, usize),
    (first_k, k): (usize, usize),
) {
    let lines = k.div_ceil(LINE);
    assert!(operand.holds(first + count, first_k + k) && count <= TILE_COLUMNS);
    assert!(out.len() >= lines * LINE * TILE_COLUMNS);
    let out = out.as_mut_ptr();
    if operand.along_rows {
        for line in 0..lines {
            let mask = first_lanes(k - line * LINE);
            for half in 0..VECTORS {
                let mut rows = [_mm512_setzero_si512(); 16];
                for (i, row) in rows.iter_mut().enumerate() {
                    let column = half * 16 + i;
                    if column < count {
                        let at = (first + column) * operand.stride + first_k + line * LINE;
                        // SAFETY: the operand holds this row; the mask keeps to `k`.
                        *row = unsafe {
                            _mm512_maskz_loadu_epi16(mask, operand.values.as_ptr().wrapping_add(at).cast())
                        };
                    }
                }
                for (pair, row) in transpose(rows).into_iter().enumerate() {
                    // SAFETY: `out` holds `PAIRS x VECTORS` registers for each line.
                    unsafe {
                        _mm512_storeu_si512(
                            out.add(((line * PAIRS + pair) * VECTORS + half) * LINE).cast(),
                            row,
                        )
                    };
                }
            }
        }
        return;
    }
    let mask = first_lanes(count);
    let (low, high) = interleaving();
    for pair in 0..lines * PAIRS {
        let row = |at: usize| match at < k {
            // SAFETY: the operand holds this row; the mask keeps to its columns.
            true => unsafe {
                let at = (first_k + at) * operand.stride + first;
                _mm512_maskz_loadu_epi16(mask, operand.values.as_ptr().wrapping_add(at).cast())
            },
            false => _mm512_setzero_si512(),
        };
        let (even, odd) = (row(2 * pair), row(2 * pair + 1));
        // SAFETY: as above.
        unsafe {
            let out = out.add(pair * VECTORS * LINE);
            _mm512_storeu_si512(out.cast(), _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(out.add(LINE).cast(), _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/// Packs `k` values from `first_k` on of the rows `first..first + count`, at most [`TILE_ROWS`]: `out[line][row][pair]`
/// where rows are summed along, else `out[line][pair][row]`. What is missing in `k` is zero, in a row that only fills the
/// panel it is anything.
///
/// # Safety
/// The processor must have what [`is_supported`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_rows(
    out: &mut [bf16],
    operand: Operand<'_, bf16>,
    (first, count): (usize, usize),
    (first_k, k): (usize, usize),
) {
    let (lines, room) = (k.div_ceil(LINE), panel_rows(count));
    assert!(operand.holds(first + count, first_k + k) && (1..=TILE_ROWS).contains(&count));
    assert!(out.len() >= lines * LINE * room);
    let out = out.as_mut_ptr();
    if operand.along_rows {
        for r in 0..room {
            let row = (first + r.min(count - 1)) * operand.stride + first_k;
            for line in 0..lines {
                let mask = first_lanes(k - line * LINE);
                // SAFETY: the operand holds this row, the mask keeps to `k`, and `out` holds `room` rows for each line.
                unsafe {
                    let values = operand.values.as_ptr().wrapping_add(row + line * LINE);
                    let values = _mm512_maskz_loadu_epi16(mask, values.cast());
                    _mm512_storeu_si512(out.add((line * room + r) * LINE).cast(), values);
                }
            }
        }
        return;
    }
    let (mask, room_mask) = (first_lanes(count) as __mmask16, first_lanes(room) as __mmask16);
    for pair in 0..lines * PAIRS {
        let row = |at: usize| match at < k {
            // SAFETY: the operand holds this row; the mask keeps to its columns.
            true => unsafe {
                let at = (first_k + at) * operand.stride + first;
                let values = operand.values.as_ptr().wrapping_add(at);
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values.cast()))
            },
            false => _mm512_setzero_si512(),
        };
        let pairs = _mm512_or_si512(row(2 * pair), _mm512_slli_epi32::<16>(row(2 * pair + 1)));
        // SAFETY: `out` holds `room` pairs for each pair of `k`, and the mask keeps to them.
        unsafe { _mm512_mask_storeu_epi32(out.add(pair * room * 2).cast(), room_mask, pairs) };
    }
}

/// Indices for `vpermt2w` that interleave the lower and the upper 16 values of two registers.
#[target_feature(enable = "avx512f")]
fn interleaving() -> (__m512i, __m512i) {
    let from = |first: usize| -> __m512i {
        let indices: [u16; LINE] = std::array::from_fn(|i| (first + i / 2 + i % 2 * LINE) as u16);
        // SAFETY: both are 512 bits, and any bits are a value of either.
        unsafe { transmute(indices) }
    };
    (from(0), from(16))
}

/// Transposes 16 x 16 pairs: in fours of rows, in fours of fours.
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let (mut a, mut b) = (rows, rows);
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    // Lane `l` of `a[4 i + j]` now holds rows `4 i ..` of column `4 l + j`; 0x88 takes lanes 0 and 2 of both, 0xdd 1 and 3.
    for j in 0..4 {
        b[j] = _mm512_shuffle_i32x4::<0x88>(a[j], a[4 + j]);
        b[4 + j] = _mm512_shuffle_i32x4::<0xdd>(a[j], a[4 + j]);
        b[8 + j] = _mm512_shuffle_i32x4::<0x88>(a[8 + j], a[12 + j]);
        b[12 + j] = _mm512_shuffle_i32x4::<0xdd>(a[8 + j], a[12 + j]);
    }
    for j in 0..4 {
        a[j] = _mm512_shuffle_i32x4::<0x88>(b[j], b[8 + j]);
        a[8 + j] = _mm512_shuffle_i32x4::<0xdd>(b[j], b[8 + j]);
        a[4 + j] = _mm512_shuffle_i32x4::<0x88>(b[4 + j], b[12 + j]);
        a[12 + j] = _mm512_shuffle_i32x4::<0xdd>(b[4 + j], b[12 + j]);
    }
    a
}

/// `out[output][row]`, the dot products of up to [`DOT_OUTPUTS`] rows of `weight[.., k]` with up to [`DOT_ROWS`] rows of
/// `x[.., k]`. Each row of the weight is read once, in order.
///
/// # Safety
/// The processor must have what [`is_supported`] asks for.
pub(super) unsafe fn dots(out: &mut [[f32; DOT_ROWS]; DOT_OUTPUTS], weight: &[bf16], x: &[bf16], k: usize) {
    macro_rules! pick {
        ($($outputs:literal $rows:literal)*) => {
            match (weight.len() / k, x.len() / k) {
                // SAFETY: the numbers of rows are those of the slices; the processor is the caller's promise.
                $(($outputs, $rows) => unsafe { run_dots::<$outputs, $rows>(out, weight, x, k) },)*
                sizes => unreachable!("dot products of {sizes:?} rows"),
            }
        };
    }
    pick!(1 1 1 2 1 3 1 4 2 1 2 2 2 3 2 4 3 1 3 2 3 3 3 4 4 1 4 2 4 3 4 4)
}

/// # Safety
/// `weight` must hold `OUTPUTS` and `x` must hold `ROWS` rows of `k` values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn run_dots<const OUTPUTS: usize, const ROWS: usize>(
    out: &mut [[f32; DOT_ROWS]; DOT_OUTPUTS],
    weight: &[bf16],
    x: &[bf16],
    k: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); ROWS]; OUTPUTS];
    for at in (0..k).step_by(LINE) {
        let mask = first_lanes(k - at);
        // SAFETY: each row has `k` values, and the mask keeps to them. Any bits are a value of both types.
        let load = |values: &[bf16], row: usize| unsafe {
            let values = values.as_ptr().wrapping_add(row * k + at);
            transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(mask, values.cast()))
        };
        let x: [__m512bh; ROWS] = std::array::from_fn(|row| load(x, row));
        for (output, sums) in sums.iter_mut().enumerate() {
            // A hint, which may point past the weight.
            let later = weight.as_ptr().wrapping_add((PREFETCH_GROUPS * OUTPUTS + output) * k + at);
            _mm_prefetch::<_MM_HINT_T0>(later.cast());
            let weight = load(weight, output);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm512_dpbf16_ps(*sum, weight, x);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = _mm512_reduce_add_ps(sum);
        }
    }
}
