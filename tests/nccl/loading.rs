//! Looking for NCCL where there is none, or half of one.
