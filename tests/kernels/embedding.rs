use mmpo_fast::device::prelude::*;

use crate::harness::*;
use crate::naive::{self, Precision};

const WIDTHS: &[usize] = &[16, 50, 576];
const VOCAB: usize = 13;

/// Prompt, chosen and rejected tokens of each pair.
type Sizes = &'static [(usize, usize, usize)];

/// Batches by the number of tokens they draw from: runs of a token from none to well beyond a warp's 32.
const RUNS: &[(Sizes, u32)] =
    &[(RAGGED, VOCAB as u32), (&[(70, 41, 33)], 2), (&[(40, 1, 1)], 1), (&[(33, 0, 0), (31, 1, 0)], 1)];

device_tests! {
    /// Rows of the table by token id.
    fn forward(device, bounds) {
        for &width in WIDTHS {
            trying("width", width);
            let batch = pair_batch(RAGGED, VOCAB as u32);
            let (table, table64) = random_compute(device, 1, VOCAB * width, 1.0);
            let buffers = load_batch(device, &batch, &[]);
            let mut out = unset_compute(device, batch.tokens() * width);
            device.embedding_forward(&mut out, &table, &buffers.token_ids, batch.tokens(), width).unwrap();
            let wanted = naive::gather(&table64, &batch.token_ids, width);
            assert_exact("out", &read_compute(device, &out), &wanted);
        }
    }

    /// The table's gradient accumulates over repeated tokens and over what was there.
    fn backward(device, bounds) {
        for (&width, &(sizes, vocab)) in WIDTHS.iter().flat_map(|width| RUNS.iter().map(move |run| (width, run))) {
            trying("(width, pairs, vocabulary)", (width, sizes, vocab));
            let batch = pair_batch(sizes, vocab);
            let table = wide(&random(1, VOCAB * width, 1.0));
            let (dout, dout64) = random_compute(device, 2, batch.tokens() * width, 1.0);
            let before = random(3, VOCAB * width, 1.0);
            let mut dtable = floats(device, &before);
            let buffers = load_batch(device, &batch, &[]);
            device.embedding_backward(&mut dtable, &dout, &buffers, batch.tokens(), width).unwrap();
            let mut wanted = wide(&before);
            for (row, &token) in batch.token_ids.iter().enumerate() {
                let (sum, dout) = (&mut wanted[token as usize * width..][..width], &dout64[row * width..][..width]);
                sum.iter_mut().zip(dout).for_each(|(sum, dout)| *sum += dout);
            }
            let dtable = read(device, &dtable);
            assert_close("dtable", &dtable, &wanted, Tolerance::F32);
            let eager: Vec<f64> = wanted.iter().map(|&sum| Precision::Bf16.store(sum)).collect();
            assert_no_worse("dtable", &dtable, Stored::F32, &wanted, &eager);
            let before = wide(&before);
            assert_gradient(
                "dtable",
                &dtable,
                |table| inner(&naive::gather(table, &batch.token_ids, width), &dout64) + inner(&before, table),
                &table,
                32,
                Tolerance::F32,
            );
        }
    }

    /// The rows that predict scored tokens, and their gradient: the last prompt row's is the sum of two.
    fn scored_rows(device, bounds) {
        for &width in WIDTHS {
            trying("width", width);
            let batch = pair_batch(RAGGED, VOCAB as u32);
            let (rows, scored) = (batch.tokens(), batch.scored_tokens());
            let (hidden, hidden64) = random_compute(device, 1, rows * width, 1.0);
            let (dout, dout64) = random_compute(device, 2, scored * width, 1.0);
            let buffers = load_batch(device, &batch, &[]);
            let mut out = unset_compute(device, scored * width);
            device.gather_rows(&mut out, &hidden, &buffers, scored, width).unwrap();
            let wanted = naive::gather(&hidden64, &batch.scored_rows, width);
            assert_exact("out", &read_compute(device, &out), &wanted);

            let mut dhidden = unset_compute(device, rows * width);
            device.gather_rows_backward(&mut dhidden, &dout, &buffers, rows, width).unwrap();
            let dhidden = read_compute(device, &dhidden);
            let mut wanted = vec![0.0; rows * width];
            for (&row, dout) in batch.scored_rows.iter().zip(dout64.chunks(width)) {
                wanted[row as usize * width..][..width].iter_mut().zip(dout).for_each(|(sum, dout)| *sum += dout);
            }
            let eager: Vec<f64> = wanted.iter().map(|&sum| Precision::Bf16.store(sum)).collect();
            assert_no_worse("dhidden", &dhidden, Stored::Bf16, &wanted, &eager);
            assert_gradient(
                "dhidden",
                &dhidden,
                |hidden| inner(&naive::gather(hidden, &batch.scored_rows, width), &dout64),
                &hidden64,
                rows * 16,
                bounds,
            );
        }
    }
}

cpu_tests! {
    /// A token id beyond the table is an error that names it, on the way down and on the way up.
    fn token_outside_the_table(device) {
        let batch = pair_batch(&[(3, 2, 2)], VOCAB as u32);
        let largest = *batch.token_ids.iter().max().unwrap();
        let buffers = load_batch(device, &batch, &[]);
        let (table, _) = random_compute(device, 1, largest as usize * 4, 1.0);
        let mut out = unset_compute(device, batch.tokens() * 4);
        let error = device.embedding_forward(&mut out, &table, &buffers.token_ids, batch.tokens(), 4);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("embedding_forward") && error.contains(&format!("token id {largest}")), "{error}");
        let mut dtable = floats(device, &vec![0.0; largest as usize * 4]);
        let error = device.embedding_backward(&mut dtable, &out, &buffers, batch.tokens(), 4);
        assert!(error.unwrap_err().to_string().contains("embedding_backward"));
    }
}

/// The checked device names the operation and the access that an index outside the table leads to.
#[cfg(mmpo_emulated)]
#[test]
fn checked_device_reports_a_token_outside_the_table() {
    let device = checked();
    let batch = pair_batch(&[(3, 2, 2)], VOCAB as u32);
    let largest = *batch.token_ids.iter().max().unwrap() as usize;
    let buffers = load_batch(&device, &batch, &[]);
    let (table, _) = random_compute(&device, 1, largest * 4, 1.0);
    let mut out = unset_compute(&device, batch.tokens() * 4);
    let error = device.embedding_forward(&mut out, &table, &buffers.token_ids, batch.tokens(), 4);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("embedding_forward") && error.contains("out of bounds"), "{error}");
}
