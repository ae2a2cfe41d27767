//! Made-up inputs. They are never zeros, which a GPU multiplies faster than other numbers.
//!
//! Values come from a formula of a stream and an element number, not from a generator with a state, so that every engine,
//! in whatever language, starts from the same weights and pairs: equal losses then say that equal work was done.
//! `benches/peers/README.md` is the specification, `benches/peers/common.py` its other implementation.

use rayon::prelude::*;

use super::shapes::Lengths;
use crate::data::TokenizedPair;
use crate::device::{ComputeBuffer, Device, Element, Floats, RawValues};
use crate::error::Result;
use crate::model::{LlamaConfig, TensorSpec};

/// The stream of token ids; weights have smaller numbers.
const TOKENS: u64 = 1 << 20;
/// The streams of a kernel's operands begin here.
const OPERANDS: u64 = 1 << 21;

const PROJECTIONS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// SplitMix64's finaliser over a counter: stateless, so any element can be made on its own.
fn scramble(stream: u64, element: u64) -> u64 {
    let mut z = ((stream << 40).wrapping_add(element).wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in [0, 1), exact in f32.
fn unit(stream: u64, element: u64) -> f32 {
    (scramble(stream, element) >> 40) as f32 / (1u32 << 24) as f32
}

/// Weights of a checkpoint tensor: uniform with standard deviation 0.02, norms 1 and biases 0.
pub fn weights(config: &LlamaConfig, tensor: &TensorSpec) -> Vec<f32> {
    let name: Vec<&str> = tensor.name.split('.').collect();
    let projection = |name: &str| PROJECTIONS.iter().position(|known| *known == name);
    let stream = match name[..] {
        ["model", "embed_tokens", _] => 0,
        ["lm_head", _] => 1 + PROJECTIONS.len() * config.layers,
        ["model", "layers", layer, _, part, "weight"] => match (layer.parse::<usize>(), projection(part)) {
            (Ok(layer), Some(projection)) => 1 + PROJECTIONS.len() * layer + projection,
            _ => return vec![1.0; tensor.values()],
        },
        [.., "bias"] => return vec![0.0; tensor.values()],
        _ => return vec![1.0; tensor.values()],
    } as u64;
    let width = 0.02 * 3f32.sqrt();
    let values = (0..tensor.values() as u64).into_par_iter();
    values.map(|element| (2.0 * unit(stream, element) - 1.0) * width).collect()
}

/// `pairs` pairs of these lengths.
pub fn pairs(lengths: Lengths, pairs: usize, vocabulary: usize) -> Vec<TokenizedPair> {
    let Lengths { prompt, chosen, .. } = lengths;
    let length = lengths.tokens();
    (0..pairs)
        .map(|record| {
            let token =
                |at: usize| (scramble(TOKENS, (record * length + at) as u64) % vocabulary as u64) as u32;
            let tokens: Vec<u32> = (0..length).map(token).collect();
            TokenizedPair {
                record,
                prompt: tokens[..prompt].to_vec().into(),
                chosen: tokens[prompt..prompt + chosen].to_vec().into(),
                rejected: tokens[prompt + chosen..].to_vec().into(),
            }
        })
        .collect()
}

/// Nearly normal values of standard deviation `scale` for operand number `operand`: sums of four uniform ones.
pub fn normal(operand: u64, len: usize, scale: f32) -> Vec<f32> {
    let value =
        |element: u64| (0..4).map(|part| unit(OPERANDS + operand, 4 * element + part)).sum::<f32>() - 2.0;
    (0..len as u64).into_par_iter().map(|element| value(element) * 3f32.sqrt() * scale).collect()
}

/// A buffer of [`normal`] values.
///
/// # Errors
/// Those of the device.
pub fn compute<D: Device>(device: &D, operand: u64, len: usize, scale: f32) -> Result<ComputeBuffer<D>> {
    let mut buffer = device.alloc(len)?;
    device.upload_values(&mut buffer, 0, RawValues::from_f32(&normal(operand, len, scale)))?;
    Ok(buffer)
}

/// As [`compute`], in f32.
///
/// # Errors
/// Those of the device.
pub fn floats<D: Device>(device: &D, operand: u64, len: usize, scale: f32) -> Result<Floats<D>> {
    filled(device, &normal(operand, len, scale))
}

/// A buffer of these values.
///
/// # Errors
/// Those of the device.
pub fn filled<D: Device, T: Element>(device: &D, values: &[T]) -> Result<D::Buffer<T>> {
    let mut buffer = device.alloc(values.len())?;
    device.upload(&mut buffer, 0, values)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_about_normal_and_differ() {
        let (a, b) = (normal(1, 100_000, 2.0), normal(2, 100_000, 2.0));
        let moment = |power: i32| a.iter().map(|&v| f64::from(v).powi(power)).sum::<f64>() / a.len() as f64;
        assert!(moment(1).abs() <= 0.03 && (moment(2) - 4.0).abs() <= 0.1, "{} {}", moment(1), moment(2));
        let covariance = a.iter().zip(&b).map(|(&a, &b)| f64::from(a * b)).sum::<f64>() / a.len() as f64;
        assert!(covariance.abs() <= 0.1, "{covariance}");
    }

    #[test]
    fn a_pair_is_its_formula() {
        let lengths = Lengths { prompt: 3, chosen: 2, rejected: 1 };
        let pairs = pairs(lengths, 2, 1000);
        let token = |at: u64| (scramble(1 << 20, at) % 1000) as u32;
        assert_eq!(pairs[1].prompt, [6, 7, 8].map(token));
        assert_eq!(pairs[1].chosen, [9, 10].map(token));
        assert_eq!(pairs[1].rejected, [token(11)]);
    }
}
