//! The model as training uses it: frozen tensors, activations that are computed again, and the sink that is told of each
//! layer. On the CPU device, and what depends on kernels on the emulated GPU too.

use std::sync::Arc;

use mmpo_fast::Result;
use mmpo_fast::data::PairBatch;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{BatchBuffers, ComputeBuffer, Floats};
use mmpo_fast::model::{
    Activations, AdaptedModule, AdaptedModules, BackwardScratch, Capacity, CompleteLayer, Context,
    FusedTensor, GradientSink, Gradients, HeadOptions, KeepGradients, Llama, LlamaTensors, LoraSettings,
    Purpose, Recompute, TensorSpec, initial_values,
};
use mmpo_fast::optimizer::{OptimizerState, StateBuffer, StateValues};
use mmpo_fast::score::PairScore;
use mmpo_fast::train::{Trainer, Workload};

use crate::golden::{self, Golden, OBJECTIVE, STEP, cpu, training_pairs};

/// Pairs of a step.
const PAIRS: usize = 4;

fn golden(name: &str) -> Golden {
    Golden::named(name, PAIRS)
}

/// The model with the tensors frozen for which `is_frozen` is true, and its scores of the pairs.
fn load<D: Device>(
    golden: &Golden,
    device: &Arc<D>,
    is_frozen: impl Fn(&FusedTensor) -> bool,
) -> (Llama<D>, Vec<PairScore>) {
    let mut model = golden.load(device);
    model.freeze(is_frozen);
    let scores = golden::score(&model, &golden.pairs);
    (model, scores)
}

fn trainer<D: Device>(golden: &Golden, model: Llama<D>) -> Result<Trainer<D>> {
    // One micro-batch holds all pairs.
    Trainer::new(model, OBJECTIVE, Workload::plan(&golden.pairs, &OBJECTIVE, PAIRS, usize::MAX))
}

pub fn bits<D: Device>(device: &D, buffer: &Floats<D>) -> Vec<u32> {
    let mut values = vec![0.0f32; device.len(buffer)];
    device.download(&mut values, buffer, 0).expect("download");
    values.into_iter().map(f32::to_bits).collect()
}

pub fn compute_bits<D: Device>(device: &D, buffer: &ComputeBuffer<D>) -> Vec<u32> {
    let mut values = vec![0.0f32; device.len(buffer)];
    device.download_compute(&mut values, buffer, 0).expect("download");
    values.into_iter().map(f32::to_bits).collect()
}

/// What a step leaves, tensor by tensor: weights as bits, gradients as bits where there are some.
struct Step {
    names: Vec<String>,
    values: Vec<usize>,
    before: Vec<Vec<u32>>,
    after: Vec<Vec<u32>>,
    gradients: Vec<Option<Vec<u32>>>,
    /// Bytes on the device once the trainer is there.
    bytes: usize,
}

fn step(golden: &Golden, is_frozen: impl Fn(&FusedTensor) -> bool) -> Step {
    let device = cpu();
    let (model, scores) = load(golden, &device, is_frozen);
    let weights = |model: &Llama<CpuDevice>| -> Vec<Vec<u32>> {
        model.weights.iter().map(|weight| compute_bits(&*device, weight)).collect()
    };
    let before = weights(&model);
    let mut trainer = trainer(golden, model).expect("trainer");
    let bytes = device.memory().now;
    let pairs = training_pairs(&golden.pairs, &scores);
    trainer.accumulate_gradients(&pairs, None).expect("gradients");
    let gradients = trainer.gradients.iter();
    let gradients = gradients.map(|gradient| Some(bits(&*device, gradient.as_ref()?))).collect();
    trainer.update(STEP).expect("update");
    assert_eq!(device.memory().now, bytes, "a step takes no memory");
    let layout = &trainer.model.layout;
    Step {
        names: layout.iter().map(|tensor| tensor.name().to_owned()).collect(),
        values: layout.iter().map(FusedTensor::values).collect(),
        before,
        after: weights(&trainer.model),
        gradients,
        bytes,
    }
}

/// Which tensors are frozen.
type IsFrozen<'a> = &'a dyn Fn(&FusedTensor) -> bool;

/// A frozen tensor keeps its bits and takes no memory for gradient and moments; the others get the gradients and the
/// updates of a run that trains everything.
#[test]
fn frozen_tensors_cost_nothing_and_change_nothing_for_the_others() {
    let in_layer = |layer: usize| format!("model.layers.{layer}.");
    let not_in_layer_1 = |tensor: &FusedTensor| !tensor.name().starts_with(&in_layer(1));
    let not_in_layer_0 = |tensor: &FusedTensor| !tensor.name().starts_with(&in_layer(0));
    let embedding = |tensor: &FusedTensor| tensor.name() == "model.embed_tokens.weight";
    let norms = |tensor: &FusedTensor| tensor.name().contains("norm");
    let projections = |tensor: &FusedTensor| tensor.name().contains("_proj.weight");
    let biases = |tensor: &FusedTensor| tensor.name().ends_with(".bias");
    let all_but_final_norm = |tensor: &FusedTensor| tensor.name() != "model.norm.weight";
    let choices: [(&str, IsFrozen); 7] = [
        ("all but layer 1", &not_in_layer_1),
        ("all but layer 0", &not_in_layer_0),
        ("the embedding", &embedding),
        ("the norms", &norms),
        ("the weights of projections", &projections),
        ("the biases", &biases),
        ("all but the final norm", &all_but_final_norm),
    ];
    // With tied embeddings, and with a head and biases.
    for name in ["tied", "bias", "qwen2"] {
        let golden = golden(name);
        let whole = step(&golden, |_| false);
        for (choice, is_frozen) in choices {
            if name == "tied" && choice == "the biases" {
                continue;
            }
            let frozen = step(&golden, is_frozen);
            let mut saved = 0;
            for tensor in 0..whole.names.len() {
                let what = format!("{name}, {choice} frozen: {}", whole.names[tensor]);
                match &frozen.gradients[tensor] {
                    Some(gradient) => {
                        assert!(Some(gradient) == whole.gradients[tensor].as_ref(), "{what}: gradient");
                        assert!(frozen.after[tensor] == whole.after[tensor], "{what}: update");
                        assert!(frozen.after[tensor] != frozen.before[tensor], "{what}: is trained");
                    }
                    None => {
                        assert!(frozen.after[tensor] == frozen.before[tensor], "{what}: is frozen");
                        saved += whole.values[tensor];
                    }
                }
            }
            assert!(saved > 0, "{name}, {choice}: nothing is frozen");
            // A gradient and two moments in f32; the CPU keeps no master copy.
            assert_eq!(whole.bytes - frozen.bytes, saved * 12, "{name}, {choice}: bytes");
        }
    }
}

#[test]
fn a_model_that_is_all_frozen_is_refused() {
    let golden = golden("tied");
    let (model, _) = load(&golden, &cpu(), |_| true);
    let error = trainer(&golden, model).expect_err("nothing to train");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("every tensor of the model is frozen"), "{error}");
}

/// A batch on a device, and the buffers to run it forward and backward.
struct Run<D: Device> {
    model: Llama<D>,
    packed: PairBatch,
    batch: BatchBuffers<D>,
    activations: Activations<D>,
    scratch: BackwardScratch<D>,
    gradients: Gradients<D>,
}

impl<D: Device> Run<D> {
    /// Forward of the golden's pairs, so that a backward can follow.
    fn new(golden: &Golden, device: &Arc<D>) -> Self {
        let (model, scores) = load(golden, device, |_| false);
        Self::of(golden, device, model, &scores)
    }

    /// As [`Run::new`], of a model that may have adapters.
    fn of(golden: &Golden, device: &Arc<D>, model: Llama<D>, scores: &[PairScore]) -> Self {
        let packed = PairBatch::pack(&golden.pairs, OBJECTIVE.sides());
        let capacity = Capacity::default().cover(&packed);
        let mut batch =
            BatchBuffers::new(&**device, capacity.tokens, capacity.pairs, capacity.scored).expect("batch");
        batch.padding_token = model.config.pad_token_id;
        let references: Vec<_> = scores.iter().map(PairScore::reference).collect();
        let chosen: Vec<usize> = golden.pairs.iter().map(|pair| pair.scored_tokens()[0]).collect();
        let constants = OBJECTIVE.batch_constants(&references, &chosen);
        batch.load(&**device, &packed, &constants).expect("load");
        let purpose = Purpose::Training { head: HeadOptions::default(), recompute: Recompute::None };
        let mut run = Run {
            activations: Activations::of(&model, capacity, purpose).expect("activations"),
            scratch: BackwardScratch::new(&**device, &model.config, capacity).expect("scratch"),
            gradients: model.zero_gradients().expect("gradients"),
            packed,
            batch,
            model,
        };
        let tokens = run.packed.tokens();
        run.model.forward(&mut run.activations, &run.batch, tokens, Context::Packed).expect("forward");
        run
    }

    fn backward(&mut self, sink: &mut impl GradientSink<D>) -> Result<()> {
        let Run { model, packed, batch, activations, scratch, gradients } = self;
        model.head_forward_backward(gradients, scratch, activations, batch, &packed.scored, &OBJECTIVE)?;
        model.backward(gradients, scratch, activations, batch, packed.tokens(), sink)
    }

    /// Bits of what the backward reads of a layer, but for the residual stream that enters it.
    fn activations_of(&self, layer: usize) -> [Vec<u32>; 7] {
        let (device, activations) = (&*self.model.device, &self.activations);
        let slot = activations.slot(layer);
        [
            compute_bits(device, &activations.qkv[slot]),
            compute_bits(device, &activations.attention[slot]),
            bits(device, &activations.attention_lse[slot]),
            compute_bits(device, &activations.middle[slot]),
            compute_bits(device, &activations.gate_up[slot]),
            bits(device, &activations.input_rstd[slot]),
            bits(device, &activations.post_rstd[slot]),
        ]
    }

    /// Overwrites these activations.
    fn spoil(&mut self, layer: usize) {
        let (device, activations) = (Arc::clone(&self.model.device), &mut self.activations);
        let slot = activations.slot(layer);
        for buffer in [
            &mut activations.qkv[slot],
            &mut activations.attention[slot],
            &mut activations.middle[slot],
            &mut activations.gate_up[slot],
        ] {
            let len = device.len(buffer);
            device.zero(buffer, 0..len).expect("zero");
        }
        let floats = [
            &mut activations.attention_lse[slot],
            &mut activations.input_rstd[slot],
            &mut activations.post_rstd[slot],
        ];
        for buffer in floats {
            let len = device.len(buffer);
            device.zero(buffer, 0..len).expect("zero");
        }
    }
}

fn recomputed_activations_have_the_same_bits<D: Device>(golden: &Golden, device: &Arc<D>) {
    let mut run = Run::new(golden, device);
    let layers = run.model.config.layers;
    assert!(layers > 1);
    let wanted: Vec<_> = (0..layers).map(|layer| run.activations_of(layer)).collect();
    // In the order of a backward, each layer from its kept input alone.
    for layer in (0..layers).rev() {
        (0..layers).for_each(|layer| run.spoil(layer));
        assert!(run.activations_of(layer) != wanted[layer], "layer {layer} is spoilt");
        let tokens = run.packed.tokens();
        run.model.recompute_layer(layer, &mut run.activations, &run.batch, tokens).expect("recompute");
        for (part, (got, wanted)) in run.activations_of(layer).iter().zip(&wanted[layer]).enumerate() {
            assert!(got == wanted, "{} layer {layer}, part {part}", golden.name());
        }
    }
}

#[test]
fn a_layer_is_computed_again_to_the_same_bits() {
    for name in ["tied", "bias", "base"] {
        recomputed_activations_have_the_same_bits(&golden(name), &cpu());
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn a_layer_is_computed_again_to_the_same_bits_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, KernelPath};
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = CudaDevice::emulated(EmulatorVariant::Plain).with_path(path);
        recomputed_activations_have_the_same_bits(&golden("bias"), &Arc::new(device));
    }
}

/// Adapters with dropout: their part of a layer's activations is computed again too, under the same mask.
#[test]
fn gradients_of_adapters_have_the_same_bits_after_a_layer_is_computed_again() {
    let (golden, device) = (golden("bias"), cpu());
    let scores = golden::score(&golden.load(&device), &golden.pairs);
    let modules = AdaptedModules::of(AdaptedModule::ALL);
    let settings = LoraSettings { modules, rank: 4, alpha: 8.0, dropout: 0.2, rslora: false };
    let gradients = |again: bool| -> Vec<Vec<u32>> {
        let mut model = golden.load(&device);
        let values = |tensor: &TensorSpec| {
            let spec = TensorSpec::new(tensor.name.replace("lora_B", "lora_b"), &tensor.shape);
            Ok(initial_values(3, &spec))
        };
        model.adapt(settings, values).expect("adapters");
        model.set_dropout_key(Some(9));
        let mut run = Run::of(&golden, &device, model, &scores);
        if again {
            let kept = |buffer: &ComputeBuffer<CpuDevice>| {
                let mut kept = device.alloc(device.len(buffer)).expect("buffer");
                device.copy(&mut kept, 0, buffer, 0, device.len(buffer)).expect("copy");
                kept
            };
            let residual: Vec<_> = run.activations.residual.iter().map(kept).collect();
            // Without dropout all activations are others, those of the adapters included.
            run.model.set_dropout_key(None);
            let tokens = run.packed.tokens();
            run.model.forward(&mut run.activations, &run.batch, tokens, Context::Packed).expect("forward");
            run.activations.residual = residual;
            run.model.set_dropout_key(Some(9));
            for layer in 0..run.model.config.layers {
                run.model
                    .recompute_layer(layer, &mut run.activations, &run.batch, tokens)
                    .expect("recompute");
            }
        }
        run.backward(&mut KeepGradients).expect("backward");
        run.gradients.iter().flatten().map(|gradient| bits(&*device, gradient)).collect()
    };
    let wanted = gradients(false);
    assert!(wanted.iter().flatten().any(|&bits| bits != 0));
    assert!(gradients(true) == wanted);
}

/// Notes which layers it hears of, and the bits of their gradients at that time.
struct Notes<'a> {
    device: &'a CpuDevice,
    layers: Vec<(usize, Vec<Vec<u32>>)>,
}

impl GradientSink<CpuDevice> for Notes<'_> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, CpuDevice>) -> Result<()> {
        let gradients = layer.gradients.iter().flatten().map(|gradient| bits(self.device, gradient));
        self.layers.push((layer.layer, gradients.collect()));
        Ok(())
    }
}

/// Every layer once, from the last to the first, each with all that the backward gives to its gradients.
#[test]
fn a_sink_hears_of_each_layer_once_when_it_is_complete() {
    for name in ["tied", "bias", "qwen2"] {
        let (golden, device) = (golden(name), cpu());
        let mut run = Run::new(&golden, &device);
        let mut sink = Notes { device: &device, layers: Vec::new() };
        run.backward(&mut sink).expect("backward");
        let layers: Vec<usize> = sink.layers.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, (0..run.model.config.layers).rev().collect::<Vec<_>>(), "{name}");
        for (layer, noted) in &sink.layers {
            let gradients = run.gradients.layers[*layer].iter().flatten();
            let after: Vec<_> = gradients.map(|gradient| bits(&*device, gradient)).collect();
            assert!(*noted == after, "{name} layer {layer} was not complete");
            assert!(
                noted.iter().all(|gradient| gradient.iter().any(|&bits| bits != 0)),
                "{name} layer {layer}"
            );
        }
    }
}

/// A second micro-batch adds to the gradients of the first, and the sink hears of each layer once for each.
#[test]
fn a_sink_hears_of_each_micro_batch() {
    let (golden, device) = (golden("tied"), cpu());
    let mut run = Run::new(&golden, &device);
    let mut sink = Notes { device: &device, layers: Vec::new() };
    run.backward(&mut sink).expect("backward");
    let first = sink.layers.len();
    run.backward(&mut sink).expect("backward");
    assert_eq!(sink.layers.len(), 2 * first);
    for ((layer, once), (again, twice)) in sink.layers[..first].iter().zip(&sink.layers[first..]) {
        assert_eq!(layer, again);
        assert!(once != twice, "layer {layer} has gained nothing");
    }
}

/// A sink that fails ends the backward with its error.
#[test]
fn a_sink_that_fails_ends_the_backward() {
    struct Fails(usize);
    impl GradientSink<CpuDevice> for Fails {
        fn layer_complete(&mut self, layer: CompleteLayer<'_, CpuDevice>) -> Result<()> {
            self.0 += 1;
            Err(mmpo_fast::Error::device(format!("layer {} is refused", layer.layer), "a test"))
        }
    }
    let golden = golden("tied");
    let mut run = Run::new(&golden, &cpu());
    let mut sink = Fails(0);
    let error = run.backward(&mut sink).expect_err("the sink's error");
    assert_eq!((sink.0, error.to_string()), (1, format!("layer {} is refused", run.model.config.layers - 1)));
}

/// Applies the gradients of each layer as soon as they are complete, and drops them.
struct Apply<D: Device> {
    device: Arc<D>,
    states: LlamaTensors<OptimizerState<D>>,
    /// The norm and the factor of an update without clipping.
    norm: Floats<D>,
}

impl<D: Device> Apply<D> {
    fn new(model: &Llama<D>) -> Result<Self> {
        let device = Arc::clone(&model.device);
        let mut norm = device.alloc(2)?;
        device.upload(&mut norm, 0, &[0.0f32, 1.0])?;
        let states = model.weights.try_map(|weight| OptimizerState::of(&*device, weight))?;
        Ok(Apply { states, norm, device })
    }

    /// The tensors that belong to no layer.
    fn rest(&mut self, model: &mut Llama<D>, gradients: &Gradients<D>) -> Result<()> {
        let weights = [&mut model.weights.embedding, &mut model.weights.final_norm];
        let states = [&mut self.states.embedding, &mut self.states.final_norm];
        let gradients_of = [&gradients.embedding, &gradients.final_norm];
        let mut updates = Vec::new();
        let head =
            model.weights.lm_head.as_mut().zip(self.states.lm_head.as_mut()).zip(gradients.lm_head.as_ref());
        for ((weight, state), gradient) in weights.into_iter().zip(states).zip(gradients_of) {
            updates.push(state.update(weight, gradient.as_ref().expect("gradient")));
        }
        if let Some(((weight, state), gradient)) = head {
            updates.push(state.update(weight, gradient.as_ref().expect("gradient")));
        }
        self.device.adamw(&mut updates, &self.norm, STEP)
    }
}

impl<D: Device> GradientSink<D> for Apply<D> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        let states = self.states.layers[layer.layer].iter_mut();
        let weights = layer.weights.iter_mut().zip(states).zip(layer.gradients.iter());
        let mut updates: Vec<_> = weights
            .map(|((weight, state), gradient)| state.update(weight, gradient.as_ref().expect("gradient")))
            .collect();
        self.device.adamw(&mut updates, &self.norm, STEP)?;
        self.device.zero_all(&mut layer.gradients.iter_mut().flatten().collect::<Vec<_>>())
    }
}

fn layer_by_layer_is_the_same_update<D: Device>(golden: &Golden, device: &Arc<D>) {
    let (model, scores) = load(golden, device, |_| false);
    let mut whole = trainer(golden, model).expect("trainer");
    whole.step(&training_pairs(&golden.pairs, &scores), STEP, None).expect("step");

    let mut run = Run::new(golden, device);
    let mut sink = Apply::new(&run.model).expect("states");
    run.backward(&mut sink).expect("backward");
    let Run { model, gradients, .. } = &mut run;
    sink.rest(model, gradients).expect("the rest");

    let weights = model.weights.iter().zip(whole.model.weights.iter());
    let states = sink.states.iter().zip(whole.states.iter().flatten());
    for ((tensor, (weight, wanted)), (state, wanted_state)) in model.layout.iter().zip(weights).zip(states) {
        let what = format!("{}: {}", golden.name(), tensor.name());
        assert!(compute_bits(&**device, weight) == compute_bits(&**device, wanted), "{what}");
        let second = |state: &OptimizerState<D>| match state.get(StateBuffer::SecondMoment) {
            Some(StateValues::F32(moment)) => bits(&**device, moment),
            other => panic!("{other:?}"),
        };
        assert!(second(state) == second(wanted_state), "{what}: second moment");
    }
    for gradient in gradients.layers.iter().flat_map(|layer| layer.iter().flatten()) {
        assert!(bits(&**device, gradient).iter().all(|&bits| bits == 0), "{}", golden.name());
    }
}

/// Gradients that are applied inside the backward, and dropped, give the weights and moments of one update over all.
#[test]
fn a_sink_that_applies_gives_the_same_update_as_the_whole() {
    for name in ["tied", "bias", "qwen2"] {
        layer_by_layer_is_the_same_update(&golden(name), &cpu());
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn a_sink_that_applies_gives_the_same_update_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};
    layer_by_layer_is_the_same_update(
        &golden("tied"),
        &Arc::new(CudaDevice::emulated(EmulatorVariant::Plain)),
    );
}

/// The sink that training uses leaves everything as it is.
#[test]
fn kept_gradients_are_those_of_the_trainer() {
    let (golden, device) = (golden("tied"), cpu());
    let mut run = Run::new(&golden, &device);
    run.backward(&mut KeepGradients).expect("backward");
    let (model, scores) = load(&golden, &device, |_| false);
    let mut trainer = trainer(&golden, model).expect("trainer");
    trainer.accumulate_gradients(&training_pairs(&golden.pairs, &scores), None).expect("gradients");
    for (ours, wanted) in run.gradients.iter().flatten().zip(trainer.gradients.iter().flatten()) {
        assert!(bits(&*device, ours) == bits(&*device, wanted));
    }
}
