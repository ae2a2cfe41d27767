//! The library's own rules, by its C interface: what the program's calls never do is refused, and what they rely on holds.

#![allow(unsafe_code, reason = "it calls the library through C")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Mutex;

use libloading::Library;

use crate::support::nccl;

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;

type Handle = *mut c_void;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

#[repr(C)]
struct Config(usize, u32, u32, c_int, c_int);

/// The library, loaded into this process.
struct Interface(Library);

impl Interface {
    fn load() -> Self {
        // SAFETY: its initialisers start nothing.
        Interface(unsafe { Library::new(nccl::folder().join("libnccl.so.2")) }.unwrap())
    }

    fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: every caller names the type that nccl.h gives the function.
        *unsafe { self.0.get::<F>(name) }.unwrap()
    }

    fn id(&self) -> UniqueId {
        let mut id = UniqueId([0; 128]);
        let make: unsafe extern "C" fn(*mut UniqueId) -> c_int = self.function("ncclGetUniqueId");
        // SAFETY: the call writes the id.
        assert_eq!(unsafe { make(&mut id) }, SUCCESS);
        id
    }

    fn init(&self, id: UniqueId, ranks: c_int, rank: c_int, blocking: c_int, magic: u32) -> (c_int, Handle) {
        type Init = unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
        let init: Init = self.function("ncclCommInitRankConfig");
        let mut config = Config(size_of::<Config>(), magic, 21_400, blocking, c_int::MIN);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call writes the handle and reads the rest.
        (unsafe { init(&mut handle, ranks, id, rank, &mut config) }, handle)
    }

    /// A communicator of one rank.
    fn alone(&self, blocking: bool) -> Handle {
        let (code, handle) = self.init(self.id(), 1, 0, blocking.into(), 0xcafe_beef);
        assert_eq!(code, if blocking { SUCCESS } else { IN_PROGRESS });
        if !blocking {
            assert_eq!(self.state(handle), (SUCCESS, SUCCESS));
        }
        handle
    }

    fn state(&self, handle: Handle) -> (c_int, c_int) {
        let ask: unsafe extern "C" fn(Handle, *mut c_int) -> c_int = self.function("ncclCommGetAsyncError");
        let mut state = -1;
        // SAFETY: the library tells a live handle from another, and writes the state.
        (unsafe { ask(handle, &mut state) }, state)
    }

    fn all_reduce(
        &self,
        handle: Handle,
        send: *const f32,
        receive: *mut f32,
        count: usize,
        stream: *mut c_void,
    ) -> c_int {
        type AllReduce =
            unsafe extern "C" fn(*const f32, *mut f32, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
        let call: AllReduce = self.function("ncclAllReduce");
        // SAFETY: every caller has `count` values at both, until the communicator is done.
        unsafe { call(send, receive, count, FLOAT32, 0, handle, stream) }
    }

    fn on(&self, name: &str, handle: Handle) -> c_int {
        let call: unsafe extern "C" fn(Handle) -> c_int = self.function(name);
        // SAFETY: the library tells a live handle from another.
        unsafe { call(handle) }
    }

    fn group(&self, name: &str) -> c_int {
        let call: unsafe extern "C" fn() -> c_int = self.function(name);
        // SAFETY: the call has no arguments.
        unsafe { call() }
    }

    fn last_error(&self) -> String {
        let ask: unsafe extern "C" fn(Handle) -> *const c_char = self.function("ncclGetLastError");
        // SAFETY: the text is a C string of this thread.
        unsafe { CStr::from_ptr(ask(std::ptr::null_mut())) }.to_string_lossy().into_owned()
    }

    fn settle(&self, handle: Handle) {
        while self.state(handle) == (SUCCESS, IN_PROGRESS) {
            std::thread::yield_now();
        }
        assert_eq!(self.state(handle), (SUCCESS, SUCCESS));
    }
}

/// The text about the last failure belongs to the process, so these tests run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn overlapping_buffers_are_refused_but_for_the_in_place_forms() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let library = Interface::load();
    let handle = library.alone(true);
    let mut values = [1.0_f32, 2.0, 3.0, 4.0];
    let start = values.as_mut_ptr();
    let stream = std::ptr::null_mut();
    assert_eq!(library.all_reduce(handle, start, start.wrapping_add(1), 3, stream), INVALID_ARGUMENT);
    assert!(library.last_error().contains("overlap"), "{}", library.last_error());
    assert_eq!(library.all_reduce(handle, start, start, 4, stream), SUCCESS);
    assert_eq!(library.all_reduce(handle, start, start.wrapping_add(2), 2, stream), SUCCESS);
    assert_eq!(library.all_reduce(handle, start, start, 0, stream), SUCCESS);
    // SAFETY: the calls before are over.
    assert_eq!(unsafe { start.cast::<[f32; 4]>().read() }, [1.0, 2.0, 1.0, 2.0]);
    assert_eq!(library.on("ncclCommDestroy", handle), SUCCESS);
    // What was destroyed is used no more.
    assert_eq!(library.all_reduce(handle, start, start, 4, stream), INVALID_ARGUMENT);
    assert_eq!(library.state(handle).0, INVALID_ARGUMENT);
    assert_eq!(library.on("ncclCommAbort", handle), INVALID_ARGUMENT);
}

#[test]
fn calls_of_a_group_start_at_its_end_and_a_busy_communicator_takes_no_more() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let library = Interface::load();
    let handle = library.alone(false);
    let sent = [5.0_f32; 8];
    let mut received = [0.0_f32; 8];
    let out = received.as_mut_ptr();
    let stream = std::ptr::null_mut();
    assert_eq!(library.group("ncclGroupStart"), SUCCESS);
    assert_eq!(library.all_reduce(handle, sent.as_ptr(), out, 8, stream), SUCCESS);
    std::thread::sleep(std::time::Duration::from_millis(20));
    // SAFETY: nothing of the group has started.
    assert_eq!(unsafe { out.cast::<[f32; 8]>().read_volatile() }, [0.0; 8]);
    assert_eq!(library.group("ncclGroupEnd"), IN_PROGRESS);
    library.settle(handle);
    // SAFETY: the communicator is done.
    assert_eq!(unsafe { out.cast::<[f32; 8]>().read_volatile() }, [5.0; 8]);
    assert_eq!(library.group("ncclGroupEnd"), INVALID_USAGE);
    assert_eq!(library.on("ncclCommFinalize", handle), SUCCESS);
    assert_eq!(library.on("ncclCommDestroy", handle), SUCCESS);
}

/// An emulated device's stream that keeps what it is given.
#[repr(C)]
struct Stream {
    magic: u64,
    enqueue: unsafe extern "C" fn(*mut Stream, Run, *mut c_void),
    kept: Mutex<Vec<(Run, usize)>>,
}

type Run = unsafe extern "C" fn(*mut c_void, c_int);

unsafe extern "C" fn keep(stream: *mut Stream, run: Run, argument: *mut c_void) {
    // SAFETY: the stream outlives the communicator, and is only shared.
    unsafe { &(*stream).kept }.lock().unwrap().push((run, argument as usize));
}

#[test]
fn an_emulated_stream_gets_work_when_the_state_was_asked_for() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let library = Interface::load();
    let handle = library.alone(false);
    let mut stream = Stream { magic: 0x6d6d_706f_5f73_7472, enqueue: keep, kept: Mutex::default() };
    let address: *mut c_void = (&raw mut stream).cast();
    let kept = || stream.kept.lock().unwrap().len();
    let mut values = [5.0_f32; 8];
    let start = values.as_mut_ptr();
    assert_eq!(library.all_reduce(handle, start, start, 8, address), IN_PROGRESS);
    assert_eq!(kept(), 0);
    // Not ready for the next call either.
    assert_eq!(library.all_reduce(handle, start, start, 8, address), INVALID_ARGUMENT);
    assert!(library.last_error().contains("before its last operation"), "{}", library.last_error());
    assert_eq!(library.state(handle), (SUCCESS, IN_PROGRESS));
    assert_eq!(kept(), 0);
    assert_eq!(library.state(handle), (SUCCESS, SUCCESS));
    assert_eq!(kept(), 1);
    // What is on the stream holds up the end of the communicator.
    assert_eq!(library.on("ncclCommFinalize", handle), IN_PROGRESS);
    let (run, argument) = stream.kept.lock().unwrap().remove(0);
    // SAFETY: called once, as the library's header asks.
    unsafe { run(argument as *mut c_void, 1) };
    assert_eq!(library.state(handle), (SUCCESS, SUCCESS));
    // SAFETY: the run is over. It raced, so it moved bytes that mean nothing.
    assert!(unsafe { start.cast::<[f32; 8]>().read_volatile() }.iter().all(|value| value.is_nan()));
    assert_eq!(library.on("ncclCommDestroy", handle), SUCCESS);
}

#[test]
fn impossible_groups_are_refused() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let library = Interface::load();
    let magic = 0xcafe_beef;
    assert_eq!(library.init(library.id(), 2, 2, 0, magic).0, INVALID_ARGUMENT);
    assert_eq!(library.init(library.id(), 0, 0, 0, magic).0, INVALID_ARGUMENT);
    assert_eq!(library.init(library.id(), 1, 0, 0, 7).0, INVALID_ARGUMENT);
    assert_eq!(library.init(UniqueId([0; 128]), 1, 0, 0, magic).0, INVALID_ARGUMENT);
    let id = library.id();
    let (code, handle) = library.init(id, 2, 0, 0, magic);
    assert_eq!(code, IN_PROGRESS);
    assert_eq!(library.init(id, 2, 0, 0, magic).0, INVALID_USAGE);
    assert!(library.last_error().contains("two processes are rank 0"), "{}", library.last_error());
    assert_eq!(library.init(id, 3, 1, 0, magic).0, INVALID_USAGE);
    assert!(library.last_error().contains("a group of 2 ranks, and one of 3"), "{}", library.last_error());
    assert_eq!(library.state(handle), (SUCCESS, IN_PROGRESS));
    assert_eq!(library.on("ncclCommAbort", handle), SUCCESS);
}
