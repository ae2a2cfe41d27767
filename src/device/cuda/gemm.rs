//! The three gemms of a linear layer, and which of their implementations runs: cuBLASLt, `kernels/linear_sm90.cu` on
//! Hopper, or `kernels/linear.cu` anywhere. The choice is a function of path, shape and alignment, so a gemm always
//! gives the same bits on one kind of GPU.

use std::ffi::c_void;

use half::bf16;

use super::backend::{Gemm, GemmOut, Operand};
use super::bindings::{KernelTable, MMPO_PLANNED_TILE, mmpo_status, mmpo_stream};
use super::gemm_table::{MEASURED, faster_tile};
use super::{CudaDevice, KernelPath, launch_sizes};
use crate::device::LinearShape;
use crate::error::{Error, Result};

/// Whose gemm a device uses where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GemmChoice {
    /// The faster one for the shape, from a table of measurements: cuBLASLt for shapes that the table lacks, ours where
    /// cuBLASLt is not installed.
    #[default]
    Fastest,
    /// This program's kernels: to test or to time them.
    Ours,
    /// As `Ours`, where Hopper's kernels use the tile shape of this number (`0..`[`CudaDevice::gemm_tiles`]) if they
    /// have a choice.
    Tile(u8),
    /// cuBLASLt, and an error where it is not installed: to time it.
    Vendor,
}

/// A tile shape of Hopper's gemms: each block computes `block_m` x `block_n` values of the output, in clusters of
/// `cluster` blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmTile {
    /// Rows of a tile.
    pub block_m: i32,
    /// Columns of a tile.
    pub block_n: i32,
    /// Blocks that share the right operand's slices.
    pub cluster: i32,
}

impl std::fmt::Display for GemmTile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.block_m, self.block_n)?;
        if self.cluster > 1 { write!(f, " by {}", self.cluster) } else { Ok(()) }
    }
}

impl CudaDevice {
    /// The tile shapes that [`GemmChoice::Tile`] names by their number.
    ///
    /// # Errors
    /// Those of the device.
    pub fn gemm_tiles(&self) -> Result<Vec<GemmTile>> {
        let mut tiles = Vec::new();
        self.backend().launch("gemm_tiles_sm90", &(), &mut |kernels, _| {
            // SAFETY: pure functions of numbers.
            let (count, plan) = unsafe { ((kernels.gemm_tiles_sm90)(), kernels.gemm_plan_sm90) };
            tiles.extend((0..count).map(|tile| {
                // SAFETY: as above.
                let plan = unsafe { plan(1, 1, 1, 0, tile) };
                GemmTile { block_m: plan.block_m, block_n: plan.block_n, cluster: plan.cluster }
            }));
            0
        })?;
        Ok(tiles)
    }
}

/// Which gemm of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GemmKind {
    Forward,
    /// Gate and up with SwiGLU of both in one kernel; where there is none, a gemm and the kernel of SwiGLU run instead.
    ForwardSwiGlu,
    BackwardInput,
    BackwardInputF32,
    BackwardWeight,
}

/// A gemm of a linear layer on addresses in device memory; the sizes come as a [`LinearShape`].
#[derive(Clone, Copy, Debug)]
pub(super) enum LinearGemm {
    /// Assigns `out[rows, outputs] = x * weight^T + bias`, rounded once.
    Forward { out: *mut bf16, x: *const bf16, weight: *const bf16, bias: Option<*const bf16> },
    /// Assigns `dx[rows, inputs] = dout * weight`.
    BackwardInput { dx: *mut bf16, dout: *const bf16, weight: *const bf16 },
    /// Accumulates `dx[rows, inputs] += dout * weight` in f32.
    BackwardInputF32 { dx: *mut f32, dout: *const bf16, weight: *const bf16 },
    /// Accumulates `dweight[outputs, inputs] += dout^T * x`.
    BackwardWeight { dweight: *mut f32, dout: *const bf16, x: *const bf16 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Implementation {
    Vendor,
    Portable,
    Hopper(Tile),
}

/// The number of a tile shape of `kernels/common/gemm_plan_sm90.cuh`; `None` leaves the choice to the plan there.
type Tile = Option<u8>;

fn tile_number(tile: Tile) -> i32 {
    tile.map_or(MMPO_PLANNED_TILE, i32::from)
}

/// The tile shape that the device's choice names, for kernels of Hopper that no library has.
pub(super) fn wanted_tile(device: &CudaDevice) -> i32 {
    match device.gemm_choice() {
        GemmChoice::Tile(tile) => tile.into(),
        GemmChoice::Fastest | GemmChoice::Ours | GemmChoice::Vendor => MMPO_PLANNED_TILE,
    }
}

/// Queues one gemm.
///
/// # Safety
/// From each address on, the memory covers `shape`; the output overlaps none of the others.
pub(super) unsafe fn multiply(device: &CudaDevice, gemm: LinearGemm, shape: LinearShape) -> Result<()> {
    let (path, tile) = match choose(device, gemm.kind(), shape, gemm.has_hopper_kernel(shape)) {
        Implementation::Vendor => {
            let Some(vendor) = device.backend().gemm_library() else { return Err(no_vendor()) };
            // SAFETY: the caller's promise.
            return device.traced(gemm.name(), || unsafe { vendor.multiply(&gemm.for_vendor(shape)) });
        }
        Implementation::Portable => (KernelPath::Portable, None),
        Implementation::Hopper(tile) => (KernelPath::Hopper, tile),
    };
    let sizes = launch_sizes(gemm.name(), [shape.rows, shape.inputs, shape.outputs])?;
    // SAFETY: the caller's promise, and the workspace is as large as the launcher's own rule says.
    device.launch_with_workspace(
        gemm.launcher(path),
        &shape,
        |kernels| gemm.kind().workspace(kernels, path, sizes, tile),
        |kernels, workspace, stream| unsafe { gemm.launch(kernels, path, sizes, tile, workspace, stream) },
    )
}

/// Chooses who computes a gemm; `hopper` says whether Hopper's kernels can.
fn choose(device: &CudaDevice, kind: GemmKind, shape: LinearShape, hopper: bool) -> Implementation {
    let hopper = hopper && device.path() == KernelPath::Hopper;
    let ours = |tile| if hopper { Implementation::Hopper(tile) } else { Implementation::Portable };
    match device.gemm_choice() {
        GemmChoice::Vendor => Implementation::Vendor,
        GemmChoice::Ours => ours(None),
        GemmChoice::Tile(tile) => ours(Some(tile)),
        GemmChoice::Fastest if !device.backend().has_gemm_library() => ours(None),
        GemmChoice::Fastest if hopper => {
            faster_tile(MEASURED, kind, shape).map_or(Implementation::Vendor, Implementation::Hopper)
        }
        GemmChoice::Fastest => Implementation::Vendor,
    }
}

/// Whether one kernel computes gate, up and their SwiGLU for these addresses and this shape, whose `outputs` is 2F.
pub(super) fn fuses_swiglu(device: &CudaDevice, addresses: [usize; 4], shape: LinearShape) -> bool {
    let hopper = mappable(&addresses, shape) && shape.outputs.is_multiple_of(16);
    matches!(choose(device, GemmKind::ForwardSwiGlu, shape, hopper), Implementation::Hopper(_))
}

/// Which kernel of this program computes a gemm with further operands, and in which tile, if one does; `hopper` says whether
/// Hopper's can take those operands.
pub(super) fn own_kernel(
    device: &CudaDevice,
    kind: GemmKind,
    addresses: &[usize],
    shape: LinearShape,
    hopper: bool,
) -> Option<(KernelPath, i32)> {
    match choose(device, kind, shape, hopper && mappable(addresses, shape)) {
        Implementation::Vendor => None,
        Implementation::Portable => Some((KernelPath::Portable, MMPO_PLANNED_TILE)),
        Implementation::Hopper(tile) => Some((KernelPath::Hopper, tile_number(tile))),
    }
}

/// Whether tensor maps of a gemm's matrices exist: they need 16-byte strides and addresses.
fn mappable(addresses: &[usize], shape: LinearShape) -> bool {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    aligned && shape.inputs.is_multiple_of(8) && shape.outputs.is_multiple_of(8)
}

/// Sets aside the scratch memory that gemms of this kind take for any of `shapes`. The largest shape need not take the
/// most: with more rows a gemm is split into fewer parts.
pub(super) fn reserve(device: &CudaDevice, kind: GemmKind, shapes: &[LinearShape]) -> Result<()> {
    let mut taken = Vec::with_capacity(shapes.len());
    for &shape in shapes {
        if let Implementation::Hopper(tile) = choose(device, kind, shape, mappable(&[], shape)) {
            taken.push((launch_sizes("scratch memory", [shape.rows, shape.inputs, shape.outputs])?, tile));
        }
    }
    let bytes = device.workspace_bytes("scratch memory", &kind, |kernels| {
        let bytes =
            taken.iter().map(|&(sizes, tile)| kind.workspace(kernels, KernelPath::Hopper, sizes, tile));
        bytes.max().unwrap_or(0)
    })?;
    device.workspace.reserve(&device.memory, bytes)
}

impl GemmKind {
    /// Bytes of scratch memory.
    fn workspace(
        self,
        kernels: &KernelTable,
        path: KernelPath,
        [rows, inputs, outputs]: [i32; 3],
        tile: Tile,
    ) -> i64 {
        match (path, self) {
            // SAFETY: a pure function of numbers.
            (KernelPath::Hopper, GemmKind::BackwardInputF32) => unsafe {
                (kernels.linear_backward_input_f32_sm90_workspace)(rows, inputs, outputs, tile_number(tile))
            },
            // SAFETY: as above.
            (KernelPath::Hopper, GemmKind::BackwardWeight) => unsafe {
                (kernels.linear_backward_weight_sm90_workspace)(rows, inputs, outputs, tile_number(tile))
            },
            _ => 0,
        }
    }
}

fn no_vendor() -> Error {
    Error::device(
        "cuBLASLt's products were asked for, and it is not loaded",
        "install CUDA's cuBLAS, for instance PyPI's nvidia-cublas, and add its folder to LD_LIBRARY_PATH",
    )
}

impl LinearGemm {
    fn kind(&self) -> GemmKind {
        match self {
            LinearGemm::Forward { .. } => GemmKind::Forward,
            LinearGemm::BackwardInput { .. } => GemmKind::BackwardInput,
            LinearGemm::BackwardInputF32 { .. } => GemmKind::BackwardInputF32,
            LinearGemm::BackwardWeight { .. } => GemmKind::BackwardWeight,
        }
    }

    /// The gemm's name in errors.
    fn name(&self) -> &'static str {
        match self {
            LinearGemm::Forward { .. } => "linear_forward",
            LinearGemm::BackwardInput { .. } => "linear_backward_input",
            LinearGemm::BackwardInputF32 { .. } => "linear_backward_input_f32",
            LinearGemm::BackwardWeight { .. } => "linear_backward_weight",
        }
    }

    /// The launcher's name in `kernels/api.h`.
    fn launcher(&self, path: KernelPath) -> &'static str {
        let hopper = match self {
            LinearGemm::Forward { .. } => "linear_forward_sm90",
            LinearGemm::BackwardInput { .. } => "linear_backward_input_sm90",
            LinearGemm::BackwardInputF32 { .. } => "linear_backward_input_f32_sm90",
            LinearGemm::BackwardWeight { .. } => "linear_backward_weight_sm90",
        };
        path.either(self.name(), hopper)
    }

    /// Whether `kernels/linear_sm90.cu` can compute it.
    fn has_hopper_kernel(&self, shape: LinearShape) -> bool {
        let addresses = match *self {
            LinearGemm::Forward { out, x, weight, .. } => [out.addr(), x.addr(), weight.addr()],
            LinearGemm::BackwardInput { dx, dout, weight } => [dx.addr(), dout.addr(), weight.addr()],
            LinearGemm::BackwardInputF32 { dx, dout, weight } => [dx.addr(), dout.addr(), weight.addr()],
            LinearGemm::BackwardWeight { dweight, dout, x } => [dweight.addr(), dout.addr(), x.addr()],
        };
        mappable(&addresses, shape)
    }

    fn for_vendor(&self, shape: LinearShape) -> Gemm {
        let LinearShape { rows, inputs, outputs } = shape;
        let as_it_is = |values| Operand { values, transposed: false };
        let transposed = |values| Operand { values, transposed: true };
        let gemm = |out, left, right, [rows, columns, depth]: [usize; 3]| Gemm {
            out,
            accumulate: false,
            left,
            right,
            bias: None,
            rows,
            columns,
            depth,
        };
        match *self {
            LinearGemm::Forward { out, x, weight, bias } => {
                let sizes = [rows, outputs, inputs];
                let forward = gemm(GemmOut::Bf16(out), as_it_is(x), transposed(weight), sizes);
                Gemm { bias, ..forward }
            }
            LinearGemm::BackwardInput { dx, dout, weight } => {
                gemm(GemmOut::Bf16(dx), as_it_is(dout), as_it_is(weight), [rows, inputs, outputs])
            }
            LinearGemm::BackwardInputF32 { dx, dout, weight } => {
                let sizes = [rows, inputs, outputs];
                let gradient = gemm(GemmOut::F32(dx), as_it_is(dout), as_it_is(weight), sizes);
                Gemm { accumulate: true, ..gradient }
            }
            LinearGemm::BackwardWeight { dweight, dout, x } => {
                let sizes = [outputs, inputs, rows];
                let gradient = gemm(GemmOut::F32(dweight), transposed(dout), as_it_is(x), sizes);
                Gemm { accumulate: true, ..gradient }
            }
        }
    }

    /// # Safety
    /// As [`multiply`]; `workspace` holds [`GemmKind::workspace`] bytes, and Hopper's kernels take the gemm
    /// ([`LinearGemm::has_hopper_kernel`]) where `path` says so.
    unsafe fn launch(
        &self,
        kernels: &KernelTable,
        path: KernelPath,
        [rows, inputs, outputs]: [i32; 3],
        tile: Tile,
        workspace: *mut c_void,
        stream: mmpo_stream,
    ) -> mmpo_status {
        let tile = tile_number(tile);
        // SAFETY: the caller's promise.
        unsafe {
            match (*self, path) {
                (LinearGemm::Forward { out, x, weight, bias }, path) => {
                    let bias = bias.unwrap_or(std::ptr::null());
                    match path {
                        KernelPath::Portable => {
                            (kernels.linear_forward)(out, x, weight, bias, rows, inputs, outputs, stream)
                        }
                        KernelPath::Hopper => (kernels.linear_forward_sm90)(
                            out, x, weight, bias, rows, inputs, outputs, tile, stream,
                        ),
                    }
                }
                (LinearGemm::BackwardInput { dx, dout, weight }, KernelPath::Portable) => {
                    (kernels.linear_backward_input)(dx, dout, weight, rows, inputs, outputs, stream)
                }
                (LinearGemm::BackwardInput { dx, dout, weight }, KernelPath::Hopper) => (kernels
                    .linear_backward_input_sm90)(
                    dx, dout, weight, rows, inputs, outputs, tile, stream,
                ),
                (LinearGemm::BackwardInputF32 { dx, dout, weight }, KernelPath::Portable) => {
                    (kernels.linear_backward_input_f32)(dx, dout, weight, rows, inputs, outputs, stream)
                }
                (LinearGemm::BackwardInputF32 { dx, dout, weight }, KernelPath::Hopper) => (kernels
                    .linear_backward_input_f32_sm90)(
                    dx, workspace, dout, weight, rows, inputs, outputs, tile, stream,
                ),
                (LinearGemm::BackwardWeight { dweight, dout, x }, KernelPath::Portable) => {
                    (kernels.linear_backward_weight)(dweight, dout, x, rows, inputs, outputs, stream)
                }
                (LinearGemm::BackwardWeight { dweight, dout, x }, KernelPath::Hopper) => (kernels
                    .linear_backward_weight_sm90)(
                    dweight, workspace, dout, x, rows, inputs, outputs, tile, stream,
                ),
            }
        }
    }
}

#[cfg(all(test, mmpo_emulated))]
mod tests {
    use super::super::bindings::{MMPO_PLANNED_TILE, emulated::KERNELS, mmpo_gemm_plan};
    use super::GemmKind;

    const MULTIPROCESSORS: usize = 132;

    /// How Hopper's kernel divides a layer's gemm, and the share of the multiprocessors, over all of its waves, that
    /// have a tile to compute.
    fn plan(kind: GemmKind, rows: usize, (inputs, outputs): (usize, usize)) -> (mmpo_gemm_plan, f64) {
        let sizes = match kind {
            GemmKind::BackwardInput => [rows, inputs, outputs],
            GemmKind::BackwardWeight => [outputs, inputs, rows],
            _ => [rows, outputs, inputs],
        };
        let [m, n, k] = sizes.map(|size| i32::try_from(size).unwrap());
        let may_split = i32::from(kind == GemmKind::BackwardWeight);
        // SAFETY: a pure function of numbers.
        let plan = unsafe { (KERNELS.gemm_plan_sm90)(m, n, k, may_split, MMPO_PLANNED_TILE) };
        let tiles = sizes[0].div_ceil((plan.block_m * plan.cluster) as usize)
            * plan.cluster as usize
            * sizes[1].div_ceil(plan.block_n as usize)
            * plan.splits as usize;
        let waves = tiles.div_ceil(MULTIPROCESSORS);
        (plan, tiles as f64 / (waves * MULTIPROCESSORS) as f64)
    }

    /// Inputs and outputs of QKV, O, gate/up, down.
    const SMOLLM2_135M: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
    const LLAMA_3_2_1B: [(usize, usize); 4] = [(2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)];
    const LLAMA_3_8B: [(usize, usize); 4] = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)];
    const KINDS: [GemmKind; 3] = [GemmKind::Forward, GemmKind::BackwardInput, GemmKind::BackwardWeight];

    #[test]
    fn wide_models_fill_the_gpu_with_wide_tiles() {
        for layer in LLAMA_3_2_1B.into_iter().chain(LLAMA_3_8B) {
            for kind in KINDS {
                let (plan, busy) = plan(kind, 8192, layer);
                assert!(plan.block_m * plan.block_n >= 128 * 192, "{kind:?} {layer:?}: {plan:?}");
                assert_eq!(plan.splits, 1, "{kind:?} {layer:?}: {plan:?}");
                assert_eq!(
                    plan.cluster, 2,
                    "{kind:?} {layer:?}: two blocks halve what L2 must deliver, {plan:?}"
                );
                assert!(busy >= 0.93, "{kind:?} {layer:?}: {busy} of the waves are tiles, {plan:?}");
            }
        }
    }

    #[test]
    fn narrow_models_fill_the_gpu() {
        for rows in [8192, 4096, 2048] {
            for layer in SMOLLM2_135M {
                for kind in KINDS {
                    let (plan, busy) = plan(kind, rows, layer);
                    // 2048 x 576 has 80 tiles of 128 x 128; smaller ones would wait for L2. Splitting weight
                    // gradients further would cost more than it gains.
                    let least = match (rows, kind) {
                        (8192, GemmKind::BackwardWeight) => 0.7,
                        (8192, _) => 0.9,
                        _ => 0.55,
                    };
                    assert!(
                        busy >= least,
                        "{kind:?} {rows} {layer:?}: {busy} of the waves are tiles, {plan:?}"
                    );
                }
            }
        }
        let (widest, _) = plan(GemmKind::Forward, 8192, (576, 576));
        assert_eq!((widest.block_m, widest.block_n), (192, 192), "one wave of 129 tiles: {widest:?}");
    }

    #[test]
    fn only_weight_gradients_of_few_tiles_are_split() {
        let (small, _) = plan(GemmKind::BackwardWeight, 8192, (576, 576));
        assert!(small.splits > 1, "{small:?}");
        let (short, _) = plan(GemmKind::BackwardWeight, 512, (576, 576));
        assert_eq!(short.splits, 1, "{short:?}");
        for kind in [GemmKind::Forward, GemmKind::BackwardInput] {
            assert_eq!(plan(kind, 1, (14336, 64)).0.splits, 1, "{kind:?}");
        }
    }
}
