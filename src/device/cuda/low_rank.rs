//! The products of low-rank adapters: `kernels/low_rank.cu`.

use half::bf16;

use super::{CudaBuffer, CudaDevice, launch_sizes};
use crate::device::{Checked, Dropout, LinearShape, LowRank, LowRankShape};
use crate::error::Result;

/// The sizes of a product as its launcher takes them: rows, rank, outputs and both widths.
fn sizes_of(operation: &str, shape: LowRankShape) -> Result<[i32; 5]> {
    let LowRankShape { rows, rank, outputs, out, inner, .. } = shape;
    launch_sizes(operation, [rows, rank, outputs, out.width, inner.width])
}

impl LowRank for CudaDevice {
    fn reserve_low_rank(&self, _: LinearShape) -> Result<()> {
        Ok(())
    }

    fn run_dropout(
        &self,
        out: &mut CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        values: usize,
        dropout: Dropout,
        _: Checked,
    ) -> Result<()> {
        let Dropout { key, threshold, scale } = dropout;
        // SAFETY: the buffers cover the values.
        self.launch("dropout", &values, |kernels, stream| unsafe {
            (kernels.dropout)(out.start_mut(), x.start(), values as i64, key, threshold, scale, stream)
        })
    }

    fn run_low_rank_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        inner: &CudaBuffer<bf16>,
        b: &CudaBuffer<bf16>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        let name = "low_rank_forward";
        let [rows, rank, outputs, out_width, inner_width] = sizes_of(name, shape)?;
        let out = out.start_mut().wrapping_add(shape.out.first);
        let inner = inner.start().wrapping_add(shape.inner.first);
        let b = b.start().wrapping_add(shape.first_row * shape.rank);
        // SAFETY: the buffers cover the sizes from these addresses on, as the check of the shape made sure.
        self.launch(name, &shape, |kernels, stream| unsafe {
            (kernels.low_rank_forward)(
                out,
                inner,
                b,
                rows,
                rank,
                outputs,
                out_width,
                inner_width,
                shape.scale,
                stream,
            )
        })
    }

    fn run_low_rank_backward_input(
        &self,
        dinner: &mut CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        b: &CudaBuffer<bf16>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        let name = "low_rank_backward_input";
        let [rows, rank, outputs, out_width, inner_width] = sizes_of(name, shape)?;
        let dinner = dinner.start_mut().wrapping_add(shape.inner.first);
        let dout = dout.start().wrapping_add(shape.out.first);
        let b = b.start().wrapping_add(shape.first_row * shape.rank);
        // SAFETY: as in the forward.
        self.launch(name, &shape, |kernels, stream| unsafe {
            (kernels.low_rank_backward_input)(
                dinner,
                dout,
                b,
                rows,
                rank,
                outputs,
                out_width,
                inner_width,
                shape.scale,
                stream,
            )
        })
    }

    fn run_low_rank_backward_weight(
        &self,
        db: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<bf16>,
        inner: &CudaBuffer<bf16>,
        shape: LowRankShape,
        _: Checked,
    ) -> Result<()> {
        let name = "low_rank_backward_weight";
        let [rows, rank, outputs, out_width, inner_width] = sizes_of(name, shape)?;
        let db = db.start_mut().wrapping_add(shape.first_row * shape.rank);
        let dout = dout.start().wrapping_add(shape.out.first);
        let inner = inner.start().wrapping_add(shape.inner.first);
        // SAFETY: as in the forward.
        self.launch(name, &shape, |kernels, stream| unsafe {
            (kernels.low_rank_backward_weight)(
                db,
                dout,
                inner,
                rows,
                rank,
                outputs,
                out_width,
                inner_width,
                shape.scale,
                stream,
            )
        })
    }

    fn run_linear_backward_input_add(
        &self,
        dx: &mut CudaBuffer<bf16>,
        dout: &CudaBuffer<bf16>,
        weight: &CudaBuffer<bf16>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        _: Checked,
    ) -> Result<()> {
        let name = "linear_backward_input_add";
        let [rows, inputs, outputs] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
        let Dropout { key, threshold, scale } =
            dropout.unwrap_or(Dropout { key: 0, threshold: 0, scale: 1.0 });
        // SAFETY: the buffers cover the sizes.
        self.launch(name, &shape, |kernels, stream| unsafe {
            (kernels.linear_backward_input_add)(
                dx.start_mut(),
                dout.start(),
                weight.start(),
                rows,
                inputs,
                outputs,
                key,
                threshold,
                scale,
                stream,
            )
        })
    }
}
