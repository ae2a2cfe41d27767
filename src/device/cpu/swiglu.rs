//! SwiGLU (Shazeer 2020): `silu(gate) * up` with `silu(g) = g sigmoid(g)`.
//!
//! Backward: `dup = dout silu(g)`, `dgate = dout up sigmoid(g) (1 + g (1 - sigmoid(g)))`.

use rayon::prelude::*;

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice, simd};
use crate::device::{Checked, Mlp};
use crate::error::Result;

impl<C: Storage> Mlp for CpuDevice<C> {
    fn run_swiglu_forward(
        &self,
        out: &mut CpuBuffer<C>,
        gate_up: &CpuBuffer<C>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("swiglu_forward", || {
            let size = rows * width;
            if size == 0 {
                return Ok(());
            }
            let block = self.block_rows(width) * width;
            self.parallel(|| {
                out[..size].par_chunks_mut(block).zip(gate_up[..2 * size].par_chunks(2 * block)).for_each(
                    |(out, gate_up)| {
                        self.vectorized(
                            #[inline(always)]
                            || {
                                for (out, row) in
                                    out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width))
                                {
                                    let (gate, up) = row.split_at(width);
                                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                                        let gate = gate.widen();
                                        *out = C::round(gate * simd::sigmoid(gate) * up.widen());
                                    }
                                }
                            },
                        )
                    },
                );
            });
            Ok(())
        })
    }

    fn run_swiglu_backward(
        &self,
        dgate_up: &mut CpuBuffer<C>,
        dout: &CpuBuffer<C>,
        gate_up: &CpuBuffer<C>,
        [rows, width]: [usize; 2],
        _: Checked,
    ) -> Result<()> {
        self.traced("swiglu_backward", || {
            let size = rows * width;
            if size == 0 {
                return Ok(());
            }
            let block = self.block_rows(width) * width;
            self.parallel(|| {
                dgate_up[..2 * size]
                    .par_chunks_mut(2 * block)
                    .zip(dout[..size].par_chunks(block).zip(gate_up[..2 * size].par_chunks(2 * block)))
                    .for_each(|(dgate_up, (dout, gate_up))| {
                        self.vectorized(
                            #[inline(always)]
                            || {
                                let rows = dgate_up.chunks_exact_mut(2 * width).zip(dout.chunks_exact(width));
                                for ((drow, dout), row) in rows.zip(gate_up.chunks_exact(2 * width)) {
                                    backward_row(drow, dout, row);
                                }
                            },
                        )
                    });
            });
            Ok(())
        })
    }
}

#[inline(always)]
fn backward_row<C: Storage>(dgate_up: &mut [C], dout: &[C], gate_up: &[C]) {
    let width = dout.len();
    let (dgate, dup) = dgate_up.split_at_mut(width);
    let (gate, up) = gate_up.split_at(width);
    let (dup, gate, up) = (&mut dup[..width], &gate[..width], &up[..width]);
    for i in 0..width {
        let (dout, gate, up) = (dout[i].widen(), gate[i].widen(), up[i].widen());
        let sigmoid = simd::sigmoid(gate);
        dup[i] = C::round(dout * gate * sigmoid);
        dgate[i] = C::round(dout * up * sigmoid * gate.mul_add(1.0 - sigmoid, 1.0));
    }
}
