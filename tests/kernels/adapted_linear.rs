//! Frozen gemms together with what low-rank adapters add to them.

use mmpo_fast::device::{
    AdaptedBackwardInput, AdaptedLinear, AdapterTerms, Device, Dropout, LinearShape, LinearSwiglu,
    LowRankShape, RowPart,
};

use crate::harness::*;
use crate::naive;

/// A layer: its rows and inputs, the outputs of its modules with whether each has an adapter, and the rank.
struct Layer {
    rows: usize,
    inputs: usize,
    modules: &'static [(usize, bool)],
    rank: usize,
}

/// A module alone; three whose borders lie within tiles; one of three without an adapter; sizes that no vector fits; ranks of
/// one slice and of more; no adapter at all in most tiles.
const LAYERS: &[Layer] = &[
    Layer { rows: 1, inputs: 16, modules: &[(16, true)], rank: 8 },
    Layer { rows: 37, inputs: 72, modules: &[(48, true), (16, true), (16, true)], rank: 8 },
    Layer { rows: 70, inputs: 64, modules: &[(136, true), (24, false), (40, true)], rank: 16 },
    Layer { rows: 9, inputs: 17, modules: &[(17, true), (5, true)], rank: 3 },
    Layer { rows: 150, inputs: 200, modules: &[(264, true), (64, true), (72, true)], rank: 64 },
    Layer { rows: 130, inputs: 96, modules: &[(128, false), (136, true)], rank: 72 },
];

impl Layer {
    fn outputs(&self) -> usize {
        self.modules.iter().map(|module| module.0).sum()
    }

    fn shape(&self) -> LinearShape {
        LinearShape { rows: self.rows, inputs: self.inputs, outputs: self.outputs() }
    }

    fn inner_width(&self) -> usize {
        self.rank * self.modules.iter().filter(|module| module.1).count()
    }

    /// The product of each adapted module, each with a scale of its own.
    fn parts(&self) -> Vec<LowRankShape> {
        let (mut first, mut first_row, mut parts) = (0, 0, Vec::new());
        for &(outputs, adapted) in self.modules {
            if adapted {
                let number = parts.len();
                parts.push(LowRankShape {
                    rows: self.rows,
                    rank: self.rank,
                    outputs,
                    out: RowPart { first, width: self.outputs() },
                    inner: RowPart { first: number * self.rank, width: self.inner_width() },
                    first_row,
                    scale: [0.75, 1.0, 2.5][number],
                });
                first_row += outputs;
            }
            first += outputs;
        }
        parts
    }

    /// Adds to `out` what the adapters give.
    fn add_naively(&self, out: &mut [f64], inner: &[f64], b: &[f64]) {
        for part in self.parts() {
            for (row, out) in out.chunks_exact_mut(part.out.width).enumerate() {
                let inner = &inner[row * part.inner.width + part.inner.first..][..part.rank];
                for output in 0..part.outputs {
                    let b = &b[(part.first_row + output) * part.rank..][..part.rank];
                    let product: f64 = inner.iter().zip(b).map(|(inner, b)| inner * b).sum();
                    out[part.out.first + output] += f64::from(part.scale) * product;
                }
            }
        }
    }
}

/// `out` is assigned in full: the frozen product, the bias, and each module's adapter in its own columns.
fn check_forward<D: Device>(device: &D, layer: &Layer, bounds: Tolerance) {
    let (shape, parts) = (layer.shape(), layer.parts());
    trying("shape and parts", (shape, &parts));
    let (x, x64) = random_compute(device, 1, shape.rows * shape.inputs, 1.0);
    let (weight, weight64) = random_compute(device, 2, shape.outputs * shape.inputs, 1.0);
    let (bias, bias64) = random_compute(device, 3, shape.outputs, 4.0);
    let (inner, inner64) = random_compute(device, 4, shape.rows * layer.inner_width(), 1.0);
    let (b, b64) = random_compute(device, 5, shape.outputs * layer.rank, 1.0);
    for with_bias in [false, true] {
        let mut out = unset_compute(device, shape.rows * shape.outputs + 5);
        let terms = AdapterTerms { inner: &inner, b: &b, parts: &parts };
        let bias = with_bias.then_some(&bias);
        let operands = AdaptedLinear { out: &mut out, x: &x, weight: &weight, bias, shape, terms };
        device.adapted_linear_forward(operands).unwrap();
        let zeros = vec![0.0; shape.outputs];
        let mut wanted =
            naive::linear(&x64, &weight64, if with_bias { &bias64 } else { &zeros }, shape.inputs);
        layer.add_naively(&mut wanted, &inner64, &b64);
        let out = read_compute(device, &out);
        assert_close("out", &out[..wanted.len()], &wanted, bounds);
        assert!(out[wanted.len()..].iter().all(|value| value.is_nan()), "wrote past {shape:?}");
    }
}

/// `dx` is assigned in full; dropout drops what the adapters add, never the frozen product.
fn check_backward<D: Device>(device: &D, layer: &Layer, bounds: Tolerance) {
    let (shape, inner_width) = (layer.shape(), layer.inner_width());
    let (dout, dout64) = random_compute(device, 1, shape.rows * shape.outputs, 1.0);
    let (weight, weight64) = random_compute(device, 2, shape.outputs * shape.inputs, 1.0);
    let (dinner, dinner64) = random_compute(device, 3, shape.rows * inner_width, 1.0);
    let (a, a64) = random_compute(device, 4, inner_width * shape.inputs, 1.0);
    for dropout in [None, Some(Dropout::new(11, 0.3))] {
        trying("shape, inner width and dropout", (shape, inner_width, dropout));
        let mut dx = unset_compute(device, shape.rows * shape.inputs + 5);
        device
            .adapted_linear_backward_input(AdaptedBackwardInput {
                dx: &mut dx,
                dout: &dout,
                weight: &weight,
                dinner: &dinner,
                a: &a,
                shape,
                inner_width,
                dropout,
            })
            .unwrap();
        let exact = naive::Precision::Exact;
        let mut wanted = exact.linear_backward_input(&dout64, &weight64, shape.inputs);
        let added = exact.linear_backward_input(&dinner64, &a64, shape.inputs);
        for (index, (wanted, added)) in wanted.iter_mut().zip(added).enumerate() {
            *wanted += added * dropout.map_or(1.0, |dropout| f64::from(dropout.factor(index)));
        }
        let dx = read_compute(device, &dx);
        assert_close("dx", &dx[..wanted.len()], &wanted, bounds);
        assert!(dx[wanted.len()..].iter().all(|value| value.is_nan()), "wrote past {shape:?}");
    }
}

/// What the gemm with its adapters gives, and SwiGLU of what it stored, to the bit.
fn check_swiglu<D: Device>(device: &D, layer: &Layer) {
    let (shape, parts) = (layer.shape(), layer.parts());
    trying("shape and parts", (shape, &parts));
    let width = shape.outputs / 2;
    let (x, _) = random_compute(device, 1, shape.rows * shape.inputs, 1.0);
    let (weight, _) = random_compute(device, 2, shape.outputs * shape.inputs, 0.3);
    let (bias, _) = random_compute(device, 3, shape.outputs, 1.0);
    let (inner, _) = random_compute(device, 4, shape.rows * layer.inner_width(), 0.3);
    let (b, _) = random_compute(device, 5, shape.outputs * layer.rank, 1.0);
    for bias in [None, Some(&bias)] {
        let terms = || AdapterTerms { inner: &inner, b: &b, parts: &parts };
        let mut out = unset_compute(device, shape.rows * width);
        let mut gate_up = unset_compute(device, shape.rows * shape.outputs);
        let operands =
            LinearSwiglu { out: &mut out, gate_up: &mut gate_up, x: &x, weight: &weight, bias, shape };
        device.adapted_linear_swiglu_forward(operands, terms()).unwrap();

        let mut wanted = unset_compute(device, shape.rows * shape.outputs);
        let operands =
            AdaptedLinear { out: &mut wanted, x: &x, weight: &weight, bias, shape, terms: terms() };
        device.adapted_linear_forward(operands).unwrap();
        assert_exact("gate_up", &read_compute(device, &gate_up), &wide(&read_compute(device, &wanted)));
        let mut activated = unset_compute(device, shape.rows * width);
        device.swiglu_forward(&mut activated, &wanted, shape.rows, width).unwrap();
        assert_exact("out", &read_compute(device, &out), &wide(&read_compute(device, &activated)));
    }
}

path_tests! {
    /// `out` is assigned in full: the frozen product, the bias, and each module's adapter in its own columns.
    fn forward(device, bounds) {
        LAYERS.iter().for_each(|layer| check_forward(device, layer, bounds));
    }

    /// `dx` is assigned in full; dropout drops what the adapters add, never the frozen product.
    fn backward(device, bounds) {
        LAYERS.iter().for_each(|layer| check_backward(device, layer, bounds));
    }

    /// SwiGLU after the gemm of gate and up, of which both, or one, have an adapter.
    fn swiglu(device, bounds) {
        for layer in [
            Layer { rows: 1, inputs: 8, modules: &[(8, true), (8, true)], rank: 8 },
            Layer { rows: 70, inputs: 72, modules: &[(136, true), (136, true)], rank: 64 },
            Layer { rows: 70, inputs: 40, modules: &[(200, false), (200, true)], rank: 16 },
            Layer { rows: 5, inputs: 17, modules: &[(31, true), (31, true)], rank: 3 },
            Layer { rows: 150, inputs: 64, modules: &[(280, true), (280, true)], rank: 72 },
        ] {
            check_swiglu(device, &layer);
        }
    }

    /// So many rows and columns that a GPU of 132 multiprocessors takes the portable kernels' large tiles.
    fn large_tiles(device, bounds) {
        let layer = Layer { rows: 1410, inputs: 8, modules: &[(1544, true)], rank: 8 };
        check_forward(device, &layer, bounds);
        let layer = Layer { rows: 1410, inputs: 1544, modules: &[(8, true)], rank: 8 };
        check_backward(device, &layer, bounds);
    }

    /// Adapters whose `b` is zero add nothing: the bits are those of the frozen layer.
    fn zero_adapters(device, bounds) {
        let layer = &LAYERS[4];
        let (shape, parts) = (layer.shape(), layer.parts());
        let (x, _) = random_compute(device, 1, shape.rows * shape.inputs, 1.0);
        let (weight, _) = random_compute(device, 2, shape.outputs * shape.inputs, 1.0);
        let (inner, _) = random_compute(device, 4, shape.rows * layer.inner_width(), 1.0);
        let (b, _) = compute(device, &vec![0.0; shape.outputs * layer.rank]);
        let mut out = unset_compute(device, shape.rows * shape.outputs);
        let mut frozen = unset_compute(device, shape.rows * shape.outputs);
        device.linear_forward(&mut frozen, &x, &weight, None, shape).unwrap();
        let terms = AdapterTerms { inner: &inner, b: &b, parts: &parts };
        let operands = AdaptedLinear { out: &mut out, x: &x, weight: &weight, bias: None, shape, terms };
        device.adapted_linear_forward(operands).unwrap();
        assert_exact("out", &read_compute(device, &out), &wide(&read_compute(device, &frozen)));
    }

    /// Columns that do not fit into a row are an error that names the operation.
    fn too_small(device, bounds) {
        let layer = &LAYERS[1];
        let mut parts = layer.parts();
        parts[2].out.first += 8;
        let shape = layer.shape();
        let (x, _) = random_compute(device, 1, shape.rows * shape.inputs, 1.0);
        let (weight, _) = random_compute(device, 2, shape.outputs * shape.inputs, 1.0);
        let (inner, _) = random_compute(device, 4, shape.rows * layer.inner_width(), 1.0);
        let (b, _) = random_compute(device, 5, shape.outputs * layer.rank, 1.0);
        let mut out = unset_compute(device, shape.rows * shape.outputs);
        let terms = AdapterTerms { inner: &inner, b: &b, parts: &parts };
        let operands = AdaptedLinear { out: &mut out, x: &x, weight: &weight, bias: None, shape, terms };
        let error = device.adapted_linear_forward(operands).unwrap_err().to_string();
        assert!(error.contains("adapted_linear_forward") && error.contains("`a row of out`"), "{error}");
    }
}

tile_tests! {
    /// Every tile shape of Hopper's kernels with adapters, by single blocks and by clusters.
    fn every_tile_of_hopper(device, tiles: [(128, 128, 1), (128, 128, 2), (128, 256, 1), (128, 256, 2)]) {
        let layer =
            Layer { rows: 300, inputs: 136, modules: &[(200, true), (40, true), (280, true)], rank: 64 };
        check_forward(device, &layer, Tolerance::BF16);
        let layer = Layer { rows: 300, inputs: 280, modules: &[(136, true), (40, true)], rank: 64 };
        check_backward(device, &layer, Tolerance::BF16);
        let layer = Layer { rows: 300, inputs: 264, modules: &[(280, true), (280, true)], rank: 64 };
        check_swiglu(device, &layer);
    }
}
