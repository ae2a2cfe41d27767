//! Seconds of one training step on the CPU: forward, MMPO loss, backward, AdamW, on made-up weights and pairs.
//!
//! `benches/peers/` times the same step in PyTorch and candle; `benches/peers/README.md` says what a step is and what
//! is printed. Usage: `cargo bench --bench step -- --shape smollm2-135m --steps 5`.

#[path = "peers/step_bench.rs"]
mod step_bench;

use std::path::Path;
use std::sync::Arc;

use mmpo_fast::Result;
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::AdamWStep;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::model::{Llama, LlamaConfig, TensorSpec};
use mmpo_fast::objective::{Mmpo, Objective, ReferencePair};
use mmpo_fast::train::{Trainer, TrainingPair, Workload};
use serde_json::json;

use step_bench::{Arguments, Engine, Matrix, ModelShape, Timings};

fn main() -> Result<()> {
    let arguments = Arguments::from_process();
    let baseline_rss_bytes = step_bench::resident_bytes();
    let shape = arguments.shape.model();
    let device = Arc::new(CpuDevice::new(Some(arguments.threads))?);
    let positions = arguments.prompt + arguments.response;
    let model = Llama::from_values(device, config(&shape)?, positions, |tensor| values(&shape, tensor))?;
    let parameters = model.parameters();
    let objective = Objective::Mmpo(Mmpo {
        beta: step_bench::BETA,
        epsilon: step_bench::EPSILON,
        reward_group: arguments.pairs,
        reward_normalize: true,
        length_normalize: true,
        preference_weight: 0.0,
        entropy_weight: 0.0,
    });
    let pairs = tokenized_pairs(&arguments, shape.vocabulary);
    let tokens = arguments.pair_tokens();
    let workload = Workload::plan(&pairs, &objective, pairs.len(), tokens);
    let mut trainer = Trainer::new(model, objective, workload)?;
    let batch = with_reference(&mut trainer, &pairs)?;
    let mut step = 0;
    let timings = Timings::measure(&arguments, || -> Result<f64> {
        step += 1;
        let adamw = AdamWStep {
            learning_rate: step_bench::LEARNING_RATE as f32,
            beta1: step_bench::ADAM_BETAS[0] as f32,
            beta2: step_bench::ADAM_BETAS[1] as f32,
            epsilon: step_bench::ADAM_EPSILON as f32,
            weight_decay: step_bench::WEIGHT_DECAY as f32,
            step,
        };
        Ok(trainer.step(&batch, adamw, None)?.loss)
    })?;
    let engine = Engine {
        name: "mmpo-fast",
        version: env!("CARGO_PKG_VERSION").to_owned(),
        variant: "shared prompts, packed",
        parameters,
        computed_tokens: tokens,
        baseline_rss_bytes,
    };
    step_bench::print_report(&arguments, engine, timings);
    Ok(())
}

/// The shape as transformers would write it.
fn config(shape: &ModelShape) -> Result<LlamaConfig> {
    let config = json!({
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": { "rope_type": "default", "rope_theta": shape.rope_theta },
    });
    LlamaConfig::parse(Path::new("config.json"), &config.to_string())
}

/// The benchmark's values of a checkpoint tensor, told by its name.
fn values(shape: &ModelShape, tensor: &TensorSpec) -> Vec<f32> {
    const PROJECTIONS: [&str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let name: Vec<&str> = tensor.name.split('.').collect();
    let matrix = match name[..] {
        ["model", "embed_tokens", _] => Matrix::Embedding,
        ["lm_head", _] => Matrix::Head { layers: shape.layers },
        ["model", "layers", layer, "self_attn" | "mlp", projection, _] => Matrix::Layer {
            layer: layer.parse().expect("a layer's tensors carry its number"),
            projection: PROJECTIONS
                .iter()
                .position(|known| *known == projection)
                .expect("these shapes have no other projections"),
        },
        _ => return vec![1.0; tensor.values()],
    };
    matrix.values(tensor.values())
}

fn tokenized_pairs(arguments: &Arguments, vocabulary: usize) -> Vec<TokenizedPair> {
    step_bench::pairs(arguments, vocabulary)
        .into_iter()
        .enumerate()
        .map(|(record, pair)| TokenizedPair {
            record,
            prompt: pair.prompt,
            chosen: pair.chosen,
            rejected: pair.rejected,
        })
        .collect()
}

/// The pairs with their log-probs under the untrained model, which is the reference.
fn with_reference<'a>(
    trainer: &mut Trainer<CpuDevice>,
    pairs: &'a [TokenizedPair],
) -> Result<Vec<TrainingPair<'a>>> {
    let mut batch: Vec<TrainingPair> =
        pairs.iter().map(|pair| TrainingPair { pair, reference: ReferencePair::default() }).collect();
    let (outcomes, _) = trainer.evaluate(&batch)?;
    for (member, outcome) in batch.iter_mut().zip(outcomes) {
        let [tokens_chosen, tokens_rejected] = member.pair.scored_tokens().map(|tokens| tokens as u32);
        member.reference = ReferencePair {
            logp_chosen: outcome.logp_chosen,
            logp_rejected: outcome.logp_rejected,
            tokens_chosen,
            tokens_rejected,
        };
    }
    Ok(batch)
}
