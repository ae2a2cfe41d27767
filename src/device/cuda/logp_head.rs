//! The log-prob head: the kernels of `kernels/logp_head.cu`, or of `logp_head_sm90.cu` on Hopper, and the gemms of its
//! gradient.
//!
//! Contents of the workspace:
//!
//! | mode | in the forward | in the backward |
//! |---|---|---|
//! | main | `[rows, V]` bf16 exponentials, the tiles' statistics | the same, `[rows, D]` for scaled rows or f32 gradients |
//! | main, with entropies | the same | dlogits in place, the same statistics |
//! | recompute | statistics of some rows at a time | f32 gradient of some rows, then their dlogits for a run of columns |

use std::ffi::c_void;
use std::ops::Range;

use half::bf16;

use super::super::check::check_sizes;
use super::bindings::MMPO_STORAGE_F32;
use super::gemm::{self, GemmKind};
use super::head_chunks::{ALIGNMENT, HeadChunks};
use super::{CudaBuffer, CudaDevice, KernelPath, launch_sizes, linear};
use crate::device::{
    Checked, Head, HeadBackward, HeadForward, HeadMode, HeadShape, HeadSizes, LinearShape, TokenCoefficients,
    TokenScores,
};
use crate::error::{Error, Result};

impl Head for CudaDevice {
    /// No bound of its own: larger chunks mean larger gemms and fewer passes over the vocabulary matrix, so a step's
    /// chunks are as large as [`crate::model::HeadOptions`] allows.
    const HEAD_CHUNK_BYTES: usize = usize::MAX;

    /// Values of the workspace that a call needs.
    fn logp_head_workspace(&self, mode: HeadMode, rows: usize, width: usize, vocab: usize) -> Result<usize> {
        Ok(Layout::new(self, mode, (rows, width, vocab), usize::MAX)?.values)
    }

    fn reserve_logp_head(&self, mode: HeadMode, rows: usize, sizes: HeadSizes) -> Result<()> {
        let HeadSizes { width, vocab, workspace } = sizes;
        let (statistics, bytes) = (row_statistics(self, vocab)?, workspace.saturating_mul(size_of::<bf16>()));
        let gemm = |rows, columns| LinearShape { rows, inputs: width, outputs: columns };
        let mut gemms = Vec::new();
        for rows in 1..=rows {
            match mode {
                HeadMode::Score => {}
                HeadMode::Main => gemms.push(gemm(rows, vocab)),
                HeadMode::Recompute => {
                    // Whole chunks, and what is left after the last whole one.
                    let chunks = HeadChunks::new(rows, width, vocab, statistics, bytes);
                    let ends = [vocab % chunks.columns.max(1), chunks.columns];
                    for count in [rows % chunks.rows.max(1), chunks.rows] {
                        gemms.extend(ends.map(|columns| gemm(count, columns)));
                    }
                }
            }
        }
        gemms.retain(|gemm| gemm.rows * gemm.outputs > 0);
        gemm::reserve(self, GemmKind::BackwardWeight, &gemms)?;
        gemm::reserve(self, GemmKind::BackwardInputF32, &gemms)
    }

    fn run_logp_head_forward(&self, operands: HeadForward<'_, Self>, _: Checked) -> Result<()> {
        self.trace.scope("logp_head_forward", || {
            let HeadForward { scores, workspace, hidden, weight, targets, shape } = operands;
            let name = "logp_head_forward";
            let HeadShape { rows, width, vocab, entropy, mode } = shape;
            let layout = Layout::new(self, *mode, (rows.len(), *width, *vocab), workspace.len())?;
            check_sizes(name, shape, &[("workspace", workspace.len(), layout.values)])?;
            let (rows_at_once, statistics) = match mode {
                HeadMode::Main => (rows.len(), statistics_offset(rows.len(), *vocab)),
                HeadMode::Score | HeadMode::Recompute => (layout.chunks.forward_rows, 0),
            };
            let path = logits_path(self, *width);
            for first in rows.clone().step_by(rows_at_once.max(1)) {
                let count = rows_at_once.min(rows.end - first);
                let [count, width_size, vocab_size] = launch_sizes(name, [count, *width, *vocab])?;
                let exponentials = match mode {
                    HeadMode::Main => workspace.start_mut(),
                    HeadMode::Score | HeadMode::Recompute => std::ptr::null_mut(),
                };
                let entropy = if *entropy { scores.entropy.at_mut(first) } else { std::ptr::null_mut() };
                let launcher = path.either(name, "logp_head_forward_sm90");
                // SAFETY: rows `first..first + count` exist in every buffer, and the workspace holds what `Layout` says.
                self.launch(launcher, shape, |kernels, stream| unsafe {
                    let launch = path.either(kernels.logp_head_forward, kernels.logp_head_forward_sm90);
                    launch(
                        scores.lse.at_mut(first),
                        scores.logp.at_mut(first),
                        entropy,
                        exponentials,
                        inside(workspace, statistics),
                        hidden.at(first * width),
                        weight.start(),
                        targets.at(first),
                        count,
                        width_size,
                        vocab_size,
                        stream,
                    )
                })?;
            }
            Ok(())
        })
    }

    fn run_logp_head_backward(&self, operands: HeadBackward<'_, Self>, _: Checked) -> Result<()> {
        self.trace.scope("logp_head_backward", || {
            let HeadBackward { hidden, dweight, workspace, weight, targets, scores, coefficients, shape } =
                operands;
            let name = "logp_head_backward";
            let HeadShape { rows, width, vocab, entropy, mode } = shape;
            let layout = Layout::new(self, *mode, (rows.len(), *width, *vocab), workspace.len())?;
            check_sizes(name, shape, &[("workspace", workspace.len(), layout.values)])?;
            let backward = Backward { device: self, weight, targets, scores, coefficients, shape };
            match mode {
                HeadMode::Main if *entropy => backward.in_place(hidden, dweight, workspace),
                HeadMode::Main => backward.by_rows(hidden, dweight, workspace),
                HeadMode::Recompute => backward.recompute(hidden, dweight, workspace, layout.chunks),
                HeadMode::Score => Err(Error::bug(format!("{name}: {shape:?} left nothing to go back from"))),
            }
        })
    }
}

/// How a call uses a workspace.
struct Layout {
    chunks: HeadChunks,
    /// Values of the workspace in use.
    values: usize,
}

impl Layout {
    /// The layout of a workspace that holds `held` values.
    fn new(
        device: &CudaDevice,
        mode: HeadMode,
        (rows, width, vocab): (usize, usize, usize),
        held: usize,
    ) -> Result<Self> {
        let statistics = row_statistics(device, vocab)?;
        let bytes = held.saturating_mul(size_of::<bf16>());
        let chunks = HeadChunks::new(rows, width, vocab, statistics, bytes);
        let bytes = match mode {
            HeadMode::Score => chunks.forward_bytes(statistics),
            HeadMode::Recompute => chunks.forward_bytes(statistics).max(chunks.backward_bytes(width)),
            HeadMode::Main => scaled_offset(rows, vocab, statistics) + rows * width * size_of::<f32>(),
        };
        Ok(Layout { chunks, values: bytes.div_ceil(size_of::<bf16>()) })
    }
}

/// Bytes of statistics that the forward leaves for each row, by the launcher's own rule.
fn row_statistics(device: &CudaDevice, vocab: usize) -> Result<usize> {
    let name = "logp_head_workspace";
    let [vocab] = launch_sizes(name, [vocab])?;
    // SAFETY: a pure function of two numbers.
    device.workspace_bytes(name, &vocab, |kernels| unsafe { (kernels.logp_head_workspace)(1, vocab) })
}

/// Which kernels form the logits: the tensor maps of `logp_head_sm90.cu` need rows on 16-byte boundaries.
fn logits_path(device: &CudaDevice, width: usize) -> KernelPath {
    if width.is_multiple_of(8) { device.path() } else { KernelPath::Portable }
}

/// Offset of the statistics in main mode, after the exponentials.
fn statistics_offset(rows: usize, vocab: usize) -> usize {
    (rows * vocab * size_of::<bf16>()).next_multiple_of(ALIGNMENT)
}

/// Offset of the scaled rows in main mode, after the statistics of `row_statistics` bytes per row.
fn scaled_offset(rows: usize, vocab: usize, row_statistics: usize) -> usize {
    statistics_offset(rows, vocab) + (rows * row_statistics).next_multiple_of(ALIGNMENT)
}

/// The address `bytes` into the workspace.
fn inside(workspace: &mut CudaBuffer<bf16>, bytes: usize) -> *mut c_void {
    workspace.start_mut().cast::<c_void>().wrapping_byte_add(bytes)
}

/// What the backward reads in every mode. The buffers cover `shape`.
struct Backward<'a> {
    device: &'a CudaDevice,
    weight: &'a CudaBuffer<bf16>,
    targets: &'a CudaBuffer<u32>,
    scores: &'a TokenScores<CudaDevice>,
    coefficients: &'a TokenCoefficients<CudaDevice>,
    shape: &'a HeadShape,
}

impl Backward<'_> {
    /// `dentropy` and `entropy` from row `first` on, null without an entropy term.
    fn entropies(&self, first: usize) -> (*const f32, *const f32) {
        match self.shape.entropy {
            true => (self.coefficients.entropy.at(first), self.scores.entropy.at(first)),
            false => (std::ptr::null(), std::ptr::null()),
        }
    }

    /// Main mode without entropies: dlogits are the exponentials that the forward left, times a factor per row. So they
    /// are never formed: the rows of `hidden`, and those of the gradient, are multiplied by the factor instead.
    fn by_rows(
        &self,
        hidden: &mut CudaBuffer<bf16>,
        dweight: Option<&mut CudaBuffer<f32>>,
        workspace: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        let HeadShape { rows, width, vocab, .. } = self.shape;
        let first = rows.start;
        let [count, width_size, vocab_size] =
            launch_sizes("logp_head_backward", [rows.len(), *width, *vocab])?;
        let exponentials = workspace.start();
        let statistics = inside(workspace, statistics_offset(rows.len(), *vocab));
        let scaled_at = scaled_offset(rows.len(), *vocab, row_statistics(self.device, *vocab)?);
        let (lse, dlogp) = (self.scores.lse.at(first), self.coefficients.logp.at(first));
        let gemm = LinearShape { rows: rows.len(), inputs: *width, outputs: *vocab };
        if let Some(dweight) = dweight {
            let scaled: *mut bf16 = inside(workspace, scaled_at).cast();
            // SAFETY: the buffers cover the shape, and the workspace is what the forward of the same rows left, with
            // room for as many rows of f32 after it.
            self.device.launch("logp_head_scale_hidden", self.shape, |kernels, stream| unsafe {
                let x = hidden.at(first * width);
                (kernels.logp_head_scale_hidden)(
                    scaled, x, statistics, lse, dlogp, count, width_size, vocab_size, stream,
                )
            })?;
            // SAFETY: as above.
            unsafe {
                linear::backward_weight_at(self.device, dweight.start_mut(), exponentials, scaled, gemm)?;
            }
        }
        let gradient: *mut f32 = inside(workspace, scaled_at).cast();
        // SAFETY: as above; the gemm above was queued first, so its scaled rows may be overwritten.
        self.device.launch("zero", self.shape, |kernels, stream| unsafe {
            (kernels.zero)(gradient.cast(), (rows.len() * width * size_of::<f32>()) as i64, stream)
        })?;
        // SAFETY: as above.
        unsafe {
            linear::add_backward_input_at(self.device, gradient, exponentials, self.weight.start(), gemm)?;
        }
        // SAFETY: as above; whatever reads `hidden` was queued first.
        self.device.launch("logp_head_scale_gradient", self.shape, |kernels, stream| unsafe {
            let dx = hidden.at_mut(first * width);
            (kernels.logp_head_scale_gradient)(
                dx, gradient, statistics, lse, dlogp, count, width_size, vocab_size, stream,
            )
        })
    }

    /// Main mode with entropies: the exponentials that the forward left become dlogits.
    fn in_place(
        &self,
        hidden: &mut CudaBuffer<bf16>,
        dweight: Option<&mut CudaBuffer<f32>>,
        workspace: &mut CudaBuffer<bf16>,
    ) -> Result<()> {
        let name = "logp_head_backward";
        let HeadShape { rows, width, vocab, .. } = self.shape;
        let first = rows.start;
        let [count, vocab_size] = launch_sizes(name, [rows.len(), *vocab])?;
        let (dentropy, entropy) = self.entropies(first);
        let dlogits = workspace.start_mut();
        let statistics = inside(workspace, statistics_offset(rows.len(), *vocab));
        // SAFETY: the buffers cover the shape, and the workspace is what the forward of the same rows left.
        self.device.launch(name, self.shape, |kernels, stream| unsafe {
            (kernels.logp_head_backward)(
                dlogits,
                statistics,
                self.targets.at(first),
                self.scores.lse.at(first),
                self.scores.logp.at(first),
                self.coefficients.logp.at(first),
                dentropy,
                entropy,
                count,
                vocab_size,
                stream,
            )
        })?;
        let gemm = LinearShape { rows: rows.len(), inputs: *width, outputs: *vocab };
        if let Some(dweight) = dweight {
            let x = hidden.at(first * width);
            // SAFETY: the buffers cover the shape.
            unsafe {
                linear::backward_weight_at(self.device, dweight.start_mut(), dlogits, x, gemm)?;
            }
        }
        // SAFETY: the buffers cover the shape. The gemm above was queued first, so `hidden` may be replaced.
        unsafe {
            let dx = hidden.at_mut(first * width);
            linear::backward_input_at(self.device, dx, dlogits, self.weight.start(), gemm)
        }
    }

    /// Recompute mode: works on a chunk of rows at a time, and for each chunk on runs of the vocabulary's columns, in a
    /// fixed order.
    fn recompute(
        &self,
        hidden: &mut CudaBuffer<bf16>,
        mut dweight: Option<&mut CudaBuffer<f32>>,
        workspace: &mut CudaBuffer<bf16>,
        chunks: HeadChunks,
    ) -> Result<()> {
        let HeadShape { rows, width, vocab, .. } = self.shape;
        let dhidden: *mut f32 = inside(workspace, 0).cast();
        let dlogits: *mut bf16 = inside(workspace, chunks.dlogits_offset(*width)).cast();
        for first in rows.clone().step_by(chunks.rows.max(1)) {
            let chunk = first..rows.end.min(first + chunks.rows);
            let x = hidden.at_mut(first * width);
            // SAFETY: `dhidden` has room for the f32 gradient of the chunk's rows.
            self.device.launch("zero", self.shape, |kernels, stream| unsafe {
                (kernels.zero)(dhidden.cast(), (chunk.len() * width * size_of::<f32>()) as i64, stream)
            })?;
            for column in (0..*vocab).step_by(chunks.columns.max(1)) {
                let columns = column..(*vocab).min(column + chunks.columns);
                let gemm = LinearShape { rows: chunk.len(), inputs: *width, outputs: columns.len() };
                self.dlogits(dlogits, x, chunk.clone(), columns)?;
                let weight = self.weight.at(column * width);
                // SAFETY: the buffers cover the shape, and `dlogits` has room for the chunk's rows and columns.
                unsafe {
                    if let Some(dweight) = &mut dweight {
                        let dweight = dweight.at_mut(column * width);
                        linear::backward_weight_at(self.device, dweight, dlogits, x, gemm)?;
                    }
                    linear::add_backward_input_at(self.device, dhidden, dlogits, weight, gemm)?;
                }
            }
            let values = (chunk.len() * width) as i64;
            // SAFETY: the gemms above were queued first, so the rows of `hidden` may be replaced.
            self.device.launch("cast_to_bf16", self.shape, |kernels, stream| unsafe {
                (kernels.cast_to_bf16)(x, dhidden.cast(), MMPO_STORAGE_F32 as i32, values, stream)
            })?;
        }
        Ok(())
    }

    /// Assigns `dlogits[rows, columns]` from `x`, the hidden rows.
    fn dlogits(
        &self,
        dlogits: *mut bf16,
        x: *const bf16,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<()> {
        let name = "logp_head_dlogits";
        let first = rows.start;
        let sizes = [rows.len(), self.shape.width, columns.start, columns.len()];
        let [count, width, first_column, columns] = launch_sizes(name, sizes)?;
        let (dentropy, entropy) = self.entropies(first);
        let path = logits_path(self.device, self.shape.width);
        let launcher = path.either(name, "logp_head_dlogits_sm90");
        // SAFETY: the buffers cover the shape, and `dlogits` has room for the rows and columns.
        self.device.launch(launcher, self.shape, |kernels, stream| unsafe {
            let launch = path.either(kernels.logp_head_dlogits, kernels.logp_head_dlogits_sm90);
            launch(
                dlogits,
                x,
                self.weight.start(),
                self.targets.at(first),
                self.scores.lse.at(first),
                self.scores.logp.at(first),
                self.coefficients.logp.at(first),
                dentropy,
                entropy,
                count,
                width,
                first_column,
                columns,
                stream,
            )
        })
    }
}
