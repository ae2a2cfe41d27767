//! Which implementation of a linear layer's products is the faster one on Hopper: measurements, nothing else.
//!
//! Made by `mmpo-fast bench products` on a GPU of compute capability 9.0: it times both on random data and prints the rows
//! of [`MEASURED`]. A table in the source rather than timing at run time: the two round differently, and a run must give
//! the same bits every time.

use super::products::ProductKind;
use crate::device::LinearShape;

/// One shape that was timed both ways.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub kind: ProductKind,
    pub shape: LinearShape,
    /// cuBLASLt's time / the time of our kernel.
    pub speedup: f32,
}

pub(super) const MEASURED: &[Measured] = &[];

/// Whether our kernel is the faster one by `table`: of the layers with these inputs and outputs, the one counts whose rows
/// are nearest by ratio (the lesser on a tie). The library takes what was never measured.
pub(super) fn ours_is_faster(table: &[Measured], kind: ProductKind, shape: LinearShape) -> bool {
    let distance = |rows: usize| {
        let (more, less) = (rows.max(shape.rows), rows.min(shape.rows));
        more as f64 / less.max(1) as f64
    };
    table
        .iter()
        .filter(|row| row.kind == kind)
        .filter(|row| (row.shape.inputs, row.shape.outputs) == (shape.inputs, shape.outputs))
        .min_by(|a, b| {
            distance(a.shape.rows).total_cmp(&distance(b.shape.rows)).then(a.shape.rows.cmp(&b.shape.rows))
        })
        .is_some_and(|row| row.speedup > 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: ProductKind, rows: usize, speedup: f32) -> Measured {
        Measured { kind, shape: LinearShape { rows, inputs: 576, outputs: 1536 }, speedup }
    }

    #[test]
    fn nearest_rows_decide() {
        let table = [
            row(ProductKind::Forward, 2048, 1.1),
            row(ProductKind::Forward, 8192, 0.9),
            row(ProductKind::BackwardInput, 2048, 0.5),
        ];
        let ours =
            |kind, rows, outputs| ours_is_faster(&table, kind, LinearShape { rows, inputs: 576, outputs });
        assert!(ours(ProductKind::Forward, 1, 1536));
        assert!(ours(ProductKind::Forward, 4096, 1536), "a tie goes to fewer rows");
        assert!(!ours(ProductKind::Forward, 4097, 1536));
        assert!(!ours(ProductKind::BackwardInput, 2048, 1536));
        assert!(!ours(ProductKind::BackwardWeight, 2048, 1536), "never measured");
        assert!(!ours(ProductKind::Forward, 2048, 1544), "never measured");
    }

    #[test]
    fn the_committed_table_is_sound() {
        for (i, row) in MEASURED.iter().enumerate() {
            assert!(row.speedup.is_finite() && row.speedup > 0.0, "{row:?}");
            let twin = MEASURED[..i].iter().find(|other| other.kind == row.kind && other.shape == row.shape);
            assert!(twin.is_none(), "measured twice: {row:?}");
        }
    }
}
