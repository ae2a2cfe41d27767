//! `mmpo-fast bench products`: times a GPU's linear layers and the head's gradients by our kernels, in every tile
//! shape, and by cuBLASLt, alternating call by call, and prints rows of `src/device/cuda/gemm_table.rs`.

use serde_json::json;

use super::BenchConfig;
use super::cases::{self, Case, Maker};
use super::measure::{Deadline, Method, Sample};
use super::report::{self, ResultRow, figures};
use super::shapes::{self, Shape};
use crate::device::cuda::{CudaDevice, GemmChoice, GemmTile};
use crate::device::{DeviceChoice, Floats, Hardware, LinearShape, Memory, Optimizer};
use crate::error::{Error, Result};

/// Tokens of a batch at which each layer is timed, the usual ones first: there may not be time for all.
const ROWS: [usize; 3] = [8192, 2048, 16384];
/// Values at the start and at the end of each output that must agree with the vendor's.
const COMPARED: usize = 1 << 18;
/// Scored tokens at which the head's gradients are timed.
const SCORED: usize = 4096;
const MODELS: [&str; 3] = ["smollm2-135m", "llama-3.2-1b", "llama-3-8b"];
const GEMMS: [&str; 5] = [
    "linear_forward",
    "linear_swiglu_forward",
    "linear_backward_input",
    "linear_backward_input_f32",
    "linear_backward_weight",
];

/// One gemm of one layer, timed every way.
struct Duel {
    operation: &'static str,
    layer: &'static str,
    shape: Shape,
    linear: LinearShape,
    flops: f64,
    vendor: Sample,
    /// Our kernel in the tile that it plans.
    planned: Sample,
    /// Our kernel in each tile shape; empty where the operation has only one plan.
    tiles: Vec<Sample>,
}

impl Duel {
    /// The tile shape in which our kernel is fastest (`None` is the planned one), and its time.
    fn fastest(&self) -> (Option<usize>, &Sample) {
        let tiles = self.tiles.iter().enumerate().map(|(tile, sample)| (Some(tile), sample));
        let all = std::iter::once((None, &self.planned)).chain(tiles);
        all.min_by(|a, b| a.1.median().total_cmp(&b.1.median())).unwrap_or((None, &self.planned))
    }

    fn speedup(&self) -> f64 {
        self.vendor.median() / self.fastest().1.median()
    }
}

/// Times every tile of our gemms and cuBLASLt, one call after another, at the shapes of `config`.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) without a GPU; those of the device and of standard output.
pub fn run(config: &BenchConfig) -> Result<()> {
    let device = match config.device {
        DeviceChoice::Cuda(ordinal) => CudaDevice::open(ordinal)?,
        DeviceChoice::Auto => CudaDevice::open(0)?,
        DeviceChoice::Cpu | DeviceChoice::Emulated => {
            return Err(Error::config(
                format!("`--device` = {}: there is no cuBLASLt to compare with", config.device),
                "bench products needs a GPU",
            ));
        }
    };
    let method = Method::GPU.with_calls(config.warmups, config.calls);
    compare(device, config, &method, sweeps(), GemmChoice::Vendor)
}

/// Times the gemms of `sweeps` by ours and by those of `other`, the vendor's.
fn compare(
    mut device: CudaDevice,
    config: &BenchConfig,
    method: &Method,
    sweeps: impl Iterator<Item = Sweep>,
    other: GemmChoice,
) -> Result<()> {
    let deadline = Deadline::of(config.seconds);
    let mut flush = device.alloc(method.flush_bytes / size_of::<f32>())?;
    device.upload(&mut flush, 0, &vec![1.0f32; method.flush_bytes / size_of::<f32>()])?;
    let tiles = device.gemm_tiles()?;
    let (mut duels, mut failure) = (Vec::new(), None);
    for Sweep { model, rows, makers } in sweeps {
        let shape = shape(model, rows)?;
        for make in makers {
            // A case's name is known once it is made, and the smallest is made at once.
            let name = make(&device, &smallest()?)?;
            let is_gemm = GEMMS.contains(&name.operation) && name.part != "qkv and bias";
            if !is_gemm || !config.wants(&name.name()) {
                continue;
            }
            let name = name.name();
            if deadline.is_over() {
                tracing::warn!(
                    "{name} of {model} at {rows} rows is left out: the time of `--seconds` is over"
                );
                continue;
            }
            let duel;
            (device, duel) = fight(device, make, &shape, &flush, method, other, tiles.len());
            match duel.and_then(|duel| write(&device, config, &duel).map(|()| duel)) {
                Ok(duel) => duels.push(duel),
                Err(error) => {
                    tracing::error!("{name} of {model} at {rows} rows is not timed: {error}");
                    failure.get_or_insert(error);
                }
            }
        }
    }
    print(&device, config, method, &duels, &tiles)?;
    failure.map_or(Ok(()), Err)
}

/// Times one gemm in every way: by the other library, by ours as planned, and by ours in each tile.
fn fight(
    device: CudaDevice,
    make: Maker<CudaDevice>,
    shape: &Shape,
    flush: &Floats<CudaDevice>,
    method: &Method,
    other: GemmChoice,
    tiles: usize,
) -> (CudaDevice, Result<Duel>) {
    let case = match make(&device, shape) {
        Ok(case) => case,
        Err(error) => return (device, Err(error)),
    };
    // SwiGLU follows one layer alone, so its case names none.
    let layer = if case.part.is_empty() { "gate_up" } else { case.part };
    let (operation, flops) = (case.operation, case.flops);
    let mut ways = vec![other, GemmChoice::Ours];
    if operation != "linear_swiglu_forward" {
        ways.extend((0..).take(tiles).map(GemmChoice::Tile));
    }
    let (device, samples) = time(device, case, flush, method, &ways);
    let duel = samples.map(|samples| {
        let mut samples = samples.into_iter();
        let [vendor, planned] = [(); 2].map(|()| samples.next().unwrap_or_default());
        let linear = cases::linear_shape(shape, layer);
        Duel {
            operation,
            layer,
            shape: shape.clone(),
            linear,
            flops,
            vendor,
            planned,
            tiles: samples.collect(),
        }
    });
    (device, duel)
}

/// What is timed together of one model.
struct Sweep {
    model: &'static str,
    rows: usize,
    makers: Vec<Maker<CudaDevice>>,
}

/// The sweeps, the most useful first: all models' layers at the usual batch, the heads, then the layers at other
/// batches.
fn sweeps() -> impl Iterator<Item = Sweep> {
    let layers = |rows| MODELS.map(|model| Sweep { model, rows, makers: cases::all() });
    let heads = MODELS.map(|model| Sweep { model, rows: SCORED, makers: cases::head_gemms() });
    let [usual, other @ ..] = ROWS;
    layers(usual).into_iter().chain(heads).chain(other.into_iter().flat_map(layers))
}

fn shape(model: &str, rows: usize) -> Result<Shape> {
    let profile = format!("{}/{}/{}", rows / 2, rows / 4, rows / 4);
    let (config, lengths) = (shapes::model(model, None)?, shapes::lengths(&profile)?);
    Ok(Shape { model: model.into(), config, profile, lengths, pairs: 1 })
}

fn smallest() -> Result<Shape> {
    let lengths = shapes::lengths("8/4/4")?;
    Ok(Shape {
        model: "tiny".into(),
        config: shapes::model("tiny", None)?,
        profile: "8/4/4".into(),
        lengths,
        pairs: 1,
    })
}

/// Times all ways, one call after another, so that a GPU that changes its clock changes it for all. Before that, all
/// must compute the same as the first.
fn time(
    mut device: CudaDevice,
    mut case: Case<CudaDevice>,
    flush: &Floats<CudaDevice>,
    method: &Method,
    ways: &[GemmChoice],
) -> (CudaDevice, Result<Vec<Sample>>) {
    let mut samples = vec![Sample::default(); ways.len()];
    let mut expected = None;
    let (mut warmups, mut calls) = (method.warmups, method.calls);
    let mut step = |device: &CudaDevice, round: usize, which: usize| -> Result<f64> {
        if round == 0 {
            let found = fresh_run(device, &mut case)?;
            let name = || format!("{} by {:?}", case.name(), ways[which]);
            same(name, &found, expected.get_or_insert_with(|| found.clone()))?;
        }
        let mut flushed: Floats<CudaDevice> = device.alloc(2)?;
        device.gradient_norm(&mut flushed, &[flush], None)?;
        device.time(|| case.run(device))
    };
    let mut round = 0;
    while round < warmups.max(1) + calls {
        let mut together = 0.0;
        for (which, &choice) in ways.iter().enumerate() {
            device = device.with_gemm_choice(choice);
            match step(&device, round, which) {
                Ok(seconds) if round >= warmups.max(1) => samples[which].0.push(seconds),
                Ok(seconds) => together += seconds,
                Err(error) => return (device.with_gemm_choice(GemmChoice::Fastest), Err(error)),
            }
        }
        // The first round also loads the kernels.
        if round < 2.min(warmups.max(1)) {
            (warmups, calls) = method.calls_of(together);
        }
        round += 1;
    }
    (device.with_gemm_choice(GemmChoice::Fastest), Ok(samples))
}

/// The outputs of one run over sums that were zeroed before.
fn fresh_run(device: &CudaDevice, case: &mut Case<CudaDevice>) -> Result<Vec<f32>> {
    for sums in &mut case.outputs.floats {
        device.zero(sums, 0..device.len(sums))?;
    }
    case.sampled_run(device, COMPARED)
}

/// Fails unless the results are the same. Both round to bf16 once, after sums in different orders.
fn same(name: impl Fn() -> String, found: &[f32], expected: &[f32]) -> Result<()> {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = squares(&mut found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let error = (difference / squares(&mut expected.iter().map(|&value| f64::from(value)))).sqrt();
    if error <= 1e-2 {
        return Ok(());
    }
    Err(Error::numerics(
        format!("{}: differs from cuBLASLt by {error:e}, relative to its norm", name()),
        "nothing is timed that computes wrong; please report this",
    ))
}

fn write(device: &CudaDevice, config: &BenchConfig, duel: &Duel) -> Result<()> {
    let Some(path) = &config.csv else { return Ok(()) };
    for (engine, sample) in [(report::OURS, duel.fastest().1), ("cuBLASLt", &duel.vendor)] {
        let op = format!("{} {}", duel.operation, duel.layer);
        let row = ResultRow::new(&op, &duel.shape.name(), sample, duel.flops, 0.0);
        report::append_csv(path, &device.describe(), engine, &[row])?;
    }
    Ok(())
}

fn print(
    device: &CudaDevice,
    config: &BenchConfig,
    method: &Method,
    duels: &[Duel],
    tiles: &[GemmTile],
) -> Result<()> {
    let names: Vec<String> = tiles.iter().map(GemmTile::to_string).collect();
    if config.json {
        let rows: Vec<_> = duels
            .iter()
            .map(|duel| {
                json!({
                    "product": duel.operation,
                    "rows": duel.linear.rows,
                    "inputs": duel.linear.inputs,
                    "outputs": duel.linear.outputs,
                    "ours_seconds": duel.fastest().1.median(),
                    "vendor_seconds": duel.vendor.median(),
                    "planned_seconds": duel.planned.median(),
                    "tile_seconds": duel.tiles.iter().map(Sample::median).collect::<Vec<_>>(),
                })
            })
            .collect();
        return report::print(&format!(
            "{}\n",
            json!({ "bench": "products", "tiles": names, "products": rows })
        ));
    }
    let rows: Vec<Vec<String>> = duels
        .iter()
        .map(|duel| {
            let rate = |sample: &Sample| figures(duel.flops / sample.median() / 1e12);
            vec![
                format!("{} {} {}", duel.shape.model, duel.operation, duel.layer),
                duel.linear.rows.to_string(),
                rate(&duel.vendor),
                rate(duel.fastest().1),
                figures(duel.speedup()),
                rate(&duel.planned),
            ]
            .into_iter()
            .chain((0..names.len()).map(|tile| duel.tiles.get(tile).map_or("-".into(), rate)))
            .collect()
        })
        .collect();
    let header = ["product", "rows", "cuBLASLt, TFLOP/s", "ours", "speedup", "planned"];
    let header: Vec<&str> = header.into_iter().chain(names.iter().map(String::as_str)).collect();
    let measured: String = duels.iter().map(measured).collect();
    report::print(&format!(
        "device   {}\nmethod   {}, ours and cuBLASLt in turn\n\n{}\nFor src/device/cuda/gemm_table.rs:\n\n{measured}",
        device.describe(),
        method.describe(),
        report::table(&header, &rows),
    ))
}

/// A row of the table of measurements, as it is written there.
fn measured(duel: &Duel) -> String {
    let kind = match duel.operation {
        "linear_forward" => "Forward",
        "linear_swiglu_forward" => "ForwardSwiGlu",
        "linear_backward_input" => "BackwardInput",
        "linear_backward_input_f32" => "BackwardInputF32",
        _ => "BackwardWeight",
    };
    let LinearShape { rows, inputs, outputs } = duel.linear;
    let (tile, speedup) = (duel.fastest().0, duel.speedup());
    format!(
        "    Measured {{ kind: GemmKind::{kind}, shape: LinearShape {{ rows: {rows}, inputs: {inputs}, outputs: {outputs} }}, \
         tile: {tile:?}, speedup: {speedup:.2} }},\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn duel(operation: &'static str, layer: &'static str) -> Duel {
        let shape = smallest().unwrap();
        Duel {
            operation,
            layer,
            linear: cases::linear_shape(&shape, layer),
            shape,
            flops: 1.0,
            vendor: Sample(vec![3.0]),
            planned: Sample(vec![2.5]),
            tiles: vec![Sample(vec![4.0]), Sample(vec![2.0])],
        }
    }

    #[test]
    fn a_row_of_the_table_is_rust() {
        let wanted = "    Measured { kind: GemmKind::BackwardInput, shape: LinearShape { rows: 16, inputs: 256, outputs: 128 }, \
                      tile: Some(1), speedup: 1.50 },\n";
        assert_eq!(measured(&duel("linear_backward_input", "down")), wanted);
        let vocab = smallest().unwrap().config.vocab_size;
        let wanted =
            format!("BackwardInputF32, shape: LinearShape {{ rows: 16, inputs: 128, outputs: {vocab} }}");
        let head = measured(&duel("linear_backward_input_f32", "head"));
        assert!(head.contains(&wanted), "{head}");
    }

    /// Both gradients of the head at every size, each a gemm that is timed.
    #[test]
    fn the_head_is_timed() {
        let heads: Vec<Sweep> = sweeps().filter(|sweep| sweep.rows == SCORED).collect();
        let sizes: Vec<(usize, usize)> = heads
            .iter()
            .map(|sweep| cases::linear_shape(&shape(sweep.model, sweep.rows).unwrap(), "head"))
            .map(|linear| (linear.inputs, linear.outputs))
            .collect();
        assert_eq!(sizes, [(576, 49_152), (2048, 128_256), (4096, 128_256)]);
        assert!(heads.iter().all(|sweep| sweep.makers.len() == 2));
    }

    /// Everything but cuBLASLt, in whose place our own portable gemms stand: rows for the file and for the table.
    #[cfg(mmpo_emulated)]
    #[test]
    fn gemms_are_compared_and_written_down() {
        use crate::device::cuda::{EmulatorVariant, KernelPath};
        let folder = tempfile::tempdir().unwrap();
        let csv = folder.path().join("raw.csv");
        let config = |seconds| BenchConfig {
            parts: vec![super::super::Part::Gemm],
            cases: Vec::new(),
            model: None,
            layers: None,
            profile: None,
            pairs: None,
            tokens: None,
            only: Vec::new(),
            warmups: None,
            calls: None,
            seconds,
            json: true,
            csv: Some(csv.clone()),
            device: DeviceChoice::Emulated,
            precision: None,
            threads: None,
        };
        let sweeps = || {
            let layers = Sweep { model: "tiny", rows: 32, makers: cases::all() };
            let head = Sweep { model: "tiny", rows: 32, makers: cases::head_gemms() };
            [layers, head].into_iter()
        };
        let device = || CudaDevice::emulated(EmulatorVariant::Plain).with_path(KernelPath::Hopper);
        compare(device(), &config(None), &Method::EMULATED, sweeps(), GemmChoice::Ours).unwrap();
        let rows = std::fs::read_to_string(&csv).unwrap();
        for row in [
            "mmpo-fast,linear_forward gate_up,tiny 16/8/8 x1",
            "cuBLASLt,linear_backward_input_f32 head,tiny",
        ] {
            assert!(rows.contains(row), "{row} is not in\n{rows}");
        }
        compare(device(), &config(Some(0.0)), &Method::EMULATED, sweeps(), GemmChoice::Ours).unwrap();
        assert_eq!(std::fs::read_to_string(&csv).unwrap(), rows, "no time, no rows");
    }

    #[cfg(mmpo_emulated)]
    #[test]
    fn the_gemms_of_the_head_run() {
        use crate::device::cuda::{EmulatorVariant, KernelPath};
        for path in [KernelPath::Portable, KernelPath::Hopper] {
            let device = CudaDevice::emulated(EmulatorVariant::Plain).with_path(path);
            for make in cases::head_gemms() {
                let mut case = make(&device, &smallest().unwrap()).unwrap();
                assert!(GEMMS.contains(&case.operation) && case.part == "head", "{}", case.name());
                assert_eq!(case.not_finite(&device).unwrap(), None, "{}", case.name());
                let (mut norm, mut found) = (device.alloc(2).unwrap(), [0.0f32; 2]);
                device.gradient_norm(&mut norm, &[&case.outputs.floats[0]], None).unwrap();
                device.download(&mut found, &norm, 0).unwrap();
                assert!(found[0] > 0.0, "{}", case.name());
            }
        }
    }
}
