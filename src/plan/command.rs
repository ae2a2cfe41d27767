//! `mmpo-fast plan`: the account of a run, from config, tokenizer and pairs alone.

use std::path::PathBuf;
use std::sync::Arc;

use half::bf16;

use super::account::{Account, Models};
use super::exchange::{Exchange, Links, RankStep, shardings};
use super::footprint::{Choice, Footprint};
use super::offload::Copies;
use super::rates::{self, GPUS, GpuKind, Rates};
use super::search::Tried;
use super::show;
use super::work::{Volume, Work};
use crate::bench::shapes::Lengths;
use crate::checkpoint::AdapterFolder;
use crate::config::{MemoryConfig, MemoryLimit, RunConfig};
use crate::context;
use crate::data::{PairCache, PairSource, TextEncoder, TokenizedPair, Treatment, load_cached};
use crate::demo::Demo;
use crate::device::cpu::CpuDevice;
use crate::device::cuda::{self, CudaDevice, KernelPath};
use crate::device::{Device, DeviceChoice, DeviceTask, GroupPlace, LargeBlocks, Precision};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::host_memory::HostMemory;
use crate::interrupt;
use crate::model::LlamaConfig;
use crate::report::print_result;
use crate::train::{Plan, pair_sources};

/// Combinations that fit which are shown.
const SHOWN: usize = 3;

/// Everything `plan` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanConfig {
    /// The run that is planned.
    pub run: RunConfig,
    /// The GPU that is planned for, by a part of its name, whether it is here or not.
    pub gpu: Option<String>,
    /// Bytes of device memory per second, in 10^9, in place of the GPU's.
    pub bandwidth: Option<f64>,
    /// Bytes per second and direction of the bus, in 10^9, in place of the GPU's.
    pub bus: Option<f64>,
    /// The largest pair that there can be, in place of pairs.
    pub largest_pair: Option<Lengths>,
    /// How the ranks of the run are connected, where there are several.
    pub links: Option<Links>,
    /// Whether the account is printed as JSON.
    pub json: bool,
}

/// Prints the account of a run.
///
/// # Errors
/// Those of config, tokenizer and pairs; [`Error::Config`] for a GPU that is not known.
pub fn run(config: &PlanConfig) -> Result<()> {
    interrupt::install()?;
    let material = Material::read(config)?;
    let target = Target::of(config)?;
    let mut run = RunConfig { limits: material.limits, ..config.run.clone() };
    if config.largest_pair.is_some() {
        run.batch.pairs_per_step = Some(material.training.len());
    }
    let run = &run;
    let plan = Plan::new(run, material.training.len());
    plan.check_micro_batches(run, &material.training)?;
    let account = Account::new(run, &plan, material.models.clone(), &material.training, &material.evaluation);
    // The last rank has the most: what cannot be cut into as many pieces is its own.
    let account = match config.links {
        Some(Links { ranks, .. }) => account.among(GroupPlace { rank: ranks - 1, ranks }),
        None => account,
    };
    let account = match config.largest_pair {
        None => account,
        // Work is compared as if every pair were the largest.
        Some(_) => {
            let largest = Volume::of(material.training.first(), run.objective.sides());
            account.with_step(largest.share(plan.pairs_per_step as f64, 1.0))
        }
    };
    let task = Planning { account: &account, config, target: &target };
    let found = match target.kind {
        TargetKind::Cpu => match run.precision {
            Some(Precision::Bf16) => task.run(Arc::new(CpuDevice::<bf16>::open_planned(run.threads)?)),
            _ => task.run(Arc::new(CpuDevice::<f32>::open_planned(run.threads)?)),
        },
        TargetKind::Gpu(path) => task.run(Arc::new(CudaDevice::planned_gpu(path, true))),
        TargetKind::Emulated => task.run(Arc::new(CudaDevice::planned_emulated())),
    }?;
    let text = match config.json {
        true => format!("{}\n", show::json(&found)),
        false => show::text(&found),
    };
    print_result(&text).map(|_| ())
}

/// What is read for a plan.
struct Material {
    models: Models,
    limits: crate::config::LengthLimits,
    training: Vec<TokenizedPair>,
    evaluation: Vec<TokenizedPair>,
    /// Keeps the demo's files alive.
    _demo: Option<Demo>,
}

impl Material {
    fn read(config: &PlanConfig) -> Result<Self> {
        let run = &config.run;
        let uses_demo = run.model.is_none() || (run.data.is_none() && config.largest_pair.is_none());
        let demo = uses_demo.then(Demo::unpack).transpose()?;
        let folder = match (&run.model, &demo) {
            (Some(model), _) => hub::model(model)?,
            (None, Some(demo)) => demo.model(),
            (None, None) => return Err(Error::bug("the demo is not unpacked")),
        };
        let model = LlamaConfig::from_folder(&folder)?;
        let reference = run.reference.as_deref().map(|path| LlamaConfig::from_folder(&hub::model(path)?));
        let reference = reference.transpose()?;
        let lora = match &run.adapter {
            Some(path) => Some(AdapterFolder::open(path, &model)?.settings()),
            None => run.lora,
        };
        let context = reference.iter().map(LlamaConfig::context).fold(model.context(), usize::min);
        let limits = run.asked_lengths.limits(Some(context))?;
        let (training, evaluation) = match config.largest_pair {
            Some(lengths) => (largest_pairs(run.pairs_per_step(usize::MAX), lengths), Vec::new()),
            None => Self::pairs(run, &folder, demo.as_ref(), limits, model.vocab_size)?,
        };
        Ok(Material { models: Models { model, reference, lora }, limits, training, evaluation, _demo: demo })
    }

    fn pairs(
        run: &RunConfig,
        folder: &std::path::Path,
        demo: Option<&Demo>,
        limits: crate::config::LengthLimits,
        vocabulary: usize,
    ) -> Result<(Vec<TokenizedPair>, Vec<TokenizedPair>)> {
        let mut run = run.clone();
        for files in [&mut run.data, &mut run.evaluation.data].into_iter().flatten() {
            *files = hub::pairs(files)?;
        }
        let text_folder = context::text_folder(folder, run.adapter.as_deref());
        let encoder = TextEncoder::load(text_folder, run.chat_template.as_deref())?.at(run.template_date)?;
        let treatment =
            Treatment { limits, policies: run.policies, min_score_gap: run.min_score_gap, tolerant: false };
        let cache = PairCache::of(run.data_cache.as_ref())?;
        let (training, evaluation) = pair_sources(&run, demo)?;
        let read = |source: &PairSource| -> Result<Vec<TokenizedPair>> {
            let _memory = LargeBlocks::give_back();
            let dataset = load_cached(source, &encoder, treatment, cache.as_ref(), None)?;
            dataset.check_vocabulary(vocabulary, folder)?;
            interrupt::check()?;
            Ok(dataset.pairs)
        };
        let evaluation = evaluation.as_ref().map(&read).transpose()?;
        Ok((read(&training)?, evaluation.unwrap_or_default()))
    }
}

/// Pairs of a step whose largest batch is the largest that pairs of up to these lengths can make: the largest pair, and the
/// shortest ones, with which a micro-batch is filled up to its last token.
pub fn largest_pairs(pairs: usize, lengths: Lengths) -> Vec<TokenizedPair> {
    let pair = |record, [prompt, chosen, rejected]: [usize; 3]| TokenizedPair {
        record,
        prompt: vec![0; prompt].into(),
        chosen: vec![0; chosen].into(),
        rejected: vec![0; rejected].into(),
    };
    let largest = [lengths.prompt, lengths.chosen, lengths.rejected];
    let shortest = largest.map(|length| length.min(1));
    (0..pairs).map(|record| pair(record, if record == 0 { largest } else { shortest })).collect()
}

/// What is planned for.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// For people.
    pub name: String,
    kind: TargetKind,
    /// Peak rates, where they are known or stated.
    pub rates: Option<Rates>,
    /// Bytes of memory that it has, where that is known.
    pub memory: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum TargetKind {
    Cpu,
    Gpu(KernelPath),
    Emulated,
}

impl Target {
    fn of(config: &PlanConfig) -> Result<Self> {
        let mut target = match (&config.gpu, config.run.device) {
            (Some(name), _) => Self::of_kind(rates::find(name).ok_or_else(|| unknown_gpu(name))?),
            (None, DeviceChoice::Cpu) => Self::cpu(),
            (None, DeviceChoice::Emulated) => Target {
                name: "the emulated GPU".to_owned(),
                kind: TargetKind::Emulated,
                rates: None,
                memory: None,
            },
            (None, DeviceChoice::Cuda(ordinal)) => Self::of_gpu(ordinal)?,
            (None, DeviceChoice::Auto) => match Self::of_gpu(0) {
                Ok(gpu) => gpu,
                Err(_) => Self::cpu(),
            },
        };
        let known = target.rates;
        let (tflops, bandwidth) = (config.run.tflops, config.bandwidth);
        target.rates = match (
            tflops.or(known.map(|rates| rates.tflops)),
            bandwidth.or(known.map(|rates| rates.bandwidth)),
        ) {
            (Some(tflops), Some(bandwidth)) => {
                let bus = config.bus.or(known.map(|rates| rates.bus)).unwrap_or(Rates::PCIE_4);
                Some(Rates { tflops, bandwidth, bus })
            }
            _ => None,
        };
        Ok(target)
    }

    fn cpu() -> Self {
        let memory = HostMemory::read().map(|memory| memory.total());
        Target { name: "the CPU".to_owned(), kind: TargetKind::Cpu, rates: None, memory }
    }

    fn of_kind(kind: &GpuKind) -> Self {
        let path = if kind.is_hopper { KernelPath::Hopper } else { KernelPath::Portable };
        Target {
            name: kind.name.to_owned(),
            kind: TargetKind::Gpu(path),
            rates: Some(kind.rates),
            memory: Some((kind.memory * 1e9) as usize),
        }
    }

    /// A GPU of this machine.
    fn of_gpu(ordinal: usize) -> Result<Self> {
        let none = |why: String| {
            Error::device(
                format!("there is no GPU {ordinal} here to plan for: {why}"),
                format!("name one with --gpu, such as --gpu H200; known are {}", gpu_names()),
            )
        };
        let gpus = cuda::gpus().map_err(|error| none(error.to_string()))?;
        let count = gpus.len();
        let gpu = gpus.into_iter().nth(ordinal).ok_or_else(|| none(format!("the driver lists {count}")))?;
        let path = if gpu.capability == (9, 0) { KernelPath::Hopper } else { KernelPath::Portable };
        let rates = rates::find(&gpu.name).map(|kind| kind.rates);
        Ok(Target { name: gpu.name, kind: TargetKind::Gpu(path), rates, memory: Some(gpu.memory) })
    }
}

fn gpu_names() -> String {
    GPUS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

fn unknown_gpu(name: &str) -> Error {
    Error::config(
        format!("`--gpu` = {name} is not in the table of GPUs"),
        format!(
            "known are {}; for another one, name the nearest, and give --memory, --tflops and --bandwidth",
            gpu_names()
        ),
    )
}

/// All that a plan shows.
pub(super) struct Planned {
    pub run: RunConfig,
    pub target: Target,
    pub pairs: usize,
    pub total_steps: usize,
    pub pairs_per_step: usize,
    pub parameters: [f64; 2],
    pub capacity: crate::model::Capacity,
    pub asked: Choice,
    pub footprint: Footprint,
    /// A mean step, and its work; none where only the largest pair is known.
    pub step: Option<(Volume, Work)>,
    pub model_flops: f64,
    /// The copies of a step, where states are offloaded and the machine's rates are known.
    pub copies: Option<Copies>,
    pub limit: Option<usize>,
    pub tried: Vec<Tried>,
    /// How the ranks are connected, where there are several.
    pub links: Option<Links>,
    /// What ranks exchange, where there are several and the machine's rates are known.
    pub exchanges: Option<Exchanges>,
}

/// What ranks exchange in a step, with each way to shard that the run may have.
pub(super) struct Exchanges {
    pub links: Links,
    pub rates: Rates,
    pub step: RankStep,
    /// With the bytes of device memory that a rank takes.
    pub all: Vec<(Exchange, usize)>,
}

struct Planning<'a> {
    account: &'a Account<'a>,
    config: &'a PlanConfig,
    target: &'a Target,
}

impl DeviceTask for Planning<'_> {
    type Output = Planned;

    fn run<D: Device>(self, device: Arc<D>) -> Result<Planned> {
        let Planning { account, config, target } = self;
        let asked = account.asked();
        let limit = match config.run.memory_limit {
            Some(MemoryLimit::Bytes(bytes)) => Some(bytes),
            Some(MemoryLimit::Auto) => Some(target.memory.ok_or_else(|| {
                Error::config(
                    format!("`--memory auto`: the memory of {} is not known", target.name),
                    "give a size, such as --memory 24GB",
                )
            })?),
            None => None,
        };
        let footprint = account.footprint(device.as_ref(), &asked, limit)?;
        let is_measured = config.largest_pair.is_none();
        let (volume, size) = (account.step_volume(asked.token_budget), size_of::<D::Compute>());
        let work = account.work(&asked, footprint.head.main_rows == 0, size);
        let tried = match limit {
            Some(limit) => account.alternatives(device.as_ref(), target.rates, (limit, None), SHOWN)?,
            None => Vec::new(),
        };
        let trained = account.trained();
        let exchanges = config.links.zip(target.rates);
        let exchanges = exchanges
            .map(|(links, rates)| {
                let again = footprint.head.main_rows == 0;
                let of = |volume: &Volume| trained.work(volume, &asked.memory, again, size);
                let step = RankStep::of(&volume, of, &rates, &links);
                let sizes = (size, account.job.model.layers);
                let all = shardings(&asked.memory).map(|shard| {
                    let choice = Choice { memory: MemoryConfig { shard, ..asked.memory }, ..asked };
                    let taken = account.footprint(device.as_ref(), &choice, limit)?.taken;
                    Ok((Exchange::of(shard, trained, sizes, &step, &links), taken))
                });
                let all = all.collect::<Result<_>>()?;
                Ok(Exchanges { links, rates, step, all })
            })
            .transpose()?;
        let copies = target.rates.and_then(|rates| account.copies(&asked, &work, size, &rates));
        Ok(Planned {
            run: account.config.clone(),
            target: target.clone(),
            pairs: account.plan.pairs(),
            total_steps: account.plan.total_steps,
            pairs_per_step: account.job.pairs_per_step,
            parameters: [trained.parameters(), trained.trained_parameters()],
            capacity: account.sizes(asked.token_budget).training,
            asked,
            footprint,
            step: is_measured.then_some((volume, work)),
            model_flops: trained.model_flops(&volume),
            copies,
            limit,
            tried,
            links: config.links,
            exchanges,
        })
    }
}

/// A path that stands where a run's output would.
pub fn no_output() -> PathBuf {
    PathBuf::from("planned")
}
