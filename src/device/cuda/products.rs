//! The three products of a linear layer, and which of their implementations runs: cuBLASLt, `kernels/linear_sm90.cu` on
//! Hopper, or `kernels/linear.cu` anywhere. The choice is a function of path, shape and alignment, so a product always
//! gives the same bits on one kind of GPU.

use std::ffi::c_void;

use half::bf16;

use super::backend::{Operand, Product, ProductOut};
use super::bindings::{KernelTable, MMPO_PLANNED_TILE, mmpo_status, mmpo_stream};
use super::product_table::{MEASURED, faster_tile};
use super::{CudaDevice, KernelPath, launch_sizes};
use crate::device::LinearShape;
use crate::error::{Error, Result};

/// Whose matrix products a device uses where there is a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// By shape, from a table of measurements; cuBLASLt for shapes that it lacks, ours where cuBLASLt is not installed.
    #[default]
    Fastest,
    /// This program's kernels: to test or to time them.
    Ours,
    /// As `Ours`, in Hopper's tile shape of this number (`0..`[`CudaDevice::product_tiles`]) where there is a choice.
    Tile(u8),
    /// cuBLASLt, and an error where it is not installed: to time it.
    Vendor,
}

/// A tile shape of Hopper's products: `block_m` x `block_n` of the output, by clusters of so many blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductTile {
    /// Rows of a tile.
    pub block_m: i32,
    /// Columns of a tile.
    pub block_n: i32,
    /// Blocks that share the right operand's slices.
    pub cluster: i32,
}

impl std::fmt::Display for ProductTile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.block_m, self.block_n)?;
        if self.cluster > 1 { write!(f, " by {}", self.cluster) } else { Ok(()) }
    }
}

impl CudaDevice {
    /// The tile shapes that [`Products::Tile`] names by their number.
    ///
    /// # Errors
    /// Those of the device.
    pub fn product_tiles(&self) -> Result<Vec<ProductTile>> {
        let mut tiles = Vec::new();
        self.backend().launch("product_tiles_sm90", &(), &mut |kernels, _| {
            // SAFETY: pure functions of numbers.
            let (count, plan) = unsafe { ((kernels.product_tiles_sm90)(), kernels.product_plan_sm90) };
            tiles.extend((0..count).map(|tile| {
                // SAFETY: as above.
                let plan = unsafe { plan(1, 1, 1, 0, tile) };
                ProductTile { block_m: plan.block_m, block_n: plan.block_n, cluster: plan.cluster }
            }));
            0
        })?;
        Ok(tiles)
    }
}

/// Which product of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProductKind {
    Forward,
    /// Gate and up, then SwiGLU of both in the same kernel; the library's product and a kernel for the rest otherwise.
    ForwardSwiGlu,
    BackwardInput,
    BackwardInputF32,
    BackwardWeight,
}

/// A product of a linear layer on addresses in device memory; the sizes come as a [`LinearShape`].
#[derive(Clone, Copy, Debug)]
pub(super) enum LinearProduct {
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

/// A tile shape of `kernels/common/product_plan.cuh` by its number, or none: the one that it plans.
type Tile = Option<u8>;

fn tile_number(tile: Tile) -> i32 {
    tile.map_or(MMPO_PLANNED_TILE, i32::from)
}

/// Queues one product.
///
/// # Safety
/// From each address on, the memory covers `shape`; the output overlaps none of the others.
pub(super) unsafe fn multiply(device: &CudaDevice, product: LinearProduct, shape: LinearShape) -> Result<()> {
    let (path, tile) = match choose(device, product.kind(), shape, product.has_hopper_kernel(shape)) {
        Implementation::Vendor => {
            let Some(vendor) = device.backend().products() else { return Err(no_vendor()) };
            // SAFETY: the caller's promise.
            return device.traced(product.name(), || unsafe { vendor.multiply(&product.for_vendor(shape)) });
        }
        Implementation::Portable => (KernelPath::Portable, None),
        Implementation::Hopper(tile) => (KernelPath::Hopper, tile),
    };
    let sizes = launch_sizes(product.name(), [shape.rows, shape.inputs, shape.outputs])?;
    // SAFETY: the caller's promise, and the workspace is as large as the launcher's own rule says.
    device.launch_with_workspace(
        product.launcher(path),
        &shape,
        |kernels| product.kind().workspace(kernels, path, sizes, tile),
        |kernels, workspace, stream| unsafe { product.launch(kernels, path, sizes, tile, workspace, stream) },
    )
}

/// `hopper`: whether Hopper's kernels take the product.
fn choose(device: &CudaDevice, kind: ProductKind, shape: LinearShape, hopper: bool) -> Implementation {
    let hopper = hopper && device.path() == KernelPath::Hopper;
    let ours = |tile| if hopper { Implementation::Hopper(tile) } else { Implementation::Portable };
    match device.products() {
        Products::Vendor => Implementation::Vendor,
        Products::Ours => ours(None),
        Products::Tile(tile) => ours(Some(tile)),
        Products::Fastest if device.backend().products().is_none() => ours(None),
        Products::Fastest if hopper => {
            faster_tile(MEASURED, kind, shape).map_or(Implementation::Vendor, Implementation::Hopper)
        }
        Products::Fastest => Implementation::Vendor,
    }
}

/// Whether gate, up and SwiGLU of them are one kernel for these addresses and this shape of the product (`outputs` = 2F).
pub(super) fn fuses_swiglu(device: &CudaDevice, addresses: [usize; 4], shape: LinearShape) -> bool {
    let hopper = mappable(&addresses, shape) && shape.outputs.is_multiple_of(16);
    matches!(choose(device, ProductKind::ForwardSwiGlu, shape, hopper), Implementation::Hopper(_))
}

/// Whether tensor maps of a product's matrices exist: they need 16-byte strides and addresses.
fn mappable(addresses: &[usize], shape: LinearShape) -> bool {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(16));
    aligned && shape.inputs.is_multiple_of(8) && shape.outputs.is_multiple_of(8)
}

/// Sets the scratch memory aside that products of this kind take for any of `shapes`. The largest shape need not take the
/// most: with more rows a product is split into fewer parts.
pub(super) fn reserve(device: &CudaDevice, kind: ProductKind, shapes: &[LinearShape]) -> Result<()> {
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

impl ProductKind {
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
            (KernelPath::Hopper, ProductKind::BackwardInputF32) => unsafe {
                (kernels.linear_backward_input_f32_sm90_workspace)(rows, inputs, outputs, tile_number(tile))
            },
            // SAFETY: as above.
            (KernelPath::Hopper, ProductKind::BackwardWeight) => unsafe {
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

impl LinearProduct {
    fn kind(&self) -> ProductKind {
        match self {
            LinearProduct::Forward { .. } => ProductKind::Forward,
            LinearProduct::BackwardInput { .. } => ProductKind::BackwardInput,
            LinearProduct::BackwardInputF32 { .. } => ProductKind::BackwardInputF32,
            LinearProduct::BackwardWeight { .. } => ProductKind::BackwardWeight,
        }
    }

    /// As errors name it.
    fn name(&self) -> &'static str {
        match self {
            LinearProduct::Forward { .. } => "linear_forward",
            LinearProduct::BackwardInput { .. } => "linear_backward_input",
            LinearProduct::BackwardInputF32 { .. } => "linear_backward_input_f32",
            LinearProduct::BackwardWeight { .. } => "linear_backward_weight",
        }
    }

    /// As `kernels/api.h` names it.
    fn launcher(&self, path: KernelPath) -> &'static str {
        let hopper = match self {
            LinearProduct::Forward { .. } => "linear_forward_sm90",
            LinearProduct::BackwardInput { .. } => "linear_backward_input_sm90",
            LinearProduct::BackwardInputF32 { .. } => "linear_backward_input_f32_sm90",
            LinearProduct::BackwardWeight { .. } => "linear_backward_weight_sm90",
        };
        path.either(self.name(), hopper)
    }

    /// Whether `kernels/linear_sm90.cu` takes it.
    fn has_hopper_kernel(&self, shape: LinearShape) -> bool {
        let addresses = match *self {
            LinearProduct::Forward { out, x, weight, .. } => [out.addr(), x.addr(), weight.addr()],
            LinearProduct::BackwardInput { dx, dout, weight } => [dx.addr(), dout.addr(), weight.addr()],
            LinearProduct::BackwardInputF32 { dx, dout, weight } => [dx.addr(), dout.addr(), weight.addr()],
            LinearProduct::BackwardWeight { dweight, dout, x } => [dweight.addr(), dout.addr(), x.addr()],
        };
        mappable(&addresses, shape)
    }

    fn for_vendor(&self, shape: LinearShape) -> Product {
        let LinearShape { rows, inputs, outputs } = shape;
        let as_it_is = |values| Operand { values, transposed: false };
        let transposed = |values| Operand { values, transposed: true };
        let product = |out, left, right, [rows, columns, depth]: [usize; 3]| Product {
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
            LinearProduct::Forward { out, x, weight, bias } => {
                let sizes = [rows, outputs, inputs];
                let forward = product(ProductOut::Bf16(out), as_it_is(x), transposed(weight), sizes);
                Product { bias, ..forward }
            }
            LinearProduct::BackwardInput { dx, dout, weight } => {
                product(ProductOut::Bf16(dx), as_it_is(dout), as_it_is(weight), [rows, inputs, outputs])
            }
            LinearProduct::BackwardInputF32 { dx, dout, weight } => {
                let sizes = [rows, inputs, outputs];
                let gradient = product(ProductOut::F32(dx), as_it_is(dout), as_it_is(weight), sizes);
                Product { accumulate: true, ..gradient }
            }
            LinearProduct::BackwardWeight { dweight, dout, x } => {
                let sizes = [outputs, inputs, rows];
                let gradient = product(ProductOut::F32(dweight), transposed(dout), as_it_is(x), sizes);
                Product { accumulate: true, ..gradient }
            }
        }
    }

    /// # Safety
    /// As [`multiply`]; `workspace` holds [`ProductKind::workspace`] bytes, and Hopper's kernels take the product
    /// ([`LinearProduct::has_hopper_kernel`]) where `path` says so.
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
                (LinearProduct::Forward { out, x, weight, bias }, path) => {
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
                (LinearProduct::BackwardInput { dx, dout, weight }, KernelPath::Portable) => {
                    (kernels.linear_backward_input)(dx, dout, weight, rows, inputs, outputs, stream)
                }
                (LinearProduct::BackwardInput { dx, dout, weight }, KernelPath::Hopper) => (kernels
                    .linear_backward_input_sm90)(
                    dx, dout, weight, rows, inputs, outputs, tile, stream,
                ),
                (LinearProduct::BackwardInputF32 { dx, dout, weight }, KernelPath::Portable) => {
                    (kernels.linear_backward_input_f32)(dx, dout, weight, rows, inputs, outputs, stream)
                }
                (LinearProduct::BackwardInputF32 { dx, dout, weight }, KernelPath::Hopper) => (kernels
                    .linear_backward_input_f32_sm90)(
                    dx, workspace, dout, weight, rows, inputs, outputs, tile, stream,
                ),
                (LinearProduct::BackwardWeight { dweight, dout, x }, KernelPath::Portable) => {
                    (kernels.linear_backward_weight)(dweight, dout, x, rows, inputs, outputs, stream)
                }
                (LinearProduct::BackwardWeight { dweight, dout, x }, KernelPath::Hopper) => (kernels
                    .linear_backward_weight_sm90)(
                    dweight, workspace, dout, x, rows, inputs, outputs, tile, stream,
                ),
            }
        }
    }
}

#[cfg(all(test, mmpo_emulated))]
mod tests {
    use super::super::bindings::{MMPO_PLANNED_TILE, emulated::KERNELS, mmpo_product_plan};
    use super::ProductKind;

    const MULTIPROCESSORS: usize = 132;

    /// What Hopper's kernel does with a layer, and the share of the multiprocessors' time in its waves that has a tile.
    fn plan(kind: ProductKind, rows: usize, (inputs, outputs): (usize, usize)) -> (mmpo_product_plan, f64) {
        let sizes = match kind {
            ProductKind::BackwardInput => [rows, inputs, outputs],
            ProductKind::BackwardWeight => [outputs, inputs, rows],
            _ => [rows, outputs, inputs],
        };
        let [m, n, k] = sizes.map(|size| i32::try_from(size).unwrap());
        let may_split = i32::from(kind == ProductKind::BackwardWeight);
        // SAFETY: a pure function of numbers.
        let plan = unsafe { (KERNELS.product_plan_sm90)(m, n, k, may_split, MMPO_PLANNED_TILE) };
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
    const KINDS: [ProductKind; 3] =
        [ProductKind::Forward, ProductKind::BackwardInput, ProductKind::BackwardWeight];

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
                        (8192, ProductKind::BackwardWeight) => 0.7,
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
        let (widest, _) = plan(ProductKind::Forward, 8192, (576, 576));
        assert_eq!((widest.block_m, widest.block_n), (192, 192), "one wave of 129 tiles: {widest:?}");
    }

    #[test]
    fn only_weight_gradients_of_few_tiles_are_split() {
        let (small, _) = plan(ProductKind::BackwardWeight, 8192, (576, 576));
        assert!(small.splits > 1, "{small:?}");
        let (short, _) = plan(ProductKind::BackwardWeight, 512, (576, 576));
        assert_eq!(short.splits, 1, "{short:?}");
        for kind in [ProductKind::Forward, ProductKind::BackwardInput] {
            assert_eq!(plan(kind, 1, (14336, 64)).0.splits, 1, "{kind:?}");
        }
    }
}
