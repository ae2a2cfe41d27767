//! Every operation once more, in f64 and in the most obvious way, for the tests to compare with.

use mmpo_fast::data::PairSpan;
use mmpo_fast::device::{AdamWStep, AttentionShape};

/// `out = x / sqrt(mean(x^2) + epsilon) * weight` and the factor of each row.
pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut rstd) = (Vec::new(), Vec::new());
    for row in x.chunks(weight.len()) {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + epsilon).sqrt();
        rstd.push(factor);
        out.extend(row.iter().zip(weight).map(|(x, weight)| x * factor * weight));
    }
    (out, rstd)
}

/// `out[t, o] = sum_i x[t, i] weight[o, i] + bias[o]`.
pub fn linear(x: &[f64], weight: &[f64], bias: &[f64], inputs: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        for (weight, bias) in weight.chunks(inputs).zip(bias) {
            out.push(x.iter().zip(weight).map(|(x, weight)| x * weight).sum::<f64>() + bias);
        }
    }
    out
}

/// Rotates query and key heads; `table[position]` is `E/2` cosines, then `E/2` sines.
pub fn rope(qkv: &[f64], table: &[f64], positions: &[u32], shape: AttentionShape) -> Vec<f64> {
    let (width, size) = (shape.qkv_width(), shape.head_size);
    let half = size / 2;
    let mut out = qkv.to_vec();
    for (t, &position) in positions.iter().enumerate() {
        for head in 0..shape.heads + shape.kv_heads {
            for i in 0..half {
                let first = t * width + head * size + i;
                let cosine = table[position as usize * size + i];
                let sine = table[position as usize * size + half + i];
                out[first] = qkv[first] * cosine - qkv[first + half] * sine;
                out[first + half] = qkv[first + half] * cosine + qkv[first] * sine;
            }
        }
    }
    out
}

/// Whether the query of row `query` sees the key of row `key`.
pub fn sees(spans: &[PairSpan], query: usize, key: usize) -> bool {
    spans.iter().any(|span| {
        let parts = [span.prompt_rows(), span.chosen_rows(), span.rejected_rows()];
        let same_part = parts.iter().any(|part| part.contains(&query) && part.contains(&key));
        let prompt = span.prompt_rows().contains(&key) && span.rows().contains(&query);
        key <= query && (same_part || prompt)
    })
}

/// Attention with the full `T x T` mask; gives `out[T, H * E]` and `lse[T, H]`.
pub fn attention(qkv: &[f64], spans: &[PairSpan], shape: AttentionShape) -> (Vec<f64>, Vec<f64>) {
    let (width, size) = (shape.qkv_width(), shape.head_size);
    let tokens = qkv.len() / width;
    let group = shape.heads / shape.kv_heads;
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for query in 0..tokens {
        for head in 0..shape.heads {
            let query_values = &qkv[query * width + head * size..][..size];
            let key_column = (shape.heads + head / group) * size;
            let value_column = (shape.heads + shape.kv_heads + head / group) * size;
            let scores: Vec<f64> = (0..tokens)
                .map(|key| {
                    let key_values = &qkv[key * width + key_column..][..size];
                    let dot: f64 = query_values.iter().zip(key_values).map(|(q, k)| q * k).sum();
                    if sees(spans, query, key) { dot / (size as f64).sqrt() } else { f64::NEG_INFINITY }
                })
                .collect();
            let row_lse = log_sum_exp(&scores);
            lse.push(row_lse);
            out.extend((0..size).map(|i| {
                (0..tokens)
                    .map(|key| (scores[key] - row_lse).exp() * qkv[key * width + value_column + i])
                    .sum::<f64>()
            }));
        }
    }
    (out, lse)
}

pub fn log_sum_exp(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + values.iter().map(|value| (value - max).exp()).sum::<f64>().ln()
}

/// `gate / (1 + e^-gate) * up`; a row of `gate_up` is `width` gates, then `width` ups.
pub fn swiglu(gate_up: &[f64], width: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in gate_up.chunks(2 * width) {
        out.extend((0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i]));
    }
    out
}

/// Per scored token: lse, log-prob of the target, entropy.
#[derive(Debug, Default)]
pub struct Head {
    pub lse: Vec<f64>,
    pub logp: Vec<f64>,
    pub entropy: Vec<f64>,
}

pub fn logp_head(hidden: &[f64], weight: &[f64], targets: &[u32], width: usize) -> Head {
    let mut head = Head::default();
    for (hidden, &target) in hidden.chunks(width).zip(targets) {
        let logits: Vec<f64> = weight
            .chunks(width)
            .map(|weight| hidden.iter().zip(weight).map(|(hidden, weight)| hidden * weight).sum())
            .collect();
        let lse = log_sum_exp(&logits);
        head.lse.push(lse);
        head.logp.push(logits[target as usize] - lse);
        head.entropy.push(-logits.iter().map(|x| (x - lse).exp() * (x - lse)).sum::<f64>());
    }
    head
}

/// `out[i] = table[indices[i]]`.
pub fn gather(table: &[f64], indices: &[u32], width: usize) -> Vec<f64> {
    indices.iter().flat_map(|&index| table[index as usize * width..][..width].to_vec()).collect()
}

/// A weight and its moments after one update, line by line as `torch.optim.AdamW` documents it.
pub fn adamw(
    weight: f64,
    first: f64,
    second: f64,
    gradient: f64,
    step: AdamWStep,
    (beta1, beta2): (f64, f64),
) -> (f64, f64, f64) {
    let learning_rate = f64::from(step.learning_rate);
    let weight = weight - learning_rate * f64::from(step.weight_decay) * weight;
    let first = beta1 * first + (1.0 - beta1) * gradient;
    let second = beta2 * second + (1.0 - beta2) * gradient * gradient;
    let first_corrected = first / (1.0 - beta1.powi(step.step as i32));
    let second_corrected = second / (1.0 - beta2.powi(step.step as i32));
    let weight =
        weight - learning_rate * first_corrected / (second_corrected.sqrt() + f64::from(step.epsilon));
    (weight, first, second)
}
