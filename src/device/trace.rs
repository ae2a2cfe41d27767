//! How long each operation of a device takes: the moments around each one, recorded while a trace runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Result;

/// An operation and the device's own time for it.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationTime {
    /// The launcher's or the operation's name; `operation/launcher` for one of several that make up an operation.
    pub operation: String,
    /// How long it took.
    pub seconds: f64,
}

/// The trace of a device whose clock gives moments of type `M`. While no trace runs, nothing is recorded and nothing
/// costs time.
#[derive(Debug)]
pub(super) struct Trace<M>(Mutex<Option<Notes<M>>>);

#[derive(Debug)]
struct Notes<M> {
    scope: Option<&'static str>,
    operations: Vec<(String, M, M)>,
}

impl<M> Default for Trace<M> {
    fn default() -> Self {
        Trace(Mutex::new(None))
    }
}

impl<M> Trace<M> {
    fn lock(&self) -> MutexGuard<'_, Option<Notes<M>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work`, and records the moments before and after it while a trace runs.
    pub(super) fn around<R>(
        &self,
        operation: &str,
        now: impl Fn() -> Result<M>,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        if self.lock().is_none() {
            return work();
        }
        let start = now()?;
        let result = work()?;
        let end = now()?;
        if let Some(notes) = &mut *self.lock() {
            let name = match notes.scope {
                Some(scope) if scope != operation => format!("{scope}/{operation}"),
                _ => operation.to_owned(),
            };
            notes.operations.push((name, start, end));
        }
        Ok(result)
    }

    /// Runs `work`; the launches inside it are recorded as parts of `operation`.
    pub(super) fn scope<R>(&self, operation: &'static str, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let enter = |scope| {
            if let Some(notes) = &mut *self.lock() {
                notes.scope = scope;
            }
        };
        enter(Some(operation));
        let result = work();
        enter(None);
        result
    }

    /// Traces `work`; `seconds` is the time between two moments.
    pub(super) fn run<R>(
        &self,
        work: impl FnOnce() -> Result<R>,
        seconds: impl Fn(&M, &M) -> Result<f64>,
    ) -> Result<(R, Vec<OperationTime>)> {
        *self.lock() = Some(Notes { scope: None, operations: Vec::new() });
        let result = work();
        let notes = self.lock().take();
        let times = notes.map(|notes| notes.operations).unwrap_or_default();
        let times = times
            .into_iter()
            .map(|(operation, start, end)| Ok(OperationTime { operation, seconds: seconds(&start, &end)? }));
        Ok((result?, times.collect::<Result<_>>()?))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_trace_names_operations_and_their_parts_and_stops_at_its_end() {
        let (trace, clock) = (Trace::default(), Cell::new(0.0));
        let now = || -> Result<f64> {
            clock.set(clock.get() + 1.0);
            Ok(clock.get())
        };
        let work = || {
            trace.around("rope", now, || Ok(()))?;
            trace.scope("head", || {
                trace.around("product", now, || Ok(()))?;
                trace.around("head", now, || Ok(()))
            })?;
            trace.around("add", now, || now().map(|_| 7))
        };
        assert_eq!(work().unwrap(), 7, "without a trace");
        let (result, times) = trace.run(work, |start, end| Ok(end - start)).unwrap();
        assert_eq!(result, 7);
        let times: Vec<(&str, f64)> =
            times.iter().map(|time| (time.operation.as_str(), time.seconds)).collect();
        assert_eq!(times, [("rope", 1.0), ("head/product", 1.0), ("head", 1.0), ("add", 2.0)]);
        let before = clock.get();
        trace.around("rope", now, || Ok(())).unwrap();
        assert_eq!(clock.get(), before, "nobody asks the clock after the end");
    }
}
