//! Sums in f32 or bf16: `kernels/accumulate.cu`.

use super::bindings::{MMPO_STORAGE_BF16, MMPO_STORAGE_F32};
use super::{CudaBuffer, CudaDevice};
use crate::device::{Accumulate, Checked, StorageType, Sum};
use crate::error::Result;

impl Accumulate for CudaDevice {
    fn run_accumulate<T: Sum>(
        &self,
        out: &mut CudaBuffer<T>,
        out_offset: usize,
        source: &CudaBuffer<f32>,
        offset: usize,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        let storage = if T::TYPE == StorageType::F32 { MMPO_STORAGE_F32 } else { MMPO_STORAGE_BF16 };
        // SAFETY: both ranges were checked to lie inside their buffers, which are different ones, and the storage is that
        // of `out`.
        self.launch("accumulate", &len, |kernels, stream| unsafe {
            let (out, source) = (out.at_mut(out_offset).cast(), source.at(offset));
            (kernels.accumulate)(out, source, storage as i32, len as i64, stream)
        })
    }
}
