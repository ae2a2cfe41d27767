//! From a file of preference pairs to packed batches of token ids.
//!
//! [`load`] reads the records ([`Record`]) of files ([`PairSource`]), renders them through the chat template ([`ChatTemplate`]), tokenises
//! and cuts them ([`TextEncoder`]). [`BatchOrder`] says which pairs make up which optimiser step, [`PairBatch`]
//! packs them, and [`ReferenceCache`] keeps the reference model's log-probs of them between runs.

mod batch;
mod dataset;
mod encode;
mod lost_text;
mod order;
mod pair_cache;
mod pair_folder;
mod pair_source;
mod panics;
mod python;
mod records;
mod reference_cache;
mod report;
mod template;
mod token_ids;
mod tokenizer;

pub use batch::{PairBatch, PairSpan, ScoredPair, Sides, TokenizedPair, micro_batches};
pub use dataset::{FileReport, PairDataset, Refusal, Treatment, load, load_cached, load_pairs};
pub(crate) use encode::tokens_after_end;
pub use encode::{Cutting, EncodedRecord, TextEncoder};
pub use order::{BatchOrder, StepBatch, Steps, permutation};
pub use pair_cache::{CACHE_LIMIT, PairCache, cache_folder};
pub use pair_source::{PairSource, Part, SourceFile};
pub use records::{Body, Message, Note, Record, read_chosen_records, read_records, read_records_as};
pub(crate) use records::{common_prefix, unknown_column};
pub use reference_cache::{CacheKey, ReferenceCache};
pub use report::{Cause, EncodingReport, Tally};
pub use template::{ChatTemplate, TemplateRefusal, Watch};
pub(crate) use template::{TEMPLATE_FILE, TEMPLATE_FOLDER};
pub use token_ids::TokenIds;
pub use tokenizer::{SegmentCache, StreamDecoder, Tokenizer};
