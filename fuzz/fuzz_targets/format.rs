//! One format of input, chosen by `MMPO_FAST_FUZZ_FORMAT`, read as the program reads it: what `tests/fuzz` does with
//! seeded changes, guided by coverage here. A panic, an input that takes too long or too much memory is a fault.

#![no_main]

#[path = "../../tests/fuzz/formats.rs"]
#[allow(dead_code, reason = "the folder and the first inputs are made by tests/fuzz")]
mod formats;

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// The format, and the folder that `cargo test --test fuzz -- --prepare FOLDER` made.
fn setting() -> &'static (String, PathBuf) {
    static SETTING: OnceLock<(String, PathBuf)> = OnceLock::new();
    SETTING.get_or_init(|| {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: see fuzz/README.md"));
        (variable("MMPO_FAST_FUZZ_FORMAT"), PathBuf::from(variable("MMPO_FAST_FUZZ_FOLDER")))
    })
}

thread_local! {
    static PLACE: formats::Place = formats::Place::open(&setting().1);
}

fuzz_target!(|bytes: &[u8]| {
    // Whether an input is mended follows from its bytes, so that it does the same each time.
    let number = u64::from(blake3::hash(bytes).as_bytes()[0]);
    PLACE.with(|place| {
        let bytes = place.mend(&setting().0, number, bytes.to_vec());
        let _ = place.try_input(&setting().0, &bytes);
    });
});
