//! Which implementation of a linear layer's gemms is the faster one on Hopper: measurements, nothing else.
//!
//! Made by `mmpo-fast bench products` on a GPU of compute capability 9.0: it times both on random data and prints the rows
//! of [`MEASURED`]. A table in the source rather than timing at run time: the two round differently, and a run must give
//! the same bits every time.

use super::gemm::GemmKind;
use crate::device::LinearShape;

/// One shape that was timed both ways.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Which of the three gemms of a linear layer.
    pub kind: GemmKind,
    /// Its rows, inputs and outputs.
    pub shape: LinearShape,
    /// The fastest of our kernel's tile shapes, by its number in `kernels/common/gemm_plan_sm90.cuh`; `None` is the
    /// planned one.
    pub tile: Option<u8>,
    /// cuBLASLt's time / the time of our kernel in that tile.
    pub speedup: f32,
}

pub(super) const MEASURED: &[Measured] = &[];

/// The tile with which our kernel is the faster one by `table` (the inner `None` is the planned one); `None` if the
/// library is faster, or if no layer with these inputs and outputs was measured. The measured number of rows that is
/// nearest by ratio decides; on a tie, the lesser one.
pub(super) fn faster_tile(table: &[Measured], kind: GemmKind, shape: LinearShape) -> Option<Option<u8>> {
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
        .filter(|row| row.speedup > 1.0)
        .map(|row| row.tile)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: GemmKind, rows: usize, speedup: f32) -> Measured {
        Measured { kind, shape: LinearShape { rows, inputs: 576, outputs: 1536 }, tile: Some(3), speedup }
    }

    #[test]
    fn nearest_rows_decide() {
        let table = [
            row(GemmKind::Forward, 2048, 1.1),
            row(GemmKind::Forward, 8192, 0.9),
            row(GemmKind::BackwardInput, 2048, 0.5),
        ];
        let ours =
            |kind, rows, outputs| faster_tile(&table, kind, LinearShape { rows, inputs: 576, outputs });
        assert_eq!(ours(GemmKind::Forward, 1, 1536), Some(Some(3)));
        assert!(ours(GemmKind::Forward, 4096, 1536).is_some(), "a tie goes to fewer rows");
        assert_eq!(ours(GemmKind::Forward, 4097, 1536), None);
        assert_eq!(ours(GemmKind::BackwardInput, 2048, 1536), None);
        assert_eq!(ours(GemmKind::BackwardWeight, 2048, 1536), None, "never measured");
        assert_eq!(ours(GemmKind::Forward, 2048, 1544), None, "never measured");
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
