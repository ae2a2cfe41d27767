//! Gemms by cuBLASLt, loaded at run time.
//!
//! Row-major `out = left * right` is column-major `out^T = right^T * left^T`: the library's A is our right operand, its
//! B our left one. An algorithm is picked once for each shape by the library's heuristic and kept, so a shape always
//! runs the same one and gives the same bits.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::size_of;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self as blas, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaStream, result as driver};

use super::backend::{Gemm, GemmLibrary, GemmOut};
use super::probe::driver_error;
use crate::error::{Error, Result};

/// Bytes that NVIDIA recommends for Hopper; older GPUs need less.
const WORKSPACE_BYTES: usize = 32 << 20;
/// The widest alignment that the heuristic distinguishes.
const WIDEST_ALIGNMENT: usize = 256;

/// A handle of the library, its workspace, and a plan for each kind of gemm seen so far.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Kind, GemmPlan>>,
    stream: Arc<CudaStream>,
}

// SAFETY: the library's handle may be used from any thread; plans, whose descriptors are written before each gemm,
// are used under their lock alone.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// What a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    rows: usize,
    columns: usize,
    depth: usize,
    left_transposed: bool,
    right_transposed: bool,
    to_f32: bool,
    accumulate: bool,
    bias: bool,
    /// Alignment of the three matrices' addresses, in bytes.
    alignments: [usize; 3],
}

/// Descriptors and algorithm of one kind of gemm.
struct GemmPlan {
    gemm: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl CublasLt {
    /// Loads the library. The context of `stream` must be current.
    pub(super) fn open(stream: &Arc<CudaStream>) -> Result<Self> {
        // SAFETY: asking loads the library and runs its initialisers, nothing else.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::device(
                "cuBLASLt (libcublasLt.so) was not found",
                "install CUDA's cuBLAS, for instance PyPI's nvidia-cublas, and add its folder to LD_LIBRARY_PATH",
            ));
        }
        let handle = blas::create_handle().map_err(|error| failed("starting cuBLASLt", error))?;
        // SAFETY: the context is current; the workspace is freed with the handle.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) }
            .map_err(|error| driver_error("allocating cuBLASLt's workspace", error))?;
        Ok(CublasLt { handle, workspace, plans: Mutex::default(), stream: Arc::clone(stream) })
    }

    /// The library's version, as in `13.1.0`. Another version may pick other algorithms, and so give other last bits.
    pub(super) fn version(&self) -> String {
        // SAFETY: the library is loaded, or there would be no handle.
        let number = unsafe { sys::cublasLtGetVersion() };
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    }

    fn plan(&self, kind: &Kind, gemm: &Gemm) -> std::result::Result<GemmPlan, CublasError> {
        use sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA,
            CUBLASLT_MATMUL_DESC_TRANSB,
        };
        let (f32_type, bf16_type) = (sys::cudaDataType::CUDA_R_32F, sys::cudaDataType::CUDA_R_16BF);
        let out_type = if kind.to_f32 { f32_type } else { bf16_type };
        let mut plan = GemmPlan {
            gemm: blas::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32_type)?,
            right: layout(bf16_type, kind.depth, kind.columns, kind.right_transposed)?,
            left: layout(bf16_type, kind.rows, kind.depth, kind.left_transposed)?,
            out: layout(out_type, kind.rows, kind.columns, false)?,
            // SAFETY: opaque words that the heuristic below fills before anything reads them.
            algorithm: unsafe { std::mem::zeroed() },
        };
        set(plan.gemm, CUBLASLT_MATMUL_DESC_TRANSA, &operation(kind.right_transposed))?;
        set(plan.gemm, CUBLASLT_MATMUL_DESC_TRANSB, &operation(kind.left_transposed))?;
        if let Some(bias) = gemm.bias {
            set(plan.gemm, CUBLASLT_MATMUL_DESC_EPILOGUE, &CUBLASLT_EPILOGUE_BIAS)?;
            // The heuristic reads the bias pointer too; each gemm sets its own before it runs.
            set(plan.gemm, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        plan.algorithm = self.choose(&plan, kind)?;
        Ok(plan)
    }

    fn choose(
        &self,
        plan: &GemmPlan,
        kind: &Kind,
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = blas::create_matmul_pref()?;
        let [left, right, out] = kind.alignments.map(|alignment| alignment as u32);
        let alignments = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, right),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, left),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ];
        // SAFETY: each attribute is read from a live value of the type that the library documents for it; the
        // descriptors are live; the preference is not used after it is destroyed.
        unsafe {
            let bytes: *const usize = &WORKSPACE_BYTES;
            let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            blas::set_matmul_pref_attribute(preference, attribute, bytes.cast(), size_of::<usize>())?;
            for (attribute, alignment) in &alignments {
                let alignment: *const u32 = alignment;
                blas::set_matmul_pref_attribute(preference, *attribute, alignment.cast(), size_of::<u32>())?;
            }
            let chosen = blas::get_matmul_algo_heuristic(
                self.handle,
                plan.gemm,
                plan.right,
                plan.left,
                plan.out,
                plan.out,
                preference,
            );
            blas::destroy_matmul_pref(preference)?;
            chosen.map(|chosen| chosen.algo)
        }
    }

    /// # Safety
    /// As [`GemmLibrary::multiply`]; the context is current.
    unsafe fn queue(&self, plan: &GemmPlan, gemm: &Gemm) -> std::result::Result<(), CublasError> {
        if let Some(bias) = gemm.bias {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.gemm, attribute, &bias)?;
        }
        let (one, beta) = (1.0f32, if gemm.accumulate { 1.0f32 } else { 0.0 });
        let out = out_address(gemm.out);
        // SAFETY: the caller's promise about the matrices; plan and scalars are live, the workspace is this handle's,
        // and one stream orders its users.
        unsafe {
            blas::matmul(
                self.handle,
                plan.gemm,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                gemm.right.values.cast(),
                plan.right,
                gemm.left.values.cast(),
                plan.left,
                out.cast_const(),
                plan.out,
                out,
                plan.out,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }
    }
}

impl GemmLibrary for CublasLt {
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<()> {
        if gemm.rows == 0 || gemm.columns == 0 || gemm.depth == 0 {
            return Ok(());
        }
        let doing = || format!("a matrix product of {}x{}x{}", gemm.rows, gemm.columns, gemm.depth);
        self.stream.context().bind_to_thread().map_err(|error| driver_error(&doing(), error))?;
        let kind = Kind::of(gemm);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(kind) {
            std::collections::hash_map::Entry::Occupied(plan) => plan.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(self.plan(&kind, gemm).map_err(|error| failed(&doing(), error))?)
            }
        };
        // SAFETY: the caller's promise, and the context was just made current.
        unsafe { self.queue(plan, gemm) }.map_err(|error| failed(&doing(), error))
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: each descriptor, the handle and the workspace are destroyed once and not used again; the wait ends the
        // gemms that still use them.
        let destroyed = unsafe {
            let waited = driver::stream::synchronize(self.stream.cu_stream());
            for plan in plans.values() {
                for layout in [plan.left, plan.right, plan.out] {
                    if let Err(error) = blas::destroy_matrix_layout(layout) {
                        tracing::debug!("destroying a matrix layout: {error:?}");
                    }
                }
                if let Err(error) = blas::destroy_matmul_desc(plan.gemm) {
                    tracing::debug!("destroying a gemm: {error:?}");
                }
            }
            if let Err(error) = blas::destroy_handle(self.handle) {
                tracing::debug!("closing cuBLASLt: {error:?}");
            }
            waited.and_then(|()| driver::free_sync(self.workspace))
        };
        if let Err(error) = destroyed {
            tracing::debug!("freeing cuBLASLt's workspace: {error:?}");
        }
    }
}

impl Kind {
    fn of(gemm: &Gemm) -> Self {
        let Gemm { out, accumulate, left, right, bias, rows, columns, depth } = *gemm;
        let addresses = [left.values as usize, right.values as usize, out_address(out) as usize];
        Kind {
            rows,
            columns,
            depth,
            left_transposed: left.transposed,
            right_transposed: right.transposed,
            to_f32: matches!(out, GemmOut::F32(_)),
            accumulate,
            bias: bias.is_some(),
            alignments: addresses.map(|address| WIDEST_ALIGNMENT.min(1 << address.trailing_zeros().min(16))),
        }
    }
}

fn out_address(out: GemmOut) -> *mut c_void {
    match out {
        GemmOut::Bf16(values) => values.cast(),
        GemmOut::F32(values) => values.cast(),
    }
}

/// `cublasOperation_t`, which cudarc's cuBLASLt bindings leave out: 0 takes a matrix as it is, 1 transposes it.
fn operation(transposed: bool) -> i32 {
    i32::from(transposed)
}

/// The column-major layout of a row-major `[rows, columns]` matrix that lies in memory as it is, or transposed.
fn layout(
    number: sys::cudaDataType,
    rows: usize,
    columns: usize,
    transposed: bool,
) -> std::result::Result<sys::cublasLtMatrixLayout_t, CublasError> {
    let (stored_rows, stored_columns) = if transposed { (columns, rows) } else { (rows, columns) };
    blas::create_matrix_layout(number, stored_columns as u64, stored_rows as u64, stored_columns as i64)
}

fn set<T>(
    gemm: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    let value: *const T = value;
    // SAFETY: the descriptor is live, and the library copies `size_of::<T>()` bytes during the call.
    unsafe { blas::set_matmul_desc_attribute(gemm, attribute, value.cast(), size_of::<T>()) }
}

fn failed(doing: &str, error: CublasError) -> Error {
    Error::device(
        format!("{doing}: cuBLASLt says {:?}", error.0),
        "its version may not fit the driver; `nvidia-smi` shows the newest CUDA that the driver supports",
    )
}
