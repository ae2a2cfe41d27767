//! What a run shows: metrics as it goes (`metrics.jsonl`, TensorBoard events, a progress bar), and at its end a summary
//! and the page `report.html`.

mod advice;
mod chart;
mod escape;
mod failure;
mod history;
mod html;
mod log;
mod metrics;
mod progress;
mod summary;
mod tensorboard;

pub use advice::advice;
pub use escape::escaped;
pub use failure::{
    bug_message, note_panics, print_bug, print_error, print_usage, wants_color, wants_color_on,
};
pub use history::{History, METRICS_FILE, MetricsWriter};
pub(crate) use html::STYLE;
pub use html::{DataSummary, REPORT_FILE, RunReport};
pub use log::{LogFormat, set_log_format};
pub use metrics::{EvalMetrics, ImplicitMetrics, PairMetrics, PreferenceMetrics, StepMetrics, WeightMetrics};
pub use progress::{LogWriter, Progress, Reader, duration, print_notice, print_result, print_styled};
pub use summary::{ComparisonRow, Sample, compare, summary};
pub use tensorboard::{EVENTS_FOLDER, EventWriter};
