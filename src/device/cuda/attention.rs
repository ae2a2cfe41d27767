//! Attention with the shared-prefix mask, and of one query over a cache: `kernels/attention_*.cu`.

use half::bf16;

use super::bindings::KernelTable;
use super::{CudaBuffer, CudaDevice, KernelPath, launch_sizes};
use crate::data::PairSpan;
use crate::device::{
    Attention, AttentionBackward, AttentionCapacity, AttentionGradient, AttentionShape, BatchBuffers, Checked,
};
use crate::error::{Error, Result};

/// The order in which the gradient of the queries receives its terms, which come from blocks of the GPU that each own some
/// of the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionOrder {
    /// The same order every time, and so the same bits: one block adds after the other.
    #[default]
    Fixed,
    /// The order in which blocks happen to arrive. The last bits may differ from run to run; this is there to measure
    /// what the fixed order costs.
    Any,
}

/// Head sizes that the kernels are compiled for.
const HEAD_SIZES: [usize; 2] = [64, 128];

/// Rows of a batch, `T`.
fn batch_rows(spans: &[PairSpan]) -> usize {
    spans.last().map_or(0, |span| span.rows().end)
}

/// Refuses heads of a size that no kernel is compiled for.
fn check_head_size(name: &str, shape: AttentionShape) -> Result<()> {
    if HEAD_SIZES.contains(&shape.head_size) {
        return Ok(());
    }
    Err(Error::device(
        format!(
            "{name}: the CUDA kernels know heads of {HEAD_SIZES:?}, this model has heads of {}",
            shape.head_size
        ),
        "run this model with `--device cpu`",
    ))
}

impl Attention for CudaDevice {
    fn run_attention_forward(
        &self,
        out: &mut CudaBuffer<bf16>,
        lse: &mut CudaBuffer<f32>,
        qkv: &CudaBuffer<bf16>,
        batch: &BatchBuffers<CudaDevice>,
        shape: AttentionShape,
        _: Checked,
    ) -> Result<()> {
        let name = "attention_forward";
        check_head_size(name, shape)?;
        let spans = batch.host_spans.as_slice();
        let rows = batch_rows(spans);
        let [pairs, rows, heads, kv_heads, head_size] =
            launch_sizes(name, [spans.len(), rows, shape.heads, shape.kv_heads, shape.head_size])?;
        let host_spans: &[u32] = bytemuck::cast_slice(spans);
        let path = self.path();
        // SAFETY: the buffers cover the sizes, and the tables of spans on the host and on the device are both this
        // batch's.
        self.launch(path.either(name, "attention_forward_sm90"), &(rows, shape), |kernels, stream| unsafe {
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

    fn run_attention_decode(
        &self,
        out: &mut CudaBuffer<bf16>,
        cache: &CudaBuffer<bf16>,
        length: usize,
        shape: AttentionShape,
        _: Checked,
    ) -> Result<()> {
        let name = "attention_decode";
        check_head_size(name, shape)?;
        let [length, heads, kv_heads, head_size] =
            launch_sizes(name, [length, shape.heads, shape.kv_heads, shape.head_size])?;
        // SAFETY: the workspace is as large as the launcher's own rule says, and the buffers cover the sizes.
        self.launch_with_workspace(
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
}

impl AttentionBackward for CudaDevice {
    fn run_attention_backward(&self, operands: AttentionGradient<'_, Self>, _: Checked) -> Result<()> {
        let AttentionGradient { dqkv, dout, out, lse, qkv, batch, shape } = operands;
        let name = "attention_backward";
        check_head_size(name, shape)?;
        let spans = batch.host_spans.as_slice();
        let rows = batch_rows(spans);
        let [pairs, rows, heads, kv_heads, head_size] =
            launch_sizes(name, [spans.len(), rows, shape.heads, shape.kv_heads, shape.head_size])?;
        let host_spans: &[u32] = bytemuck::cast_slice(spans);
        let path = self.path();
        let any_order = i32::from(self.attention_order == AttentionOrder::Any);
        // SAFETY: the workspace is as large as this path's own rule says; the rest is as in `forward`.
        self.launch_with_workspace(
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

    fn in_any_order(&self) -> Option<Self> {
        Some(self.with_attention_order(AttentionOrder::Any))
    }

    fn reserve_attention(&self, capacity: AttentionCapacity, shape: AttentionShape) -> Result<()> {
        let name = "attention_backward";
        check_head_size(name, shape)?;
        let AttentionCapacity { rows, pairs, .. } = capacity;
        let sizes = launch_sizes(name, [rows, pairs, shape.heads, shape.kv_heads, shape.head_size])?;
        let bytes = self.workspace_bytes(name, &(rows, shape), |kernels| {
            backward_workspace(kernels, self.path(), sizes)
        })?;
        self.workspace.reserve(&self.memory, bytes)
    }
}

fn backward_workspace(kernels: &KernelTable, path: KernelPath, sizes: [i32; 5]) -> i64 {
    let bytes = path.either(kernels.attention_backward_workspace, kernels.attention_backward_sm90_workspace);
    let [rows, pairs, heads, kv_heads, head_size] = sizes;
    // SAFETY: a pure function of numbers.
    unsafe { bytes(rows, pairs, heads, kv_heads, head_size) }
}
