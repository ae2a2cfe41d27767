//! Transposes a matrix in tiles of 8 by 8 values, which stay in registers.

/// Side of a tile: the lanes of an AVX register.
const TILE: usize = 8;

/// `out[c * out_stride + r] = values[r * stride + c]` for `r` in `0..rows` and `c` in `0..columns`.
pub(super) fn transpose(
    out: &mut [f32],
    out_stride: usize,
    values: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(
            #[inline(always)]
            || tiles(out, out_stride, values, stride, (rows, columns), |tile| avx::transpose(simd, tile)),
        );
    }
    tiles(out, out_stride, values, stride, (rows, columns), plain);
}

/// Transposes whole tiles by `turn`, and the remaining values one by one.
#[inline(always)]
fn tiles(
    out: &mut [f32],
    out_stride: usize,
    values: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
    turn: impl Fn([[f32; TILE]; TILE]) -> [[f32; TILE]; TILE],
) {
    let (whole_rows, whole_columns) = (rows - rows % TILE, columns - columns % TILE);
    // Go along a band of rows: each of the band's cache lines is read once, in order.
    for row in (0..whole_rows).step_by(TILE) {
        for column in (0..whole_columns).step_by(TILE) {
            let mut tile = [[0.0; TILE]; TILE];
            for (r, line) in tile.iter_mut().enumerate() {
                line.copy_from_slice(&values[(row + r) * stride + column..][..TILE]);
            }
            for (c, line) in turn(tile).iter().enumerate() {
                out[(column + c) * out_stride + row..][..TILE].copy_from_slice(line);
            }
        }
    }
    for row in 0..rows {
        let first = if row < whole_rows { whole_columns } else { 0 };
        for column in first..columns {
            out[column * out_stride + row] = values[row * stride + column];
        }
    }
}

#[inline(always)]
fn plain(tile: [[f32; TILE]; TILE]) -> [[f32; TILE]; TILE] {
    std::array::from_fn(|c| std::array::from_fn(|r| tile[r][c]))
}

#[cfg(target_arch = "x86_64")]
mod avx {
    use pulp::x86::V3;

    use super::TILE;

    /// Three rounds of shuffles: pairs of rows, pairs of pairs, halves of registers.
    #[inline(always)]
    pub(super) fn transpose(simd: V3, tile: [[f32; TILE]; TILE]) -> [[f32; TILE]; TILE] {
        let avx = simd.avx;
        let r = tile.map(pulp::cast);
        let pairs = [
            avx._mm256_unpacklo_ps(r[0], r[1]),
            avx._mm256_unpackhi_ps(r[0], r[1]),
            avx._mm256_unpacklo_ps(r[2], r[3]),
            avx._mm256_unpackhi_ps(r[2], r[3]),
            avx._mm256_unpacklo_ps(r[4], r[5]),
            avx._mm256_unpackhi_ps(r[4], r[5]),
            avx._mm256_unpacklo_ps(r[6], r[7]),
            avx._mm256_unpackhi_ps(r[6], r[7]),
        ];
        // 0x44 takes the lower pair of both, 0xEE the upper one.
        let quads = [
            avx._mm256_shuffle_ps::<0x44>(pairs[0], pairs[2]),
            avx._mm256_shuffle_ps::<0xEE>(pairs[0], pairs[2]),
            avx._mm256_shuffle_ps::<0x44>(pairs[1], pairs[3]),
            avx._mm256_shuffle_ps::<0xEE>(pairs[1], pairs[3]),
            avx._mm256_shuffle_ps::<0x44>(pairs[4], pairs[6]),
            avx._mm256_shuffle_ps::<0xEE>(pairs[4], pairs[6]),
            avx._mm256_shuffle_ps::<0x44>(pairs[5], pairs[7]),
            avx._mm256_shuffle_ps::<0xEE>(pairs[5], pairs[7]),
        ];
        // 0x20 joins the lower halves, 0x31 the upper ones.
        let columns = [
            avx._mm256_permute2f128_ps::<0x20>(quads[0], quads[4]),
            avx._mm256_permute2f128_ps::<0x20>(quads[1], quads[5]),
            avx._mm256_permute2f128_ps::<0x20>(quads[2], quads[6]),
            avx._mm256_permute2f128_ps::<0x20>(quads[3], quads[7]),
            avx._mm256_permute2f128_ps::<0x31>(quads[0], quads[4]),
            avx._mm256_permute2f128_ps::<0x31>(quads[1], quads[5]),
            avx._mm256_permute2f128_ps::<0x31>(quads[2], quads[6]),
            avx._mm256_permute2f128_ps::<0x31>(quads[3], quads[7]),
        ];
        columns.map(pulp::cast)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_and_stride() {
        for (rows, columns) in [(1, 1), (8, 8), (7, 9), (17, 24), (40, 33), (16, 1), (3, 50)] {
            let (stride, out_stride) = (columns + 3, rows + 2);
            let values: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
            let mut out = vec![-1.0; columns * out_stride];
            transpose(&mut out, out_stride, &values, stride, (rows, columns));
            for (i, &value) in out.iter().enumerate() {
                let (c, r) = (i / out_stride, i % out_stride);
                let wanted = if r < rows { values[r * stride + c] } else { -1.0 };
                assert_eq!(value, wanted, "{rows} x {columns}: row {r}, column {c}");
            }
        }
    }
}
