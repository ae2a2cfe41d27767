//! A GPU that is only planned for: memory is counted, pieces of the driver's included, and nothing is copied or computed.

use std::ffi::c_void;
use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use super::arena::{Arena, PieceSource};
use super::backend::{Address, Backend, EventHandle, Lane, LaunchCall, Moment};
use super::bindings::KernelTable;
use super::workspace_rules;
use crate::device::Queue;
use crate::error::{Error, Result};

static RULES: LazyLock<KernelTable> = LazyLock::new(workspace_rules::table);

/// Addresses that no one dereferences begin here.
const FIRST_ADDRESS: u64 = 1 << 40;

#[derive(Debug)]
pub(super) struct PlannedBackend {
    memory: Mutex<(Arena, Pieces)>,
    takes_pieces: bool,
    has_gemm_library: bool,
}

impl PlannedBackend {
    /// `takes_pieces`: whether the device takes its memory in pieces, as a GPU does; `has_gemm_library`: whether it has the
    /// vendor's; `limit`: bytes that it has.
    pub(super) fn new(takes_pieces: bool, has_gemm_library: bool, limit: Option<usize>) -> Self {
        let arena = if takes_pieces { Arena::default() } else { Arena::exact() };
        let pieces = Pieces {
            next: FIRST_ADDRESS,
            sizes: Vec::new(),
            now: 0,
            peak: 0,
            limit: limit.unwrap_or(usize::MAX),
        };
        PlannedBackend { memory: Mutex::new((arena, pieces)), takes_pieces, has_gemm_library }
    }

    fn lock(&self) -> MutexGuard<'_, (Arena, Pieces)> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Stands in for the driver.
#[derive(Debug)]
struct Pieces {
    next: u64,
    sizes: Vec<(u64, usize)>,
    now: usize,
    peak: usize,
    /// Beyond it no piece is given, as at the end of a GPU's memory.
    limit: usize,
}

impl PieceSource for Pieces {
    type Error = Error;

    fn take(&mut self, bytes: usize) -> Result<u64> {
        if self.now.saturating_add(bytes) > self.limit {
            return Err(Error::device("the planned memory is full", "take less"));
        }
        let address = self.next;
        let end = address.checked_add(bytes.next_multiple_of(256) as u64);
        self.next =
            end.ok_or_else(|| Error::device("more memory than there are addresses", "use a smaller model"))?;
        self.sizes.push((address, bytes));
        self.now += bytes;
        self.peak = self.peak.max(self.now);
        Ok(address)
    }

    fn give_back(&mut self, address: u64) -> Result<()> {
        if let Some(index) = self.sizes.iter().rposition(|&(start, _)| start == address) {
            self.now -= self.sizes.swap_remove(index).1;
        }
        Ok(())
    }
}

impl Backend for PlannedBackend {
    fn describe(&self) -> String {
        "cuda (planned)".to_owned()
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let (arena, pieces) = &mut *self.lock();
        let address = match arena.allocate(bytes, pieces) {
            Ok(address) => address,
            // What is too much is counted too: it says by how much.
            Err(_) => {
                pieces.limit = usize::MAX;
                arena.allocate(bytes, pieces)?
            }
        };
        NonNull::new(address as *mut c_void).map(Address).ok_or_else(|| Error::bug("an address of 0"))
    }

    unsafe fn free(&self, address: Address) {
        let (arena, pieces) = &mut *self.lock();
        if let Err(error) = arena.free(address.pointer() as u64, pieces) {
            tracing::debug!("{error}");
        }
    }

    unsafe fn copy_in(&self, _: *mut c_void, _: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_out(&self, _: &mut [u8], _: *const c_void) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, _: *mut c_void, _: *const c_void, _: usize) -> Result<()> {
        Ok(())
    }

    fn launch(&self, _: &str, _: &dyn Debug, _: LaunchCall<'_>) -> Result<()> {
        Ok(())
    }

    fn ask(&self, _: &str, _: &dyn Debug, call: LaunchCall<'_>) -> Result<()> {
        call(&RULES, std::ptr::null_mut());
        Ok(())
    }

    fn allocate_host(&self, _: usize) -> Result<Address> {
        // Only counted: no one reads or writes there.
        Ok(Address(NonNull::dangling()))
    }

    unsafe fn free_host(&self, _: Address, _: usize) {}

    fn finish_copies(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_beside(&self, _: Lane, _: *mut c_void, _: *const c_void, _: usize) -> Result<()> {
        Ok(())
    }

    fn new_event(&self) -> Result<EventHandle> {
        Ok(EventHandle(0))
    }

    unsafe fn free_event(&self, _: EventHandle) {}

    unsafe fn record(&self, _: EventHandle, _: Queue) -> Result<()> {
        Ok(())
    }

    unsafe fn wait(&self, _: Queue, _: EventHandle) -> Result<()> {
        Ok(())
    }

    fn collectives_stream(&self) -> Result<*mut c_void> {
        Ok(std::ptr::null_mut())
    }

    fn seconds_between(&self, _: &Moment, _: &Moment) -> Result<f64> {
        Ok(0.0)
    }

    fn takes_pieces(&self) -> bool {
        self.takes_pieces
    }

    fn has_gemm_library(&self) -> bool {
        self.has_gemm_library
    }

    fn only_counts(&self) -> bool {
        true
    }

    fn taken_at_peak(&self) -> Option<usize> {
        Some(self.lock().1.peak)
    }
}
