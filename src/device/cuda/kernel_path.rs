//! The two sets of kernels that some operations have.

#[cfg(mmpo_gpu_kernels)]
use super::Gpu;

/// Which kernels run where an operation has two sets of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelPath {
    /// `kernels/<stem>.cu`: mma.sync and cp.async, on every GPU from compute capability 8.0 on.
    Portable,
    /// `kernels/<stem>_sm90.cu`: wgmma and TMA, on compute capability 9.0 alone.
    Hopper,
}

impl KernelPath {
    /// The faster path that the GPU can run.
    #[cfg(mmpo_gpu_kernels)]
    pub(super) fn of(gpu: &Gpu) -> Self {
        if gpu.capability == (9, 0) { KernelPath::Hopper } else { KernelPath::Portable }
    }

    /// Selects this path's value of the two: a launcher, or its name.
    pub(super) fn either<T>(self, portable: T, hopper: T) -> T {
        match self {
            KernelPath::Portable => portable,
            KernelPath::Hopper => hopper,
        }
    }
}
