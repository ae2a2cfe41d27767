//! What several test programs share.

pub mod close;
pub mod nccl;
