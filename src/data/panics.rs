//! Panics of dependencies on what users give them, turned into errors.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether this thread is inside [`catch`], so that the panic hook keeps silent.
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Returns what `call` returns, or the message of the panic that ended it. Nothing is printed for such a panic.
///
/// For calls into libraries that panic where they should return an error. `call` must not leave something half
/// changed that is used after its panic.
pub(crate) fn catch<T>(call: impl FnOnce() -> T) -> std::result::Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let shown = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !SILENT.try_with(Cell::get).unwrap_or(false) {
                shown(panic);
            }
        }));
    });
    let outer = SILENT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(call));
    SILENT.set(outer);
    result.map_err(|payload| message(payload.as_ref()))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message_and_a_value_stays_a_value() {
        assert_eq!(catch(|| 3), Ok(3));
        let number = 4;
        assert_eq!(
            catch(|| -> u8 { panic!("no such thing as {number}") }),
            Err("no such thing as 4".to_string())
        );
        assert_eq!(catch(|| -> u8 { panic!("plain") }), Err("plain".to_string()));
        assert!(!SILENT.get(), "panics elsewhere are shown again");
    }
}
