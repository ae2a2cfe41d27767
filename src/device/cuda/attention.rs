//! Attention with the shared-prefix mask, and of one query over a cache: `kernels/attention_*.cu`.

use half::bf16;

use super::bindings::KernelTable;
use super::{CudaBuffer, CudaDevice, KernelPath, REPORT, check_sizes, launch_sizes};
use crate::data::PairSpan;
use crate::device::{AttentionShape, BatchBuffers};
use crate::error::{Error, Result};

/// The order in which the gradient of the queries receives its terms, which come from blocks of the GPU that each own some
/// of the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionOrder {
    /// The same every time, and so are the bits: blocks add in turn.
    #[default]
    Fixed,
    /// As the blocks come to it. The last bits may differ from run to run: it is there to measure what the order costs.
    Any,
}

/// Head sizes that the kernels are compiled for.
const HEAD_SIZES: [usize; 2] = [64, 128];

/// `T`, after checking that the spans tile the rows of the batch in order.
fn batch_rows(name: &str, spans: &[PairSpan]) -> Result<usize> {
    let mut end = 0;
    for span in spans {
        if span.start as usize != end {
            let message =
                format!("{name}: {span:?} overlaps the span before it or leaves a gap at row {end}");
            return Err(Error::device(message, REPORT));
        }
        end = span.rows().end;
    }
    Ok(end)
}

fn check_heads(name: &str, shape: AttentionShape) -> Result<()> {
    let AttentionShape { heads, kv_heads, head_size } = shape;
    let message = if kv_heads == 0 || heads % kv_heads != 0 {
        format!("{name}: {heads} query heads cannot share {kv_heads} key/value heads evenly")
    } else if !HEAD_SIZES.contains(&head_size) {
        format!("{name}: the CUDA kernels know heads of {HEAD_SIZES:?}, this model has heads of {head_size}")
    } else {
        return Ok(());
    };
    Err(Error::device(message, "run this model with `--device cpu`"))
}

pub(super) fn forward(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    lse: &mut CudaBuffer<f32>,
    qkv: &CudaBuffer<bf16>,
    batch: &BatchBuffers<CudaDevice>,
    shape: AttentionShape,
) -> Result<()> {
    let name = "attention_forward";
    check_heads(name, shape)?;
    let spans = batch.host_spans.as_slice();
    let rows = batch_rows(name, spans)?;
    let sizes = [
        ("out", out.len(), rows * shape.out_width()),
        ("lse", lse.len(), rows * shape.heads),
        ("qkv", qkv.len(), rows * shape.qkv_width()),
        ("spans", batch.spans.len(), 4 * spans.len()),
    ];
    check_sizes(name, &(rows, shape), &sizes)?;
    let [pairs, rows, heads, kv_heads, head_size] =
        launch_sizes(name, [spans.len(), rows, shape.heads, shape.kv_heads, shape.head_size])?;
    let host_spans: &[u32] = bytemuck::cast_slice(spans);
    let path = device.path();
    // SAFETY: the buffers cover the sizes, and both tables of spans are the same, for this batch.
    device.launch(path.either(name, "attention_forward_sm90"), &(rows, shape), |kernels, stream| unsafe {
        let launch = path.either(kernels.attention_forward, kernels.attention_forward_sm90);
        launch(
            out.start_mut(),
            lse.start_mut(),
            qkv.start(),
            batch.spans.start(),
            host_spans.as_ptr(),
            pairs,
            rows,
            heads,
            kv_heads,
            head_size,
            shape.scale(),
            stream,
        )
    })
}

#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    device: &CudaDevice,
    dqkv: &mut CudaBuffer<bf16>,
    dout: &CudaBuffer<bf16>,
    out: &CudaBuffer<bf16>,
    lse: &CudaBuffer<f32>,
    qkv: &CudaBuffer<bf16>,
    batch: &BatchBuffers<CudaDevice>,
    shape: AttentionShape,
) -> Result<()> {
    let name = "attention_backward";
    check_heads(name, shape)?;
    let spans = batch.host_spans.as_slice();
    let rows = batch_rows(name, spans)?;
    let sizes = [
        ("dqkv", dqkv.len(), rows * shape.qkv_width()),
        ("dout", dout.len(), rows * shape.out_width()),
        ("out", out.len(), rows * shape.out_width()),
        ("lse", lse.len(), rows * shape.heads),
        ("qkv", qkv.len(), rows * shape.qkv_width()),
        ("spans", batch.spans.len(), 4 * spans.len()),
    ];
    check_sizes(name, &(rows, shape), &sizes)?;
    let [pairs, rows, heads, kv_heads, head_size] =
        launch_sizes(name, [spans.len(), rows, shape.heads, shape.kv_heads, shape.head_size])?;
    let host_spans: &[u32] = bytemuck::cast_slice(spans);
    let path = device.path();
    let any_order = i32::from(device.attention_order == AttentionOrder::Any);
    // SAFETY: the workspace is as large as this path's own rule says; the rest is as in `forward`.
    device.launch_with_workspace(
        path.either(name, "attention_backward_sm90"),
        &(rows, shape),
        |kernels| backward_workspace(kernels, path, [rows, pairs, heads, kv_heads, head_size]),
        |kernels, workspace, stream| unsafe {
            let launch = path.either(kernels.attention_backward, kernels.attention_backward_sm90);
            launch(
                dqkv.start_mut(),
                workspace,
                dout.start(),
                out.start(),
                lse.start(),
                qkv.start(),
                batch.spans.start(),
                host_spans.as_ptr(),
                pairs,
                rows,
                heads,
                kv_heads,
                head_size,
                shape.scale(),
                any_order,
                stream,
            )
        },
    )
}

fn backward_workspace(kernels: &KernelTable, path: KernelPath, sizes: [i32; 5]) -> i64 {
    let bytes = path.either(kernels.attention_backward_workspace, kernels.attention_backward_sm90_workspace);
    let [rows, pairs, heads, kv_heads, head_size] = sizes;
    // SAFETY: a pure function of numbers.
    unsafe { bytes(rows, pairs, heads, kv_heads, head_size) }
}

pub(super) fn reserve_backward(
    device: &CudaDevice,
    rows: usize,
    pairs: usize,
    shape: AttentionShape,
) -> Result<()> {
    let name = "attention_backward";
    check_heads(name, shape)?;
    let sizes = launch_sizes(name, [rows, pairs, shape.heads, shape.kv_heads, shape.head_size])?;
    let bytes = device
        .workspace_bytes(name, &(rows, shape), |kernels| backward_workspace(kernels, device.path(), sizes))?;
    device.workspace.with(&device.memory, bytes, |_| Ok(()))
}

pub(super) fn decode(
    device: &CudaDevice,
    out: &mut CudaBuffer<bf16>,
    cache: &CudaBuffer<bf16>,
    length: usize,
    shape: AttentionShape,
) -> Result<()> {
    let name = "attention_decode";
    check_heads(name, shape)?;
    let sizes = [("out", out.len(), shape.out_width()), ("cache", cache.len(), length * shape.qkv_width())];
    check_sizes(name, &(length, shape), &sizes)?;
    let [length, heads, kv_heads, head_size] =
        launch_sizes(name, [length, shape.heads, shape.kv_heads, shape.head_size])?;
    // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
    device.launch_with_workspace(
        name,
        &(length, shape),
        |kernels| unsafe { (kernels.attention_decode_workspace)(length, heads, kv_heads, head_size) },
        |kernels, workspace, stream| unsafe {
            (kernels.attention_decode)(
                out.start_mut(),
                workspace,
                cache.start(),
                length,
                heads,
                kv_heads,
                head_size,
                shape.scale(),
                stream,
            )
        },
    )
}
