//! What the kernels do, counted exactly by the emulated device, and what ptxas gives them: work, traffic and registers
//! that a change of a kernel must not raise unseen.
//!
//! `tests/counts/kernels.csv` has every launcher's counts at fixed shapes, `tests/counts/ptxas.csv` every kernel's
//! registers, stack, spills and static shared memory. A test fails where a number differs, and says which rose and which
//! fell. Where the change is meant, record the tables again and commit them:
//!
//! ```text
//! MMPO_FAST_RECORD=1 cargo test --release --test counts kernels
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use mmpo_fast::bench::cases::{self, Maker};
use mmpo_fast::bench::counts::{self, Counted, Counts};
use mmpo_fast::bench::shapes::{self, Shape};
use mmpo_fast::device::cuda::{
    self, CudaDevice, EmulatorCounters, EmulatorVariant, GemmChoice, GemmTile, KernelPath,
};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Gradient, LinearShape, RawValues};
use mmpo_fast::error::Result;
use mmpo_fast::optimizer::{MasterWeights, MomentFormat, OptimizerState, StateOptions, StochasticRounding};

use crate::emulator_alone;
use crate::table::Table;

const VARIANT: EmulatorVariant = EmulatorVariant::Plain;

/// Sizes of the tiles of `kernels/linear.cu`.
const TILE: usize = 128;
const BF16: usize = 2;

/// The compiler of tools/setup_cuda.sh; others give other registers.
const NVCC: &str = "# nvcc 13.0.88";

fn counted(run: impl FnOnce()) -> EmulatorCounters {
    VARIANT.reset_counters();
    run();
    VARIANT.counters()
}

/// `[rows, columns] = [rows, depth] * [depth, columns]` in whole tiles: each operand is read once per tile, each mma of
/// 16 x 8 x 16 is done once, and no `ldmatrix` waits for a bank.
#[track_caller]
fn assert_gemm(counters: &EmulatorCounters, rows: usize, columns: usize, depth: usize) {
    assert_eq!(counters.launches, 1);
    assert_eq!(counters.mma_operations as usize, rows / 16 * (columns / 8) * (depth / 16));
    assert_eq!(counters.mma_flops as usize, 2 * rows * columns * depth);
    let tiles = rows / TILE * (columns / TILE);
    assert_eq!(counters.copy_async_bytes as usize, tiles * 2 * TILE * depth * BF16);
    assert_eq!(counters.matrix_bank_conflicts, 0);
}

#[test]
fn gemms_read_each_operand_once_a_tile() {
    let _alone = emulator_alone();
    let device = CudaDevice::emulated(VARIANT);
    let shape = LinearShape { rows: 256, inputs: 384, outputs: 512 };
    let mut x = device.alloc(shape.rows * shape.inputs).unwrap();
    let weight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let mut out = device.alloc(shape.rows * shape.outputs).unwrap();
    let mut dweight = device.alloc(shape.outputs * shape.inputs).unwrap();

    let forward = counted(|| device.linear_forward(&mut out, &x, &weight, None, shape).unwrap());
    assert_gemm(&forward, shape.rows, shape.outputs, shape.inputs);
    let weights =
        counted(|| device.linear_backward_weight(Some(&mut dweight), None, &out, &x, shape).unwrap());
    assert_gemm(&weights, shape.outputs, shape.inputs, shape.rows);
    let inputs = counted(|| device.linear_backward_input(&mut x, &out, &weight, shape).unwrap());
    assert_gemm(&inputs, shape.rows, shape.inputs, shape.outputs);
}

/// What `kernels/linear_sm90.cu` takes for gemms as small as these.
const HOPPER_TILE: (usize, usize) = (64, 128);
const F32: usize = 4;

/// As [`assert_gemm`], with wgmma and TMA: `stored` bytes per value leave shared memory by TMA, once.
#[track_caller]
fn assert_hopper_gemm(counters: &EmulatorCounters, rows: usize, columns: usize, depth: usize, stored: usize) {
    assert_eq!(counters.launches, 1);
    assert_eq!(counters.wgmma_flops as usize, 2 * rows * columns * depth);
    assert_eq!(counters.wgmma_operations as usize, rows / 64 * (columns / 64) * (depth / 16));
    let (tile_rows, tile_columns) = HOPPER_TILE;
    let tiles = rows / tile_rows * (columns / tile_columns);
    assert_eq!(counters.tensor_load_bytes as usize, tiles * (tile_rows + tile_columns) * depth * BF16);
    assert_eq!(counters.tensor_store_bytes as usize, rows * columns * stored);
    assert_eq!((counters.mma_operations, counters.copy_async_bytes), (0, 0));
    assert_eq!(counters.matrix_bank_conflicts, 0);
    assert_eq!(counters.shared_wavefronts, counters.shared_wavefronts_ideal);
    assert_eq!((counters.global_load_bytes, counters.global_store_bytes), (0, 0));
}

#[test]
fn hopper_gemms_read_each_operand_once_a_tile() {
    let _alone = emulator_alone();
    let variant = EmulatorVariant::Checked;
    let device = CudaDevice::emulated(variant).with_path(KernelPath::Hopper);
    let shape = LinearShape { rows: 128, inputs: 384, outputs: 256 };
    let mut x = device.alloc(shape.rows * shape.inputs).unwrap();
    let weight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let mut out = device.alloc(shape.rows * shape.outputs).unwrap();
    let mut dweight = device.alloc(shape.outputs * shape.inputs).unwrap();
    let counted = |run: &mut dyn FnMut()| {
        variant.reset_counters();
        run();
        variant.counters()
    };

    let forward = counted(&mut || device.linear_forward(&mut out, &x, &weight, None, shape).unwrap());
    assert_hopper_gemm(&forward, shape.rows, shape.outputs, shape.inputs, BF16);
    assert_eq!(forward.shared_wavefronts, 0, "bf16 leaves by stmatrix alone");
    let weights =
        counted(&mut || device.linear_backward_weight(Some(&mut dweight), None, &out, &x, shape).unwrap());
    assert_hopper_gemm(&weights, shape.outputs, shape.inputs, shape.rows, F32);
    assert_eq!(weights.shared_wavefronts as usize, shape.outputs * shape.inputs * F32 / 128);
    let inputs = counted(&mut || device.linear_backward_input(&mut x, &out, &weight, shape).unwrap());
    assert_hopper_gemm(&inputs, shape.rows, shape.inputs, shape.outputs, BF16);
}

/// Two blocks of a cluster read their shared operand from global memory once between them: 128 x 256 tiles ask for 2/3 of
/// what they would ask for alone.
#[test]
fn clusters_read_the_shared_operand_once() {
    let _alone = emulator_alone();
    let variant = EmulatorVariant::Checked;
    let shape = LinearShape { rows: 512, inputs: 128, outputs: 256 };
    let loaded = |cluster: i32| {
        let device = CudaDevice::emulated(variant).with_path(KernelPath::Hopper);
        let wanted = GemmTile { block_m: 128, block_n: 256, cluster };
        let tile = device.gemm_tiles().unwrap().iter().position(|&tile| tile == wanted);
        let choice = GemmChoice::Tile(tile.expect("the tile exists").try_into().unwrap());
        let device = device.with_gemm_choice(choice);
        let x = device.alloc(shape.rows * shape.inputs).unwrap();
        let weight = device.alloc(shape.outputs * shape.inputs).unwrap();
        let mut out = device.alloc(shape.rows * shape.outputs).unwrap();
        variant.reset_counters();
        device.linear_forward(&mut out, &x, &weight, None, shape).unwrap();
        variant.counters().tensor_load_bytes as usize
    };
    assert_eq!(loaded(1), shape.rows / 128 * (128 + 256) * shape.inputs * BF16);
    assert_eq!(loaded(2), shape.rows / 128 * (128 + 128) * shape.inputs * BF16);
}

/// As many tensors as SmolLM2-135M has: a launch for each would take longer than most of them do.
#[test]
fn the_optimiser_launches_a_few_kernels_for_many_tensors() {
    const TENSORS: usize = 182;
    let _alone = emulator_alone();
    let variant = EmulatorVariant::Checked;
    let device = CudaDevice::emulated(variant);
    let mut weights: Vec<_> = (0..TENSORS).map(|_| device.alloc(5).unwrap()).collect();
    let mut states: Vec<_> = (0..TENSORS).map(|_| OptimizerState::new(&device, 5).unwrap()).collect();
    let mut gradients: Vec<_> = (0..TENSORS).map(|_| device.alloc(5).unwrap()).collect();
    let mut norm = device.alloc(2).unwrap();
    let launches = |work: &mut dyn FnMut() -> Result<()>| -> u64 {
        let (done, launches) = variant.count_launches(work);
        done.unwrap();
        launches.iter().map(|launch| launch.counters.launches).sum()
    };
    assert_eq!(launches(&mut || device.zero_all(&mut gradients.iter_mut().collect::<Vec<_>>())), 1);
    let all: Vec<_> = gradients.iter().collect();
    assert_eq!(launches(&mut || device.gradient_norm(&mut norm, &all, None)), 2);
    let tensors = weights.iter_mut().zip(&mut states).zip(&gradients);
    let mut updates: Vec<_> =
        tensors.map(|((weight, state), gradient)| state.update(weight, gradient)).collect();
    let step = shapes::settings().unwrap().adamw(1);
    assert_eq!(launches(&mut || device.adamw(&mut updates, &norm, step)), 3);
}

/// Every format of moments, with and without a master copy, from f32 and bf16 gradients, on tensors that fill whole warps: every byte of gradient, moments,
/// scales, master copy and weight is read once where it is needed and written once where it changes. Beside them each thread reads
/// the clipping factor, 4 bytes that its warp shares.
#[test]
fn the_optimiser_moves_every_byte_once() {
    const VALUES: usize = 9 * 2048;
    let _alone = emulator_alone();
    let variant = EmulatorVariant::Checked;
    let device = CudaDevice::emulated(variant);
    for (moments, moment_bytes, thread_values) in [
        (MomentFormat::F32, 8 * VALUES, 4),
        (MomentFormat::Bf16, 4 * VALUES, 4),
        (MomentFormat::EightBit, 2 * VALUES + 2 * F32 * VALUES / 256, 8),
    ] {
        for (master, is_bf16) in [
            (MasterWeights::F32, false),
            (MasterWeights::F32, true),
            (MasterWeights::Split, false),
            (MasterWeights::Split, true),
            (MasterWeights::None, false),
            (MasterWeights::None, true),
        ] {
            let options = StateOptions { moments, master };
            let mut weight = device.alloc(VALUES).unwrap();
            let mut state =
                OptimizerState::before_first(&device, &weight, options, StochasticRounding::default())
                    .unwrap();
            let (wide, narrow) = (device.alloc(VALUES).unwrap(), device.alloc(VALUES).unwrap());
            let (gradient, gradient_bytes) = match is_bf16 {
                false => (Gradient::F32(&wide), F32),
                true => (Gradient::Bf16(&narrow), BF16),
            };
            let norm = device.alloc(2).unwrap();
            let step = shapes::settings().unwrap().adamw(1);
            variant.reset_counters();
            device.adamw(&mut [state.update_from(&mut weight, gradient)], &norm, step).unwrap();
            let counters = variant.counters();
            // What the new weight comes from: the master copy, the weight and what it lacks of one, or the weight.
            let (read, written) = match master {
                MasterWeights::F32 => (F32 * VALUES, (F32 + BF16) * VALUES),
                MasterWeights::Split => (2 * BF16 * VALUES, 2 * BF16 * VALUES),
                MasterWeights::None => (BF16 * VALUES, BF16 * VALUES),
            };
            let factors = VALUES / thread_values * F32;
            let what = format!("{options:?}, bf16 gradient: {is_bf16}");
            assert_eq!(counters.launches, 1, "{what}");
            assert_eq!(
                counters.global_load_bytes as usize,
                gradient_bytes * VALUES + moment_bytes + read + factors,
                "{what}: read"
            );
            assert_eq!(counters.global_store_bytes as usize, moment_bytes + written, "{what}: written");
            assert_eq!(
                counters.shared_wavefronts, counters.shared_wavefronts_ideal,
                "{what}: bank conflicts"
            );
        }
    }
}

/// The counted columns, then what the operation needs at least; a minimum is the whole operation's, and stands in its row,
/// or in a row `all` where several launchers share the work.
const COLUMNS: [&str; 9] = [
    "launches",
    "mma_operations",
    "mma_flops",
    "minimum_flops",
    "load_bytes",
    "store_bytes",
    "minimum_bytes",
    "sectors",
    "bank_conflicts",
];

/// A row's cells, in the order of [`COLUMNS`].
fn cells(counted: &Counted) -> Vec<String> {
    let Counts { launches, mma_operations, mma_flops, load_bytes, store_bytes, sectors, bank_conflicts } =
        counted.counts;
    let [least_flops, least_bytes] = match counted.minimum {
        Some(minimum) => minimum.map(|value| format!("{value:.0}")),
        None => [const { String::new() }; 2],
    };
    let [launches, operations, flops, loads, stores, sectors, conflicts] =
        [launches, mma_operations, mma_flops, load_bytes, store_bytes, sectors, bank_conflicts]
            .map(|count| count.to_string());
    vec![launches, operations, flops, least_flops, loads, stores, least_bytes, sectors, conflicts]
}

fn shape(model: &str, profile: &str, pairs: usize) -> Shape {
    Shape {
        model: model.into(),
        config: shapes::model(model, None).unwrap(),
        profile: profile.into(),
        lengths: shapes::lengths(profile).unwrap(),
        pairs,
    }
}

/// Two pairs that fill whole tiles, and ragged ones of a model with heads of 128.
fn counted_shapes() -> [Shape; 2] {
    [shape("tiny", "64/32/32", 2), shape("tiny-128", "40/21/9", 2)]
}

/// What a case's launchers do at `shape`: its row's key, without the path, and cells.
fn count_case(device: &CudaDevice, make: Maker<CudaDevice>, shape: &Shape) -> Vec<(String, Vec<String>)> {
    let rows = counts::count_case(device, make, shape).unwrap();
    rows.iter()
        .map(|row| (format!("{};{};{}", shape.name(), row.operation, row.launcher), cells(row)))
        .collect()
}

/// The conversion of uploaded weights, which no case times: it is a part of reading a checkpoint.
fn count_conversion(device: &CudaDevice) -> Vec<(String, Vec<String>)> {
    let values = vec![1.5; 4096];
    let mut buffer = device.alloc(values.len()).unwrap();
    let upload = || device.upload_values(&mut buffer, 0, RawValues::from_f32(&values));
    let (done, launches) = EmulatorVariant::Checked.count_launches(upload);
    done.unwrap();
    let minimum = (values.len() * (size_of::<f32>() + BF16)) as f64;
    let rows = counts::sum_launches("upload_values", &launches, Some([0.0, minimum]));
    rows.iter().map(|row| (format!("4096 values;upload_values;{}", row.launcher), cells(row))).collect()
}

/// Launchers of `kernels/api.h` that run a kernel of ours: `zero` is the runtime's.
fn launchers() -> BTreeSet<String> {
    let header =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/api.h")).unwrap();
    let declared = header.split("mmpo_status MMPO_EXPORT(").skip(1);
    let mut names: BTreeSet<String> =
        declared.filter_map(|rest| rest.split_once(')')).map(|(name, _)| name.to_owned()).collect();
    assert!(names.remove("zero") && names.len() >= 25, "{names:?}");
    names
}

#[test]
fn every_launcher_does_what_the_committed_table_says() {
    if cfg!(mmpo_emulated_by_clang) {
        return eprintln!(
            "clang loads some values once where g++ loads them again, and the table is g++'s: skipped"
        );
    }
    let _alone = emulator_alone();
    let header = format!("path;shape;operation;launcher;{}", COLUMNS.join(";"));
    let mut table = Table::new("kernels.csv", header);
    let device = counts::counting_device().unwrap();
    let mut portable = count_conversion(&device);
    for shape in &counted_shapes() {
        for make in cases::all() {
            portable.extend(count_case(&device, make, shape));
        }
    }
    let hopper_device = device.with_path(KernelPath::Hopper);
    for shape in &counted_shapes() {
        for make in cases::all() {
            for row in count_case(&hopper_device, make, shape) {
                // Most operations have one set of kernels.
                if !portable.contains(&row) {
                    table.insert(format!("hopper;{}", row.0), row.1);
                }
            }
        }
    }
    for (key, cells) in portable {
        table.insert(format!("portable;{key}"), cells);
    }
    let counted: BTreeSet<String> =
        table.rows().keys().filter_map(|key| key.split(';').nth(3)).map(str::to_owned).collect();
    let missing: Vec<String> = launchers().difference(&counted).cloned().collect();
    assert!(missing.is_empty(), "no case of src/bench/cases runs {missing:?}: add one");
    table.hold_against_the_committed_one();
}

/// The build's own table against the committed one, where the build had the project's nvcc.
#[test]
fn every_kernel_takes_the_registers_that_the_committed_table_says() {
    let built = Path::new(env!("OUT_DIR")).join("ptxas/resources.csv");
    if !cuda::build_info().starts_with("nvcc ") {
        eprintln!("built without nvcc ({}): skipped", cuda::build_info());
        return;
    }
    let text = std::fs::read_to_string(&built).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    let (compiler, rows) = text.split_once('\n').unwrap();
    if compiler != NVCC {
        eprintln!("built by {compiler}, the table is of {NVCC}: skipped");
        return;
    }
    let mut rows = rows.lines();
    let header = rows.next().unwrap().replace(',', ";");
    let mut table = Table::new("ptxas.csv", header);
    for row in rows {
        // file,"kernel<a, b>",target,numbers
        let [file, kernel, numbers] = row.split('"').collect::<Vec<_>>()[..] else { panic!("{row}") };
        let numbers: Vec<&str> = numbers.trim_start_matches(',').split(',').collect();
        let cells = numbers[1..].iter().map(|&cell| cell.to_owned()).collect();
        table.insert(format!("{};{kernel};{}", file.trim_end_matches(','), numbers[0]), cells);
    }
    table.hold_against_the_committed_one();
}
