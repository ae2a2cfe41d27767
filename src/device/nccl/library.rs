//! Finds NCCL, and holds its functions as `nccl.h` declares them.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};

/// Names of the library: the one that packages install, then the one for developers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first version whose calls never block the thread that makes them, so that a hang can be ended: 2.14.0.
const OLDEST: c_int = 21_400;

/// What to do where there is no NCCL.
const INSTALL: &str = "install NVIDIA's package libnccl2 (Debian, Ubuntu), libnccl (Fedora, RHEL) or nvidia-nccl-cu13 (PyPI), and add its \
     folder to LD_LIBRARY_PATH where the loader does not look there; `mmpo-fast doctor` says what is found";

/// `ncclResult_t`. A later NCCL may answer with numbers that no list here has, so this is no Rust enumeration.
pub(super) type Code = c_int;
/// `ncclSuccess`.
pub(super) const SUCCESS: Code = 0;
/// `ncclInProgress`: the call goes on in the background.
pub(super) const IN_PROGRESS: Code = 7;
/// `ncclSum`.
pub(super) const SUM: c_int = 0;

/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as NCCL 2.14 had it. Every later version takes its defaults for what an older struct lacks, going by size and
/// version.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// The struct's padding, with the value that later versions read as "undefined".
    undefined: c_int,
}

impl Config {
    /// No call blocks.
    pub(super) fn non_blocking() -> Self {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            undefined: c_int::MIN,
        }
    }
}

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)+) => {
        /// Functions of `nccl.h`.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)+
        }

        impl Functions {
            /// The name of the first function that the library lacks is the error.
            ///
            /// # Safety
            /// The library is NCCL, and stays loaded.
            unsafe fn of(library: &Library) -> std::result::Result<Self, &'static str> {
                Ok(Functions {
                    // SAFETY: the types are those of nccl.h, whose functions of one name never change.
                    $($field: *unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) }
                        .map_err(|_| $symbol)?,)+
                })
            }
        }
    };
}

functions! {
    error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
    last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    join = "ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code;
    state = "ncclCommGetAsyncError": fn(Handle, *mut Code) -> Code;
    finalize = "ncclCommFinalize": fn(Handle) -> Code;
    destroy = "ncclCommDestroy": fn(Handle) -> Code;
    abort = "ncclCommAbort": fn(Handle) -> Code;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;
    reduce_scatter = "ncclReduceScatter": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> Code;
    reduce = "ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Handle, *mut c_void) -> Code;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Code;
}

/// The loaded library.
pub(in crate::device) struct Nccl {
    pub(super) functions: Functions,
    /// Keeps the functions in memory.
    _library: Library,
}

impl Nccl {
    /// The library of this process, which is looked for once.
    ///
    /// # Errors
    /// [`Error::Device`] where there is none, where it is too old, or where it lacks a function.
    pub(in crate::device) fn get() -> Result<&'static Nccl> {
        static NCCL: OnceLock<std::result::Result<Nccl, (String, String)>> = OnceLock::new();
        let loaded = NCCL.get_or_init(load);
        loaded.as_ref().map_err(|(message, help)| Error::device(message, help))
    }

    /// What the library calls a result, and its text about the last thing that went wrong.
    pub(super) fn explain(&self, code: Code, communicator: Handle) -> String {
        // SAFETY: both return C strings that stay valid until the next call of this thread; the communicator is live or null.
        let texts =
            unsafe { [(self.functions.error_string)(code), (self.functions.last_error)(communicator)] };
        let texts = texts.map(|text| match text.is_null() {
            true => String::new(),
            // SAFETY: not null, so a C string.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
        });
        let [name, details] = texts;
        if details.is_empty() { name } else { format!("{name}: {details}") }
    }
}

/// Message and help of what is in the way.
fn load() -> std::result::Result<Nccl, (String, String)> {
    let (library, number) = open().map_err(|why| (why, INSTALL.to_owned()))?;
    if number < OLDEST {
        let found = format!(
            "NCCL {} is too old: a run of several ranks takes {} or later",
            dotted(number),
            dotted(OLDEST)
        );
        return Err((found, INSTALL.to_owned()));
    }
    // SAFETY: a library of this name with this function is NCCL, or stands in for it; it is kept.
    match unsafe { Functions::of(&library) } {
        Ok(functions) => Ok(Nccl { functions, _library: library }),
        Err(symbol) => {
            Err((format!("the NCCL {} that is found has no {symbol}", dotted(number)), INSTALL.to_owned()))
        }
    }
}

/// The library and its version number; why there is none otherwise.
fn open() -> std::result::Result<(Library, c_int), String> {
    let mut refused = Vec::new();
    let library = NAMES.iter().find_map(|name| {
        // SAFETY: loading runs the library's initialisers, which start nothing.
        unsafe { Library::new(*name) }.map_err(|error| refused.push(reason(&error))).ok()
    });
    let Some(library) = library else {
        return Err(format!("NCCL, which joins the ranks of a run, is not found: {}", refused.join("; ")));
    };
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> Code;
    // SAFETY: nccl.h declares `ncclResult_t ncclGetVersion(int *version)`; the result is an enumeration.
    let get_version = *unsafe { library.get::<GetVersion>("ncclGetVersion") }
        .map_err(|_| "the library that is found in NCCL's place has no ncclGetVersion".to_owned())?;
    let mut number = 0;
    // SAFETY: the pointer is valid for the call, which writes the number.
    let code = unsafe { get_version(&mut number) };
    if code == SUCCESS { Ok((library, number)) } else { Err("NCCL does not tell its version".to_owned()) }
}

/// The loader's own words, which name the file.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn dotted(number: c_int) -> String {
    format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
}

/// The version of NCCL that the loader finds, such as `2.27.5`; `None` where it finds none.
pub fn version() -> Option<String> {
    open().ok().map(|(_, number)| dotted(number))
}
