//! The page of a run under way, written again and again (`train --live`).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::facts::RunFacts;
use super::run_page::RunReport;

/// The page is written no more often than this.
const INTERVAL: Duration = Duration::from_secs(5);
/// Writing takes no more than this part of the time: 1 in 50.
const SHARE: u32 = 50;

/// Writes the page of a run as its steps are done, which costs at most a fiftieth of the time: the metrics are read again
/// each time, and a long run has many.
#[derive(Debug)]
pub struct LivePage {
    folder: PathBuf,
    facts: RunFacts,
    started: Instant,
    /// When the page may be written next.
    due: Instant,
    has_failed: bool,
}

impl LivePage {
    /// Begins with the facts of the run in `folder`; the first page is written at the first step.
    pub fn start(folder: PathBuf, facts: RunFacts) -> Self {
        let now = Instant::now();
        LivePage { folder, facts, started: now, due: now, has_failed: false }
    }

    /// Writes the page if it is time. A page that cannot be written stops no training: there is a warning, once.
    pub fn tick(&mut self) {
        let begun = Instant::now();
        if begun < self.due {
            return;
        }
        if let Err(error) = self.write()
            && !self.has_failed
        {
            self.has_failed = true;
            tracing::warn!("the live page is not written: {error}; the run goes on");
        }
        self.due = Instant::now() + pause(begun.elapsed());
    }

    fn write(&self) -> crate::error::Result<()> {
        let mut report = RunReport::read(&self.folder)?;
        let seconds = self.facts.seconds + self.started.elapsed().as_secs_f64();
        report.facts = RunFacts { seconds, ..self.facts.clone() };
        report.refresh = Some(INTERVAL.as_secs());
        report.write(&self.folder)
    }
}

/// Time from the end of a writing that took `cost` to the next.
fn pause(cost: Duration) -> Duration {
    INTERVAL.max(cost * SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{METRICS_FILE, REPORT_FILE, RunState};

    #[test]
    fn the_page_is_written_at_once_and_then_when_it_is_time() {
        let folder = tempfile::tempdir().unwrap();
        let line = "{\"step\":3,\"loss\":2.0}\n";
        std::fs::write(folder.path().join(METRICS_FILE), line).unwrap();
        let facts = RunFacts { total_steps: 9, state: RunState::Running, ..RunFacts::default() };
        let mut live = LivePage::start(folder.path().to_path_buf(), facts);
        let page = || std::fs::read_to_string(folder.path().join(REPORT_FILE)).unwrap_or_default();
        live.tick();
        assert!(page().contains("after step 3 of 9"), "{}", page());
        assert!(page().contains("<meta http-equiv=\"refresh\" content=\"5\">"));

        std::fs::write(folder.path().join(METRICS_FILE), [line, "{\"step\":4,\"loss\":1.0}\n"].concat())
            .unwrap();
        live.tick();
        assert!(page().contains("after step 3 of 9"), "written again within the interval");
        live.due = Instant::now();
        live.tick();
        assert!(page().contains("after step 4 of 9"), "{}", page());
    }

    #[test]
    fn writing_takes_a_small_share_of_the_time() {
        assert_eq!(pause(Duration::from_millis(10)), INTERVAL);
        assert_eq!(pause(Duration::from_secs(2)), Duration::from_secs(100));
    }

    #[test]
    fn a_page_that_cannot_be_written_stops_nothing() {
        let mut live = LivePage::start("/nowhere/at/all".into(), RunFacts::default());
        live.tick();
        assert!(live.has_failed);
    }
}
