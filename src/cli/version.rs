//! `mmpo-fast --version`, and with `--verbose` what this build can do and what it finds on this machine.

use crate::device::cuda;
use crate::doctor;
use crate::error::Result;
use crate::report::print_result;

/// A line of `--version --verbose`: a name and what there is to say.
type Feature = (&'static str, String);

/// What this build can do: `kernels` says for which GPUs kernels were built and by which compiler, or why there are
/// none; `emulated` says whether the emulated device is built in, or why not.
fn features() -> Vec<Feature> {
    vec![
        ("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)),
        ("build", if cfg!(debug_assertions) { "debug" } else { "release" }.to_string()),
        ("devices", "cpu, cuda, emulated".to_string()),
        ("kernels", cuda::build_info().to_string()),
        ("emulated", cuda::emulated_info().to_string()),
    ]
}

/// Prints the version on one line; if `verbose`, then one line per feature and per finding of `doctor`.
///
/// # Errors
/// [`crate::Error::Io`] if standard output cannot be written.
pub fn print(verbose: bool) -> Result<()> {
    let mut text = format!("mmpo-fast {}\n", env!("CARGO_PKG_VERSION"));
    if verbose {
        for (name, value) in features().into_iter().chain(doctor::lines()) {
            text.push_str(&format!("{name:<10}{value}\n"));
        }
        text.push_str("`mmpo-fast doctor` says what to do about what is not found\n");
    }
    print_result(&text).map(|_| ())
}
