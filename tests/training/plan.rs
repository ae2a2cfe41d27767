//! The memory that a plan states, against what a run's buffers take: on the CPU device and on the emulated GPU.

use std::path::Path;
use std::sync::Arc;

use mmpo_fast::config::{GradientConfig, MemoryConfig, ShardConfig};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::model::{
    AdaptedModule, AdaptedModules, Generation, HeadChoice, HeadOptions, Llama, LoraSettings, Recompute,
};
use mmpo_fast::objective::{Dpo, Mmpo, Objective, ObjectiveKind};
use mmpo_fast::optimizer::{AdamWStep, MasterWeights, MomentFormat, StateOptions};
use mmpo_fast::plan::{Choice, Footprint, Job, Sizes};
use mmpo_fast::score::Scorer;
use mmpo_fast::train::{MAX_NEW_TOKENS, Trainer, TrainingPair, Workload};

use crate::golden::Golden;

const STEP: AdamWStep =
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, step: 1 };

/// Pairs of the data, of which the last two are evaluated.
const PAIRS: usize = 6;
/// Pairs of a step.
const STEP_PAIRS: usize = 4;

fn golden(name: &str) -> Golden {
    Golden::named(name, PAIRS)
}

fn objectives() -> Vec<Objective> {
    let mmpo = Mmpo {
        beta: 0.05,
        epsilon: 0.9,
        reward_group: 2,
        reward_normalize: true,
        length_normalize: false,
        preference_weight: 0.0,
        entropy_weight: 0.05,
    };
    let dpo = Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 });
    let sft = (ObjectiveKind::from_name("sft").unwrap().descriptor().build)(&dpo.settings());
    vec![Objective::Mmpo(mmpo), dpo, sft]
}

fn loras() -> [Option<LoraSettings>; 3] {
    let lora = |modules: &[AdaptedModule], dropout| LoraSettings {
        modules: AdaptedModules::of(modules.iter().copied()),
        rank: 4,
        alpha: 4.0,
        dropout,
        rslora: false,
    };
    [
        None,
        Some(lora(&[AdaptedModule::Query, AdaptedModule::Value], 0.0)),
        Some(lora(&AdaptedModule::ALL, 0.01)),
    ]
}

/// Every combination of states, master copy, recomputation and gradients.
fn memories() -> Vec<MemoryConfig> {
    let mut all = Vec::new();
    for moments in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit] {
        for master in [MasterWeights::F32, MasterWeights::Split, MasterWeights::None] {
            for recompute in [Recompute::None, Recompute::Selective, Recompute::Layer] {
                for gradients in [GradientConfig::F32, GradientConfig::Bf16, GradientConfig::Layer] {
                    let states = StateOptions { moments, master };
                    all.push(MemoryConfig { states, recompute, gradients, ..MemoryConfig::default() });
                }
            }
        }
    }
    all
}

fn job(golden: &Golden, model: &Llama<impl Device>, lora: Option<LoraSettings>, objective: Objective) -> Job {
    Job {
        model: model.config.clone(),
        reference: None,
        lora,
        objective,
        pairs_per_step: STEP_PAIRS,
        positions: golden.pairs.iter().map(|pair| pair.positions()).max().unwrap(),
        prompts: vec![golden.pairs[0].prompt.len()],
        place: None,
    }
}

fn answer<D: Device>(model: &Llama<D>, golden: &Golden) {
    let mut generation = Generation::start(model, &golden.pairs[0].prompt, MAX_NEW_TOKENS).expect("prompt");
    generation.push(1).expect("token");
}

/// Does on `device` what a run does, a step included where one is wanted, and compares.
fn compare<D: Device>(
    device: D,
    golden: &Golden,
    (objective, lora, choice): (Objective, Option<LoraSettings>, Choice),
    computes: bool,
) {
    let what =
        format!("{} {:?} {:?} {choice:?}", golden.name(), objective.kind(), lora.map(|lora| lora.modules));
    let planned = Arc::new(device.planned(None).expect("planned"));
    let device = Arc::new(device);
    let folder = mmpo_fast::checkpoint::ModelFolder::open(&golden.folder.join("model")).expect("model");
    let (training, evaluation) = golden.pairs.split_at(STEP_PAIRS);
    let positions = golden.pairs.iter().map(|pair| pair.positions()).max().unwrap();
    let mut model = Llama::load(Arc::clone(&device), &folder, positions + MAX_NEW_TOKENS).expect("weights");
    let job = job(golden, &model, lora, objective);
    let sizes = Sizes::of(training, evaluation, &objective, (STEP_PAIRS, choice.token_budget));
    let footprint = Footprint::on(&planned, &job, &choice, &sizes).expect("footprint");

    for (scores, pairs) in [
        (objective.needs_reference(), training),
        (objective.sides() == mmpo_fast::data::Sides::Both, evaluation),
    ] {
        if scores {
            let mut scorer = Scorer::new(&model, pairs, choice.token_budget).expect("scorer");
            if computes {
                scorer.run(false, |_| ()).expect("scores");
            }
        }
    }
    if let Some(settings) = lora {
        model.adapt(settings, |tensor| Ok(mmpo_fast::model::initial_values(1, tensor))).expect("adapters");
    }
    match computes {
        true => answer(&model, golden),
        false => drop(Generation::buffers(&model, job.prompts[0], MAX_NEW_TOKENS).expect("buffers")),
    }
    let workload = Workload::plan(&golden.pairs, &objective, STEP_PAIRS, choice.token_budget);
    let workload = Workload { head: choice.head, memory: choice.memory, ..workload };
    let mut trainer = Trainer::new(model, objective, workload).expect("trainer");
    if computes {
        let training: Vec<_> = training
            .iter()
            .map(|pair| TrainingPair { pair, reference: mmpo_fast::objective::ReferencePair::default() })
            .collect();
        trainer.evaluate(&training).expect("evaluation");
        trainer.step(&training, STEP, None).expect("step");
        answer(&trainer.model, golden);
    }
    let measured = device.memory().peak;
    if !computes {
        Generation::buffers(&trainer.model, job.prompts[0], MAX_NEW_TOKENS).expect("buffers");
    }
    let measured = measured.max(device.memory().peak);
    assert_eq!(footprint.peak, measured, "{what}: planned and measured");
    assert_eq!(footprint.parts, device.memory_counter().parts_at_peak(), "{what}: parts");
    let sum: usize = footprint.parts.iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(sum, footprint.peak, "{what}: the parts are the whole");
    assert_eq!(footprint.head, trainer.head_plan(), "{what}: head");
    assert!(footprint.taken >= footprint.peak, "{what}: {footprint:?}");
}

fn choice(memory: MemoryConfig, token_budget: usize) -> Choice {
    Choice { memory, token_budget, head: HeadOptions::default() }
}

/// The budget that takes a step in one micro-batch, and one that takes a pair at a time.
const BUDGETS: [usize; 2] = [1 << 20, 1];

fn fits(memory: MemoryConfig, budget: usize) -> bool {
    memory.gradients != GradientConfig::Layer || budget > 1
}

#[test]
fn a_plan_states_the_memory_of_a_run_on_the_cpu() {
    let golden = golden("bias");
    let mut number = 0;
    for objective in objectives() {
        for lora in loras() {
            for memory in memories() {
                for budget in BUDGETS.into_iter().filter(|&budget| fits(memory, budget)) {
                    let cpu = CpuDevice::new(Some(2)).expect("the CPU device starts");
                    // Every combination makes its buffers; every seventh also computes with them, so that each option is among
                    // them with each other one.
                    compare(cpu, &golden, (objective, lora, choice(memory, budget)), number % 7 == 0);
                    number += 1;
                }
            }
        }
    }
}

/// The head's modes, a limit of memory that it must keep to, other numbers of threads, and a head that is tied.
#[test]
fn a_plan_follows_the_head_the_threads_and_the_limit() {
    for name in ["tied", "base"] {
        let golden = golden(name);
        for mode in [HeadChoice::Auto, HeadChoice::Main, HeadChoice::Recompute] {
            for threads in [1, 3] {
                let head = HeadOptions { mode, workspace: 1 << 16 };
                let choice = Choice { head, ..choice(MemoryConfig::default(), 150) };
                let cpu = CpuDevice::new(Some(threads)).expect("the CPU device starts");
                compare(cpu, &golden, (objectives()[0], None, choice), true);
            }
        }
    }
}

#[cfg(mmpo_emulated)]
#[test]
fn a_plan_states_the_memory_of_a_run_on_the_emulated_gpu() {
    use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant, KernelPath};
    let golden = golden("bias");
    for path in [KernelPath::Portable, KernelPath::Hopper] {
        let device = || CudaDevice::emulated(EmulatorVariant::Plain).with_path(path);
        for objective in objectives() {
            for lora in loras() {
                for memory in memories() {
                    for budget in BUDGETS.into_iter().filter(|&budget| fits(memory, budget)) {
                        compare(device(), &golden, (objective, lora, choice(memory, budget)), false);
                    }
                }
            }
        }
        // What the buffers are for must also be all that a step takes.
        for (objective, lora) in objectives().into_iter().zip(loras()) {
            let memory = memories()[objective.needs_reference() as usize * 7];
            compare(device(), &golden, (objective, lora, choice(memory, 1 << 20)), true);
        }
    }
}

/// 64 ranks with a part of Llama-3-8B's weights each, and of another reference's: at its most a rank takes less than the weights of one of
/// the two models.
#[test]
fn a_rank_with_a_part_of_the_weights_never_holds_the_whole() {
    use mmpo_fast::bench::shapes::{self, Lengths};
    use mmpo_fast::device::GroupPlace;
    use mmpo_fast::device::cuda::{CudaDevice, KernelPath};
    let model = shapes::model("llama-3-8b", None).unwrap();
    let whole = 2 * model.tensors().iter().map(|tensor| tensor.values()).sum::<usize>();
    let pairs = mmpo_fast::plan::largest_pairs(1, Lengths { prompt: 64, chosen: 64, rejected: 64 });
    let objective = objectives()[1];
    let job = Job {
        model: model.clone(),
        reference: Some(model),
        lora: None,
        objective,
        pairs_per_step: 64,
        positions: 128,
        prompts: vec![64],
        place: Some(GroupPlace { rank: 63, ranks: 64 }),
    };
    let sizes = Sizes::of(&pairs, &pairs, &objective, (64, 256));
    let peak = |shard| {
        let memory = MemoryConfig { shard, recompute: Recompute::Layer, ..MemoryConfig::default() };
        let device = Arc::new(CudaDevice::planned_gpu(KernelPath::Hopper, true));
        Footprint::on(&device, &job, &choice(memory, 256), &sizes).unwrap().peak
    };
    let taken = peak(ShardConfig::Weights);
    assert!(taken < whole, "{taken} bytes, and a model has {whole}");
    assert!(peak(ShardConfig::Gradients) > 2 * whole, "the weights of both");
}

/// The sizes of the paper's four models, as their published `config.json` have them.
fn paper_model(recipe: &str) -> mmpo_fast::model::LlamaConfig {
    let names = ["smollm2-135m", "smollm2-360m", "llama-3.2-1b", "llama-3-8b"];
    let name = names.into_iter().find(|name| recipe.starts_with(name));
    let name = name.unwrap_or_else(|| panic!("{recipe} is of no model of benches/shapes.json"));
    mmpo_fast::bench::shapes::model(name, None).unwrap()
}

/// The most memory that a recipe's run takes on a GPU, whatever the pairs within its lengths.
fn recipe_memory(path: &Path) -> usize {
    use mmpo_fast::bench::shapes::Lengths;
    use mmpo_fast::config;
    use mmpo_fast::device::cuda::{CudaDevice, KernelPath};

    let placed = "model = \"m\"\ndata = \"d.jsonl\"\noutput = \"o\"\n";
    let text = std::fs::read_to_string(path).unwrap() + placed;
    let run = config::resolve(config::recipe::parse(&text, path).unwrap(), None, false).unwrap();
    let (prompt, response) =
        (run.limits.max_prompt_length, run.limits.max_length - run.limits.max_prompt_length);
    let lengths = Lengths { prompt, chosen: response, rejected: response };
    let pairs_per_step = run.pairs_per_step(usize::MAX);
    let pairs = mmpo_fast::plan::largest_pairs(pairs_per_step, lengths);
    let job = Job {
        model: paper_model(&path.file_name().unwrap().to_string_lossy()),
        reference: None,
        lora: run.lora,
        objective: run.objective,
        pairs_per_step,
        positions: run.limits.max_length,
        prompts: vec![prompt],
        place: None,
    };
    let budget = run.batch.tokens_per_micro_batch;
    let sizes = Sizes::of(&pairs, &[], &run.objective, (pairs_per_step, budget));
    assert_eq!(sizes.training.tokens, budget, "a micro-batch is full: {sizes:?}");
    let choice = Choice { memory: run.memory, token_budget: budget, head: run.head };
    let taken = [KernelPath::Portable, KernelPath::Hopper].map(|path| {
        let device = Arc::new(CudaDevice::planned_gpu(path, true));
        Footprint::on(&device, &job, &choice, &sizes).unwrap().taken
    });
    taken.into_iter().max().unwrap()
}

#[test]
fn recipes_state_the_memory_that_a_plan_states() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut wrong = Vec::new();
    for model in ["smollm2-135m", "smollm2-360m", "llama-3.2-1b", "llama-3-8b"] {
        for objective in ["mmpo", "dpo", "simpo"] {
            let path = recipes.join(format!("{model}-{objective}.toml"));
            let stated =
                format!("# Memory: at most {} on a GPU", mmpo_fast::plan::size(recipe_memory(&path)));
            if !std::fs::read_to_string(&path).unwrap().contains(&stated) {
                wrong.push(format!("{model}-{objective}: {stated}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The values of the authors' runs: docs of the paper name learning rates for each model and objective, and adapters.
#[test]
fn recipes_have_the_values_of_the_paper() {
    use mmpo_fast::config;
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let attention = [AdaptedModule::Query, AdaptedModule::Key, AdaptedModule::Value, AdaptedModule::Output];
    for (model, rates, adapted) in [
        ("smollm2-135m", [5e-4, 5e-4, 1e-4], &[][..]),
        ("smollm2-360m", [5e-4, 5e-5, 1e-4], &[]),
        ("llama-3.2-1b", [5e-4, 5e-4, 5e-4], &AdaptedModule::ALL),
        ("llama-3-8b", [1e-4, 1e-5, 1e-4], &attention),
    ] {
        for (objective, rate) in ["mmpo", "dpo", "simpo"].into_iter().zip(rates) {
            let name = format!("{model}-{objective}.toml");
            let path = recipes.join(&name);
            let placed = "model = \"m\"\ndata = \"d.jsonl\"\noutput = \"o\"\n";
            let text = std::fs::read_to_string(&path).unwrap() + placed;
            let run = config::resolve(config::recipe::parse(&text, &path).unwrap(), None, false).unwrap();
            assert_eq!(run.objective.name(), objective, "{name}");
            assert_eq!(run.optimizer.learning_rate, rate, "{name}");
            assert_eq!(run.batch.pairs_per_step, Some(128), "{name}");
            assert_eq!((run.limits.max_length, run.limits.max_prompt_length), (2312, 1800), "{name}");
            assert_eq!((run.seed, run.schedule.warmup), (42, config::Warmup::Ratio(0.1)), "{name}");
            let is_lora = !adapted.is_empty();
            assert_eq!(run.schedule.epochs, if model == "llama-3-8b" { 2.0 } else { 5.0 }, "{name}");
            let states = if is_lora { MomentFormat::EightBit } else { MomentFormat::F32 };
            assert_eq!(run.memory.states.moments, states, "{name}");
            let lora = is_lora.then(|| LoraSettings {
                modules: AdaptedModules::of(adapted.iter().copied()),
                rank: 64,
                alpha: 64.0,
                dropout: 0.01,
                rslora: false,
            });
            assert_eq!(run.lora, lora, "{name}");
            if let Some(ratio) = text.lines().find_map(|line| line.strip_prefix("gamma_beta_ratio = ")) {
                assert_eq!(ratio, if is_lora { "1.0" } else { "1.6" }, "{name}");
            }
        }
    }
}
