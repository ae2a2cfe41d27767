//! `mmpo-fast bench kernels`.

use serde::Serialize;
use serde_json::json;

use super::BenchConfig;
use super::cases::{self, Case, Maker};
use super::measure::{Ceilings, Method, Stopwatch};
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
    /// Of the ceiling that bounds it.
    share_of_ceiling: f64,
}

pub fn run<D: Device>(device: &D, config: &BenchConfig, shape: &Shape, method: Method) -> Result<()> {
    let mut stopwatch = Stopwatch::new(device, method)?;
    let before = Ceilings::measure(&mut stopwatch)?;
    let reference = CpuDevice::new(config.threads)?;
    let mut measured = Vec::new();
    for (make, make_reference) in cases::all::<D>().into_iter().zip(cases::all::<CpuDevice>()) {
        let wanted = |name: &str| config.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
        let small = make(device, &small_shape()?)?;
        let name = small.name();
        if !wanted(&name) {
            continue;
        }
        let error = check(device, small, &reference, make_reference)?;
        let case = make(device, shape)?;
        tracing::debug!("{name}: {error:?} from the CPU device");
        measured.push((name, error, measure(&mut stopwatch, device, case)?));
    }
    if measured.is_empty() {
        return Err(Error::config(
            format!("`--only` = {} is part of no kernel's name", config.only.as_deref().unwrap_or_default()),
            "run without it to see the names",
        ));
    }
    let ceilings = before.join(Ceilings::measure(&mut stopwatch)?);
    let lines: Vec<Line> = measured
        .into_iter()
        .map(|(name, error, measured)| {
            let (flops, bytes, median) = (measured.flops, measured.bytes, measured.sample.median());
            Line {
                row: ResultRow::new(&name, &shape.name(), &measured.sample, flops, bytes),
                error,
                tflop_per_s: flops / median / 1e12,
                gb_per_s: bytes / median / 1e9,
                share_of_ceiling: ceilings.share(flops, bytes, median),
            }
        })
        .collect();
    report(device, config, shape, &method, &ceilings, lines)
}

struct Measured {
    flops: f64,
    bytes: f64,
    sample: super::measure::Sample,
}

/// Checks a case on poisoned outputs, then times it.
fn measure<D: Device>(stopwatch: &mut Stopwatch<'_, D>, device: &D, mut case: Case<D>) -> Result<Measured> {
    let values = case.checked_run(device)?;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(wrong(&case.name(), &format!("value {at} of its output is {}", values[at])));
    }
    drop(values);
    let (flops, bytes) = (case.flops, case.bytes);
    let case = std::cell::RefCell::new(case);
    let sample =
        stopwatch.measure(|| case.borrow_mut().prepare_operands(device), || case.borrow_mut().run(device))?;
    Ok(Measured { flops, bytes, sample })
}

/// The shape at which results are compared: every part of the mask, and rows that fill no tile.
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
    let error = (difference / size).sqrt();
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
    if let Some(path) = &config.csv {
        let mut rows: Vec<ResultRow> = lines.iter().map(|line| line.row.clone()).collect();
        let copied = 2.0 * ceilings.copy_bytes as f64;
        rows.push(ResultRow::new("ceiling copy", "machine", &ceilings.copy, 0.0, copied));
        let flops = ceilings.product_flops();
        rows.push(ResultRow::new("ceiling product", "machine", &ceilings.product, flops, 0.0));
        report::append_csv(path, &device.describe(), &rows)?;
    }
    if config.json {
        let report = json!({
            "bench": "kernels",
            "version": env!("CARGO_PKG_VERSION"),
            "device": device.describe(),
            "shape": shape.name(),
            "tokens": shape.tokens(),
            "scored": shape.scored(),
            "method": method.describe(),
            "copy_gb_per_s": ceilings.bandwidth() / 1e9,
            "product_tflop_per_s": ceilings.rate() / 1e12,
            "kernels": lines,
        });
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
            ]
        })
        .collect();
    let header = ["kernel", "median us", "min", "max", "TFLOP/s", "GB/s", "of ceiling"];
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
