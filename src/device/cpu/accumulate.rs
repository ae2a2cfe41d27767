//! `out += source`, whose sums may be narrower than what is added to them.

use rayon::prelude::*;

use super::storage::Storage;
use super::{BLOCK_ELEMENTS, CpuBuffer, CpuDevice};
use crate::device::{Accumulate, Checked, Sum};
use crate::error::Result;

impl<C: Storage> Accumulate for CpuDevice<C> {
    fn run_accumulate<T: Sum>(
        &self,
        out: &mut CpuBuffer<T>,
        out_offset: usize,
        source: &CpuBuffer<f32>,
        offset: usize,
        len: usize,
        _: Checked,
    ) -> Result<()> {
        self.traced("accumulate", || {
            let sums = out[out_offset..][..len].par_chunks_mut(BLOCK_ELEMENTS);
            let blocks = sums.zip(source[offset..][..len].par_chunks(BLOCK_ELEMENTS));
            self.parallel(|| {
                blocks.for_each(|(sums, terms)| {
                    self.vectorized(
                        #[inline(always)]
                        || {
                            for (sum, term) in sums.iter_mut().zip(terms) {
                                *sum = T::round(sum.widen() + term);
                            }
                        },
                    )
                });
            });
            Ok(())
        })
    }
}
