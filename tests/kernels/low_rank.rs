use mmpo_fast::device::{Device, Dropout, LinearShape, LowRankShape, RowPart};

use crate::harness::*;
use crate::naive;

/// Rows, rank, outputs, first output and width of the output, first column and width of `inner`, first row of `b`: a module
/// alone; one between others whose rows are aligned; one whose rows are not; tails in every direction; more tiles than one.
const SHAPES: &[[usize; 8]] = &[
    [1, 8, 16, 0, 16, 0, 8, 0],
    [37, 8, 48, 32, 96, 8, 24, 16],
    [9, 3, 17, 5, 29, 4, 11, 2],
    [130, 16, 136, 8, 152, 16, 48, 8],
    [70, 64, 200, 64, 328, 64, 192, 64],
];

fn shape(
    [rows, rank, outputs, first, width, first_inner, inner_width, first_row]: [usize; 8],
) -> LowRankShape {
    LowRankShape {
        rows,
        rank,
        outputs,
        out: RowPart { first, width },
        inner: RowPart { first: first_inner, width: inner_width },
        first_row,
        scale: 0.75,
    }
}

/// The module's columns of a matrix.
fn columns(values: &[f64], part: RowPart, count: usize) -> Vec<f64> {
    values.chunks_exact(part.width).flat_map(|row| row[part.first..][..count].to_vec()).collect()
}

/// Puts `values` into the module's columns of a matrix.
fn put(matrix: &mut [f64], part: RowPart, count: usize, values: &[f64]) {
    for (row, values) in matrix.chunks_exact_mut(part.width).zip(values.chunks_exact(count)) {
        row[part.first..][..count].copy_from_slice(values);
    }
}

fn scaled(values: &[f64], scale: f32) -> Vec<f64> {
    values.iter().map(|value| value * f64::from(scale)).collect()
}

/// `out` accumulates in the module's columns, and the others keep their values.
fn check_forward<D: Device>(device: &D, sizes: [usize; 8], bounds: Tolerance) {
    trying("shape", sizes);
    let shape = shape(sizes);
    let (inner, inner64) = random_compute(device, 1, shape.rows * shape.inner.width, 1.0);
    let (b, b64) = random_compute(device, 2, (shape.first_row + shape.outputs) * shape.rank, 1.0);
    let (mut out, mut wanted) = random_compute(device, 3, shape.rows * shape.out.width, 1.0);
    device.low_rank_forward(&mut out, &inner, &b, shape).unwrap();
    let inner64 = columns(&inner64, shape.inner, shape.rank);
    let b64 = &b64[shape.first_row * shape.rank..];
    let product = naive::linear(&inner64, b64, &vec![0.0; shape.outputs], shape.rank);
    let before = columns(&wanted, shape.out, shape.outputs);
    let sum: Vec<f64> =
        before.iter().zip(scaled(&product, shape.scale)).map(|(before, product)| before + product).collect();
    put(&mut wanted, shape.out, shape.outputs, &sum);
    assert_close("out", &read_compute(device, &out), &wanted, bounds);
}

/// `dinner` is assigned in the module's columns alone.
fn check_backward_input<D: Device>(device: &D, sizes: [usize; 8], bounds: Tolerance) {
    trying("shape", sizes);
    let shape = shape(sizes);
    let (b, b64) = random_compute(device, 2, (shape.first_row + shape.outputs) * shape.rank, 1.0);
    let (dout, dout64) = random_compute(device, 3, shape.rows * shape.out.width, 1.0);
    let (mut dinner, mut wanted) = random_compute(device, 4, shape.rows * shape.inner.width, 1.0);
    device.low_rank_backward_input(&mut dinner, &dout, &b, shape).unwrap();

    let dout64 = scaled(&columns(&dout64, shape.out, shape.outputs), shape.scale);
    let b64 = &b64[shape.first_row * shape.rank..];
    let product = naive::Precision::Exact.linear_backward_input(&dout64, b64, shape.rank);
    put(&mut wanted, shape.inner, shape.rank, &product);
    assert_close("dinner", &read_compute(device, &dinner), &wanted, bounds);
}

/// `db` accumulates in the module's rows alone.
fn check_backward_weight<D: Device>(device: &D, sizes: [usize; 8]) {
    trying("shape", sizes);
    let shape = shape(sizes);
    let (inner, inner64) = random_compute(device, 1, shape.rows * shape.inner.width, 1.0);
    let (dout, dout64) = random_compute(device, 3, shape.rows * shape.out.width, 1.0);
    let before = random(5, (shape.first_row + shape.outputs) * shape.rank, 1.0);
    let mut db = floats(device, &before);
    device.low_rank_backward_weight(&mut db, &dout, &inner, shape).unwrap();

    let inner64 = columns(&inner64, shape.inner, shape.rank);
    let dout64 = scaled(&columns(&dout64, shape.out, shape.outputs), shape.scale);
    let mut wanted = wide(&before);
    let gradient = naive::Precision::Exact.linear_backward_weight(&dout64, &inner64, shape.rank);
    let own = &mut wanted[shape.first_row * shape.rank..];
    own.iter_mut().zip(gradient).for_each(|(wanted, gradient)| *wanted += gradient);
    assert_close("db", &read(device, &db), &wanted, Tolerance::F32);
}

/// The gradient of the input is added to what is there, without the values that the forward's mask dropped.
fn check_input_add<D: Device>(device: &D, (rows, inputs, outputs): (usize, usize, usize), bounds: Tolerance) {
    for dropout in [None, Some(Dropout::new(11, 0.3))] {
        trying("(rows, inputs, outputs), dropout", ((rows, inputs, outputs), dropout));
        let (dout, dout64) = random_compute(device, 1, rows * outputs, 1.0);
        let (weight, weight64) = random_compute(device, 2, outputs * inputs, 1.0);
        let (mut dx, before) = random_compute(device, 3, rows * inputs, 1.0);
        let shape = LinearShape { rows, inputs, outputs };
        device.linear_backward_input_add(&mut dx, &dout, &weight, shape, dropout).unwrap();
        let product = naive::Precision::Exact.linear_backward_input(&dout64, &weight64, inputs);
        let factor = |index| dropout.map_or(1.0, |dropout| f64::from(dropout.factor(index)));
        let wanted: Vec<f64> =
            (0..rows * inputs).map(|index| before[index] + product[index] * factor(index)).collect();
        assert_close("dx", &read_compute(device, &dx), &wanted, bounds);
    }
}

/// The values of `x` that are left, in exact arithmetic.
fn dropped(x: &[f64], dropout: Option<Dropout>) -> Vec<f64> {
    let factor = |index| dropout.map_or(1.0, |dropout| f64::from(dropout.factor(index)));
    x.iter().enumerate().map(|(index, x)| x * factor(index)).collect()
}

/// Nothing, a few values, and many.
fn dropouts() -> [Option<Dropout>; 3] {
    [None, Some(Dropout::new(0x1234_5678_9ABC_DEF0, 0.01)), Some(Dropout::new(11, 0.3))]
}

/// `inner` is assigned in full, from what dropout leaves of `x`.
fn check_inner<D: Device>(device: &D, (rows, inputs, outputs): (usize, usize, usize), bounds: Tolerance) {
    let (x, x64) = random_compute(device, 1, rows * inputs, 1.0);
    let (a, a64) = random_compute(device, 2, outputs * inputs, 1.0);
    for dropout in dropouts() {
        trying("(rows, inputs, outputs), dropout", ((rows, inputs, outputs), dropout));
        let mut inner = unset_compute(device, rows * outputs + 5);
        let shape = LinearShape { rows, inputs, outputs };
        device.low_rank_inner(&mut inner, &x, &a, shape, dropout).unwrap();
        let wanted = naive::linear(&dropped(&x64, dropout), &a64, &vec![0.0; outputs], inputs);
        let inner = read_compute(device, &inner);
        assert_close("inner", &inner[..rows * outputs], &wanted, bounds);
        assert!(inner[rows * outputs..].iter().all(|value| value.is_nan()), "wrote past {shape:?}");
    }
}

/// The gradient of `a`, which accumulates, is that of a linear layer with few outputs, from the same values of `x`.
fn check_gradient_of_a<D: Device>(device: &D, shape: LinearShape) {
    let (x, x64) = random_compute(device, 1, shape.rows * shape.inputs, 1.0);
    let (dinner, dinner64) = random_compute(device, 2, shape.rows * shape.outputs, 1.0);
    let before = random(3, shape.outputs * shape.inputs, 1.0);
    for dropout in dropouts() {
        trying("shape, dropout", (shape, dropout));
        let mut da = floats(device, &before);
        device.low_rank_inner_backward_weight(&mut da, &dinner, &x, shape, dropout).unwrap();
        let mut wanted = wide(&before);
        let x64 = dropped(&x64, dropout);
        let gradient = naive::Precision::Exact.linear_backward_weight(&dinner64, &x64, shape.inputs);
        wanted.iter_mut().zip(gradient).for_each(|(wanted, gradient)| *wanted += gradient);
        assert_close("da", &read(device, &da), &wanted, Tolerance::F32);
    }
}

/// The matrix that changes nothing.
fn unit(size: usize) -> Vec<f32> {
    (0..size * size).map(|index| if index % (size + 1) == 0 { 1.0 } else { 0.0 }).collect()
}

/// A value of `x` is dropped by its place alone, and the same ones in both products: a unit matrix shows each of them. A scale
/// of 2 is exact in every storage type.
fn check_mask<D: Device>(device: &D, (rows, inputs): (usize, usize)) {
    trying("(rows, inputs)", (rows, inputs));
    let dropout = Some(Dropout::new(0x0123_4567_89AB_CDEF, 0.5));
    let (x, x64) = random_compute(device, 1, rows * inputs, 1.0);
    let wanted = dropped(&x64, dropout);
    let mut inner = unset_compute(device, rows * inputs);
    let (a, _) = compute(device, &unit(inputs));
    let shape = LinearShape { rows, inputs, outputs: inputs };
    device.low_rank_inner(&mut inner, &x, &a, shape, dropout).unwrap();
    assert_exact("inner", &read_compute(device, &inner), &wanted);
    let mut da = floats(device, &vec![0.0; rows * inputs]);
    let (dinner, _) = compute(device, &unit(rows));
    let shape = LinearShape { rows, inputs, outputs: rows };
    device.low_rank_inner_backward_weight(&mut da, &dinner, &x, shape, dropout).unwrap();
    assert_exact("da", &read(device, &da), &wanted);
}

path_tests! {
    /// Both products with `a` drop the values that the key drops at their places, and no others.
    fn mask(device, bounds) {
        for sizes in [(1, 8), (3, 7), (37, 31), (72, 200), (200, 72), (136, 264)] {
            check_mask(device, sizes);
        }
    }

    /// The gradient of `a`, for one to three modules: ragged tiles, rows that are summed in parts, and single values.
    fn gradient_of_a(device, bounds) {
        let shapes =
            [(1, 16, 8), (9, 17, 3), (70, 72, 64), (530, 200, 128), (40, 136, 192), (1100, 264, 64), (37, 64, 216)];
        for (rows, inputs, outputs) in shapes {
            check_gradient_of_a(device, LinearShape { rows, inputs, outputs });
        }
    }

    /// `inner` is assigned in full, for as many columns as one to three modules have, and more.
    fn inner(device, bounds) {
        let shapes = [(1, 16, 8), (9, 17, 3), (70, 72, 64), (530, 200, 128), (40, 136, 192), (37, 64, 216)];
        for (rows, inputs, outputs) in shapes {
            check_inner(device, (rows, inputs, outputs), bounds);
        }
    }

    /// So many rows and columns that a GPU of 132 multiprocessors takes the large, tall and wide tiles of each gemm.
    fn large_tiles(device, bounds) {
        check_forward(device, [1410, 8, 1544, 0, 1544, 0, 8, 0], bounds);
        // The gradients of `inner` and of B, whose tiles are large only above a rank of 64, and else tall.
        check_backward_input(device, [16_900, 72, 8, 0, 8, 0, 72, 0], bounds);
        check_backward_weight(device, [8, 72, 16_904, 0, 16_904, 0, 72, 0]);
        check_backward_input(device, [8450, 16, 8, 0, 8, 0, 16, 0], bounds);
        check_backward_weight(device, [8, 16, 8456, 0, 8456, 0, 16, 0]);
        check_input_add(device, (1410, 1544, 8), bounds);
        for (long, rank) in [(16_904, 72), (8456, 16)] {
            check_inner(device, (long, 8, rank), bounds);
            check_gradient_of_a(device, LinearShape { rows: 8, inputs: long, outputs: rank });
        }
    }

    /// `dinner` is assigned in the module's columns alone; `db` accumulates in the module's rows alone.
    fn backward(device, bounds) {
        for &sizes in SHAPES {
            check_backward_input(device, sizes, bounds);
            check_backward_weight(device, sizes);
        }
        // Rows that Hopper's kernels sum in parts.
        check_backward_weight(device, [1100, 16, 24, 8, 40, 8, 32, 16]);
    }
}

device_tests! {
    /// `out` accumulates in the module's columns, and the others keep their values.
    fn forward(device, bounds) {
        SHAPES.iter().for_each(|&sizes| check_forward(device, sizes, bounds));
    }

    /// The gradient of the input is added to what is there, without the values that the forward's mask dropped.
    fn input_add(device, bounds) {
        for sizes in [(1, 16, 8), (5, 17, 3), (70, 72, 16), (130, 200, 64)] {
            check_input_add(device, sizes, bounds);
        }
    }

    /// Columns that do not fit into a row are an error that names the operation.
    fn too_small(device, bounds) {
        let (inner, _) = random_compute(device, 1, 8, 1.0);
        let (b, _) = random_compute(device, 2, 64, 1.0);
        let mut out = unset_compute(device, 16);
        let shape = shape([1, 8, 8, 12, 16, 0, 8, 0]);
        let error = device.low_rank_forward(&mut out, &inner, &b, shape).unwrap_err().to_string();
        assert!(error.contains("low_rank_forward") && error.contains("`a row of out`"), "{error}");
    }
}

tile_tests! {
    /// The gradient of `a` in every tile shape of Hopper's kernel, by single blocks and by clusters.
    fn every_tile_of_hopper(device, tiles: [(128, 128, 1), (128, 128, 2), (64, 128, 1)]) {
        check_gradient_of_a(device, LinearShape { rows: 300, inputs: 264, outputs: 192 });
        check_mask(device, (200, 136));
    }
}
