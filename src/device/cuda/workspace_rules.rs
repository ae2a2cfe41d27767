//! The scratch memory of the kernels by the launchers' own rules, once more in Rust: a GPU can be planned for by a program that has
//! no kernels. A test compares them with the launchers.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::bindings::{KernelTable, mmpo_gradient};

/// Multiprocessors that all plans assume: `kernels/common/limits.cuh`.
const MULTIPROCESSORS: i64 = 132;

/// A table whose functions that ask for scratch memory are those of this file. The others must not be called.
pub(super) fn table() -> KernelTable {
    let find = |name: &str| {
        let rule = match name {
            "rms_norm_backward_workspace" => rms_norm_backward_workspace as *mut c_void,
            "linear_bias_backward_workspace" => linear_bias_backward_workspace as *mut c_void,
            "gradient_norm_workspace" => gradient_norm_workspace as *mut c_void,
            "logp_head_workspace" => logp_head_workspace as *mut c_void,
            "attention_decode_workspace" => attention_decode_workspace as *mut c_void,
            "attention_backward_workspace" => attention_backward_workspace as *mut c_void,
            "attention_backward_sm90_workspace" => attention_backward_sm90_workspace as *mut c_void,
            "linear_backward_input_f32_sm90_workspace" => {
                linear_backward_input_f32_sm90_workspace as *mut c_void
            }
            "linear_backward_weight_sm90_workspace" => linear_backward_weight_sm90_workspace as *mut c_void,
            "low_rank_backward_weight_sm90_workspace" => {
                low_rank_backward_weight_sm90_workspace as *mut c_void
            }
            "low_rank_inner_backward_weight_sm90_workspace" => {
                low_rank_inner_backward_weight_sm90_workspace as *mut c_void
            }
            _ => never_called as *mut c_void,
        };
        NonNull::new(rule)
    };
    // SAFETY: each rule has the type that the header declares for its name, and nothing calls the others: a planned device launches
    // nothing, and asks for scratch memory alone.
    match unsafe { KernelTable::of(&find) } {
        Ok(table) => table,
        Err(name) => unreachable!("every name has a function, {name} too"),
    }
}

/// Stands where a launcher would. No caller may unwind out of it.
extern "C" fn never_called() {
    std::process::abort();
}

fn ceil_div(value: i64, by: i64) -> i64 {
    (value + by - 1).div_euclid(by.max(1))
}

/// `kernels/rms_norm.cu`: a row of partial sums for each block.
extern "C" fn rms_norm_backward_workspace(rows: i32, width: i32) -> i64 {
    i64::from(rows).min(2 * MULTIPROCESSORS) * i64::from(width) * 4
}

/// `kernels/linear_bias.cu`: a row of partial sums for each slice of rows.
extern "C" fn linear_bias_backward_workspace(rows: i32, outputs: i32) -> i64 {
    if rows == 0 || outputs == 0 {
        return 0;
    }
    let (rows, outputs) = (i64::from(rows), i64::from(outputs));
    let slices = ceil_div(rows, 32).min(ceil_div(8 * MULTIPROCESSORS, ceil_div(outputs, 256)));
    slices * outputs * 4
}

/// `kernels/grad_norm.cu`: a partial sum for each part of a tensor.
extern "C" fn gradient_norm_workspace(gradients: *const mmpo_gradient, count: i32) -> i64 {
    let count = usize::try_from(count).unwrap_or(0);
    if count == 0 {
        return 0;
    }
    // SAFETY: the caller's list, as for the launcher's function, has `count` entries.
    let gradients = unsafe { std::slice::from_raw_parts(gradients, count) };
    gradients.iter().map(|gradient| ceil_div(gradient.length, 16_384)).sum::<i64>() * 4
}

/// `kernels/common/logp_epilogue.cuh`: three statistics for each tile of columns, and two values for each row.
extern "C" fn logp_head_workspace(rows: i32, vocab: i32) -> i64 {
    (3 * ceil_div(i64::from(vocab), 128) + 2) * i64::from(rows) * 4
}

/// `kernels/attention_decode.cu`: an output and two statistics for each chunk and head.
extern "C" fn attention_decode_workspace(length: i32, heads: i32, _: i32, head_size: i32) -> i64 {
    ceil_div(i64::from(length), 128) * i64::from(heads) * (i64::from(head_size) + 2) * 4
}

extern "C" fn attention_backward_workspace(
    rows: i32,
    pairs: i32,
    heads: i32,
    kv_heads: i32,
    head_size: i32,
) -> i64 {
    attention_bytes([rows, pairs, heads, kv_heads, head_size], if head_size == 64 { 64 } else { 32 })
}

extern "C" fn attention_backward_sm90_workspace(
    rows: i32,
    pairs: i32,
    heads: i32,
    kv_heads: i32,
    head_size: i32,
) -> i64 {
    attention_bytes([rows, pairs, heads, kv_heads, head_size], if head_size == 64 { 128 } else { 64 })
}

/// `BackwardWorkspace` of `kernels/common/attention_backward.cuh`: dQ and statistics of all tiles of queries, of `block_m` rows each,
/// their turns, and a table of the tiles of keys.
fn attention_bytes(sizes: [i32; 5], block_m: i64) -> i64 {
    const BLOCK_N: i64 = 128;
    const SEQUENCES: i64 = 2;
    const KEY_TILE_ENTRY: i64 = 32;
    let [rows, pairs, heads, kv_heads, head_size] = sizes.map(i64::from);
    let group = heads / kv_heads.max(1);
    let fits = |packed: &i64| group % packed == 0 && block_m % packed <= block_m / 16;
    let packed = (2..=group.min(block_m)).rfind(fits).unwrap_or(1);
    let tiles = |tile_rows: i64| rows / tile_rows + SEQUENCES * pairs;
    let entries = tiles(block_m / packed) * (heads / packed);
    entries * block_m * (head_size + 2) * 4 + ceil_div(entries + 1, 4) * 16 + tiles(BLOCK_N) * KEY_TILE_ENTRY
}

extern "C" fn linear_backward_input_f32_sm90_workspace(
    rows: i32,
    inputs: i32,
    outputs: i32,
    tile: i32,
) -> i64 {
    split_bytes([rows, inputs, outputs], tile)
}

extern "C" fn linear_backward_weight_sm90_workspace(rows: i32, inputs: i32, outputs: i32, tile: i32) -> i64 {
    split_bytes([outputs, inputs, rows], tile)
}

/// Rows, columns and blocks of the tiles in `kernels/common/gemm_plan_sm90.cuh`, in its order.
const TILE_SHAPES: [(i64, i64, i64); 9] = [
    (128, 256, 1),
    (128, 256, 2),
    (192, 192, 1),
    (192, 192, 2),
    (128, 192, 1),
    (128, 192, 2),
    (128, 128, 1),
    (128, 128, 2),
    (64, 128, 1),
];

/// `kernels/low_rank_sm90.cu`, whose gemms have tiles of their own.
extern "C" fn low_rank_backward_weight_sm90_workspace(rows: i32, rank: i32, outputs: i32) -> i64 {
    split_bytes_of([outputs, rank, rows], &[(128, 64, 4)])
}

/// `plan_narrow_tiles`: the last three tiles, or one of them.
extern "C" fn low_rank_inner_backward_weight_sm90_workspace(
    rows: i32,
    inputs: i32,
    inner_width: i32,
    tile: i32,
) -> i64 {
    const FIRST: usize = 6;
    let one = usize::try_from(tile).ok().filter(|&tile| tile >= FIRST);
    let shapes = one.and_then(|tile| TILE_SHAPES.get(tile..=tile)).unwrap_or(&TILE_SHAPES[FIRST..]);
    split_bytes_of([inner_width, inputs, rows], shapes)
}

/// Bytes of the partial sums of a Hopper gemm `out[M, N]` of depth K whose depth is split.
fn split_bytes(sizes: [i32; 3], tile: i32) -> i64 {
    split_bytes_of(
        sizes,
        match usize::try_from(tile) {
            Err(_) => &TILE_SHAPES[..],
            Ok(tile) => TILE_SHAPES.get(tile..=tile).unwrap_or(&[]),
        },
    )
}

fn split_bytes_of(sizes: [i32; 3], shapes: &[(i64, i64, i64)]) -> i64 {
    let sizes = sizes.map(i64::from);
    let (mut best, mut least) = (None, f64::INFINITY);
    for &shape in shapes {
        let few = 2 * tiles_of(shape, sizes) <= MULTIPROCESSORS;
        let longest = ceil_div(sizes[2], 64) / 8;
        let most = if few { longest.min(16) } else { 1 };
        for splits in 1..=most.max(1) {
            let cycles = estimated_cycles(shape, splits, sizes);
            if best.is_none() || cycles < least {
                (best, least) = (Some((shape, splits)), cycles);
            }
        }
    }
    match best {
        None | Some((_, 1)) => 0,
        Some(((block_m, _, cluster), splits)) => {
            let rows = block_m * cluster;
            splits * ceil_div(sizes[0], rows) * rows * sizes[1] * 4
        }
    }
}

fn tiles_of((block_m, block_n, cluster): (i64, i64, i64), [m, n, _]: [i64; 3]) -> i64 {
    ceil_div(m, block_m * cluster) * cluster * ceil_div(n, block_n)
}

/// The cost model of `kernels/common/gemm_plan_sm90.cuh`, term for term.
fn estimated_cycles(shape: (i64, i64, i64), splits: i64, sizes: [i64; 3]) -> f64 {
    let (block_m, block_n, cluster) = shape;
    let [m, n, k] = sizes;
    let waves = ceil_div(tiles_of(shape, sizes) * splits, MULTIPROCESSORS);
    let slices = ceil_div(ceil_div(k, 64), splits);
    let multiply_adds = block_m as f64 * block_n as f64 * 64.0 / 2048.0;
    let lines = block_m as f64 + block_n as f64 / cluster as f64;
    let loads = lines * 64.0 * 2.0 / 40.0;
    let completed = tiles_of(shape, sizes) as f64 / tiles_of((block_m, block_n, 1), sizes) as f64;
    let paired = if cluster > 1 { 1.01 * completed } else { 1.0 };
    let slice = multiply_adds.max(loads) * paired;
    let epilogue = block_m as f64 * block_n as f64 / 32.0;
    let tile = slices as f64 * slice + epilogue;
    let partials = m as f64 * n as f64 * 4.0 * splits as f64 * 2.0;
    let second = if splits > 1 { partials / 1500.0 + 3500.0 } else { 0.0 };
    waves as f64 * tile + 1000.0 + second
}

#[cfg(all(test, any(mmpo_emulated, mmpo_gpu_kernels)))]
mod tests {
    use super::super::bindings;
    use super::*;

    #[cfg(mmpo_emulated)]
    use bindings::emulated::KERNELS;
    #[cfg(not(mmpo_emulated))]
    use bindings::gpu::KERNELS;

    const SIZES: [i32; 12] = [0, 1, 31, 64, 127, 576, 960, 1000, 2048, 4096, 8200, 14_336];

    /// Every rule gives what the launcher gives, over sizes around all of their boundaries.
    #[test]
    fn the_rules_are_those_of_the_launchers() {
        let rules = table();
        for one in SIZES {
            for other in SIZES {
                // SAFETY: pure functions of numbers.
                unsafe {
                    for (name, ours, theirs) in [
                        ("rms_norm", rules.rms_norm_backward_workspace, KERNELS.rms_norm_backward_workspace),
                        (
                            "bias",
                            rules.linear_bias_backward_workspace,
                            KERNELS.linear_bias_backward_workspace,
                        ),
                        ("head", rules.logp_head_workspace, KERNELS.logp_head_workspace),
                    ] {
                        assert_eq!(ours(one, other), theirs(one, other), "{name}({one}, {other})");
                    }
                    for depth in SIZES {
                        if one.min(other).min(depth) > 0 {
                            assert_eq!(
                                low_rank_backward_weight_sm90_workspace(one, other, depth),
                                (KERNELS.low_rank_backward_weight_sm90_workspace)(one, other, depth),
                                "low rank {one} {other} {depth}"
                            );
                        }
                        for tile in -1..9 {
                            for (ours, theirs) in [
                                (
                                    rules.linear_backward_weight_sm90_workspace,
                                    KERNELS.linear_backward_weight_sm90_workspace,
                                ),
                                (
                                    rules.linear_backward_input_f32_sm90_workspace,
                                    KERNELS.linear_backward_input_f32_sm90_workspace,
                                ),
                                (
                                    rules.low_rank_inner_backward_weight_sm90_workspace,
                                    KERNELS.low_rank_inner_backward_weight_sm90_workspace,
                                ),
                            ] {
                                if one.min(other).min(depth) > 0 {
                                    let sizes = (one, other, depth, tile);
                                    assert_eq!(
                                        ours(one, other, depth, tile),
                                        theirs(one, other, depth, tile),
                                        "{sizes:?}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_rules_of_attention_are_those_of_the_launchers() {
        let rules = table();
        for rows in SIZES {
            for pairs in [1, 3, 40] {
                for (heads, kv_heads) in [(9, 3), (15, 5), (32, 8), (4, 4), (7, 1), (64, 2)] {
                    for size in [64, 128] {
                        // SAFETY: pure functions of numbers.
                        unsafe {
                            for (ours, theirs) in [
                                (rules.attention_backward_workspace, KERNELS.attention_backward_workspace),
                                (
                                    rules.attention_backward_sm90_workspace,
                                    KERNELS.attention_backward_sm90_workspace,
                                ),
                            ] {
                                assert_eq!(
                                    ours(rows, pairs, heads, kv_heads, size),
                                    theirs(rows, pairs, heads, kv_heads, size),
                                    "{rows} rows, {pairs} pairs, {heads}/{kv_heads} heads of {size}"
                                );
                            }
                            let decode = rules.attention_decode_workspace;
                            assert_eq!(
                                decode(rows, heads, kv_heads, size),
                                (KERNELS.attention_decode_workspace)(rows, heads, kv_heads, size)
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_rule_of_the_norm_is_that_of_the_launcher() {
        let lengths = [1, 16_383, 16_384, 16_385, 1_000_000];
        let gradients: Vec<mmpo_gradient> =
            lengths.map(|length| mmpo_gradient { values: std::ptr::null(), length, storage: 0 }).to_vec();
        // SAFETY: reads the lengths of the list alone.
        let theirs = unsafe { (KERNELS.gradient_norm_workspace)(gradients.as_ptr(), 5) };
        assert_eq!(gradient_norm_workspace(gradients.as_ptr(), 5), theirs);
        assert_eq!(gradient_norm_workspace(std::ptr::null(), 0), 0);
    }
}
