//! The PTX machine for tests: builds it, takes the kernels' PTX out of the objects that the program embeds, and opens a
//! device that executes it with the program's own launchers and Rust code. README.md beside this file says how it works.
//!
//! The machine and the launchers are one shared library, linked here from the same objects that the program links. It
//! stands where libcuda.so stands, so a process has either a real driver or this.

#![cfg(mmpo_gpu_kernels)]
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(unsafe_code, reason = "it loads the machine and calls it through C")]

pub mod cases;
mod library;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;

use mmpo_fast::device::cuda::{CudaDevice, launch_through};

/// Names the target whose PTX a test process executes instead of looking for a GPU: `sm_90a` or `sm_80`.
pub const TARGET: &str = "MMPO_FAST_PTX";
/// How it runs: words out of `late`, `early`, `random`, `seed=N`, `measured` (rounding of tensor cores), `strict_reads` (zeros of
/// a buffer's creation count as unwritten), `multiprocessors=N`.
pub const MODE: &str = "MMPO_FAST_PTX_MODE";
/// A file to which the process appends its launches when it ends, one line per entry.
pub const LAUNCHES: &str = "MMPO_FAST_PTX_LAUNCHES";

/// When asynchronous operations take effect, in the machine's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    Late = 0,
    Early = 1,
    Random = 2,
}

/// How launches run.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    pub landing: Landing,
    /// 0 keeps warps in order.
    pub seed: u64,
    /// Matrix instructions round as has been measured on tensor cores, not in f32.
    pub measured_rounding: bool,
    /// Kernels may not read what a buffer's creation zeroed and nothing has written since.
    pub strict_reads: bool,
}

impl Mode {
    pub const LATE: Mode =
        Mode { landing: Landing::Late, seed: 0, measured_rounding: false, strict_reads: false };

    /// As [`MODE`] says; the number of multiprocessors beside it, where one is named.
    pub fn from_words(words: &str) -> (Mode, Option<u32>) {
        let (mut mode, mut multiprocessors) = (Mode::LATE, None);
        for word in words.split_whitespace() {
            let number =
                |prefix: &str| word.strip_prefix(prefix).and_then(|number| number.parse::<u32>().ok());
            match word {
                "late" => mode.landing = Landing::Late,
                "early" => mode.landing = Landing::Early,
                "random" => mode.landing = Landing::Random,
                "measured" => mode.measured_rounding = true,
                "strict_reads" => mode.strict_reads = true,
                _ => match (number("seed="), number("multiprocessors=")) {
                    (Some(number), _) => mode.seed = number.into(),
                    (_, Some(number)) => multiprocessors = Some(number),
                    _ => panic!("{MODE}={words}: unknown word `{word}`"),
                },
            }
        }
        (mode, multiprocessors)
    }
}

/// The loaded machine.
pub struct Machine {
    configure: unsafe extern "C" fn(c_int, u64, c_int, c_int),
    edit: unsafe extern "C" fn(*const c_char, *const c_char, *const c_char, c_int) -> *const c_char,
    restore: unsafe extern "C" fn(),
    multiprocessors: unsafe extern "C" fn(c_int),
}

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}
const RTLD_NOW: c_int = 2;
const RTLD_GLOBAL: c_int = 0x100;

/// A function of the library.
fn symbol(library: NonNull<c_void>, name: &str) -> Option<NonNull<c_void>> {
    let name = CString::new(name).expect("a name without a zero");
    // SAFETY: the library stays loaded, and the name is a C string.
    NonNull::new(unsafe { dlsym(library.as_ptr(), name.as_ptr()) })
}

fn load(path: &Path) -> NonNull<c_void> {
    let path = CString::new(path.to_str().expect("a path in UTF-8")).expect("a path without a zero");
    // SAFETY: the library's initialisers register the kernels' names and do nothing else.
    let library = unsafe { dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
    NonNull::new(library).unwrap_or_else(|| {
        // SAFETY: after a failure it is a C string.
        panic!("{}", unsafe { CStr::from_ptr(dlerror()) }.to_string_lossy())
    })
}

/// Whether the PTX can be executed; builds what that needs, and says what is missing. Loads nothing, so that this process may
/// still look for a GPU.
pub fn available() -> bool {
    let _alone = library::building();
    let available = library::extract_ptx().is_some();
    if available {
        library::build();
    }
    available
}

/// The machine of this process, which stands in the driver's place from now on. `None`, with a message, where there is
/// no cuobjdump to take the PTX out with.
pub fn machine() -> Option<&'static Machine> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    MACHINE.get_or_init(start).as_ref()
}

fn start() -> Option<Machine> {
    let _alone = library::building();
    let folder = library::extract_ptx()?;
    let library = load(&library::build());
    let function = |name: &str| symbol(library, name).unwrap_or_else(|| panic!("the machine has no {name}"));
    let folder = CString::new(folder.to_str().expect("a path in UTF-8")).expect("a path without a zero");
    // SAFETY: the functions are those of runtime.cpp, and the launchers those of kernels/api.h; nothing unloads them.
    unsafe {
        let open = std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(*const c_char) -> *const c_char>(
            function("ptx_machine_open"),
        );
        let error = CStr::from_ptr(open(folder.as_ptr())).to_string_lossy();
        assert!(error.is_empty(), "{error}");
        launch_through(&|name| symbol(library, &format!("mmpo_{name}"))).expect("launchers");
        Some(Machine {
            configure: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(c_int, u64, c_int, c_int)>(
                function("ptx_machine_configure"),
            ),
            edit: std::mem::transmute::<
                NonNull<c_void>,
                unsafe extern "C" fn(*const c_char, *const c_char, *const c_char, c_int) -> *const c_char,
            >(function("ptx_machine_edit")),
            restore: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn()>(function(
                "ptx_machine_restore",
            )),
            multiprocessors: std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn(c_int)>(function(
                "ptx_machine_multiprocessors",
            )),
        })
    }
}

impl Machine {
    /// How launches run from now on.
    pub fn configure(&self, mode: Mode) {
        let Mode { landing, seed, measured_rounding, strict_reads } = mode;
        // SAFETY: the call stores numbers under a lock.
        unsafe {
            (self.configure)(
                landing as c_int,
                seed,
                c_int::from(measured_rounding),
                c_int::from(!strict_reads),
            );
        }
    }

    /// As [`MODE`] says.
    fn configure_by_words(&self, words: &str) {
        let (mode, multiprocessors) = Mode::from_words(words);
        self.configure(mode);
        if let Some(count) = multiprocessors {
            // SAFETY: the call stores a number.
            unsafe { (self.multiprocessors)(count as c_int) };
        }
    }

    /// Replaces text in the PTX of every entry whose mangled name holds every word of `entry`: the occurrence of this number,
    /// from 1, or all where it is 0. The error says that there is none.
    pub fn edit(&self, entry: &str, from: &str, to: &str, occurrence: i32) -> Result<(), String> {
        let [entry, from, to] =
            [entry, from, to].map(|text| CString::new(text).expect("text without a zero"));
        // SAFETY: three C strings that live during the call, which returns one that lives until this thread's next.
        let error =
            unsafe { CStr::from_ptr((self.edit)(entry.as_ptr(), from.as_ptr(), to.as_ptr(), occurrence)) };
        let error = error.to_string_lossy().into_owned();
        if error.is_empty() { Ok(()) } else { Err(error) }
    }

    /// Undoes all edits.
    pub fn restore(&self) {
        // SAFETY: the call changes the machine under a lock.
        unsafe { (self.restore)() };
    }
}

/// A device that executes the PTX for `target`; `None` as for [`machine`].
pub fn device(target: &str) -> Option<CudaDevice> {
    machine()?;
    let ordinal = match target {
        "sm_90a" => 0,
        "sm_80" => 1,
        other => panic!("{TARGET}={other}; it may be sm_90a or sm_80"),
    };
    Some(CudaDevice::open(ordinal).expect("the machine's device opens"))
}

/// The device that the environment asks for: where [`TARGET`] is set, tests for a GPU run on it.
pub fn device_of_environment() -> Option<CudaDevice> {
    let target = std::env::var(TARGET).ok()?;
    let machine = machine().expect("a machine was asked for by its name");
    static CONFIGURED: OnceLock<()> = OnceLock::new();
    CONFIGURED.get_or_init(|| machine.configure_by_words(&std::env::var(MODE).unwrap_or_default()));
    device(&target)
}

/// What was launched, as the machine of a process appended it to the file that [`LAUNCHES`] named: for each entry, by target,
/// file and mangled name, how often.
pub fn read_launches(path: &Path) -> std::collections::BTreeMap<(String, String, String), u64> {
    let mut launches = std::collections::BTreeMap::new();
    for line in std::fs::read_to_string(path).expect("the machine wrote its launches").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [target, file, entry, count] = words[..] else { panic!("`{line}`") };
        let key = (target.to_owned(), file.to_owned(), entry.to_owned());
        *launches.entry(key).or_default() += count.parse::<u64>().expect("a count");
    }
    launches
}
