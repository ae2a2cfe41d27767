//! How the C library's allocator treats large blocks of the host's memory.

/// While a [`LargeBlocks`] lives, a block of this many bytes or more has pages of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_PAGES: libc::c_int = 4 << 20;
/// The threshold at other times: the most that glibc takes.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const USUAL: libc::c_int = 32 << 20;

/// As long as this lives, a large block that is freed is given back to the system at once.
///
/// glibc keeps blocks of up to 32 MiB for later as soon as one such block was freed. A record with a long text takes
/// several, of growing sizes, so what it had freed took more memory in the end than its text and its token ids. Steps
/// of training, which ask for equal blocks again and again, are better off with the usual rule. Other C libraries are
/// left as they are.
#[derive(Debug)]
#[must_use]
pub struct LargeBlocks(());

impl LargeBlocks {
    /// Begins to give large blocks back.
    pub fn give_back() -> Self {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        set_threshold(OWN_PAGES);
        LargeBlocks(())
    }
}

impl Drop for LargeBlocks {
    fn drop(&mut self) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        set_threshold(USUAL);
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_threshold(bytes: libc::c_int) {
    // SAFETY: mallopt(3) takes numbers only, may be called at any time and from any thread, and changes how later blocks
    // are found, not those that exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 * bytes);
    }
}
