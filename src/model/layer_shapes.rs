//! The shapes of a layer's operations, for any number of rows.

use super::LlamaConfig;
use crate::device::{LinearShape, NormShape};

impl LlamaConfig {
    pub(super) fn norm_shape(&self, rows: usize) -> NormShape {
        NormShape { rows, width: self.hidden_size, epsilon: self.rms_norm_eps }
    }

    pub(crate) fn qkv_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.hidden_size, outputs: self.attention_shape().qkv_width() }
    }

    pub(super) fn attention_out_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.attention_shape().out_width(), outputs: self.hidden_size }
    }

    pub(crate) fn gate_up_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.hidden_size, outputs: 2 * self.intermediate_size }
    }

    pub(super) fn down_shape(&self, rows: usize) -> LinearShape {
        LinearShape { rows, inputs: self.intermediate_size, outputs: self.hidden_size }
    }
}
