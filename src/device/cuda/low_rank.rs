//! The products of low-rank adapters: `kernels/low_rank.cu`.

use half::bf16;

use super::gemm::{GemmKind, own_kernel, wanted_tile};
use super::{CudaBuffer, CudaDevice, KernelPath, adapted_linear, launch_sizes};
use crate::device::{
    AdaptedBackwardInput, AdaptedLinear, Checked, Dropout, Linear, LinearShape, LowRank, LowRankShape,
};
use crate::error::Result;

/// What launchers take where nothing is dropped.
const NO_DROPOUT: Dropout = Dropout { key: 0, threshold: 0, scale: 1.0 };

/// The sizes of a product as its launcher takes them: rows, rank, outputs and both widths.
fn sizes_of(operation: &str, shape: LowRankShape) -> Result<[i32; 5]> {
    let LowRankShape { rows, rank, outputs, out, inner, .. } = shape;
    launch_sizes(operation, [rows, rank, outputs, out.width, inner.width])
}

/// Sizes that Hopper's tensor maps need in multiples of 8: a product's columns in all of its matrices.
fn widths(shape: LowRankShape) -> [usize; 5] {
    [shape.rank, shape.outputs, shape.out.width, shape.inner.width, shape.inner.first]
}

impl CudaDevice {
    /// Which kernels take a product with these addresses and sizes.
    fn low_rank_path<const COUNT: usize>(&self, addresses: &[usize], widths: [usize; COUNT]) -> KernelPath {
        let mappable = addresses.iter().all(|address| address.is_multiple_of(16))
            && widths.iter().all(|width| width.is_multiple_of(8));
        if mappable { self.path() } else { KernelPath::Portable }
    }
}

impl LowRank for CudaDevice {
    fn reserve_low_rank(&self, shape: LinearShape, parts: &[LowRankShape], dropout: bool) -> Result<()> {
        if self.path() == KernelPath::Portable {
            return Ok(());
        }
        if dropout {
            let name = "low_rank_inner_backward_weight";
            let [rows, inputs, inner_width] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
            let tile = wanted_tile(self);
            let bytes = self.workspace_bytes(name, &shape, |kernels| {
                // SAFETY: a pure function of numbers.
                let taken = (1..=rows).map(|rows| unsafe {
                    (kernels.low_rank_inner_backward_weight_sm90_workspace)(rows, inputs, inner_width, tile)
                });
                taken.max().unwrap_or(0)
            })?;
            self.workspace.reserve(&self.memory, bytes)?;
        }
        let name = "low_rank_backward_weight";
        for shape in parts {
            let [rows, rank, outputs, ..] = sizes_of(name, *shape)?;
            // With more rows a gemm may be split into fewer parts.
            let bytes = self.workspace_bytes(name, shape, |kernels| {
                // SAFETY: a pure function of numbers.
                let taken = (1..=rows).map(|rows| unsafe {
                    (kernels.low_rank_backward_weight_sm90_workspace)(rows, rank, outputs)
                });
                taken.max().unwrap_or(0)
            })?;
            self.workspace.reserve(&self.memory, bytes)?;
        }
        Ok(())
    }

    fn run_low_rank_inner(
        &self,
        inner: &mut CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        a: &CudaBuffer<bf16>,
        shape: LinearShape,
        dropout: Option<Dropout>,
        _: Checked,
    ) -> Result<()> {
        let addresses = [inner.start().addr(), x.start().addr(), a.start().addr()];
        let path = match dropout {
            None => {
                let kernel = own_kernel(self, GemmKind::Forward, &addresses, shape, true);
                if !matches!(kernel, Some((KernelPath::Hopper, _))) {
                    return self.linear_forward(inner, x, a, None, shape);
                }
                KernelPath::Hopper
            }
            Some(_) => self.low_rank_path(&addresses, [shape.inputs, shape.outputs]),
        };
        let name = "low_rank_inner";
        let [rows, inputs, inner_width] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
        let Dropout { key, threshold, scale } = dropout.unwrap_or(NO_DROPOUT);
        // SAFETY: the buffers cover the sizes.
        self.launch(path.either(name, "low_rank_inner_sm90"), &shape, |kernels, stream| unsafe {
            let launch = path.either(kernels.low_rank_inner, kernels.low_rank_inner_sm90);
            let (inner, x, a) = (inner.start_mut(), x.start(), a.start());
            launch(inner, x, a, rows, inputs, inner_width, key, threshold, scale, stream)
        })
    }

    fn run_low_rank_inner_backward_weight(
        &self,
        da: &mut CudaBuffer<f32>,
        dinner: &CudaBuffer<bf16>,
        x: &CudaBuffer<bf16>,
        shape: LinearShape,
        dropout: Dropout,
        _: Checked,
    ) -> Result<()> {
        let name = "low_rank_inner_backward_weight";
        let [rows, inputs, inner_width] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
        let addresses = [da.start().addr(), dinner.start().addr(), x.start().addr()];
        let path = self.low_rank_path(&addresses, [shape.inputs, shape.outputs]);
        let tile = wanted_tile(self);
        let Dropout { key, threshold, scale } = dropout;
        let (da, dinner, x) = (da.start_mut(), dinner.start(), x.start());
        // SAFETY: the buffers cover the sizes, and the workspace is as large as the launcher's own rule says.
        self.launch_with_workspace(
            path.either(name, "low_rank_inner_backward_weight_sm90"),
            &shape,
            |kernels| match path {
                KernelPath::Portable => 0,
                // SAFETY: a pure function of numbers.
                KernelPath::Hopper => unsafe {
                    (kernels.low_rank_inner_backward_weight_sm90_workspace)(rows, inputs, inner_width, tile)
                },
            },
            |kernels, workspace, stream| unsafe {
                match path {
                    KernelPath::Portable => (kernels.low_rank_inner_backward_weight)(
                        da,
                        dinner,
                        x,
                        rows,
                        inputs,
                        inner_width,
                        key,
                        threshold,
                        scale,
                        stream,
                    ),
                    KernelPath::Hopper => (kernels.low_rank_inner_backward_weight_sm90)(
                        da,
                        workspace,
                        dinner,
                        x,
                        rows,
                        inputs,
                        inner_width,
                        key,
                        threshold,
                        scale,
                        tile,
                        stream,
                    ),
                }
            },
        )
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
        let path = self.low_rank_path(&[dinner.addr(), dout.addr(), b.addr()], widths(shape));
        let launcher = path.either(name, "low_rank_backward_input_sm90");
        // SAFETY: as in the forward.
        self.launch(launcher, &shape, |kernels, stream| unsafe {
            let launch = path.either(kernels.low_rank_backward_input, kernels.low_rank_backward_input_sm90);
            launch(dinner, dout, b, rows, rank, outputs, out_width, inner_width, shape.scale, stream)
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
        let path = self.low_rank_path(&[db.addr(), dout.addr(), inner.addr()], widths(shape));
        // SAFETY: as in the forward, and the workspace is as large as the launcher's own rule says.
        self.launch_with_workspace(
            path.either(name, "low_rank_backward_weight_sm90"),
            &shape,
            |kernels| match path {
                KernelPath::Portable => 0,
                // SAFETY: a pure function of numbers.
                KernelPath::Hopper => unsafe {
                    (kernels.low_rank_backward_weight_sm90_workspace)(rows, rank, outputs)
                },
            },
            |kernels, workspace, stream| unsafe {
                let scale = shape.scale;
                match path {
                    KernelPath::Portable => (kernels.low_rank_backward_weight)(
                        db,
                        dout,
                        inner,
                        rows,
                        rank,
                        outputs,
                        out_width,
                        inner_width,
                        scale,
                        stream,
                    ),
                    KernelPath::Hopper => (kernels.low_rank_backward_weight_sm90)(
                        db,
                        workspace,
                        dout,
                        inner,
                        rows,
                        rank,
                        outputs,
                        out_width,
                        inner_width,
                        scale,
                        stream,
                    ),
                }
            },
        )
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
        let Dropout { key, threshold, scale } = dropout.unwrap_or(NO_DROPOUT);
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

    fn run_adapted_linear_forward(&self, operands: AdaptedLinear<'_, Self>, _: Checked) -> Result<()> {
        let separate = adapted_linear::forward(self, operands)?;
        separate.map_or(Ok(()), |operands| operands.separately(self))
    }

    fn run_adapted_linear_backward_input(
        &self,
        operands: AdaptedBackwardInput<'_, Self>,
        _: Checked,
    ) -> Result<()> {
        let separate = adapted_linear::backward_input(self, operands)?;
        separate.map_or(Ok(()), |operands| operands.separately(self))
    }
}
