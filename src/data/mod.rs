//! From a file of preference pairs to packed batches of token ids.
//!
//! [`load_pairs`] reads records ([`Record`]), renders them through the chat template ([`ChatTemplate`]), tokenises
//! and cuts them ([`TextEncoder`]). [`BatchOrder`] says which pairs make up which optimiser step, [`PairBatch`]
//! packs them, and [`ReferenceCache`] keeps the reference model's log-probs of them between runs.

mod batch;
mod dataset;
mod encode;
mod lost_text;
mod order;
mod panics;
mod python;
mod records;
mod reference_cache;
mod report;
mod template;
mod tokenizer;

pub use batch::{PairBatch, PairSpan, ScoredPair, Sides, TokenizedPair, micro_batches};
pub use dataset::{PairDataset, load_pairs};
pub use encode::{EncodedRecord, TextEncoder};
pub use order::{BatchOrder, StepBatch, Steps, permutation};
pub(crate) use records::common_prefix;
pub use records::{Body, Message, Note, Record, read_chosen_records, read_records};
pub use reference_cache::{CacheKey, ReferenceCache};
pub use report::{Cause, EncodingReport, Tally};
pub use template::{ChatTemplate, TemplateRefusal, Watch};
pub(crate) use template::{TEMPLATE_FILE, TEMPLATE_FOLDER};
pub use tokenizer::{SegmentCache, StreamDecoder, Tokenizer};
