//! A few steps of a trainer, alone or as one of several ranks, and what came of them.

use std::path::Path;
use std::sync::Arc;

use mmpo_fast::checkpoint::run_state::{self, RngPosition, RunIdentity};
use mmpo_fast::checkpoint::{BackgroundSaves, Checkpoint, ModelFolder, RunState};
use mmpo_fast::config::{MemoryConfig, ShardConfig};
use mmpo_fast::device::{Device, GroupPlace, StorageType};
use mmpo_fast::model::{AdaptedModule, AdaptedModules, Llama, LoraSettings, initial_values};
use mmpo_fast::objective::{Dpo, Objective};
use mmpo_fast::optimizer::{AdamWStep, MasterWeights, MomentFormat, StateOptions};
use mmpo_fast::ranks::RankGroup;
use mmpo_fast::score::Scorer;
use mmpo_fast::train::{Trainer, TrainingPair, Workload, restore, save_beside, save_weights};

use super::golden::{self, Golden};
use super::ranks::{On, Rank};

const STEPS: u32 = 3;
/// Tokens of a micro-batch: the pairs of a rank are several of them, and not as many on each rank.
const TOKEN_BUDGET: usize = 150;
/// Clips the gradients of every case.
const MAX_NORM: f64 = 0.5;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    Mmpo,
    Dpo,
    Sft,
}

/// The states that are tried: those of the default, and smaller ones in bf16.
pub const STATES: [StateOptions; 3] = [
    StateOptions { moments: MomentFormat::F32, master: MasterWeights::F32 },
    StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None },
    StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::Split },
];

/// What is trained.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub shard: ShardConfig,
    pub goal: Goal,
    pub lora: bool,
    /// What AdamW keeps: one of [`STATES`].
    pub states: StateOptions,
    pub pairs: usize,
    /// Adapters drop values, and all pairs are the first one.
    pub dropout: bool,
}

impl Case {
    pub fn new(shard: ShardConfig, goal: Goal) -> Self {
        Case { shard, goal, lora: false, states: StateOptions::default(), pairs: 6, dropout: false }
    }

    pub fn text(&self) -> String {
        let Case { shard, goal, lora, states, pairs, dropout } = self;
        let states = STATES.iter().position(|one| one == states).unwrap();
        format!("{shard:?} {goal:?} {lora} {states} {pairs} {dropout}")
    }

    pub fn parse(text: &str) -> Self {
        use ShardConfig::{Gradients, None as Whole, States, Weights};
        let words: Vec<&str> = text.split(' ').collect();
        let [shard, goal, lora, states, pairs, dropout] = words[..] else { panic!("{text}") };
        let shards = [Whole, States, Gradients, Weights];
        let goals = [Goal::Mmpo, Goal::Dpo, Goal::Sft];
        Case {
            shard: *shards.iter().find(|one| format!("{one:?}") == shard).unwrap(),
            goal: *goals.iter().find(|one| format!("{one:?}") == goal).unwrap(),
            lora: lora.parse().unwrap(),
            states: STATES[states.parse::<usize>().unwrap()],
            pairs: pairs.parse().unwrap(),
            dropout: dropout.parse().unwrap(),
        }
    }

    fn objective(&self) -> Objective {
        match self.goal {
            Goal::Sft => Objective::Sft,
            Goal::Dpo => Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 }),
            Goal::Mmpo => golden::OBJECTIVE,
        }
    }
}

/// What a run does with the run's folder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CheckpointUse {
    /// Saves before the last step.
    Save,
    /// Takes the last step from what was saved.
    Resume,
}

impl CheckpointUse {
    pub fn name(self) -> &'static str {
        match self {
            CheckpointUse::Save => "save",
            CheckpointUse::Resume => "resume",
        }
    }

    pub fn parse(name: &str) -> Self {
        *[CheckpointUse::Save, CheckpointUse::Resume].iter().find(|one| one.name() == name).unwrap()
    }
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// Loss, norm, tokens of each step, the losses of its pairs, and those of an evaluation.
    pub numbers: Vec<f64>,
    /// All values of the model, and of its adapters.
    pub weights: Vec<f32>,
}

impl Results {
    pub fn write(&self, folder: &Path, rank: usize) {
        std::fs::write(folder.join(format!("numbers-{rank}")), bytemuck::cast_slice(&self.numbers)).unwrap();
        std::fs::write(folder.join(format!("weights-{rank}")), bytemuck::cast_slice(&self.weights)).unwrap();
    }

    pub fn read(folder: &Path, rank: usize) -> Self {
        let bytes = |name: &str| std::fs::read(folder.join(format!("{name}-{rank}"))).unwrap();
        let (numbers, weights) = (bytes("numbers"), bytes("weights"));
        let numbers = numbers.chunks_exact(8).map(|eight| f64::from_le_bytes(eight.try_into().unwrap()));
        let weights = weights.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
        Results { numbers: numbers.collect(), weights: weights.collect() }
    }

    pub fn assert_close(&self, other: &Results, on: On, what: &str) {
        let bound = if on == On::Cpu { 2e-5 } else { 1e-2 };
        assert_eq!(self.numbers.len(), other.numbers.len(), "{what}");
        for (index, (one, two)) in self.numbers.iter().zip(&other.numbers).enumerate() {
            let error = (one - two).abs() / one.abs().max(0.1);
            assert!(error <= bound, "{what}: number {index} is {two}, and {one} with one rank");
        }
        self.assert_weights_close(other, on, what);
    }

    pub fn assert_weights_close(&self, other: &Results, on: On, what: &str) {
        let bound = if on == On::Cpu { 2e-5 } else { 8e-3 };
        assert_eq!(self.weights.len(), other.weights.len(), "{what}");
        for (index, (one, two)) in self.weights.iter().zip(&other.weights).enumerate() {
            let error = (one - two).abs() / one.abs().max(0.1);
            assert!(error <= bound, "{what}: weight {index} is {two}, and {one} with one rank");
        }
    }
}

/// A large epsilon, so that an update does not make much of a gradient that is nothing but rounding.
fn adamw(step: u32) -> AdamWStep {
    AdamWStep { learning_rate: 1e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-2, weight_decay: 0.01, step }
}

/// Bytes of the trainer and of what was made before it, on a device that only counts.
fn planned_bytes<D: Device>(
    device: &D,
    golden: &Golden,
    case: &Case,
    workload: Workload,
    place: GroupPlace,
) -> usize {
    let planned = Arc::new(device.planned(None).unwrap());
    let folder = ModelFolder::open(&golden.folder.join("model")).unwrap();
    let storage = folder.config().dtype.unwrap_or(StorageType::Bf16);
    let mut model = Llama::planned(&planned, folder.config().clone(), 2048, storage).unwrap();
    if case.lora {
        model.adapt(lora(case), |_| Ok(vec![0.0])).unwrap();
    }
    drop(Scorer::new(&model, &golden.pairs, 700).unwrap());
    let join = || planned.join_group(&planned.new_group().unwrap(), place).unwrap();
    let group =
        (place.ranks > 1).then(|| Arc::new(RankGroup { device: Arc::clone(&planned), communicator: join() }));
    let _trainer = Trainer::with_group(model, case.objective(), workload, group).unwrap();
    planned.memory().now
}

fn lora(case: &Case) -> LoraSettings {
    let modules = AdaptedModules::of(AdaptedModule::ALL);
    let dropout = if case.dropout { 0.3 } else { 0.0 };
    LoraSettings { modules, rank: 8, alpha: 16.0, dropout, rslora: false }
}

fn model<D: Device>(golden: &Golden, device: &Arc<D>, case: &Case) -> Llama<D> {
    let mut model = golden.load(device);
    if case.lora {
        // Both matrices have values, so that both have gradients.
        let values = |tensor: &mmpo_fast::model::TensorSpec| {
            let renamed =
                mmpo_fast::model::TensorSpec::new(tensor.name.replace("lora_B", "lora_A"), &tensor.shape);
            Ok(initial_values(3, &renamed))
        };
        model.adapt(lora(case), values).unwrap();
    }
    model
}

/// The ranks of a test as this one reaches them.
fn group_of<D: Device>(rank: &Rank, device: &Arc<D>) -> Arc<RankGroup<D>> {
    Arc::new(RankGroup { device: Arc::clone(device), communicator: rank.join(&**device) })
}

/// Model and pairs of a case.
fn golden_of<D: Device>(case: &Case) -> Golden {
    // The kernels know heads of 64 values, and not those of the first model.
    let name = if D::IS_CPU { "base" } else { "tied" };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    let mut golden = Golden::read(&folder);
    golden.pairs.truncate(case.pairs);
    assert_eq!(golden.pairs.len(), case.pairs);
    if case.dropout {
        golden.pairs = vec![golden.pairs[0].clone(); case.pairs];
    }
    golden
}

/// The gradients of the second rank are too large for f32 while all losses are finite: its `beta` is. Policy and reference are the
/// same model, so that the margins are next to nothing.
pub fn break_gradients<D: Device>(device: &Arc<D>, case: &Case, rank: &Rank) {
    const BROKEN: usize = 1;
    let golden = golden_of::<D>(case);
    let model = model(&golden, device, case);
    let references = golden::score(&model, &golden.pairs);
    let scored = golden.pairs.iter().zip(references);
    let pairs: Vec<TrainingPair<'_>> =
        scored.map(|(pair, score)| TrainingPair { pair, reference: score.reference() }).collect();
    let beta = if rank.place.rank == BROKEN { 3e38 } else { 0.1 };
    let objective = Objective::Dpo(Dpo { beta, label_smoothing: 0.0 });
    let workload = Workload::plan(&golden.pairs, &objective, pairs.len(), TOKEN_BUDGET);
    let memory = MemoryConfig { shard: case.shard, ..MemoryConfig::default() };
    let workload = Workload { memory, ..workload };
    let group = Some(group_of(rank, device));
    let mut trainer = Trainer::with_group(model, objective, workload, group).unwrap();
    assert_eq!(trainer.broken_rank(), None);
    let error = trainer.accumulate_gradients(&pairs, Some(MAX_NORM)).unwrap_err();
    let text = error.to_string();
    assert!(error.exit_code() == 7 && text.contains("in no single pair's loss"), "{text}");
    assert_eq!(trainer.broken_rank(), Some(BROKEN), "{text}");
}

pub fn train<D: Device>(
    device: &Arc<D>,
    case: &Case,
    rank: Option<&Rank>,
    run: Option<(&Path, CheckpointUse)>,
) -> Results {
    let golden = golden_of::<D>(case);
    let model = model(&golden, device, case);
    let references = golden::score(&model, &golden.pairs);
    let pairs: Vec<TrainingPair<'_>> = golden
        .pairs
        .iter()
        .zip(references)
        .map(|(pair, score)| TrainingPair { pair, reference: score.reference() })
        .collect();
    let objective = case.objective();
    let workload = Workload::plan(&golden.pairs, &objective, pairs.len(), TOKEN_BUDGET);
    let memory = MemoryConfig { shard: case.shard, states: case.states, ..MemoryConfig::default() };
    let workload = Workload { memory, ..workload };
    let group = rank.map(|rank| group_of(rank, device));
    let mut trainer = Trainer::with_group(model, objective, workload, group).unwrap();
    let place = rank.map_or(GroupPlace { rank: 0, ranks: 1 }, |rank| rank.place);
    let planned = planned_bytes(device.as_ref(), &golden, case, workload, place);
    assert_eq!(device.memory().now, planned, "bytes of rank {} and those planned", place.rank);

    let mut first = 1;
    if let Some((path, CheckpointUse::Resume)) = run {
        let checkpoint = Checkpoint::open(&run_state::latest(path).unwrap().unwrap()).unwrap();
        first = checkpoint.state().step as u32 + 1;
        restore(&checkpoint, &mut trainer).unwrap();
    }
    let mut numbers = Vec::new();
    for step in first..=STEPS {
        // The last rank asks to stop after the second step.
        trainer.request_stop(step == 2 && place.rank + 1 == place.ranks);
        let result = trainer.step(&pairs, adamw(step), Some(MAX_NORM)).unwrap();
        assert_eq!(result.stop_requested, step == 2);
        assert_eq!(result.ranks.len(), if place.ranks > 1 { place.ranks } else { 0 });
        numbers.extend([result.loss, f64::from(result.gradient_norm), result.tokens as f64]);
        numbers.extend(result.outcomes.iter().map(|outcome| f64::from(outcome.loss)));
        if let (Some((path, CheckpointUse::Save)), true) = (run, step + 1 == STEPS) {
            save(path, &mut trainer, step);
        }
    }
    let (outcomes, loss) = trainer.evaluate(&pairs).unwrap();
    numbers.push(loss);
    numbers.extend(outcomes.iter().map(|outcome| f64::from(outcome.logp_chosen)));
    numbers.push(loss);
    let weights = weights(&mut trainer);
    save_and_compare(&mut trainer, &golden, place, &weights);
    Results { numbers, weights }
}

fn save<D: Device>(run: &Path, trainer: &mut Trainer<D>, step: u32) {
    let state = RunState {
        step: step.into(),
        epoch: 0,
        pairs_seen: 0,
        rng: RngPosition::default(),
        identity: RunIdentity::default(),
    };
    let mut saves = BackgroundSaves::default();
    save_beside(&mut saves, run, trainer, &state, (1, &[])).unwrap();
    // The save goes on beside the next step.
}

/// All values of the model, layer by layer.
fn weights<D: Device>(trainer: &mut Trainer<D>) -> Vec<f32> {
    let device = Arc::clone(&trainer.model.device);
    let mut all = Vec::new();
    let mut add = |weight: &mmpo_fast::device::ComputeBuffer<D>, len: usize| {
        let start = all.len();
        all.resize(start + len, 0.0);
        device.download_compute(&mut all[start..], weight, 0).unwrap();
    };
    let layout = trainer.model.layout.clone();
    for (weight, tensor) in trainer.model.weights.outside_layers().zip(layout.outside_layers()) {
        add(weight, tensor.values());
    }
    for (layer, tensors) in layout.layers.iter().enumerate() {
        let gathered = trainer.gather_layer(layer).unwrap();
        for (weight, tensor) in gathered.iter().zip(tensors.iter()) {
            add(weight, tensor.values());
        }
    }
    all
}

/// The model folder that the ranks write has the weights of the model, in bf16.
fn save_and_compare<D: Device>(
    trainer: &mut Trainer<D>,
    golden: &Golden,
    place: GroupPlace,
    weights: &[f32],
) {
    if trainer.model.lora().is_some() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model");
    let mut companions = mmpo_fast::checkpoint::CompanionFiles::default();
    companions.set("config.json", std::fs::read(golden.folder.join("model/config.json")).unwrap());
    save_weights(&target, trainer, &companions).unwrap();
    assert_eq!(target.exists(), place.rank == 0);
    if place.rank > 0 {
        return;
    }
    let saved = ModelFolder::open(&target).unwrap();
    let layout = &trainer.model.layout;
    let mut rest = weights;
    for tensor in layout.outside_layers().chain(layout.layers.iter().flat_map(|layer| layer.iter())) {
        for (_, part) in tensor.offsets() {
            let (values, after) = rest.split_at(part.values());
            let rounded: Vec<u8> = values
                .iter()
                .flat_map(|&value| half::bf16::from_f32(value).to_bits().to_le_bytes())
                .collect();
            assert!(saved.tensor(&part.name, &part.shape).unwrap().bytes == rounded, "{}", part.name);
            rest = after;
        }
    }
    assert!(rest.is_empty());
}
