//! The reference device: f32, all cores. See the operation files beside this one.
