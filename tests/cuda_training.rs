//! The CUDA device under the whole model: scoring, gradients and three training steps agree with the CPU device within
//! what bf16 weights and activations allow, and two runs give the same bits. On the emulated GPU, and on a real one
//! where there is one. So does the CPU device that stores bf16.

#[cfg(mmpo_gpu_kernels)]
mod ptx_machine;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::config::{MemoryConfig, OffloadConfig};
use mmpo_fast::data::TokenizedPair;
use mmpo_fast::device::Device;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::cuda::{self, CudaDevice, GemmChoice, KernelPath};
use mmpo_fast::model::{
    AdaptedModule, AdaptedModules, HeadChoice, HeadOptions, Llama, LoraSettings, TensorSpec, initial_values,
};
use mmpo_fast::objective::{Mmpo, Objective};
use mmpo_fast::optimizer::AdamWStep;
use mmpo_fast::score::Scorer;
use mmpo_fast::train::{Trainer, TrainingPair, Workload};
use serde_json::Value;

/// The committed models whose heads the CUDA kernels know; with and without tied embeddings, biases on all
/// projections and on some, linear and llama3 rope.
const MODELS: [&str; 5] = ["tied", "bias", "rope_linear", "rope_llama3", "qwen2"];
const STEPS: u32 = 3;
/// Tokens of a micro-batch: a step takes several.
const TOKEN_BUDGET: usize = 400;

/// Every part of the loss at work, and no weight saturated.
const OBJECTIVE: Objective = Objective::Mmpo(Mmpo {
    beta: 0.05,
    epsilon: 0.9,
    reward_group: 2,
    reward_normalize: true,
    length_normalize: true,
    preference_weight: 0.5,
    entropy_weight: 0.05,
});

/// The committed goldens; `MMPO_FAST_GOLDENS` names them where the test binary runs away from its source.
fn goldens() -> PathBuf {
    match std::env::var_os("MMPO_FAST_GOLDENS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"),
    }
}

/// Results of a run.
struct Run {
    /// `logp_chosen, logp_rejected, entropy_chosen, entropy_rejected` of each pair, before and after training.
    scores: [Vec<[f64; 4]>; 2],
    losses: Vec<f64>,
    gradient_norms: Vec<f32>,
    /// The gradients of the first step, tensor by tensor.
    gradients: Vec<Vec<f32>>,
}

fn golden_pairs(model: &str) -> Vec<TokenizedPair> {
    let path = goldens().join(model).join("golden.json");
    let text = std::fs::read_to_string(path).expect("golden.json");
    let json: Value = serde_json::from_str(&text).expect("golden.json parses");
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("id") as u32).collect()
    };
    let pairs = json["pairs"].as_array().expect("pairs").iter().enumerate();
    pairs
        .map(|(record, pair)| TokenizedPair {
            record,
            prompt: ids(&pair["prompt_ids"]).into(),
            chosen: ids(&pair["chosen_ids"]).into(),
            rejected: ids(&pair["rejected_ids"]).into(),
        })
        .collect()
}

fn score<D: Device>(model: &Llama<D>, pairs: &[TokenizedPair]) -> Vec<mmpo_fast::score::PairScore> {
    Scorer::new(model, pairs, TOKEN_BUDGET).expect("scorer").run(true, |_| ()).expect("scores")
}

fn numbers(scores: &[mmpo_fast::score::PairScore]) -> Vec<[f64; 4]> {
    scores
        .iter()
        .map(|score| [score.logp_chosen, score.logp_rejected, score.entropy_chosen, score.entropy_rejected])
        .collect()
}

fn run<D: Device>(device: D, model: &str) -> Run {
    run_with(device, model, HeadOptions::default())
}

fn run_with<D: Device>(device: D, model: &str, head: HeadOptions) -> Run {
    run_adapted(device, model, head, None)
}

/// With `lora`, low-rank adapters are trained, whose matrices are both not zero.
fn run_adapted<D: Device>(device: D, model: &str, head: HeadOptions, lora: Option<LoraSettings>) -> Run {
    run_keeping(device, model, (head, lora), MemoryConfig::default())
}

/// With optimiser states in the host's memory.
fn run_offloaded<D: Device>(device: D, model: &str) -> Run {
    let memory = MemoryConfig { offload: OffloadConfig::States, ..MemoryConfig::default() };
    run_keeping(device, model, (HeadOptions::default(), None), memory)
}

fn run_keeping<D: Device>(
    device: D,
    model: &str,
    (head, lora): (HeadOptions, Option<LoraSettings>),
    memory: MemoryConfig,
) -> Run {
    let pairs = golden_pairs(model);
    let folder = goldens().join(model).join("model");
    let folder = ModelFolder::open(&folder).expect("model folder");
    let mut llama = Llama::load(Arc::new(device), &folder, 2048).expect("weights");
    if let Some(lora) = lora {
        llama.adapt(lora, |tensor| Ok(adapter_values(tensor))).expect("adapters");
    }
    let before = score(&llama, &pairs);
    let training: Vec<TrainingPair<'_>> = pairs
        .iter()
        .zip(&before)
        .map(|(pair, score)| TrainingPair { pair, reference: score.reference() })
        .collect();
    let workload = Workload::plan(&pairs, &OBJECTIVE, pairs.len(), TOKEN_BUDGET);
    let workload = Workload { head, memory, ..workload };
    let mut trainer = Trainer::new(llama, OBJECTIVE, workload).expect("trainer");
    let (mut losses, mut gradient_norms, mut gradients) = (Vec::new(), Vec::new(), Vec::new());
    let memory = trainer.device().memory();
    for step in 1..=STEPS {
        let result = trainer.accumulate_gradients(&training, Some(1.0)).expect("gradients");
        losses.push(result.loss);
        gradient_norms.push(result.gradient_norm);
        if step == 1 {
            let trained = trainer.model.layout.iter().filter(|tensor| tensor.trained);
            for (gradient, tensor) in trainer.gradients.iter().flatten().zip(trained) {
                let mut values = vec![0.0; tensor.values()];
                trainer.device().download(&mut values, gradient, 0).expect("download");
                gradients.push(values);
            }
        }
        trainer.update(adamw(step)).expect("update");
        // Buffers and scratch memory are there before the first step: no step takes any.
        assert_eq!(trainer.device().memory(), memory, "step {step}");
    }
    let after = score(&trainer.model, &pairs);
    Run { scores: [numbers(&before), numbers(&after)], losses, gradient_norms, gradients }
}

fn adapter_values(tensor: &TensorSpec) -> Vec<f32> {
    let spec = TensorSpec::new(tensor.name.replace("lora_B", "lora_b"), &tensor.shape);
    initial_values(3, &spec).into_iter().map(|value| 0.5 * value).collect()
}

/// Adapters of all modules, of a rank whose rows are aligned to 16 bytes and of one whose rows are not.
fn lora(rank: usize, dropout: f64) -> LoraSettings {
    let modules = AdaptedModules::of(AdaptedModule::ALL);
    LoraSettings { modules, rank, alpha: 2.0 * rank as f64, dropout, rslora: false }
}

fn adamw(step: u32) -> AdamWStep {
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step }
}

#[track_caller]
fn assert_near(what: &str, cuda: f64, cpu: f64, relative: f64) {
    let error = (cuda - cpu).abs() / cpu.abs().max(1e-6);
    assert!(error <= relative, "{what}: cuda {cuda}, cpu {cpu}, relative error {error:.2e} > {relative:.0e}");
}

/// Relative l2 distance of two vectors, in units of the second.
fn distance(cuda: &[f32], cpu: &[f32]) -> (f64, f64) {
    let square =
        |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let pairs = cuda.iter().zip(cpu);
    let error = square(&mut pairs.map(|(&cuda, &cpu)| f64::from(cuda) - f64::from(cpu)));
    (error, square(&mut cpu.iter().map(|&cpu| f64::from(cpu))))
}

/// bf16 keeps 8 bits, so a value is off by up to 2^-9, and the errors of independent roundings mostly cancel in sums over
/// tokens.
fn compare(model: &str, cuda: &Run, cpu: &Run) {
    for (when, cuda, cpu) in
        [("before", &cuda.scores[0], &cpu.scores[0]), ("after", &cuda.scores[1], &cpu.scores[1])]
    {
        assert_eq!(cuda.len(), cpu.len());
        for (pair, (cuda, cpu)) in cuda.iter().zip(cpu).enumerate() {
            for (column, (&cuda, &cpu)) in cuda.iter().zip(cpu).enumerate() {
                assert_near(&format!("{model} {when}, pair {pair}, score {column}"), cuda, cpu, 5e-3);
            }
        }
    }
    for step in 0..STEPS as usize {
        assert_near(&format!("{model} loss {step}"), cuda.losses[step], cpu.losses[step], 5e-3);
        let norms = (cuda.gradient_norms[step], cpu.gradient_norms[step]);
        assert_near(&format!("{model} norm {step}"), norms.0.into(), norms.1.into(), 2e-2);
    }
    for (tensor, (cuda, cpu)) in cuda.gradients.iter().zip(&cpu.gradients).enumerate() {
        let (error, norm) = distance(cuda, cpu);
        assert!(error <= 3e-2 * norm, "{model} gradient of tensor {tensor}: off by {error:e} of {norm:e}");
    }
}

/// The same numbers, bit for bit.
fn assert_same_bits(first: &Run, second: &Run) {
    assert_eq!(first.scores, second.scores);
    assert_eq!(first.losses, second.losses);
    assert_eq!(first.gradient_norms, second.gradient_norms);
    assert_eq!(first.gradients, second.gradients);
}

fn cpu() -> CpuDevice {
    CpuDevice::new(Some(2)).expect("the CPU device starts")
}

fn cpu_bf16(threads: usize) -> CpuDevice<bf16> {
    CpuDevice::open(Some(threads)).expect("the CPU device starts")
}

/// With the processor's instructions for bf16, where it has them, and without; the same bits at any number of threads.
#[test]
fn the_cpu_in_bf16_trains_as_in_f32() {
    for model in MODELS {
        let reference = run(cpu(), model);
        let first = run(cpu_bf16(2), model);
        compare(model, &first, &reference);
        compare(model, &run(cpu_bf16(2).without_bf16_instructions(), model), &reference);
        assert_same_bits(&first, &run(cpu_bf16(3), model));
    }
    let recompute = HeadOptions { mode: HeadChoice::Recompute, ..HeadOptions::default() };
    compare(MODELS[0], &run_with(cpu_bf16(1), MODELS[0], recompute), &run(cpu(), MODELS[0]));
}

#[test]
fn the_cpu_in_bf16_trains_adapters_as_in_f32() {
    let head = HeadOptions::default();
    for (model, lora) in [("tied", lora(8, 0.1)), ("bias", lora(16, 0.0)), ("rope_linear", lora(3, 0.1))] {
        let reference = run_adapted(cpu(), model, head, Some(lora));
        let first = run_adapted(cpu_bf16(2), model, head, Some(lora));
        compare(model, &first, &reference);
        let without = cpu_bf16(2).without_bf16_instructions();
        compare(model, &run_adapted(without, model, head, Some(lora)), &reference);
        assert_same_bits(&first, &run_adapted(cpu_bf16(1), model, head, Some(lora)));
    }
}

#[cfg(mmpo_emulated)]
fn emulated() -> CudaDevice {
    CudaDevice::emulated(cuda::EmulatorVariant::Plain)
}

#[cfg(mmpo_emulated)]
#[test]
fn the_emulated_gpu_trains_as_the_cpu_does() {
    for model in MODELS {
        compare(model, &run(emulated(), model), &run(cpu(), model));
    }
    // The threads of blocks run in whatever order the host's do.
    assert_same_bits(&run(emulated(), MODELS[0]), &run(emulated(), MODELS[0]));
}

#[cfg(mmpo_emulated)]
#[test]
fn the_emulated_gpu_trains_the_same_bits_with_offloaded_states() {
    assert_same_bits(&run_offloaded(emulated(), MODELS[0]), &run(emulated(), MODELS[0]));
}

/// No other test of this program runs the checked variant, so all of its launches are this one's.
#[cfg(mmpo_emulated)]
#[test]
fn the_optimiser_launches_once_for_all_tensors() {
    let variant = cuda::EmulatorVariant::Checked;
    let pairs = &golden_pairs(MODELS[0])[..1];
    let folder = ModelFolder::open(&goldens().join(MODELS[0]).join("model")).expect("model folder");
    let llama = Llama::load(Arc::new(CudaDevice::emulated(variant)), &folder, 2048).expect("weights");
    let workload = Workload::plan(pairs, &OBJECTIVE, pairs.len(), TOKEN_BUDGET);
    let mut trainer = Trainer::new(llama, OBJECTIVE, workload).expect("trainer");
    let batch = [TrainingPair { pair: &pairs[0], reference: mmpo_fast::objective::ReferencePair::default() }];
    let (done, launches) = variant.count_launches(|| trainer.step(&batch, adamw(1), Some(1.0)));
    done.expect("step");
    let tensors = trainer.gradients.iter().count();
    assert!(tensors > 10, "{tensors}");
    for (launcher, wanted) in [("zero_all", 1), ("gradient_norm", 2), ("adamw", 1)] {
        let launches = launches.iter().filter(|launch| launch.launcher == launcher);
        let launches: u64 = launches.map(|launch| launch.counters.launches).sum();
        assert_eq!(launches, wanted, "{launcher}, {tensors} tensors");
    }
}

/// The same masks on both devices, on both sets of kernels.
#[cfg(mmpo_emulated)]
#[test]
fn the_emulated_gpu_trains_adapters_as_the_cpu_does() {
    let head = HeadOptions::default();
    for (model, path, lora) in [
        ("tied", KernelPath::Portable, lora(8, 0.1)),
        ("bias", KernelPath::Hopper, lora(16, 0.0)),
        ("rope_linear", KernelPath::Portable, lora(3, 0.1)),
    ] {
        let cpu = run_adapted(cpu(), model, head, Some(lora));
        let first = run_adapted(emulated().with_path(path), model, head, Some(lora));
        compare(model, &first, &cpu);
        assert_same_bits(&first, &run_adapted(emulated().with_path(path), model, head, Some(lora)));
    }
}

/// The head keeps no probabilities, and Hopper's kernels run.
#[cfg(mmpo_emulated)]
#[test]
fn the_emulated_gpu_trains_with_a_recomputing_head() {
    let head = HeadOptions { mode: HeadChoice::Recompute, ..HeadOptions::default() };
    let hopper = || emulated().with_path(KernelPath::Hopper);
    compare(MODELS[0], &run_with(hopper(), MODELS[0], head), &run(cpu(), MODELS[0]));
}

/// What nvcc made of the kernels, executed on the host for both targets, each in a process of its own: one with a machine in the
/// driver's place must not look for a GPU.
#[cfg(mmpo_gpu_kernels)]
#[test]
fn the_ptx_trains_as_the_cpu_does() {
    if let Some(device) = ptx_machine::device_of_environment() {
        return compare(MODELS[0], &run(device, MODELS[0]), &run(cpu(), MODELS[0]));
    }
    if !ptx_machine::available() {
        return;
    }
    for target in ["sm_90a", "sm_80"] {
        let output = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "the_ptx_trains_as_the_cpu_does"])
            .env(ptx_machine::TARGET, target)
            .output()
            .expect("this program runs");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && text.contains("1 passed"), "{target}:\n{text}");
    }
}

#[test]
fn a_real_gpu_trains_as_the_cpu_does() {
    let missing = match cuda::gpus() {
        Ok(gpus) if !gpus.is_empty() => None,
        Ok(_) => Some("no GPU".to_owned()),
        Err(error) => Some(format!("no GPU ({error})")),
    };
    if let Some(missing) = missing {
        assert!(std::env::var_os("MMPO_FAST_REQUIRE_GPU").is_none(), "{missing}");
        return eprintln!("{missing}: skipped");
    }
    let open = || CudaDevice::open(0).expect("the first GPU opens");
    // It stays open, so that the others share its context: to make one takes longer than a run.
    let _kept = open();
    for model in MODELS {
        let first = run(open(), model);
        compare(model, &first, &run(cpu(), model));
        assert_same_bits(&first, &run(open(), model));
    }
    assert_same_bits(&run_offloaded(open(), MODELS[0]), &run(open(), MODELS[0]));
    let first = run_adapted(open(), "bias", HeadOptions::default(), Some(lora(16, 0.1)));
    compare("bias", &first, &run_adapted(cpu(), "bias", HeadOptions::default(), Some(lora(16, 0.1))));
    // Where the device would take the vendor's products: both sets of our own kernels, and the head that keeps nothing.
    let head = HeadOptions { mode: HeadChoice::Recompute, ..HeadOptions::default() };
    let reference = run(cpu(), MODELS[0]);
    for path in [open().path(), KernelPath::Portable] {
        let ours = || open().with_path(path).with_gemm_choice(GemmChoice::Ours);
        let first = run_with(ours(), MODELS[0], head);
        compare(MODELS[0], &first, &reference);
        assert_same_bits(&first, &run_with(ours(), MODELS[0], head));
        compare(MODELS[0], &run(ours(), MODELS[0]), &reference);
    }
}
