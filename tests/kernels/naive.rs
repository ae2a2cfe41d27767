//! Every operation once more, in f64 and in the most obvious way, for the tests to compare with.
//!
//! One source is both references: [`Precision::Exact`] is the truth, [`Precision::Bf16`] what an eager framework gives, which
//! stores every intermediate tensor in bf16. The kernels must not be worse than twice the latter's error. The free functions
//! are the exact forward passes, whose central differences check every backward pass.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::Location;
use std::sync::{LazyLock, Mutex, PoisonError};

use half::bf16;
use mmpo_fast::data::PairSpan;
use mmpo_fast::device::AttentionShape;
use mmpo_fast::optimizer::AdamWStep;

/// What is kept of a number that goes into a tensor of weights, activations or gradients. Sums and statistics inside one
/// operation are f64 in both: better than an eager framework's f32, so that the comparison is not easier than a real one.
#[derive(Clone, Copy, Debug)]
pub enum Precision {
    Exact,
    Bf16,
}

/// As [`both`], worked out once for all devices that ask from the same line with the same `inputs` and `shape`. For what is
/// cubic in its size: devices that store bf16 round their inputs alike, so most of a test's devices share a result.
#[track_caller]
pub fn both_once<T: Clone + Send + 'static>(
    shape: impl Debug,
    inputs: &[&[f64]],
    compute: impl Fn(Precision) -> T,
) -> [T; 2] {
    type Results = HashMap<(&'static Location<'static>, u64), Box<dyn Any + Send>>;
    static RESULTS: LazyLock<Mutex<Results>> = LazyLock::new(Mutex::default);
    let mut hasher = DefaultHasher::new();
    format!("{shape:?}").hash(&mut hasher);
    for input in inputs {
        bytemuck::cast_slice::<f64, u64>(input).hash(&mut hasher);
    }
    let key = (Location::caller(), hasher.finish());
    let known = |results: &Results| results.get(&key)?.downcast_ref::<[T; 2]>().cloned();
    // A test that fails while it holds the lock fails by itself alone.
    let lock = || RESULTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(result) = known(&lock()) {
        return result;
    }
    // Not under the lock: other tests work on.
    let result = both(compute);
    lock().insert(key, Box::new(result.clone()));
    result
}

/// The exact result and the naive bf16 version's.
pub fn both<T>(compute: impl Fn(Precision) -> T) -> [T; 2] {
    [compute(Precision::Exact), compute(Precision::Bf16)]
}

impl Precision {
    pub fn store(self, value: f64) -> f64 {
        match self {
            Precision::Exact => value,
            Precision::Bf16 => bf16::from_f64(value).to_f64(),
        }
    }

    /// `before + values`, as a gradient accumulates.
    pub fn accumulate(self, before: &[f64], values: &[f64]) -> Vec<f64> {
        assert_eq!(before.len(), values.len());
        before.iter().zip(values).map(|(before, value)| self.store(before + value)).collect()
    }

    /// `out = x * rstd * weight` and `rstd = 1 / sqrt(mean(x^2) + epsilon)` of each row; `x * rstd` is stored.
    pub fn rms_norm(self, x: &[f64], weight: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
        let (mut out, mut rstd) = (Vec::new(), Vec::new());
        for row in x.chunks(weight.len()) {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean + epsilon).sqrt();
            rstd.push(factor);
            out.extend(row.iter().zip(weight).map(|(x, weight)| self.store(self.store(x * factor) * weight)));
        }
        (out, rstd)
    }

    /// `dx` and `dweight` of [`Precision::rms_norm`].
    pub fn rms_norm_backward(
        self,
        dout: &[f64],
        x: &[f64],
        weight: &[f64],
        epsilon: f64,
    ) -> (Vec<f64>, Vec<f64>) {
        let (_, rstd) = self.rms_norm(x, weight, epsilon);
        let (mut dx, mut dweight) = (Vec::new(), vec![0.0; weight.len()]);
        for ((x, dout), rstd) in x.chunks(weight.len()).zip(dout.chunks(weight.len())).zip(rstd) {
            let normed = x.iter().map(|x| self.store(x * rstd));
            dweight
                .iter_mut()
                .zip(dout)
                .zip(normed)
                .for_each(|((sum, dout), x)| *sum += self.store(dout * x));
            let dnormed: Vec<f64> = dout.iter().zip(weight).map(|(dout, w)| self.store(dout * w)).collect();
            let mean = x.iter().zip(&dnormed).map(|(x, d)| x * rstd * d).sum::<f64>() / x.len() as f64;
            dx.extend(x.iter().zip(&dnormed).map(|(x, d)| self.store(rstd * (d - x * rstd * mean))));
        }
        (dx, dweight.into_iter().map(|value| self.store(value)).collect())
    }

    /// `out[t, o] = sum_i x[t, i] weight[o, i] + bias[o]`.
    pub fn linear(self, x: &[f64], weight: &[f64], bias: &[f64], inputs: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for x in x.chunks(inputs) {
            for (weight, bias) in weight.chunks(inputs).zip(bias) {
                out.push(self.store(inner(x, weight) + bias));
            }
        }
        out
    }

    /// `dx[t, i] = sum_o dout[t, o] weight[o, i]`.
    pub fn linear_backward_input(self, dout: &[f64], weight: &[f64], inputs: usize) -> Vec<f64> {
        let outputs = weight.len() / inputs;
        let mut dx = Vec::new();
        for dout in dout.chunks(outputs) {
            let mut sums = vec![0.0; inputs];
            dout.iter().zip(weight.chunks(inputs)).for_each(|(&dout, weight)| add(&mut sums, dout, weight));
            dx.extend(sums.into_iter().map(|value| self.store(value)));
        }
        dx
    }

    /// `dweight[o, i] = sum_t dout[t, o] x[t, i]`.
    pub fn linear_backward_weight(self, dout: &[f64], x: &[f64], inputs: usize) -> Vec<f64> {
        let rows = x.len() / inputs;
        let outputs = dout.len() / rows;
        let mut dweight = vec![0.0; outputs * inputs];
        for (dout, x) in dout.chunks(outputs).zip(x.chunks(inputs)) {
            dweight.chunks_mut(inputs).zip(dout).for_each(|(sums, &dout)| add(sums, dout, x));
        }
        dweight.into_iter().map(|value| self.store(value)).collect()
    }

    /// The sum of `values[rows, width]` over its rows.
    pub fn column_sums(self, values: &[f64], width: usize) -> Vec<f64> {
        let mut sums = vec![0.0; width];
        values.chunks(width).for_each(|row| add(&mut sums, 1.0, row));
        sums.into_iter().map(|value| self.store(value)).collect()
    }

    /// Rotates query and key heads; `table[position]` is `E/2` cosines, then `E/2` sines. Cosines, sines and both products
    /// are stored. With the sines negated it is its own backward pass.
    pub fn rope(self, qkv: &[f64], table: &[f64], positions: &[u32], shape: AttentionShape) -> Vec<f64> {
        let (width, size) = (shape.qkv_width(), shape.head_size);
        let half = size / 2;
        let mut out = qkv.to_vec();
        for (t, &position) in positions.iter().enumerate() {
            for head in 0..shape.heads + shape.kv_heads {
                for i in 0..half {
                    let first = t * width + head * size + i;
                    let second = first + half;
                    let cosine = self.store(table[position as usize * size + i]);
                    let sine = self.store(table[position as usize * size + half + i]);
                    let product = |value: f64, factor: f64| self.store(value * factor);
                    out[first] = self.store(product(qkv[first], cosine) - product(qkv[second], sine));
                    out[second] = self.store(product(qkv[second], cosine) + product(qkv[first], sine));
                }
            }
        }
        out
    }

    /// Attention with the full `T x T` mask. Products, scaled scores and probabilities are stored.
    pub fn attention(self, qkv: &[f64], spans: &[PairSpan], shape: AttentionShape) -> Attention {
        let rows = Rows::of(qkv, shape);
        let mut pass = Attention::default();
        for query in 0..rows.tokens {
            for head in 0..shape.heads {
                let scores: Vec<f64> = (0..rows.tokens)
                    .map(|key| {
                        if !sees(spans, query, key) {
                            return f64::NEG_INFINITY;
                        }
                        let product = self.store(inner(rows.query(query, head), rows.key(key, head)));
                        self.store(product / (shape.head_size as f64).sqrt())
                    })
                    .collect();
                let lse = log_sum_exp(&scores);
                pass.lse.push(lse);
                let mut out = vec![0.0; shape.head_size];
                for (key, score) in scores.into_iter().enumerate() {
                    let probability = self.store((score - lse).exp());
                    pass.probabilities.push(probability);
                    add(&mut out, probability, rows.value(key, head));
                }
                pass.out.extend(out.into_iter().map(|value| self.store(value)));
            }
        }
        pass
    }

    /// `dqkv` of an attention. The gradients of probabilities, scaled scores and products are stored, and those of keys and
    /// values once for each query head before the heads that share them are added.
    pub fn attention_backward(
        self,
        dout: &[f64],
        pass: &Attention,
        qkv: &[f64],
        shape: AttentionShape,
    ) -> Vec<f64> {
        let rows = Rows::of(qkv, shape);
        let (tokens, size) = (rows.tokens, shape.head_size);
        let mut dqkv = vec![0.0; qkv.len()];
        for head in 0..shape.heads {
            let (mut dkeys, mut dvalues) = (vec![0.0; tokens * size], vec![0.0; tokens * size]);
            for query in 0..tokens {
                let row = query * shape.heads + head;
                let dout = &dout[row * size..][..size];
                let probabilities = &pass.probabilities[row * tokens..][..tokens];
                let dprobabilities: Vec<f64> =
                    (0..tokens).map(|key| self.store(inner(dout, rows.value(key, head)))).collect();
                let sum = inner(probabilities, &dprobabilities);
                let mut dquery = vec![0.0; size];
                for key in 0..tokens {
                    let dscore = self.store(probabilities[key] * (dprobabilities[key] - sum));
                    let dproduct = self.store(dscore / (size as f64).sqrt());
                    add(&mut dquery, dproduct, rows.key(key, head));
                    add(&mut dkeys[key * size..][..size], dproduct, rows.query(query, head));
                    add(&mut dvalues[key * size..][..size], probabilities[key], dout);
                }
                let place = query * rows.width + rows.query_column(head);
                add(&mut dqkv[place..][..size], 1.0, &dquery);
            }
            for key in 0..tokens {
                for (column, gradients) in
                    [(rows.key_column(head), &dkeys), (rows.value_column(head), &dvalues)]
                {
                    let sums = &mut dqkv[key * rows.width + column..][..size];
                    let gradients = &gradients[key * size..][..size];
                    sums.iter_mut().zip(gradients).for_each(|(sum, gradient)| *sum += self.store(*gradient));
                }
            }
        }
        dqkv.into_iter().map(|value| self.store(value)).collect()
    }

    /// `gate / (1 + e^-gate) * up`; a row of `gate_up` is `width` gates, then `width` ups. The first factor is stored.
    pub fn swiglu(self, gate_up: &[f64], width: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for row in gate_up.chunks(2 * width) {
            out.extend((0..width).map(|i| self.store(self.store(row[i] * sigmoid(row[i])) * row[width + i])));
        }
        out
    }

    /// `dgate_up` of [`Precision::swiglu`].
    pub fn swiglu_backward(self, dout: &[f64], gate_up: &[f64], width: usize) -> Vec<f64> {
        let mut dgate_up = vec![0.0; gate_up.len()];
        let rows = dgate_up.chunks_mut(2 * width).zip(gate_up.chunks(2 * width)).zip(dout.chunks(width));
        for ((out, row), dout) in rows {
            for i in 0..width {
                let (gate, up) = (row[i], row[width + i]);
                let sigmoid = sigmoid(gate);
                let dsilu = self.store(dout[i] * up);
                out[i] = self.store(dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
                out[width + i] = self.store(dout[i] * self.store(gate * sigmoid));
            }
        }
        dgate_up
    }

    /// The head's forward pass; logits are stored, statistics over them are not rounded.
    pub fn logp_head(self, hidden: &[f64], weight: &[f64], targets: &[u32], width: usize) -> Head {
        let mut head = Head::default();
        for (hidden, &target) in hidden.chunks(width).zip(targets) {
            let logits: Vec<f64> =
                weight.chunks(width).map(|weight| self.store(inner(hidden, weight))).collect();
            let lse = log_sum_exp(&logits);
            head.lse.push(lse);
            head.logp.push(logits[target as usize] - lse);
            head.entropy.push(-logits.iter().map(|x| (x - lse).exp() * (x - lse)).sum::<f64>());
            head.logits.extend(logits);
        }
        head
    }

    /// `dL/dlogits` of `L = sum_t a_t logp_t + b_t entropy_t`, `[N, V]`, stored.
    pub fn logp_head_dlogits(self, head: &Head, targets: &[u32], a: &[f64], b: &[f64]) -> Vec<f64> {
        let vocab = head.logits.len() / targets.len();
        let mut dlogits = Vec::with_capacity(head.logits.len());
        for (row, logits) in head.logits.chunks(vocab).enumerate() {
            for (v, logit) in logits.iter().enumerate() {
                let logp = logit - head.lse[row];
                let target = if v == targets[row] as usize { 1.0 } else { 0.0 };
                let entropy_part = logp.exp() * (logp + head.entropy[row]);
                dlogits.push(self.store(a[row] * (target - logp.exp()) - b[row] * entropy_part));
            }
        }
        dlogits
    }

    /// A weight and its moments after one update, line by line as `torch.optim.AdamW` documents it; all three are stored.
    pub fn adamw(
        self,
        (weight, first, second): (f64, f64, f64),
        gradient: f64,
        step: AdamWStep,
        (beta1, beta2): (f64, f64),
    ) -> (f64, f64, f64) {
        let gradient = self.store(gradient);
        let learning_rate = step.learning_rate;
        let weight = self.store(weight - learning_rate * step.weight_decay * weight);
        let first = self.store(beta1 * first + (1.0 - beta1) * gradient);
        let second = self.store(beta2 * second + (1.0 - beta2) * gradient * gradient);
        let first_corrected = first / (1.0 - beta1.powi(step.step as i32));
        let second_corrected = second / (1.0 - beta2.powi(step.step as i32));
        let update = learning_rate * first_corrected / (second_corrected.sqrt() + step.epsilon);
        (self.store(weight - update), first, second)
    }
}

/// What an attention's forward pass gives.
#[derive(Debug, Default)]
pub struct Attention {
    /// `[T, H * E]`
    pub out: Vec<f64>,
    /// `[T, H]`
    pub lse: Vec<f64>,
    /// `[T, H, T]`, 0 where a query does not see a key.
    pub probabilities: Vec<f64>,
}

/// Per scored token: lse, log-prob of the target, entropy, logits.
#[derive(Debug, Default)]
pub struct Head {
    pub lse: Vec<f64>,
    pub logp: Vec<f64>,
    pub entropy: Vec<f64>,
    pub logits: Vec<f64>,
}

/// `qkv[T, (H + 2K) * E]` by token and query head.
struct Rows<'a> {
    qkv: &'a [f64],
    shape: AttentionShape,
    width: usize,
    tokens: usize,
}

impl<'a> Rows<'a> {
    fn of(qkv: &'a [f64], shape: AttentionShape) -> Self {
        let width = shape.qkv_width();
        Rows { qkv, shape, width, tokens: qkv.len() / width }
    }

    fn query_column(&self, head: usize) -> usize {
        head * self.shape.head_size
    }

    fn key_column(&self, head: usize) -> usize {
        (self.shape.heads + head / (self.shape.heads / self.shape.kv_heads)) * self.shape.head_size
    }

    fn value_column(&self, head: usize) -> usize {
        self.key_column(head) + self.shape.kv_heads * self.shape.head_size
    }

    fn query(&self, token: usize, head: usize) -> &'a [f64] {
        &self.qkv[token * self.width + self.query_column(head)..][..self.shape.head_size]
    }

    fn key(&self, token: usize, head: usize) -> &'a [f64] {
        &self.qkv[token * self.width + self.key_column(head)..][..self.shape.head_size]
    }

    fn value(&self, token: usize, head: usize) -> &'a [f64] {
        &self.qkv[token * self.width + self.value_column(head)..][..self.shape.head_size]
    }
}

/// In eight partial sums, which processors add at the same time: most of the tests' time would go by otherwise.
fn inner(a: &[f64], b: &[f64]) -> f64 {
    let (a_parts, a_rest) = a.as_chunks::<8>();
    let (b_parts, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (a, b) in a_parts.iter().zip(b_parts) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>() + sums.iter().sum::<f64>()
}

/// `sums += factor * values`.
fn add(sums: &mut [f64], factor: f64, values: &[f64]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub fn log_sum_exp(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + values.iter().map(|value| (value - max).exp()).sum::<f64>().ln()
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

/// `out[i] = table[indices[i]]`.
pub fn gather(table: &[f64], indices: &[u32], width: usize) -> Vec<f64> {
    indices.iter().flat_map(|&index| table[index as usize * width..][..width].to_vec()).collect()
}

pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    Precision::Exact.rms_norm(x, weight, epsilon)
}

pub fn linear(x: &[f64], weight: &[f64], bias: &[f64], inputs: usize) -> Vec<f64> {
    Precision::Exact.linear(x, weight, bias, inputs)
}

pub fn rope(qkv: &[f64], table: &[f64], positions: &[u32], shape: AttentionShape) -> Vec<f64> {
    Precision::Exact.rope(qkv, table, positions, shape)
}

/// `out[T, H * E]` and `lse[T, H]`.
pub fn attention(qkv: &[f64], spans: &[PairSpan], shape: AttentionShape) -> (Vec<f64>, Vec<f64>) {
    let pass = Precision::Exact.attention(qkv, spans, shape);
    (pass.out, pass.lse)
}

pub fn swiglu(gate_up: &[f64], width: usize) -> Vec<f64> {
    Precision::Exact.swiglu(gate_up, width)
}

pub fn logp_head(hidden: &[f64], weight: &[f64], targets: &[u32], width: usize) -> Head {
    Precision::Exact.logp_head(hidden, weight, targets, width)
}
