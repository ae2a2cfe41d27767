//! Low-rank adapters in the model: what they add, their gradients by finite differences, dropout, and what a step changes.
//! On the CPU device, in f32.

use std::sync::Arc;

use mmpo_fast::config::{GradientConfig, MemoryConfig};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{Floats, RawValues};
use mmpo_fast::model::{
    AdaptedModule, AdaptedModules, FusedTensor, Llama, LlamaConfig, LlamaTensors, LoraSettings, ModuleForm,
    ModuleForms, PEFT_PREFIX, Recompute, TensorSpec, initial_values,
};
use mmpo_fast::objective::{Mmpo, Objective};
use mmpo_fast::optimizer::AdamWStep;
use mmpo_fast::score::PairScore;
use mmpo_fast::train::{Trainer, TrainingPair, Workload};

use crate::golden::{self, Golden, STEP, cpu, training_pairs};

// The entropy term is a surrogate: its gradient is not that of its value.
const OBJECTIVE: Objective = Objective::Mmpo(Mmpo { entropy_weight: 0.0, ..golden::MMPO });

/// Pairs of a step.
const PAIRS: usize = 4;
/// Tokens of a micro-batch: a step takes several.
const TOKEN_BUDGET: usize = 300;

fn settings(modules: &[AdaptedModule]) -> LoraSettings {
    let modules = AdaptedModules::of(modules.iter().copied());
    LoraSettings { modules, rank: 4, alpha: 6.0, dropout: 0.0, rslora: false }
}

fn golden(name: &str) -> Golden {
    Golden::named(name, PAIRS)
}

/// Values like those of a trained adapter: neither matrix is zero.
fn trained_values(tensor: &TensorSpec) -> Vec<f32> {
    let spec = TensorSpec::new(tensor.name.replace("lora_B", "lora_b"), &tensor.shape);
    initial_values(3, &spec).into_iter().map(|value| 0.5 * value).collect()
}

fn adapted(golden: &Golden, device: &Arc<CpuDevice>, settings: LoraSettings) -> Llama<CpuDevice> {
    let mut model = golden.load(device);
    model.adapt(settings, |tensor| Ok(trained_values(tensor))).expect("adapters");
    model
}

/// A trainer over the golden's pairs, whose reference is the base model.
fn with_trainer(
    golden: &Golden,
    settings: LoraSettings,
    body: impl FnOnce(&mut Trainer<CpuDevice>, &[TrainingPair<'_>]),
) {
    with_recomputing_trainer(golden, settings, Recompute::None, body);
}

fn with_recomputing_trainer(
    golden: &Golden,
    settings: LoraSettings,
    recompute: Recompute,
    body: impl FnOnce(&mut Trainer<CpuDevice>, &[TrainingPair<'_>]),
) {
    let memory = MemoryConfig { recompute, ..MemoryConfig::default() };
    with_memory(golden, settings, (memory, TOKEN_BUDGET), body);
}

fn with_memory(
    golden: &Golden,
    settings: LoraSettings,
    (memory, token_budget): (MemoryConfig, usize),
    body: impl FnOnce(&mut Trainer<CpuDevice>, &[TrainingPair<'_>]),
) {
    let device = cpu();
    let references = golden::score(&golden.load(&device), &golden.pairs);
    let pairs = training_pairs(&golden.pairs, &references);
    let workload = Workload { memory, ..Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, token_budget) };
    let model = adapted(golden, &device, settings);
    body(&mut Trainer::new(model, OBJECTIVE, workload).expect("trainer"), &pairs);
}

fn read(device: &CpuDevice, buffer: &Floats<CpuDevice>) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.download(&mut values, buffer, 0).expect("download");
    values
}

/// Every tensor's values and, of the trained ones, gradients.
fn gradients(trainer: &Trainer<CpuDevice>) -> Vec<Option<Vec<f32>>> {
    trainer.gradients.iter().map(|gradient| Some(read(trainer.device(), gradient.as_ref()?))).collect()
}

fn weights(trainer: &Trainer<CpuDevice>) -> Vec<Vec<f32>> {
    trainer.model.weights.iter().map(|weight| read(trainer.device(), weight)).collect()
}

/// Moves tensor `index` along `direction` by `distance`.
fn set_along(
    trainer: &mut Trainer<CpuDevice>,
    index: usize,
    start: &[f32],
    direction: &[f32],
    distance: f32,
) {
    let moved: Vec<f32> = start.iter().zip(direction).map(|(start, d)| start + distance * d).collect();
    let device = Arc::clone(&trainer.model.device);
    let weight = trainer.model.weights.iter_mut().nth(index).expect("a tensor");
    device.upload_values(weight, 0, RawValues::from_f32(&moved)).expect("upload");
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

/// Central differences of the loss along each trained tensor's gradient, and along a direction that does not follow it.
fn assert_gradients_are_differences(name: &str, settings: LoraSettings) {
    const DISTANCE: f32 = 4e-3;
    with_trainer(&golden(name), settings, |trainer, pairs| {
        trainer.accumulate_gradients(pairs, None).expect("gradients");
        let gradients = gradients(trainer);
        let starts = weights(trainer);
        let mut checked = 0;
        for (index, gradient) in gradients.iter().enumerate() {
            let Some(gradient) = gradient else { continue };
            let tensor = trainer.model.layout.iter().nth(index).expect("a tensor").name().to_owned();
            let length = norm(gradient);
            assert!(length > 0.0, "{tensor} has no gradient");
            let along: Vec<f32> = gradient.iter().map(|value| (f64::from(*value) / length) as f32).collect();
            let across: Vec<f32> =
                along_signs(&along).iter().map(|value| value / (gradient.len() as f32).sqrt()).collect();
            for direction in [along, across] {
                let wanted: f64 =
                    gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let mut loss = |distance| {
                    set_along(trainer, index, &starts[index], &direction, distance);
                    trainer.accumulate_gradients(pairs, None).expect("loss").loss
                };
                let difference = (loss(DISTANCE) - loss(-DISTANCE)) / (2.0 * f64::from(DISTANCE));
                // The loss is a sum of f32 log-probs: its rounding, over the distance.
                let error = (difference - wanted).abs();
                assert!(
                    error <= 5e-3 * length + 2e-4,
                    "{name} {tensor}: {difference} and {wanted}, |g| {length}"
                );
                set_along(trainer, index, &starts[index], &direction, 0.0);
            }
            checked += 1;
        }
        let modules = settings.modules.iter().count();
        assert!(checked >= 2 * trainer.model.config.layers, "{checked} tensors of {modules} modules");
    });
}

/// The signs of the values, with every third one negated.
fn along_signs(values: &[f32]) -> Vec<f32> {
    values
        .iter()
        .enumerate()
        .map(|(i, value)| if i % 3 == 0 { -value.signum() } else { value.signum() })
        .collect()
}

#[test]
fn gradients_are_the_differences_of_the_loss() {
    use AdaptedModule::{Down, Gate, Key, Output, Query, Up, Value};
    assert_gradients_are_differences("tied", settings(&AdaptedModule::ALL));
    // With dropout the mask is the same for each of the losses.
    assert_gradients_are_differences("bias", LoraSettings { dropout: 0.2, ..settings(&AdaptedModule::ALL) });
    assert_gradients_are_differences("base", LoraSettings { rslora: true, ..settings(&[Query, Value]) });
    assert_gradients_are_differences("tied", settings(&[Key, Output, Up]));
    assert_gradients_are_differences("rope_linear", LoraSettings { rank: 3, ..settings(&[Gate, Down]) });
}

/// `W + scale * B A` in place of the adapter gives the same log-probs.
fn merged(golden: &Golden, device: &Arc<CpuDevice>, settings: LoraSettings) -> Llama<CpuDevice> {
    let folder = mmpo_fast::checkpoint::ModelFolder::open(&golden.folder.join("model")).expect("folder");
    let values = |tensor: &TensorSpec| {
        let spec = tensor;
        let mut buffer = device.alloc(spec.values()).expect("buffer");
        let stored = folder.tensor(&spec.name, &spec.shape).expect("tensor");
        device.upload_values(&mut buffer, 0, stored).expect("upload");
        let mut weight = read(device, &buffer);
        let module =
            settings.modules.iter().find(|module| spec.name.ends_with(&format!("{}.weight", module.path())));
        if module.is_some() {
            let stem = spec.name.trim_end_matches(".weight");
            let (outputs, inputs, rank) = (spec.shape[0], spec.shape[1], settings.rank);
            let matrix = |kind: &str, shape: &[usize]| {
                trained_values(&TensorSpec::new(format!("{PEFT_PREFIX}{stem}.lora_{kind}.weight"), shape))
            };
            let (a, b) = (matrix("A", &[rank, inputs]), matrix("B", &[outputs, rank]));
            for output in 0..outputs {
                for input in 0..inputs {
                    let sum: f64 = (0..rank)
                        .map(|r| f64::from(b[output * rank + r]) * f64::from(a[r * inputs + input]))
                        .sum();
                    weight[output * inputs + input] += (settings.scale() * sum) as f32;
                }
            }
        }
        weight
    };
    Llama::from_values(Arc::clone(device), folder.config().clone(), 2048, values).expect("model")
}

fn log_probs(scores: &[PairScore]) -> Vec<f64> {
    scores.iter().flat_map(|score| [score.logp_chosen, score.logp_rejected]).collect()
}

#[test]
fn an_adapter_adds_its_product_to_the_weights() {
    use AdaptedModule::{Down, Query, Up, Value};
    let device = cpu();
    for (name, settings) in [
        ("tied", settings(&AdaptedModule::ALL)),
        ("bias", LoraSettings { rslora: true, dropout: 0.5, ..settings(&AdaptedModule::ALL) }),
        ("base", LoraSettings { rank: 5, ..settings(&[Query, Value, Up, Down]) }),
    ] {
        let golden = golden(name);
        let base = log_probs(&golden::score(&golden.load(&device), &golden.pairs));
        let ours = log_probs(&golden::score(&adapted(&golden, &device, settings), &golden.pairs));
        let wanted = log_probs(&golden::score(&merged(&golden, &device, settings), &golden.pairs));
        for ((ours, wanted), base) in ours.iter().zip(&wanted).zip(&base) {
            assert!((ours - wanted).abs() <= 2e-5 * wanted.abs(), "{name}: {ours} and {wanted}");
            assert!((ours - base).abs() >= 1e-3, "{name}: the adapter does something to {base}");
        }
    }
}

/// The first values add nothing: the adapted model is the base, to the bit. `A` lies within PEFT's bound and fills it.
#[test]
fn a_new_adapter_changes_nothing() {
    let (golden, device) = (golden("bias"), cpu());
    let base = golden::score(&golden.load(&device), &golden.pairs);
    let mut model = golden.load(&device);
    let mut largest = 0.0f32;
    let settings = settings(&AdaptedModule::ALL);
    model
        .adapt(settings, |tensor| {
            let values = initial_values(42, tensor);
            if tensor.name.ends_with("lora_A.weight") {
                let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
                largest = values.iter().fold(largest, |largest, value| largest.max(value.abs() / bound));
                let mean = values.iter().sum::<f32>() / values.len() as f32;
                assert!(mean.abs() <= 0.3 * bound, "{}: mean {mean}", tensor.name);
            } else {
                assert!(values.iter().all(|&value| value == 0.0));
            }
            Ok(values)
        })
        .expect("adapters");
    assert!(largest <= 1.0 && largest > 0.99, "{largest} of the bound");
    assert_eq!(golden::score(&model, &golden.pairs), base);
    let spec = TensorSpec::new("x.lora_A.weight", &[4, 8]);
    assert_eq!(initial_values(1, &spec), initial_values(1, &spec));
    assert_ne!(initial_values(1, &spec), initial_values(2, &spec));
    assert!(model.adapt(settings, |tensor| Ok(trained_values(tensor))).is_err(), "one adapter is enough");
}

/// A step trains the adapters and nothing else, takes no memory, and its norm is that of their gradients alone.
#[test]
fn a_step_trains_the_adapters_alone() {
    for (name, dropout) in [("tied", 0.0), ("bias", 0.1)] {
        with_trainer(
            &golden(name),
            LoraSettings { dropout, ..settings(&AdaptedModule::ALL) },
            |trainer, pairs| {
                let before = weights(trainer);
                let memory = trainer.device().memory();
                let result = trainer.step(pairs, STEP, Some(1.0)).expect("step");
                trainer.evaluate(pairs).expect("evaluation");
                assert_eq!(trainer.device().memory(), memory, "{name}: a step takes no memory");
                let gradients = gradients(trainer);
                let all: Vec<f32> = gradients.iter().flatten().flatten().copied().collect();
                let error = (f64::from(result.gradient_norm) - norm(&all)).abs();
                assert!(error <= 1e-5 * norm(&all), "{name}: {} and {}", result.gradient_norm, norm(&all));
                let tensors = trainer.model.layout.iter().zip(before).zip(weights(trainer)).zip(&gradients);
                for (((tensor, before), after), gradient) in tensors {
                    let is_adapter = tensor.name().starts_with(PEFT_PREFIX);
                    assert_eq!(tensor.trained, is_adapter, "{name} {}", tensor.name());
                    assert_eq!(gradient.is_some(), is_adapter, "{name} {}", tensor.name());
                    assert_eq!(before != after, is_adapter, "{name} {}", tensor.name());
                }
            },
        );
    }
}

/// What is computed again in the backward has the same bits with adapters too, under the same masks.
#[test]
fn recomputation_gives_the_same_gradients() {
    let lora = LoraSettings { dropout: 0.1, ..settings(&AdaptedModule::ALL) };
    let of = |recompute| {
        let mut found = Vec::new();
        with_recomputing_trainer(&golden("bias"), lora, recompute, |trainer, pairs| {
            let memory = trainer.device().memory();
            trainer.accumulate_gradients(pairs, None).expect("gradients");
            assert_eq!(trainer.device().memory(), memory, "{recompute:?} takes no memory in a step");
            found = gradients(trainer);
        });
        found
    };
    let wanted = of(Recompute::None);
    for recompute in [Recompute::Selective, Recompute::Layer] {
        assert!(of(recompute) == wanted, "{recompute:?}");
    }
}

/// The mask depends on seed and step, is off in an evaluation, and on average does not move the loss far.
#[test]
fn dropout_is_a_function_of_seed_and_step_and_off_in_evaluation() {
    let dropped = LoraSettings { dropout: 0.3, ..settings(&AdaptedModule::ALL) };
    let losses = |dropout: f64, seed: u64, step: u32| {
        let mut losses = [0.0; 2];
        with_trainer(&golden("tied"), LoraSettings { dropout, ..dropped }, |trainer, pairs| {
            trainer.dropout_seed = seed;
            losses[0] = trainer.evaluate(pairs).expect("evaluation").1;
            losses[1] = trainer.step(pairs, AdamWStep { step, ..STEP }, None).expect("step").loss;
        });
        losses
    };
    let plain = losses(0.0, 1, 1);
    assert_eq!(plain[0], plain[1]);
    let [evaluated, first] = losses(0.3, 1, 1);
    assert_eq!(evaluated, plain[0], "no dropout in an evaluation");
    assert_ne!(first, plain[1]);
    assert_eq!(losses(0.3, 1, 1)[1], first, "the same seed and step");
    assert_ne!(losses(0.3, 1, 2)[1], first, "another step");
    assert_ne!(losses(0.3, 2, 1)[1], first, "another seed");
}

/// Each micro-batch of a step has a mask of its own: the same pair in two of them is scored under two masks.
#[test]
fn micro_batches_drop_other_values() {
    let lora = LoraSettings { dropout: 0.3, ..settings(&AdaptedModule::ALL) };
    with_trainer(&golden("tied"), lora, |trainer, pairs| {
        trainer.begin_step(1);
        let longest = pairs.iter().max_by_key(|pair| pair.pair.tokens()).expect("pairs");
        let result = trainer.accumulate_gradients(&[*longest; PAIRS], None).expect("gradients");
        assert!(result.tokens > TOKEN_BUDGET, "{} tokens are one micro-batch", result.tokens);
        let logps: Vec<f32> = result.outcomes.iter().map(|outcome| outcome.logp_chosen).collect();
        for (place, logp) in logps.iter().enumerate() {
            assert!(!logps[..place].contains(logp), "two of the same pair have one mask: {logps:?}");
        }
    });
}

/// A step that is looked at closely drops what the step itself drops, in each of its micro-batches, and so do the gradients of a step
/// that was begun. A replay of a capsule counts on it.
#[test]
fn a_trace_drops_what_its_step_drops() {
    let lora = LoraSettings { dropout: 0.3, ..settings(&AdaptedModule::ALL) };
    // Layers are updated inside the backward where a step is one micro-batch.
    for (sums, token_budget) in [
        (GradientConfig::F32, TOKEN_BUDGET),
        (GradientConfig::Bf16, TOKEN_BUDGET),
        (GradientConfig::Layer, usize::MAX),
    ] {
        let memory = MemoryConfig { gradients: sums, ..MemoryConfig::default() };
        with_memory(&golden("tied"), lora, (memory, token_budget), |trainer, pairs| {
            trainer.dropout_seed = 7;
            for step in [1, 2, 5] {
                let traced = trainer.trace(pairs, step).expect("a trace");
                assert!(traced.first.is_none(), "{:?}", traced.first);
                let formed = gradients(trainer);
                trainer.begin_step(step + 1);
                let other = trainer.accumulate_gradients(pairs, None).expect("gradients");
                assert_ne!(other.outcomes, traced.outcomes, "the masks of another step");
                trainer.begin_step(step);
                let begun = trainer.accumulate_gradients(pairs, None).expect("gradients");
                assert_eq!(
                    begun.outcomes, traced.outcomes,
                    "step {step}: gradients of a step that was begun"
                );
                assert!(gradients(trainer) == formed, "step {step}: gradients of the trace");
                let taken = trainer.step(pairs, AdamWStep { step, ..STEP }, None).expect("a step");
                assert_eq!(taken.outcomes, traced.outcomes, "step {step}");
                let numbers = (traced.loss, traced.gradient_norm);
                assert_eq!((taken.loss, taken.gradient_norm), numbers, "{sums:?}, step {step}");
            }
        });
    }
}

/// Ranks and scales that differ between modules: the model computes what one with equal scales and accordingly larger `B` does,
/// and the zeros beyond a module's own rank stay zeros in training.
#[test]
fn modules_may_have_ranks_and_scales_of_their_own() {
    let (golden, device, settings) = (golden("bias"), cpu(), settings(&AdaptedModule::ALL));
    let form = |name: &str| -> Result<ModuleForm, ()> {
        let rank = if name.ends_with("layers.1.self_attn.q_proj") { 2 } else { 4 };
        Ok(ModuleForm { rank, alpha: if name.contains("layers.0.mlp") { 12.0 } else { 6.0 } })
    };
    let layers = golden.load(&device).config.layers;
    let forms = ModuleForms::of(layers, form).expect("forms");
    let values = |tensor: &TensorSpec| forms.widen(tensor, trained_values(&forms.in_files(tensor)));
    let factor = |name: &str| -> f32 {
        let is_larger = name.contains("layers.1.self_attn.q_proj") || name.contains("layers.0.mlp");
        if is_larger && name.ends_with("lora_B.weight") { 2.0 } else { 1.0 }
    };
    let mut model = golden.load(&device);
    model.adapt_with(settings, Some(forms.clone()), |tensor| Ok(values(tensor))).expect("adapters");
    let mut twin = golden.load(&device);
    let larger = |tensor: &TensorSpec| -> Vec<f32> {
        values(tensor).into_iter().map(|value| factor(&tensor.name) * value).collect()
    };
    twin.adapt(settings, |tensor| Ok(larger(tensor))).expect("adapters");
    let log_probs = |model: &Llama<CpuDevice>| -> Vec<f32> {
        let scores = golden::score(model, &golden.pairs);
        scores
            .iter()
            .map(PairScore::reference)
            .flat_map(|pair| [pair.logp_chosen, pair.logp_rejected])
            .collect()
    };
    let (ours, wanted) = (log_probs(&model), log_probs(&twin));
    let plain = log_probs(&adapted(&golden, &device, settings));
    for ((ours, wanted), plain) in ours.iter().zip(&wanted).zip(plain) {
        assert!((ours - wanted).abs() <= 1e-5 * wanted.abs(), "{ours}, wanted {wanted}");
        assert!((ours - plain).abs() > 1e-4 * plain.abs(), "{ours}, and {plain} with one form");
    }

    let references = golden::score(&golden.load(&device), &golden.pairs);
    let pairs = training_pairs(&golden.pairs, &references);
    let workload = Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, TOKEN_BUDGET);
    let mut trainer = Trainer::new(model, OBJECTIVE, workload).expect("trainer");
    for step in 1..=3 {
        trainer.step(&pairs, AdamWStep { step, ..STEP }, Some(1.0)).expect("step");
    }
    let mut padding = 0;
    for (fused, weight) in trainer.model.layout.iter().zip(weights(&trainer)) {
        for (offset, tensor) in fused.offsets().filter(|(_, tensor)| tensor.name.starts_with(PEFT_PREFIX)) {
            let now = &weight[offset..][..tensor.values()];
            for (now, before) in now.iter().zip(values(tensor)) {
                assert_eq!(*now == 0.0, before == 0.0, "{}: {now}, before {before}", tensor.name);
                padding += usize::from(before == 0.0);
            }
        }
    }
    assert!(padding > 0, "there is something beyond a rank");
}

/// Names, shapes and order are PEFT's: one `A` and one `B` for each module of each layer.
#[test]
fn tensors_have_the_names_of_peft() {
    let golden = golden("tied");
    let config = LlamaConfig::from_folder(&golden.folder.join("model")).expect("config");
    let settings = settings(&[AdaptedModule::Value, AdaptedModule::Gate]);
    let layout = LlamaTensors::<FusedTensor>::layout(&config).with_adapters(&config, &settings);
    let names: Vec<String> =
        layout.adapter_tensors().map(|tensor| format!("{} {:?}", tensor.name, tensor.shape)).collect();
    let of_layer = |layer: usize| {
        let stem = format!("base_model.model.model.layers.{layer}");
        [
            format!("{stem}.self_attn.v_proj.lora_A.weight [4, 32]"),
            format!("{stem}.self_attn.v_proj.lora_B.weight [64, 4]"),
            format!("{stem}.mlp.gate_proj.lora_A.weight [4, 32]"),
            format!("{stem}.mlp.gate_proj.lora_B.weight [72, 4]"),
        ]
    };
    assert_eq!(names, [of_layer(0), of_layer(1)].concat());
}
