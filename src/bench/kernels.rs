//! `mmpo-fast bench kernels`: the time of each kernel, beside a copy and a large gemm in the same run.

use serde::Serialize;
use serde_json::json;

use super::BenchConfig;
use super::cases::{self, Case, Maker};
use super::measure::{Ceilings, Deadline, Method, Stopwatch};
use super::report::{self, ResultRow, figures};
use super::shapes::{self, Shape};
use crate::device::Device;
use crate::device::cpu::CpuDevice;
use crate::error::{Error, Result};

/// How far an operation's results in bf16 may be from the CPU's in f32: `|got - wanted| / |wanted|`.
const TOLERANCE: f64 = 2e-2;

/// A kernel's result beside the ceilings.
#[derive(Clone, Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    row: ResultRow,
    /// Relative difference from the CPU device at a small shape.
    error: Option<f64>,
    tflop_per_s: f64,
    gb_per_s: f64,
    /// Share of the ceiling that bounds it.
    share_of_ceiling: f64,
}

/// Measures every shape, whatever is wrong with one kernel, and then fails if something was.
///
/// # Errors
/// That of the first kernel that failed; those of the device and of standard output.
pub fn run<D: Device>(device: &D, config: &BenchConfig, shapes: &[Shape], method: Method) -> Result<()> {
    let deadline = Deadline::of(config.seconds);
    let mut stopwatch = Stopwatch::new(device, method)?;
    let mut ceilings = Ceilings::measure(&mut stopwatch)?;
    write(config, device, &ceiling_rows(&ceilings))?;
    let mut failures = Failures::default();
    let mut measured = Vec::new();
    for shape in shapes {
        let rows = measure_shape(&mut stopwatch, device, config, shape, deadline, &mut failures)?;
        // Written at once: what was measured is kept even if something later ends the program.
        write(config, device, &rows.iter().map(|row| row.row.clone()).collect::<Vec<_>>())?;
        measured.push((shape, rows));
        if failures.lost_device {
            break;
        }
    }
    if measured.iter().all(|(_, rows)| rows.is_empty()) && failures.first.is_none() && !deadline.is_over() {
        return Err(Error::config(
            format!("`--only` = {} is part of no kernel's name", config.only.join(", ")),
            "run without it to see the names",
        ));
    }
    if !failures.lost_device {
        let later = Ceilings::measure(&mut stopwatch)?;
        write(config, device, &ceiling_rows(&later))?;
        ceilings = ceilings.join(later);
    }
    for (shape, rows) in measured {
        let lines = rows.into_iter().map(|measured| Line::new(measured, &ceilings)).collect();
        report(device, config, shape, &method, &ceilings, lines)?;
    }
    failures.first.map_or(Ok(()), Err)
}

/// What went wrong so far; the rest is measured all the same.
#[derive(Default)]
struct Failures {
    first: Option<Error>,
    /// Whether the device is lost: a kernel that faults ends the process's use of its GPU.
    lost_device: bool,
}

impl Failures {
    fn note<D: Device>(&mut self, device: &D, name: &str, error: Error) {
        tracing::error!("{name} is not timed: {error}");
        let answers = || device.download(&mut [0.0f32], &device.alloc(1)?, 0);
        self.lost_device = answers().is_err();
        self.first.get_or_insert(error);
    }
}

fn measure_shape<D: Device>(
    stopwatch: &mut Stopwatch<'_, D>,
    device: &D,
    config: &BenchConfig,
    shape: &Shape,
    deadline: Deadline,
    failures: &mut Failures,
) -> Result<Vec<Measured>> {
    let reference = CpuDevice::new(config.threads)?;
    let mut measured = Vec::new();
    for (make, make_reference) in cases::all::<D>().into_iter().zip(cases::all::<CpuDevice>()) {
        let small = make(device, &small_shape()?)?;
        let name = small.name();
        if small.redundant || !config.wants(&name) {
            continue;
        }
        if deadline.is_over() {
            tracing::warn!("{name} of {} is left out: the time of `--seconds` is over", shape.name());
            continue;
        }
        let checked_and_timed = check(device, small, &reference, make_reference)
            .and_then(|error| measure(stopwatch, device, shape, make(device, shape)?, error));
        match checked_and_timed {
            Ok(row) => measured.push(row),
            Err(error) => failures.note(device, &name, error),
        }
        if failures.lost_device {
            break;
        }
    }
    Ok(measured)
}

fn ceiling_rows(ceilings: &Ceilings) -> Vec<ResultRow> {
    let copied = 2.0 * ceilings.copy_bytes as f64;
    vec![
        ResultRow::new("ceiling copy", "machine", &ceilings.copy, 0.0, copied),
        ResultRow::new("ceiling product", "machine", &ceilings.product, ceilings.product_flops(), 0.0),
    ]
}

fn write<D: Device>(config: &BenchConfig, device: &D, rows: &[ResultRow]) -> Result<()> {
    match &config.csv {
        Some(path) => report::append_csv(path, &device.describe(), report::OURS, rows),
        None => Ok(()),
    }
}

/// A kernel's result, and how far it is from the CPU device's.
struct Measured {
    row: ResultRow,
    error: Option<f64>,
}

impl Line {
    fn new(Measured { row, error }: Measured, ceilings: &Ceilings) -> Self {
        let seconds = row.median_us * 1e-6;
        Line {
            error,
            tflop_per_s: row.flops / seconds / 1e12,
            gb_per_s: row.bytes / seconds / 1e9,
            share_of_ceiling: ceilings.share(row.flops, row.bytes, seconds),
            row,
        }
    }
}

/// Checks a case on poisoned outputs, then times it.
fn measure<D: Device>(
    stopwatch: &mut Stopwatch<'_, D>,
    device: &D,
    shape: &Shape,
    mut case: Case<D>,
    error: Option<f64>,
) -> Result<Measured> {
    let name = case.name();
    if let Some(what) = case.not_finite(device)? {
        return Err(wrong(&name, &what));
    }
    let case = std::cell::RefCell::new(case);
    let sample =
        stopwatch.measure(|| case.borrow_mut().prepare_operands(device), || case.borrow_mut().run(device))?;
    let case = case.into_inner();
    let row = ResultRow::new(&name, &shape.name(), &sample, case.flops, case.bytes);
    Ok(Measured { row: ResultRow { workspace: case.workspace, ..row }, error })
}

/// The shape at which results are compared: it has every part of the mask, and rows that fill no whole tile.
fn small_shape() -> Result<Shape> {
    Ok(Shape {
        model: "tiny".into(),
        config: shapes::model("tiny", None)?,
        profile: "tiny".into(),
        lengths: shapes::lengths("tiny")?,
        pairs: 2,
    })
}

/// Relative difference from the CPU device; `None` on the CPU device itself.
fn check<D: Device>(
    device: &D,
    mut case: Case<D>,
    reference: &CpuDevice,
    make_reference: Maker<CpuDevice>,
) -> Result<Option<f64>> {
    let got = case.checked_run(device)?;
    if size_of::<D::Compute>() == size_of::<f32>() {
        return Ok(None);
    }
    let wanted = make_reference(reference, &small_shape()?)?.checked_run(reference)?;
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference =
        squares(&mut got.iter().zip(&wanted).map(|(&got, &wanted)| f64::from(got) - f64::from(wanted)));
    let size = squares(&mut wanted.iter().map(|&wanted| f64::from(wanted)));
    // All results may rightly be zeros.
    let error = if difference == 0.0 { 0.0 } else { (difference / size).sqrt() };
    if error <= TOLERANCE && got.len() == wanted.len() {
        return Ok(Some(error));
    }
    Err(wrong(
        &case.name(),
        &format!("its results differ by {error:e} from the CPU's, relative to their norm"),
    ))
}

fn wrong(name: &str, what: &str) -> Error {
    Error::numerics(format!("{name}: {what}"), "nothing is timed that computes wrong; please report this")
}

fn report<D: Device>(
    device: &D,
    config: &BenchConfig,
    shape: &Shape,
    method: &Method,
    ceilings: &Ceilings,
    lines: Vec<Line>,
) -> Result<()> {
    if config.json {
        let report = as_json(&device.describe(), shape, method, ceilings, &lines);
        return report::print(&format!("{report}\n"));
    }
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                line.row.op.clone(),
                figures(line.row.median_us),
                figures(line.row.min_us),
                figures(line.row.max_us),
                if line.row.flops > 0.0 { figures(line.tflop_per_s) } else { "-".into() },
                figures(line.gb_per_s),
                format!("{:.0} %", 100.0 * line.share_of_ceiling),
                if line.row.workspace > 0.0 {
                    figures(line.row.workspace / f64::from(1 << 20))
                } else {
                    "-".into()
                },
            ]
        })
        .collect();
    let header = ["kernel", "median us", "min", "max", "TFLOP/s", "GB/s", "of ceiling", "workspace, MiB"];
    let range = |sample: &super::measure::Sample, amount: f64| {
        let [most, least] = [sample.min(), sample.max()].map(|seconds| figures(amount / seconds));
        format!("{least} to {most}")
    };
    report::print(&format!(
        "{}: {} tokens, {} scored\ndevice   {}\nmethod   {}\nceilings copy {} GB/s ({}), product of {side} x {side} x \
         {side} {} TFLOP/s ({})\n\n{}\nOf ceiling: the least time that the ceilings allow, by operations or by bytes, \
         over the median.\n",
        shape.name(),
        shape.tokens(),
        shape.scored(),
        device.describe(),
        method.describe(),
        figures(ceilings.bandwidth() / 1e9),
        range(&ceilings.copy, 2.0 * ceilings.copy_bytes as f64 / 1e9),
        figures(ceilings.rate() / 1e12),
        range(&ceilings.product, ceilings.product_flops() / 1e12),
        report::table(&header, &rows),
        side = ceilings.product_side,
    ))
}

fn as_json(
    device: &str,
    shape: &Shape,
    method: &Method,
    ceilings: &Ceilings,
    lines: &[Line],
) -> serde_json::Value {
    json!({
        "bench": "kernels",
        "version": env!("CARGO_PKG_VERSION"),
        "device": device,
        "shape": shape.name(),
        "tokens": shape.tokens(),
        "scored": shape.scored(),
        "method": method.describe(),
        "copy_gb_per_s": ceilings.bandwidth() / 1e9,
        "product_tflop_per_s": ceilings.rate() / 1e12,
        "kernels": lines,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_kernel_is_noted_and_the_others_go_on() {
        let device = CpuDevice::new(Some(1)).unwrap();
        let mut failures = Failures::default();
        failures.note(&device, "rope", wrong("rope", "value 3 of its output is NaN"));
        failures.note(&device, "add", wrong("add", "value 0 of its output is NaN"));
        assert!(!failures.lost_device);
        assert!(
            failures.first.unwrap().to_string().starts_with("rope: "),
            "the first is the program's error"
        );
    }
}
