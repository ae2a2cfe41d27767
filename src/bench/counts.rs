//! `mmpo-fast bench counts`: what each kernel does, counted exactly by the emulated device, beside the least that its
//! operation needs. It needs no GPU, and does not depend on the machine.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use super::BenchConfig;
use super::cases::{self, Maker};
use super::report::{self, figures};
use super::shapes::Shape;
use crate::device::Hardware;
use crate::device::cuda::{
    CudaDevice, EmulatedLaunch, EmulatorCounters, EmulatorOptions, EmulatorVariant, KernelPath,
    MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_SCHEDULE_ORDERED,
};
use crate::error::{Error, Result};

/// Sums over launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Kernel launches.
    pub launches: u64,
    /// mma.sync and wgmma instructions.
    pub mma_operations: u64,
    /// Floating-point operations of tensor-core instructions.
    pub mma_flops: u64,
    /// Bytes read from global memory, by ordinary accesses, cp.async and TMA.
    pub load_bytes: u64,
    /// Bytes written to global memory.
    pub store_bytes: u64,
    /// 32-byte sectors of the ordinary accesses.
    pub sectors: u64,
    /// Shared-memory wavefronts beyond those that the bytes of the accesses need.
    pub bank_conflicts: u64,
}

impl Counts {
    fn of(c: &EmulatorCounters) -> Self {
        Counts {
            launches: c.launches,
            mma_operations: c.mma_operations + c.wgmma_operations,
            mma_flops: c.mma_flops + c.wgmma_flops,
            load_bytes: c.global_load_bytes + c.copy_async_bytes + c.tensor_load_bytes,
            store_bytes: c.global_store_bytes + c.tensor_store_bytes,
            sectors: c.global_load_sectors + c.global_store_sectors,
            bank_conflicts: c.matrix_bank_conflicts + c.shared_wavefronts - c.shared_wavefronts_ideal,
        }
    }

    fn add(&mut self, more: Counts) {
        self.launches += more.launches;
        self.mma_operations += more.mma_operations;
        self.mma_flops += more.mma_flops;
        self.load_bytes += more.load_bytes;
        self.store_bytes += more.store_bytes;
        self.sectors += more.sectors;
        self.bank_conflicts += more.bank_conflicts;
    }
}

/// What one launcher did for an operation; the launcher is `all` for the sum where several share the work.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    /// The operation, as `bench kernels` names it.
    pub operation: String,
    /// The launcher, as `kernels/api.h` names it.
    pub launcher: String,
    /// What it did.
    #[serde(flatten)]
    pub counts: Counts,
    /// The floating-point operations and bytes that the whole operation needs at least; only in its last row.
    pub minimum: Option<[f64; 2]>,
}

/// The emulated device, set to count every access.
///
/// # Errors
/// Those of the device.
pub fn counting_device() -> Result<CudaDevice> {
    EmulatorVariant::Checked.configure(EmulatorOptions {
        async_: MMPO_EMULATOR_ASYNC_LATE as i32,
        schedule: MMPO_EMULATOR_SCHEDULE_ORDERED as i32,
        seed: 0,
        host_threads: 0,
        multiprocessors: 0,
        trace_accesses: 1,
    })?;
    Ok(CudaDevice::emulated(EmulatorVariant::Checked))
}

/// Sums a device's launches by launcher, and over `all` of them if there are several.
pub fn sum_launches(operation: &str, launches: &[EmulatedLaunch], minimum: Option<[f64; 2]>) -> Vec<Counted> {
    let mut by_launcher: BTreeMap<&str, Counts> = BTreeMap::new();
    let mut total = Counts::default();
    for EmulatedLaunch { launcher, counters } in launches {
        let counts = Counts::of(counters);
        by_launcher.entry(launcher).or_default().add(counts);
        total.add(counts);
    }
    let several = by_launcher.len() > 1;
    let row = |(launcher, counts): (&str, Counts)| Counted {
        operation: operation.to_owned(),
        launcher: launcher.to_owned(),
        counts,
        minimum: minimum.filter(|_| !several || launcher == "all"),
    };
    by_launcher.into_iter().chain(several.then_some(("all", total))).map(row).collect()
}

/// Runs a case once on the counting device.
///
/// # Errors
/// Those of the device.
pub fn count_case(device: &CudaDevice, make: Maker<CudaDevice>, shape: &Shape) -> Result<Vec<Counted>> {
    let mut case = make(device, shape)?;
    // Shapes that are counted fit into one chunk of the head anyway.
    if case.part.ends_with("in one chunk") {
        return Ok(Vec::new());
    }
    case.prepare_operands(device)?;
    let (done, launches) = EmulatorVariant::Checked.count_launches(|| case.run(device));
    done?;
    Ok(sum_launches(&case.name(), &launches, Some([case.flops, case.bytes])))
}

pub(super) fn run(config: &BenchConfig, shape: &Shape) -> Result<()> {
    let mut device = counting_device()?;
    let mut paths = Vec::new();
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        device = device.with_path(path);
        let mut rows = Vec::new();
        for make in cases::all::<CudaDevice>() {
            rows.extend(count_case(&device, make, shape)?);
        }
        rows.retain(|row| config.wants(&row.operation) || config.wants(&row.launcher));
        paths.push((if path == KernelPath::Hopper { "hopper" } else { "portable" }, rows));
    }
    if paths.iter().all(|(_, rows)| rows.is_empty()) {
        return Err(Error::config(
            format!("`--only` = {} is part of no kernel's name", config.only.join(", ")),
            "run without it to see the names",
        ));
    }
    report(config, shape, &device.describe(), &paths)
}

fn report(config: &BenchConfig, shape: &Shape, device: &str, paths: &[(&str, Vec<Counted>)]) -> Result<()> {
    if config.json {
        let paths: serde_json::Map<String, serde_json::Value> =
            paths.iter().map(|(path, rows)| ((*path).to_owned(), json!(rows))).collect();
        let report = json!({
            "bench": "counts",
            "version": env!("CARGO_PKG_VERSION"),
            "device": device,
            "shape": shape.name(),
            "paths": paths,
        });
        return report::print(&format!("{report}\n"));
    }
    let header = [
        "operation",
        "launcher",
        "path",
        "mma MFLOP",
        "least",
        "useful",
        "read KB",
        "written KB",
        "least",
        "bank conflicts",
    ];
    let rows: Vec<Vec<String>> =
        paths.iter().flat_map(|(path, rows)| rows.iter().map(|row| cells(path, row))).collect();
    report::print(&format!(
        "{}: {} tokens, {} scored\n\n{}\nLeast: what the operation needs, every operand read once and every result written \
         once. Useful: of the tensor cores' work.\n",
        shape.name(),
        shape.tokens(),
        shape.scored(),
        report::table(&header, &rows),
    ))
}

fn cells(path: &str, row: &Counted) -> Vec<String> {
    let counts = row.counts;
    let amount = |value: f64, unit: f64| if value > 0.0 { figures(value / unit) } else { "-".into() };
    let [flops, bytes] = row.minimum.unwrap_or_default();
    let useful = match counts.mma_flops {
        0 => "-".to_owned(),
        _ if flops == 0.0 => "-".to_owned(),
        done => format!("{:.0} %", 100.0 * flops / done as f64),
    };
    vec![
        row.operation.clone(),
        row.launcher.clone(),
        path.to_owned(),
        amount(counts.mma_flops as f64, 1e6),
        amount(flops, 1e6),
        useful,
        amount(counts.load_bytes as f64, 1e3),
        amount(counts.store_bytes as f64, 1e3),
        amount(bytes, 1e3),
        counts.bank_conflicts.to_string(),
    ]
}
