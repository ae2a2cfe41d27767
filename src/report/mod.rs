//! What a run shows: metrics as it goes (`metrics.jsonl`, TensorBoard events, a progress bar), and a summary and the
//! page `report.html` at its end, which can be written again and beside other runs'.

mod advice;
mod chart;
mod charts;
mod comparison;
mod escape;
mod facts;
mod failure;
mod history;
mod live;
mod log;
mod metrics;
pub(crate) mod page;
mod progress;
mod run_page;
mod summary;
mod table;
mod tensorboard;

pub use advice::advice;
pub use comparison::{MOST_RUNS, NamedRun, comparison_page};
pub use escape::escaped;
pub use facts::{DataSummary, FACTS_FILE, RankFacts, RunFacts, RunState};
pub use failure::{
    bug_message, note_panics, print_bug, print_error, print_usage, wants_color, wants_color_on,
};
pub use history::{History, METRICS_FILE, MetricsWriter};
pub use live::LivePage;
pub use log::{LogFormat, set_log_format, set_rank};
pub use metrics::{
    EvalMetrics, ImplicitMetrics, PairMetrics, PreferenceMetrics, RankMetrics, StepMetrics, WeightMetrics,
};
pub use progress::{LogWriter, Progress, Reader, duration, print_notice, print_result, print_styled};
pub use run_page::{Options, REPORT_FILE, RunReport};
pub use summary::{ComparisonRow, Sample, compare, summary};
pub use tensorboard::{EVENTS_FOLDER, EventWriter};
