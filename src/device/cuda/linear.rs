//! Matrix products: by cuBLASLt on a real GPU, by `kernels/linear.cu` where it is missing and on the emulated device.

use half::bf16;

use super::backend::{Operand, Product, ProductOut};
use super::bindings::{KernelTable, mmpo_status, mmpo_stream};
use super::{CudaBuffer, CudaDevice, check_sizes, launch_sizes};
use crate::device::LinearShape;
use crate::error::Result;

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    bias: Option<&CudaBuffer<bf16>>,
    shape: LinearShape,
) -> Result<()> {
    let name = "linear_forward";
    let sizes = [
        ("out", out.len(), shape.rows * shape.outputs),
        ("x", x.len(), shape.rows * shape.inputs),
        ("weight", weight.len(), shape.outputs * shape.inputs),
        ("bias", bias.map_or(shape.outputs, CudaBuffer::len), shape.outputs),
    ];
    check_sizes(name, &shape, &sizes)?;
    let bias = bias.map(CudaBuffer::start);
    let product = Product {
        out: ProductOut::Bf16(out.start_mut()),
        accumulate: false,
        left: Operand { values: x.start(), transposed: false },
        right: Operand { values: weight.start(), transposed: true },
        bias,
        rows: shape.rows,
        columns: shape.outputs,
        depth: shape.inputs,
    };
    // SAFETY: the buffers cover the sizes.
    unsafe {
        multiply(device, name, shape, &product, |kernels, [rows, inputs, outputs], stream| {
            let bias = bias.unwrap_or(std::ptr::null());
            let (x, weight) = (x.start(), weight.start());
            (kernels.linear_forward)(out.start_mut(), x, weight, bias, rows, inputs, outputs, stream)
        })
    }
}

/// Assigns `out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T`, the accumulators as they are.
///
/// # Safety
/// From each address on, the memory covers `shape`; `out` overlaps none of the others.
pub(super) unsafe fn forward_f32(
    device: &CudaDevice,
    out: *mut f32,
    x: *const bf16,
    weight: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    let product = Product {
        out: ProductOut::F32(out),
        accumulate: false,
        left: Operand { values: x, transposed: false },
        right: Operand { values: weight, transposed: true },
        bias: None,
        rows: shape.rows,
        columns: shape.outputs,
        depth: shape.inputs,
    };
    // SAFETY: the caller's promise.
    unsafe {
        multiply(device, "linear_forward_f32", shape, &product, |kernels, [rows, inputs, outputs], stream| {
            (kernels.linear_forward_f32)(out, x, weight, rows, inputs, outputs, stream)
        })
    }
}

/// Queues `product` with the vendor's library, where there is one, else by `kernel`.
///
/// # Safety
/// As [`super::backend::MatrixProducts::multiply`], and `kernel` computes the same product.
unsafe fn multiply(
    device: &CudaDevice,
    name: &str,
    shape: LinearShape,
    product: &Product,
    mut kernel: impl FnMut(&KernelTable, [i32; 3], mmpo_stream) -> mmpo_status,
) -> Result<()> {
    if let Some(products) = device.backend().products() {
        // SAFETY: the caller's promise.
        return device.traced(name, || unsafe { products.multiply(product) });
    }
    let sizes = launch_sizes(name, [shape.rows, shape.inputs, shape.outputs])?;
    device.launch(name, &shape, |kernels, stream| kernel(kernels, sizes, stream))
}

pub(super) fn backward_input(
    device: &CudaDevice,
    dx: &mut CudaBuffer<bf16>,
    dout: &CudaBuffer<bf16>,
    weight: &CudaBuffer<bf16>,
    shape: LinearShape,
) -> Result<()> {
    let sizes = [
        ("dx", dx.len(), shape.rows * shape.inputs),
        ("dout", dout.len(), shape.rows * shape.outputs),
        ("weight", weight.len(), shape.outputs * shape.inputs),
    ];
    check_sizes("linear_backward_input", &shape, &sizes)?;
    // SAFETY: the buffers cover the sizes.
    unsafe { backward_input_at(device, dx.start_mut(), dout.start(), weight.start(), shape) }
}

/// As [`backward_input`], from the addresses of a buffer's rows.
///
/// # Safety
/// From each address on, the buffers cover `shape`; `dx` overlaps none of the others.
pub(super) unsafe fn backward_input_at(
    device: &CudaDevice,
    dx: *mut bf16,
    dout: *const bf16,
    weight: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    let product = Product {
        out: ProductOut::Bf16(dx),
        accumulate: false,
        left: Operand { values: dout, transposed: false },
        right: Operand { values: weight, transposed: false },
        bias: None,
        rows: shape.rows,
        columns: shape.inputs,
        depth: shape.outputs,
    };
    // SAFETY: the caller's promise.
    unsafe {
        multiply(
            device,
            "linear_backward_input",
            shape,
            &product,
            |kernels, [rows, inputs, outputs], stream| {
                (kernels.linear_backward_input)(dx, dout, weight, rows, inputs, outputs, stream)
            },
        )
    }
}

pub(super) fn backward_weight(
    device: &CudaDevice,
    dweight: &mut CudaBuffer<f32>,
    dbias: Option<&mut CudaBuffer<f32>>,
    dout: &CudaBuffer<bf16>,
    x: &CudaBuffer<bf16>,
    shape: LinearShape,
) -> Result<()> {
    let name = "linear_backward_weight";
    let sizes = [
        ("dweight", dweight.len(), shape.outputs * shape.inputs),
        ("dbias", dbias.as_ref().map_or(shape.outputs, |dbias| dbias.len()), shape.outputs),
        ("dout", dout.len(), shape.rows * shape.outputs),
        ("x", x.len(), shape.rows * shape.inputs),
    ];
    check_sizes(name, &shape, &sizes)?;
    // SAFETY: the buffers cover the sizes.
    unsafe { backward_weight_at(device, dweight.start_mut(), dout.start(), x.start(), shape)? };
    let Some(dbias) = dbias else { return Ok(()) };
    let [rows, outputs] = launch_sizes(name, [shape.rows, shape.outputs])?;
    // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
    device.launch_with_workspace(
        "linear_bias_backward",
        &shape,
        |kernels| unsafe { (kernels.linear_bias_backward_workspace)(rows, outputs) },
        |kernels, workspace, stream| unsafe {
            (kernels.linear_bias_backward)(dbias.start_mut(), workspace, dout.start(), rows, outputs, stream)
        },
    )
}

/// As [`backward_weight`] without bias, from the addresses of a buffer's rows.
///
/// # Safety
/// From each address on, the buffers cover `shape`; `dweight` overlaps none of the others.
pub(super) unsafe fn backward_weight_at(
    device: &CudaDevice,
    dweight: *mut f32,
    dout: *const bf16,
    x: *const bf16,
    shape: LinearShape,
) -> Result<()> {
    let product = Product {
        out: ProductOut::F32(dweight),
        accumulate: true,
        left: Operand { values: dout, transposed: true },
        right: Operand { values: x, transposed: false },
        bias: None,
        rows: shape.outputs,
        columns: shape.inputs,
        depth: shape.rows,
    };
    // SAFETY: the caller's promise.
    unsafe {
        multiply(
            device,
            "linear_backward_weight",
            shape,
            &product,
            |kernels, [rows, inputs, outputs], stream| {
                (kernels.linear_backward_weight)(dweight, dout, x, rows, inputs, outputs, stream)
            },
        )
    }
}
