//! The optimiser: its settings, the factors of one update, the state of each trained tensor, and the schedule of the
//! learning rate.
//!
//! Settings stay f64 from the recipe to [`AdamWFactors`], whose f32 values a device's kernel takes. The update itself is
//! an operation of the device, [`crate::device::Optimizer::adamw`]. docs/memory.md compares the formats of a state.

mod adamw;
mod dynamic_map;
mod master;
mod moments;
mod offload;
mod rounding;
mod schedule;
mod state;

pub use adamw::{AdamWFactors, AdamWSettings, AdamWStep};
pub use dynamic_map::{BLOCK, DynamicMap, LEAST_VALUES, block_scale, inverse_scale, quantize_block};
pub use master::{Master, join, joined, remainder};
pub use moments::{MasterWeights, MomentFormat, MomentPair, Moments, StateOptions};
pub use offload::{OffloadPlan, OffloadedStates, PIECE_VALUES, is_offloaded};
pub use rounding::StochasticRounding;
pub use schedule::Schedule;
pub use state::{OptimizerState, StateBuffer, StateMut, StateRef, StateType, StateValues};
