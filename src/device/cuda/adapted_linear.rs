//! Frozen linear layers with low-rank adapters: `kernels/adapted_linear.cu`, and `kernels/adapted_linear_sm90.cu` on Hopper.
//!
//! One kernel computes the frozen gemm and what the adapters add wherever this program's kernels compute the frozen gemm.
//! Where cuBLASLt does, the products stay separate, because its gemms take one pair of operands.

use half::bf16;

use super::bindings::mmpo_low_rank_part;
use super::gemm::{GemmKind, own_kernel};
use super::{CudaBuffer, CudaDevice, KernelPath, launch_sizes};
use crate::device::{AdaptedBackwardInput, AdaptedLinear, AdapterTerms, Dropout, LinearSwiglu, LowRankShape};
use crate::error::Result;

impl AdapterTerms<'_, CudaDevice> {
    /// The parts as launchers take them.
    fn parts(&self, operation: &str) -> Result<Vec<mmpo_low_rank_part>> {
        self.parts.iter().map(|shape| part(operation, self.inner, self.b, shape)).collect()
    }

    /// Whether Hopper's kernels take the parts: tensor maps of `inner` and `b` exist, whose addresses follow from the ranks, and
    /// parts begin and end on multiples of 8.
    fn mappable(&self) -> bool {
        let aligned = |shape: &LowRankShape| {
            let sizes = [shape.rank, shape.inner.first, shape.inner.width, shape.out.first, shape.outputs];
            sizes.iter().all(|size| size.is_multiple_of(8))
        };
        self.parts.iter().all(aligned)
    }
}

fn part(
    operation: &str,
    inner: &CudaBuffer<bf16>,
    b: &CudaBuffer<bf16>,
    shape: &LowRankShape,
) -> Result<mmpo_low_rank_part> {
    let sizes = [shape.inner.width, shape.rank, shape.out.first, shape.outputs];
    let [inner_width, rank, first, outputs] = launch_sizes(operation, sizes)?;
    Ok(mmpo_low_rank_part {
        inner: inner.start().wrapping_add(shape.inner.first),
        b: b.start().wrapping_add(shape.first_row * shape.rank),
        inner_width,
        rank,
        first,
        outputs,
        scale: shape.scale,
    })
}

/// The number of parts as launchers take it.
fn count(parts: &[mmpo_low_rank_part]) -> i32 {
    i32::try_from(parts.len()).unwrap_or(i32::MAX)
}

/// Runs the gemm with its adapters in one kernel; gives the operands back where no kernel of this program computes it.
pub(super) fn forward<'a>(
    device: &CudaDevice,
    operands: AdaptedLinear<'a, CudaDevice>,
) -> Result<Option<AdaptedLinear<'a, CudaDevice>>> {
    let AdaptedLinear { ref out, x, weight, bias, shape, ref terms } = operands;
    let addresses = [out.start().addr(), x.start().addr(), weight.start().addr()];
    let Some((path, tile)) = own_kernel(device, GemmKind::Forward, &addresses, shape, terms.mappable())
    else {
        return Ok(Some(operands));
    };
    let name = "adapted_linear_forward";
    let [rows, inputs, outputs] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
    let parts = terms.parts(name)?;
    let (out, bias) = (operands.out.start_mut(), bias.map_or(std::ptr::null(), CudaBuffer::start));
    let (x, weight) = (x.start(), weight.start());
    // SAFETY: the buffers cover the sizes, as the checks of shape and terms made sure; `parts` lives during the call.
    device.launch(path.either(name, "adapted_linear_forward_sm90"), &shape, |kernels, stream| unsafe {
        let (first, count) = (parts.as_ptr(), count(&parts));
        match path {
            KernelPath::Portable => (kernels.adapted_linear_forward)(
                out, x, weight, bias, first, count, rows, inputs, outputs, stream,
            ),
            KernelPath::Hopper => (kernels.adapted_linear_forward_sm90)(
                out, x, weight, bias, first, count, rows, inputs, outputs, tile, stream,
            ),
        }
    })?;
    Ok(None)
}

/// As [`forward`], with SwiGLU in the same kernel; gives everything back where there is none.
pub(super) fn swiglu_forward<'a>(
    device: &CudaDevice,
    operands: LinearSwiglu<'a, CudaDevice>,
    terms: AdapterTerms<'a, CudaDevice>,
) -> Result<Option<(LinearSwiglu<'a, CudaDevice>, AdapterTerms<'a, CudaDevice>)>> {
    let LinearSwiglu { ref out, ref gate_up, x, weight, bias, shape } = operands;
    let addresses = [out.start().addr(), gate_up.start().addr(), x.start().addr(), weight.start().addr()];
    let mappable = terms.mappable() && shape.outputs.is_multiple_of(16);
    let kernel = own_kernel(device, GemmKind::ForwardSwiGlu, &addresses, shape, mappable);
    let Some((KernelPath::Hopper, tile)) = kernel else { return Ok(Some((operands, terms))) };
    let name = "adapted_linear_swiglu_forward_sm90";
    let [rows, inputs, width] = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs / 2])?;
    let parts = terms.parts(name)?;
    let (out, gate_up) = (operands.out.start_mut(), operands.gate_up.start_mut());
    let (x, weight, bias) = (x.start(), weight.start(), bias.map_or(std::ptr::null(), CudaBuffer::start));
    // SAFETY: as in `forward`.
    device.launch(name, &shape, |kernels, stream| unsafe {
        let (first, count) = (parts.as_ptr(), count(&parts));
        (kernels.adapted_linear_swiglu_forward_sm90)(
            out, gate_up, x, weight, bias, first, count, rows, inputs, width, tile, stream,
        )
    })?;
    Ok(None)
}

/// As [`forward`], for the gradient of the input.
pub(super) fn backward_input<'a>(
    device: &CudaDevice,
    operands: AdaptedBackwardInput<'a, CudaDevice>,
) -> Result<Option<AdaptedBackwardInput<'a, CudaDevice>>> {
    let AdaptedBackwardInput { ref dx, dout, weight, dinner, a, shape, inner_width, dropout } = operands;
    let addresses = [dx, dout, weight, dinner, a].map(|buffer| buffer.start().addr());
    let mappable = inner_width.is_multiple_of(8);
    let Some((path, tile)) = own_kernel(device, GemmKind::BackwardInput, &addresses, shape, mappable) else {
        return Ok(Some(operands));
    };
    let name = "adapted_linear_backward_input";
    let sizes = [shape.rows, shape.inputs, shape.outputs, inner_width];
    let [rows, inputs, outputs, inner_width] = launch_sizes(name, sizes)?;
    let Dropout { key, threshold, scale } = dropout.unwrap_or(Dropout { key: 0, threshold: 0, scale: 1.0 });
    let dx = operands.dx.start_mut();
    let [dout, weight, dinner, a] = [dout, weight, dinner, a].map(CudaBuffer::start);
    // SAFETY: the buffers cover the sizes.
    device.launch(
        path.either(name, "adapted_linear_backward_input_sm90"),
        &shape,
        |kernels, stream| unsafe {
            match path {
                KernelPath::Portable => (kernels.adapted_linear_backward_input)(
                    dx,
                    dout,
                    weight,
                    dinner,
                    a,
                    rows,
                    inputs,
                    outputs,
                    inner_width,
                    key,
                    threshold,
                    scale,
                    stream,
                ),
                KernelPath::Hopper => (kernels.adapted_linear_backward_input_sm90)(
                    dx,
                    dout,
                    weight,
                    dinner,
                    a,
                    rows,
                    inputs,
                    outputs,
                    inner_width,
                    key,
                    threshold,
                    scale,
                    tile,
                    stream,
                ),
            }
        },
    )?;
    Ok(None)
}
