//! The adapters of a run: where their first values come from, and how they are saved.

use std::path::Path;

use super::checkpoint::download;
use super::guard;
use super::inputs::Inputs;
use super::trainer::Trainer;
use crate::checkpoint::{AdapterFolder, ModelFolder, SavedForm, save_adapter};
use crate::config::RunConfig;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{FusedTensor, Llama, LlamaTensors, LoraSettings, TensorSpec, initial_values};
use crate::optimizer::StateBuffer;

/// The adapters that a run begins with.
#[derive(Debug)]
pub enum StartingAdapter {
    /// PEFT's first values, chosen by a seed.
    New {
        /// Their form.
        settings: LoraSettings,
        /// The run's seed.
        seed: u64,
    },
    /// The adapters of a folder.
    Continued(Box<AdapterFolder>),
}

impl StartingAdapter {
    /// What `config` asks for; `None` where the weights themselves are trained.
    ///
    /// # Errors
    /// Those of the adapter's folder.
    pub fn of(config: &RunConfig, folder: &ModelFolder) -> Result<Option<Self>> {
        if let Some(path) = &config.adapter {
            return AdapterFolder::open(path, folder.config())
                .map(|folder| Some(StartingAdapter::Continued(Box::new(folder))));
        }
        Ok(config.lora.map(|settings| StartingAdapter::New { settings, seed: config.seed }))
    }

    /// Their form.
    pub fn settings(&self) -> LoraSettings {
        match self {
            StartingAdapter::New { settings, .. } => *settings,
            StartingAdapter::Continued(folder) => folder.settings(),
        }
    }

    /// The first values of a tensor.
    ///
    /// # Errors
    /// [`Error::Bug`] for a tensor that they do not have.
    pub fn values(&self, tensor: &TensorSpec) -> Result<Vec<f32>> {
        match self {
            StartingAdapter::New { seed, .. } => Ok(initial_values(*seed, tensor)),
            StartingAdapter::Continued(folder) => folder.values(tensor),
        }
    }

    /// What a resumed run must begin with too, beside its configuration; empty for new adapters, which that determines.
    pub fn identity(&self) -> String {
        match self {
            StartingAdapter::New { .. } => String::new(),
            StartingAdapter::Continued(folder) => format!(" adapter {}", super::hex(&folder.fingerprint())),
        }
    }

    /// Adds the adapters to `model`, whose weights are frozen from then on.
    ///
    /// # Errors
    /// Those of the device.
    pub fn attach<D: Device>(&self, model: &mut Llama<D>) -> Result<()> {
        match self {
            StartingAdapter::New { settings, .. } => model.adapt(*settings, |tensor| self.values(tensor)),
            StartingAdapter::Continued(folder) => folder.attach(model),
        }
    }

    /// Puts the first values into the f32 masters, where the device keeps some: its weights are rounded.
    ///
    /// # Errors
    /// Those of the device.
    pub fn set_masters<D: Device>(&self, trainer: &mut Trainer<D>) -> Result<()> {
        let Trainer { model, states, offloaded, .. } = trainer;
        for (number, (fused, state)) in model.layout.iter().zip(states.iter_mut()).enumerate() {
            if let Some(offloaded) = offloaded {
                for (offset, tensor) in fused.offsets() {
                    offloaded.write_master(&model.device, number, offset, &self.values(tensor)?)?;
                }
            }
            let Some(state) = state else { continue };
            let part = state.part.clone().unwrap_or(0..fused.values());
            let Some(master) = &mut state.master else { continue };
            for (offset, tensor) in fused.offsets() {
                let here = offset.max(part.start)..(offset + tensor.values()).min(part.end);
                if !here.is_empty() {
                    let values = &self.values(tensor)?[here.start - offset..here.end - offset];
                    master.upload(&model.device, here.start - part.start, values)?;
                }
            }
        }
        Ok(())
    }

    /// Writes the trained adapters as a folder of PEFT's, in f32. Among ranks every one must call it, and the first one writes.
    ///
    /// # Errors
    /// [`Error::Numerics`] where a value is not finite; `target` stays as it was then.
    pub fn save<D: Device>(&self, target: &Path, trainer: &mut Trainer<D>, inputs: &Inputs) -> Result<()> {
        let gathered = trainer.gather_masters()?;
        if trainer.place().rank > 0 {
            return Ok(());
        }
        let layout = &trainer.model.layout;
        let tensors: Vec<TensorSpec> = layout.adapter_tensors().cloned().collect();
        let base = std::path::absolute(inputs.folder.path())
            .map_err(|error| Error::io(inputs.folder.path(), "find the absolute path of", error))?;
        let base = base.display().to_string();
        let form = match self {
            StartingAdapter::New { settings, .. } => SavedForm::New(settings),
            StartingAdapter::Continued(folder) => SavedForm::Continued(folder),
        };
        save_adapter(target, &inputs.companions, (form, &base), &tensors, |name, offset, values| {
            let (number, fused, start) = place(layout, name)?;
            if let Some(gathered) = gathered.as_ref().and_then(|gathered| gathered[number].as_ref()) {
                values.copy_from_slice(&gathered[start + offset..][..values.len()]);
                return guard::check_saved(name, offset, values);
            }
            let stored = format!("{}/{}", StateBuffer::Weight.name(), fused.name());
            download(trainer, &stored, start + offset, bytemuck::cast_slice_mut(values))
        })
    }
}

/// Number and names of the fused tensor that a tensor lies in, and where.
fn place<'a>(layout: &'a LlamaTensors<FusedTensor>, name: &str) -> Result<(usize, &'a FusedTensor, usize)> {
    let found = layout.iter().enumerate().find_map(|(number, fused)| {
        let (start, _) = fused.offsets().find(|(_, part)| part.name == name)?;
        Some((number, fused, start))
    });
    found.ok_or_else(|| Error::bug(format!("no tensor `{name}` in this model")))
}

/// The tensors of the run's model, adapters included.
pub fn layout(inputs: &Inputs) -> LlamaTensors<FusedTensor> {
    let config = inputs.folder.config();
    let layout = LlamaTensors::layout(config);
    match &inputs.adapter {
        Some(adapter) => layout.with_adapters(config, &adapter.settings()),
        None => layout,
    }
}
