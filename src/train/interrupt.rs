//! Ctrl-C asks the loop to save and stop; a second one ends the program at once.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static INSTALLED: OnceLock<std::result::Result<(), String>> = OnceLock::new();

/// From now on Ctrl-C (and SIGTERM) is noted instead of ending the program.
pub fn install() -> Result<()> {
    let installed = INSTALLED.get_or_init(|| {
        ctrlc::set_handler(|| {
            if REQUESTED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            // Where nobody listens there is nobody to tell.
            let _ = std::io::stderr()
                .write_all(b"\nstopping after this step; once more stops at once, without saving\n");
        })
        .map_err(|error| error.to_string())
    });
    installed.clone().map_err(|error| {
        Error::device(
            format!("cannot watch for Ctrl-C: {error}"),
            "run outside a sandbox that forbids signals",
        )
    })
}

pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
