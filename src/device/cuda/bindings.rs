//! The kernels' C interface in Rust. What `kernels/api.h` and `kernels/emulator/emulator_api.h` declare is generated,
//! by `cargo run -p bindings`: types into `bindings/types.rs`, functions, each once, into `bindings/functions.rs`. The
//! macros here turn those into a table of function pointers and, for each build of the kernels that is linked, a static
//! that fills it. So the Rust above is written once, and a launcher added to a header is bound everywhere or fails to
//! link.

/// `struct $table` with a pointer for each function.
macro_rules! table {
    ($(#[$attribute:meta])* $table:ident $(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        $(#[$attribute])*
        #[allow(dead_code, reason = "the whole of the header, whoever calls it")]
        pub struct $table {
            $(pub $name: unsafe extern "C" fn($($argument: $type),*) $(-> $result)?,)*
        }

        impl $table {
            /// The table of the functions that `find` gives for their names without a prefix; the error is the first
            /// name that it does not know.
            ///
            /// # Safety
            /// Each is the function that the header declares under that name, and stays where it is.
            #[allow(dead_code, reason = "only tests bring launchers of their own")]
            pub unsafe fn of(
                find: &dyn Fn(&str) -> Option<std::ptr::NonNull<std::ffi::c_void>>,
            ) -> Result<Self, &'static str> {
                Ok($table {
                    $($name: {
                        let found = find(stringify!($name)).ok_or(stringify!($name))?;
                        // SAFETY: the caller's promise; function pointers are as large as any other.
                        unsafe {
                            std::mem::transmute::<
                                std::ptr::NonNull<std::ffi::c_void>,
                                unsafe extern "C" fn($($argument: $type),*) $(-> $result)?,
                            >(found)
                        }
                    },)*
                })
            }
        }
    };
}

/// `static $static`, the functions as the build with this prefix exports them.
#[cfg_attr(not(any(mmpo_gpu_kernels, mmpo_emulated)), allow(unused_macros, reason = "no build is linked"))]
macro_rules! build {
    ($prefix:literal $static:ident: $table:ident $(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        unsafe extern "C" {
            $(
                #[link_name = concat!($prefix, stringify!($name))]
                fn $name($($argument: $type),*) $(-> $result)?;
            )*
        }
        pub static $static: $table = $table { $($name),* };
    };
}

/// The tables and the builds; `bindings/functions.rs` is one call of it.
macro_rules! functions {
    (kernels { $($kernels:tt)* } emulator { $($emulator:tt)* }) => {
        table! {
            /// The launchers of `kernels/api.h`, as one build exports them.
            KernelTable $($kernels)*
        }
        table! {
            /// The host side of the emulated device, `kernels/emulator/emulator_api.h`.
            EmulatorTable $($emulator)*
        }

        /// The kernels as nvcc built them.
        #[cfg(mmpo_gpu_kernels)]
        pub mod gpu {
            use super::*;
            build! { "mmpo_" KERNELS: KernelTable $($kernels)* }
        }

        /// The fast build of the emulated device.
        #[cfg(mmpo_emulated)]
        pub mod emulated {
            use super::*;
            build! { "mmpo_emulated_" KERNELS: KernelTable $($kernels)* }
            build! { "mmpo_emulated_" EMULATOR: EmulatorTable $($emulator)* }
        }

        /// The build of the emulated device that watches every access.
        #[cfg(mmpo_emulated)]
        pub mod checked {
            use super::*;
            build! { "mmpo_checked_" KERNELS: KernelTable $($kernels)* }
            build! { "mmpo_checked_" EMULATOR: EmulatorTable $($emulator)* }
        }
    };
}

#[rustfmt::skip]
mod functions;
#[rustfmt::skip]
#[allow(missing_docs, reason = "the headers document what they declare")]
mod types;

pub use functions::*;
pub use types::*;
