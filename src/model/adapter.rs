//! Low-rank adapters (LoRA, Hu et al. 2021) as PEFT has them: for each adapted module of a layer two small matrices, and
//! `y = W x + scale * B A dropout(x)` with `W` frozen.
//!
//! The model stores projections of one input as one matrix, and their adapters likewise: the `A` of query, key and value
//! lie one after the other in one tensor, so that one gemm serves all three; so do their `B`, whose products go to
//! columns of the fused output.

use super::buffers::Capacity;
use super::config::{LlamaConfig, TensorSpec};
use super::projection::Adapter;
use super::tensors::{FusedTensor, LayerTensors, LlamaTensors};
use super::{Llama, ModuleForms, Projection};
use crate::device::{
    AdaptedBackwardInput, ComputeBuffer, Device, Dropout, Floats, LinearShape, LowRankShape, MemoryPart,
    RawValues, RowPart, hash,
};
use crate::error::{Error, Result};

/// What PEFT puts before the model's own names of tensors.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// A linear module of a layer that may have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdaptedModule {
    /// `self_attn.q_proj`
    Query,
    /// `self_attn.k_proj`
    Key,
    /// `self_attn.v_proj`
    Value,
    /// `self_attn.o_proj`
    Output,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl AdaptedModule {
    /// All modules, in the order in which a layer computes them.
    pub const ALL: [AdaptedModule; 7] = [
        AdaptedModule::Query,
        AdaptedModule::Key,
        AdaptedModule::Value,
        AdaptedModule::Output,
        AdaptedModule::Gate,
        AdaptedModule::Up,
        AdaptedModule::Down,
    ];

    /// The name in options: `q`.
    pub fn name(self) -> &'static str {
        self.peft_name().trim_end_matches("_proj")
    }

    /// The name in PEFT's `target_modules`: `q_proj`.
    pub fn peft_name(self) -> &'static str {
        let path = self.path();
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// The place in a layer, as tensors are named: `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            AdaptedModule::Query => "self_attn.q_proj",
            AdaptedModule::Key => "self_attn.k_proj",
            AdaptedModule::Value => "self_attn.v_proj",
            AdaptedModule::Output => "self_attn.o_proj",
            AdaptedModule::Gate => "mlp.gate_proj",
            AdaptedModule::Up => "mlp.up_proj",
            AdaptedModule::Down => "mlp.down_proj",
        }
    }

    /// The projection of the model that computes it.
    fn site(self) -> Site {
        match self {
            AdaptedModule::Query | AdaptedModule::Key | AdaptedModule::Value => Site::Qkv,
            AdaptedModule::Output => Site::AttentionOut,
            AdaptedModule::Gate | AdaptedModule::Up => Site::GateUp,
            AdaptedModule::Down => Site::Down,
        }
    }

    /// Number of outputs.
    fn outputs(self, config: &LlamaConfig) -> usize {
        match self {
            AdaptedModule::Query => config.heads * config.head_size,
            AdaptedModule::Key | AdaptedModule::Value => config.kv_heads * config.head_size,
            AdaptedModule::Output | AdaptedModule::Down => config.hidden_size,
            AdaptedModule::Gate | AdaptedModule::Up => config.intermediate_size,
        }
    }
}

/// A set of modules, the same in every layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdaptedModules(u8);

impl AdaptedModules {
    /// The set of these modules.
    pub fn of(modules: impl IntoIterator<Item = AdaptedModule>) -> Self {
        AdaptedModules(modules.into_iter().fold(0, |set, module| set | 1 << module as u8))
    }

    /// Whether the module is one of them.
    pub fn has(self, module: AdaptedModule) -> bool {
        self.0 & 1 << module as u8 != 0
    }

    /// The modules, in the order of [`AdaptedModule::ALL`].
    pub fn iter(self) -> impl Iterator<Item = AdaptedModule> {
        AdaptedModule::ALL.into_iter().filter(move |&module| self.has(module))
    }
}

/// The form of an adapter, and how it is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSettings {
    /// Modules with an adapter.
    pub modules: AdaptedModules,
    /// `r`: rows of each `A`, columns of each `B`.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability that an input of `A` is dropped in training.
    pub dropout: f64,
    /// Whether the scale is `alpha / sqrt(r)` (rsLoRA, Kalajdzievski 2023) in place of `alpha / r`.
    pub rslora: bool,
}

impl LoraSettings {
    /// Factor of what the adapter adds.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }
}

/// A projection of a layer: one matrix in the model, of one or several modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    Qkv,
    AttentionOut,
    GateUp,
    Down,
}

impl Site {
    pub(super) const ALL: [Site; 4] = [Site::Qkv, Site::AttentionOut, Site::GateUp, Site::Down];

    pub(super) fn of<T>(self, layer: &LayerTensors<T>) -> &Projection<T> {
        match self {
            Site::Qkv => &layer.qkv,
            Site::AttentionOut => &layer.attention_out,
            Site::GateUp => &layer.gate_up,
            Site::Down => &layer.down,
        }
    }

    fn of_mut<T>(self, layer: &mut LayerTensors<T>) -> &mut Projection<T> {
        match self {
            Site::Qkv => &mut layer.qkv,
            Site::AttentionOut => &mut layer.attention_out,
            Site::GateUp => &mut layer.gate_up,
            Site::Down => &mut layer.down,
        }
    }

    /// Sizes of the projection's gemm.
    pub(super) fn shape(self, config: &LlamaConfig, rows: usize) -> LinearShape {
        match self {
            Site::Qkv => config.qkv_shape(rows),
            Site::AttentionOut => config.attention_out_shape(rows),
            Site::GateUp => config.gate_up_shape(rows),
            Site::Down => config.down_shape(rows),
        }
    }
}

/// A module's adapter within the tensors of its projection.
#[derive(Clone, Copy, Debug)]
struct AdapterPart {
    module: AdaptedModule,
    /// The module's first column in the projection's output.
    first_output: usize,
    outputs: usize,
    /// Its first row in `B`.
    first_row: usize,
    /// Its first column in `inner`.
    first_inner: usize,
}

/// The adapters of one projection, the same in every layer.
#[derive(Clone, Debug, Default)]
struct SiteAdapters {
    parts: Vec<AdapterPart>,
    /// Columns of `inner`: `r` for each adapted module.
    inner_width: usize,
}

impl SiteAdapters {
    fn new(site: Site, config: &LlamaConfig, settings: &LoraSettings) -> Self {
        let mut adapters = SiteAdapters::default();
        let (mut first_output, mut first_row) = (0, 0);
        for module in AdaptedModule::ALL.into_iter().filter(|module| module.site() == site) {
            let outputs = module.outputs(config);
            if settings.modules.has(module) {
                let first_inner = adapters.inner_width;
                adapters.parts.push(AdapterPart { module, first_output, outputs, first_row, first_inner });
                adapters.inner_width += settings.rank;
                first_row += outputs;
            }
            first_output += outputs;
        }
        adapters
    }
}

/// What a model knows of its adapters.
#[derive(Clone, Debug)]
pub struct Adapters {
    /// Form and training.
    pub settings: LoraSettings,
    /// The form of each module's adapter, where they differ: the rank of `settings` is the largest of them then.
    forms: Option<ModuleForms>,
    /// Key of the dropout masks of the next forward and backward; `None` drops nothing, as everywhere but in training.
    dropout_key: Option<u64>,
    /// The adapters of each projection, in the order of [`Site::ALL`].
    sites: [SiteAdapters; 4],
}

impl Adapters {
    fn new(config: &LlamaConfig, settings: LoraSettings, forms: Option<ModuleForms>) -> Self {
        let sites = Site::ALL.map(|site| SiteAdapters::new(site, config, &settings));
        Adapters { settings, forms, dropout_key: None, sites }
    }

    fn site(&self, site: Site) -> &SiteAdapters {
        &self.sites[site as usize]
    }

    /// The mask of a projection's input.
    fn dropout(&self, layer: usize, site: Site) -> Option<Dropout> {
        let key = self.dropout_key.filter(|_| self.settings.dropout > 0.0)?;
        Some(Dropout::new(hash(key, (4 * layer + site as usize) as u64), self.settings.dropout))
    }

    /// Sizes of the products with a module's `B` in a layer.
    fn low_rank_shape(
        &self,
        (layer, part): (usize, &AdapterPart),
        shape: LinearShape,
        inner_width: usize,
    ) -> LowRankShape {
        let scale = match &self.forms {
            Some(forms) => forms.scale(layer, part.module, &self.settings),
            None => self.settings.scale(),
        };
        LowRankShape {
            rows: shape.rows,
            rank: self.settings.rank,
            outputs: part.outputs,
            out: RowPart { first: part.first_output, width: shape.outputs },
            inner: RowPart { first: part.first_inner, width: inner_width },
            first_row: part.first_row,
            scale: scale as f32,
        }
    }
}

impl LlamaTensors<FusedTensor> {
    /// Adds the adapters' tensors, under PEFT's names, and freezes all others.
    #[must_use]
    pub fn with_adapters(mut self, config: &LlamaConfig, settings: &LoraSettings) -> Self {
        self.iter_mut().for_each(|tensor| tensor.trained = false);
        for (number, layer) in self.layers.iter_mut().enumerate() {
            for site in Site::ALL {
                let inputs = site.shape(config, 0).inputs;
                let modules: Vec<AdaptedModule> =
                    settings.modules.iter().filter(|module| module.site() == site).collect();
                if modules.is_empty() {
                    continue;
                }
                let tensor = |matrix: &str, shape: &dyn Fn(AdaptedModule) -> [usize; 2]| {
                    let parts = modules.iter().map(|&module| {
                        let path = module.path();
                        let name = format!("{PEFT_PREFIX}model.layers.{number}.{path}.lora_{matrix}.weight");
                        TensorSpec::new(name, &shape(module))
                    });
                    FusedTensor { parts: parts.collect(), trained: true }
                };
                site.of_mut(layer).adapter = Some(Adapter {
                    a: tensor("A", &|_| [settings.rank, inputs]),
                    b: tensor("B", &|module| [module.outputs(config), settings.rank]),
                });
            }
        }
        self
    }

    /// The tensors of all adapters, in the order of the tree.
    pub fn adapter_tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.iter().flat_map(|tensor| &tensor.parts).filter(|part| is_adapter_name(&part.name))
    }
}

/// Whether a tensor of this name is part of an adapter.
fn is_adapter_name(name: &str) -> bool {
    name.starts_with(PEFT_PREFIX)
}

/// The values before the first step, as PEFT chooses them: `A` uniform within `1 / sqrt(inputs)` (Kaiming's bound at
/// `a = sqrt(5)`), `B` zero, so that the adapter begins by adding nothing. A value is a function of the seed, its
/// tensor's name and its index.
pub fn initial_values(seed: u64, tensor: &TensorSpec) -> Vec<f32> {
    if tensor.name.ends_with("lora_B.weight") {
        return vec![0.0; tensor.values()];
    }
    let key = tensor.name.bytes().fold(hash(seed, 0), |key, byte| hash(key, u64::from(byte)));
    let bound = 1.0 / (tensor.shape.last().copied().unwrap_or(1) as f64).sqrt();
    // 24 bits, and half a step more, so that the mean is 0.
    let uniform = |index: usize| ((hash(key, index as u64) >> 40) as f64 + 0.5) / (1u64 << 24) as f64;
    (0..tensor.values()).map(|index| (bound * (2.0 * uniform(index) - 1.0)) as f32).collect()
}

impl<D: Device> Llama<D> {
    /// Adds adapters with the values that `values` gives for each of their tensors, and freezes everything else.
    ///
    /// # Errors
    /// [`Error::Device`] where the device has no memory for them; [`Error::Bug`] where the model has adapters already;
    /// those of `values`.
    pub fn adapt(
        &mut self,
        settings: LoraSettings,
        values: impl FnMut(&TensorSpec) -> Result<Vec<f32>>,
    ) -> Result<()> {
        self.adapt_with(settings, None, values)
    }

    /// As [`Llama::adapt`], with adapters of which each may have a form of its own: `settings.rank` is the largest of their ranks, and
    /// the values beyond a module's own rank are zero.
    ///
    /// # Errors
    /// As [`Llama::adapt`].
    pub fn adapt_with(
        &mut self,
        settings: LoraSettings,
        forms: Option<ModuleForms>,
        mut values: impl FnMut(&TensorSpec) -> Result<Vec<f32>>,
    ) -> Result<()> {
        if self.adapters.is_some() {
            return Err(Error::bug("the model has adapters already"));
        }
        self.layout = self.layout.clone().with_adapters(&self.config, &settings);
        for (layer, tensors) in self.layout.layers.iter().enumerate() {
            for site in Site::ALL {
                let Some(adapter) = &site.of(tensors).adapter else { continue };
                let adapter = adapter.try_map(&mut |fused: &FusedTensor| {
                    let alloc = || self.device.alloc(fused.values());
                    let mut weight = self.device.as_part(MemoryPart::Adapters, alloc)?;
                    for (offset, tensor) in fused.offsets() {
                        let values = values(tensor)?;
                        self.device.upload_values(&mut weight, offset, RawValues::from_f32(&values))?;
                    }
                    Ok::<_, Error>(weight)
                })?;
                site.of_mut(&mut self.weights.layers[layer]).adapter = Some(adapter);
            }
        }
        self.adapters = Some(Adapters::new(&self.config, settings, forms));
        Ok(())
    }

    /// Form and training of the adapters, where the model has some.
    pub fn lora(&self) -> Option<&LoraSettings> {
        self.adapters.as_ref().map(|adapters| &adapters.settings)
    }

    /// Sets the key of the dropout masks of what runs from now on; `None` drops nothing.
    pub fn set_dropout_key(&mut self, key: Option<u64>) {
        if let Some(adapters) = &mut self.adapters {
            adapters.dropout_key = key;
        }
    }
}

/// What adapters keep of a forward, and their scratch memory, for the largest micro-batch.
#[derive(Debug)]
pub(super) struct AdapterActivations<D: Device> {
    /// `[T, inner_width]` for each slot and site: the input of `B`.
    inner: Vec<[Option<ComputeBuffer<D>>; 4]>,
    /// `[T, widest inner]` scratch of the backward: the gradient of `inner`.
    dinner: Option<ComputeBuffer<D>>,
}

impl<D: Device> AdapterActivations<D> {
    /// Buffers for `model`, of `slots` layers at a time; `None` where it has no adapters.
    pub(super) fn new(
        model: &Llama<D>,
        capacity: Capacity,
        slots: usize,
        training: bool,
    ) -> Result<Option<Self>> {
        let Some(adapters) = &model.adapters else { return Ok(None) };
        let (device, tokens) = (model.device.as_ref(), capacity.tokens);
        let mut inner = Vec::with_capacity(slots);
        for _ in 0..slots {
            let mut sites = [const { None }; 4];
            for (buffer, site) in sites.iter_mut().zip(&adapters.sites) {
                if site.inner_width > 0 {
                    *buffer = Some(device.alloc(tokens * site.inner_width)?);
                }
            }
            inner.push(sites);
        }
        let widest_inner = adapters.sites.iter().map(|site| site.inner_width).max().unwrap_or(0);
        Ok(Some(AdapterActivations {
            inner,
            dinner: if training { Some(device.alloc(tokens * widest_inner)?) } else { None },
        }))
    }

    /// Sets aside the scratch memory that the adapters' operations take, so that no step allocates it.
    pub(super) fn reserve(model: &Llama<D>, capacity: Capacity) -> Result<()> {
        let Some(adapters) = &model.adapters else { return Ok(()) };
        for site in Site::ALL {
            let inner_width = adapters.site(site).inner_width;
            if inner_width == 0 {
                continue;
            }
            let shape = LinearShape { outputs: inner_width, ..site.shape(&model.config, capacity.tokens) };
            model.device.reserve_linear(shape, false)?;
            let place = Place { layer: 0, site, slot: 0, tokens: capacity.tokens };
            let parts = model.adapter_parts(adapters, place);
            model.device.reserve_low_rank(shape, &parts, adapters.settings.dropout > 0.0)?;
        }
        Ok(())
    }
}

/// An adapted projection of a layer, in the forward or the backward.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub layer: usize,
    pub site: Site,
    /// Index of the layer's activations.
    pub slot: usize,
    pub tokens: usize,
}

/// `inner`, `b` and the product of each module of a projection.
type Terms<'a, D> = (&'a ComputeBuffer<D>, &'a ComputeBuffer<D>, Vec<LowRankShape>);

/// Operands of [`Llama::adapter_backward`].
pub(super) struct AdapterBackward<'a, D: Device> {
    /// Assigned, `[T, inputs]`: the gradient of `x`.
    pub dx: &'a mut ComputeBuffer<D>,
    /// Accumulated: the gradients of the adapter's matrices.
    pub dadapter: Option<&'a mut Adapter<Option<Floats<D>>>>,
    /// `[T, outputs]`: the gradient of the projection's output.
    pub dout: &'a ComputeBuffer<D>,
    /// `[T, inputs]`, the input of the forward.
    pub x: &'a ComputeBuffer<D>,
    /// What the forward kept.
    pub adapter: Option<&'a mut AdapterActivations<D>>,
    pub place: Place,
}

impl<D: Device> Llama<D> {
    /// Computes `inner = dropout(x) * A^T` of a projection, which its adapters' output and the backward read; does nothing
    /// where the projection has no adapter.
    pub(super) fn adapter_inner(
        &self,
        activations: Option<&mut AdapterActivations<D>>,
        x: &ComputeBuffer<D>,
        place: Place,
    ) -> Result<()> {
        let Some((adapters, weights)) = self.adapter_at(place) else { return Ok(()) };
        let AdapterActivations { inner, .. } = activations.ok_or_else(no_buffers)?;
        let inner = inner[place.slot][place.site as usize].as_mut().ok_or_else(no_buffers)?;
        let shape = self.inner_shape(adapters, place);
        let dropout = adapters.dropout(place.layer, place.site);
        self.device.low_rank_inner(inner, x, &weights.a, shape, dropout)
    }

    /// What the adapters of a projection add to its output, from [`Llama::adapter_inner`]: `inner`, `b` and the product of each
    /// module. `None` where the projection has no adapter.
    pub(super) fn adapter_terms<'a>(
        &'a self,
        activations: Option<&'a AdapterActivations<D>>,
        place: Place,
    ) -> Result<Option<Terms<'a, D>>> {
        let Some((adapters, weights)) = self.adapter_at(place) else { return Ok(None) };
        let inner = &activations.ok_or_else(no_buffers)?.inner[place.slot][place.site as usize];
        let inner = inner.as_ref().ok_or_else(no_buffers)?;
        Ok(Some((inner, &weights.b, self.adapter_parts(adapters, place))))
    }

    /// Sizes of the products with each module's `B`.
    fn adapter_parts(&self, adapters: &Adapters, place: Place) -> Vec<LowRankShape> {
        let (site, shape) = (adapters.site(place.site), place.site.shape(&self.config, place.tokens));
        let parts = site.parts.iter();
        parts.map(|part| adapters.low_rank_shape((place.layer, part), shape, site.inner_width)).collect()
    }

    /// The backward of an adapted projection with a frozen weight: gradients of `A` and `B`, and that of its input.
    pub(super) fn adapter_backward(&self, operands: AdapterBackward<'_, D>) -> Result<()> {
        let AdapterBackward { dx, mut dadapter, dout, x, adapter, place } = operands;
        let Some((adapters, weights)) = self.adapter_at(place) else { return Ok(()) };
        let AdapterActivations { inner, dinner } = adapter.ok_or_else(no_buffers)?;
        let inner = inner[place.slot][place.site as usize].as_ref().ok_or_else(no_buffers)?;
        let dinner = dinner.as_mut().ok_or_else(no_buffers)?;
        for shape in self.adapter_parts(adapters, place) {
            if let Some(db) = dadapter.as_mut().and_then(|dadapter| dadapter.b.as_mut()) {
                self.device.low_rank_backward_weight(db, dout, inner, shape)?;
            }
            self.device.low_rank_backward_input(dinner, dout, &weights.b, shape)?;
        }
        let shape = self.inner_shape(adapters, place);
        let dropout = adapters.dropout(place.layer, place.site);
        if let Some(da) = dadapter.as_mut().and_then(|dadapter| dadapter.a.as_mut()) {
            self.device.low_rank_inner_backward_weight(da, dinner, x, shape, dropout)?;
        }
        self.device.adapted_linear_backward_input(AdaptedBackwardInput {
            dx,
            dout,
            weight: &self.projection(place).weight,
            dinner,
            a: &weights.a,
            shape: place.site.shape(&self.config, place.tokens),
            inner_width: shape.outputs,
            dropout,
        })
    }

    fn adapter_at(&self, place: Place) -> Option<(&Adapters, &Adapter<ComputeBuffer<D>>)> {
        let weights = self.projection(place).adapter.as_ref()?;
        Some((self.adapters.as_ref()?, weights))
    }

    /// The gemm with `A`.
    fn inner_shape(&self, adapters: &Adapters, place: Place) -> LinearShape {
        let outputs = adapters.site(place.site).inner_width;
        LinearShape { outputs, ..place.site.shape(&self.config, place.tokens) }
    }
}

fn no_buffers() -> Error {
    Error::bug("the activations were made for a model without these adapters")
}
