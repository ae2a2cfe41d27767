//! Macros that make tests of a body: one `#[test]` for each device and set of kernels that it must pass on.

use mmpo_fast::device::cuda::{CudaDevice, GemmChoice};

/// Defines tests whose body is generic over the device: on the CPU, on the emulated GPU in both of its variants, and on
/// a real one. `bounds` is the tolerance of what the device stores as weights or activations; f32 results are held to
/// [`Tolerance::F32`] everywhere. Each becomes a module with one `#[test]` per device, so that a failure names the
/// device: `rms_norm::forward::cpu`.
macro_rules! device_tests {
    ($($item:tt)+) => { $crate::harness::define_tests! { no_more_tests $($item)+ } };
}
pub(crate) use device_tests;

/// As [`device_tests`], for operations that have kernels of their own for Hopper: both sets run on the emulated GPU, and on
/// a real one that has Hopper's instructions.
macro_rules! path_tests {
    ($($item:tt)+) => { $crate::harness::define_tests! { hopper_tests $($item)+ } };
}
pub(crate) use path_tests;

/// As [`path_tests`], for operations that a GPU may also do in any order, to the same tolerance.
macro_rules! order_tests {
    ($($item:tt)+) => { $crate::harness::define_tests! { any_order_tests $($item)+ } };
}
pub(crate) use order_tests;

macro_rules! no_more_tests {
    () => {};
}
pub(crate) use no_more_tests;

macro_rules! hopper_tests {
    () => {
        #[cfg(mmpo_emulated)]
        #[test]
        fn emulated_hopper() {
            let device = $crate::harness::emulated().with_path(KernelPath::Hopper);
            body(&device, $crate::harness::Tolerance::BF16);
        }

        #[cfg(mmpo_emulated)]
        #[test]
        fn checked_hopper() {
            let device = $crate::harness::checked().with_path(KernelPath::Hopper);
            body(&device, $crate::harness::Tolerance::BF16);
        }

        /// The kernels that any GPU runs, also where the device would choose others or the vendor's gemms.
        #[test]
        fn gpu_portable() {
            if let Some(device) = $crate::harness::gpu() {
                let device = device.with_path(KernelPath::Portable).with_gemm_choice(GemmChoice::Ours);
                body(&device, $crate::harness::Tolerance::BF16);
            }
        }

        /// The GPU's own path without the vendor's gemms, which [`gpu`] takes for shapes that were never measured.
        #[test]
        fn gpu_our_products() {
            if let Some(device) = $crate::harness::gpu() {
                body(&device.with_gemm_choice(GemmChoice::Ours), $crate::harness::Tolerance::BF16);
            }
        }
    };
}
pub(crate) use hopper_tests;

macro_rules! any_order_tests {
    () => {
        $crate::harness::hopper_tests! {}

        #[cfg(mmpo_emulated)]
        #[test]
        fn emulated_any_order() {
            for path in [KernelPath::Portable, KernelPath::Hopper] {
                let device = $crate::harness::emulated().with_path(path);
                body(&device.with_attention_order(AttentionOrder::Any), $crate::harness::Tolerance::BF16);
            }
        }

        #[cfg(mmpo_emulated)]
        #[test]
        fn checked_any_order() {
            for path in [KernelPath::Portable, KernelPath::Hopper] {
                let device = $crate::harness::checked().with_path(path);
                body(&device.with_attention_order(AttentionOrder::Any), $crate::harness::Tolerance::BF16);
            }
        }

        #[test]
        fn gpu_any_order() {
            let Some(device) = $crate::harness::gpu() else { return };
            let device = device.with_attention_order(AttentionOrder::Any);
            body(&device, $crate::harness::Tolerance::BF16);
            body(&device.with_path(KernelPath::Portable), $crate::harness::Tolerance::BF16);
        }
    };
}
pub(crate) use any_order_tests;

macro_rules! define_tests {
    ($more:ident $($(#[doc = $doc:literal])+ fn $name:ident($device:ident, $bounds:ident) $body:block)+) => {$(
        $(#[doc = $doc])+
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            fn body<D: mmpo_fast::device::Device>($device: &D, $bounds: $crate::harness::Tolerance) {
                let _ = $bounds;
                $body
            }

            #[test]
            fn cpu() {
                body(&$crate::harness::cpu(1), $crate::harness::Tolerance::F32);
            }

            #[test]
            fn cpu_threads() {
                body(&$crate::harness::cpu(3), $crate::harness::Tolerance::F32);
            }

            /// bf16 in the processor's own instructions, where it has them.
            #[test]
            fn cpu_bf16() {
                body(&$crate::harness::cpu_bf16(2), $crate::harness::Tolerance::BF16);
            }

            /// bf16 as on a processor without such instructions.
            #[test]
            fn cpu_bf16_widened() {
                let device = $crate::harness::cpu_bf16(2).without_bf16_instructions();
                body(&device, $crate::harness::Tolerance::BF16);
            }

            #[cfg(mmpo_emulated)]
            #[test]
            fn emulated() {
                body(&$crate::harness::emulated(), $crate::harness::Tolerance::BF16);
            }

            /// Every load and store of the kernels watched: bounds, uninitialised memory, races.
            #[cfg(mmpo_emulated)]
            #[test]
            fn checked() {
                body(&$crate::harness::checked(), $crate::harness::Tolerance::BF16);
            }

            /// On a real GPU, where there is one.
            #[test]
            fn gpu() {
                if let Some(device) = $crate::harness::gpu() {
                    body(&device, $crate::harness::Tolerance::BF16);
                }
            }

            $crate::harness::$more! {}
        }
    )+};
}
pub(crate) use define_tests;

/// As [`device_tests`], for what only the CPU promises: it looks at the numbers in index buffers, where a GPU trusts what
/// `BatchBuffers::load` has checked.
macro_rules! cpu_tests {
    ($($(#[doc = $doc:literal])+ fn $name:ident($device:ident) $body:block)+) => {$(
        $(#[doc = $doc])+
        #[test]
        fn $name() {
            let $device = &$crate::harness::cpu(2);
            $body
        }
    )+};
}
pub(crate) use cpu_tests;

/// Makes a module of tests whose body must pass with each of these tile shapes of Hopper's gemm kernels: `(rows, columns,
/// blocks of a cluster)`. A plan would take most of them for large gemms alone.
macro_rules! tile_tests {
    ($(#[doc = $doc:literal])+ fn $name:ident($device:ident, tiles: $tiles:expr) $body:block) => {
        $(#[doc = $doc])+
        mod $name {
            use super::*;

            fn body(device: mmpo_fast::device::cuda::CudaDevice) {
                $crate::harness::with_each_tile(device, &$tiles, |$device| $body);
            }

            #[cfg(mmpo_emulated)]
            #[test]
            fn emulated_hopper() {
                body($crate::harness::emulated().with_path(KernelPath::Hopper));
            }

            #[cfg(mmpo_emulated)]
            #[test]
            fn checked_hopper() {
                body($crate::harness::checked().with_path(KernelPath::Hopper));
            }

            #[test]
            fn gpu() {
                let device = $crate::harness::gpu();
                if let Some(device) = device.filter(|device| device.path() == KernelPath::Hopper) {
                    body(device);
                }
            }
        }
    };
}
pub(crate) use tile_tests;

/// Calls `check` with the device set to each of these tile shapes, see [`tile_tests`]. All of them must exist.
pub fn with_each_tile(mut device: CudaDevice, wanted: &[(i32, i32, i32)], check: impl Fn(&CudaDevice)) {
    let tiles = device.gemm_tiles().unwrap();
    for &shape in wanted {
        let number = tiles.iter().position(|tile| (tile.block_m, tile.block_n, tile.cluster) == shape);
        let number = number.unwrap_or_else(|| panic!("no tile shape {shape:?} among {tiles:?}"));
        device = device.with_gemm_choice(GemmChoice::Tile(number.try_into().unwrap()));
        check(&device);
    }
}
