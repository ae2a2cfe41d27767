//! An adapter folder as PEFT's `save_pretrained` writes it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;

use super::adapter_config::{self, ADAPTER_CONFIG, AdapterForm};
use super::atomic::AtomicFolder;
use super::model_folder::first_non_finite;
use super::save::{self, CompanionFiles};
use super::tensor_file::TensorFile;
use super::tensor_writer::{StoredTensor, write_tensors};
use crate::device::{Device, RawValues, StorageType};
use crate::error::{Error, Result};
use crate::foreign;
use crate::model::{
    AdaptedModule, AdaptedModules, FusedTensor, Llama, LlamaConfig, LlamaTensors, LoraSettings, ModuleForm,
    ModuleForms, PEFT_PREFIX, TensorSpec,
};

const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// An adapter of a model: its form, and its memory-mapped values.
#[derive(Debug)]
pub struct AdapterFolder {
    path: PathBuf,
    /// With the largest rank of any module.
    settings: LoraSettings,
    /// What the config says.
    form: AdapterForm,
    /// The form of each module, where they differ.
    forms: Option<ModuleForms>,
    file: TensorFile,
}

impl AdapterFolder {
    /// Opens an adapter of a model of this config: plain LoRA on the same modules of every layer.
    ///
    /// # Errors
    /// [`Error::Model`] or [`Error::Io`] naming the file, and the key or the tensor where it is about one.
    pub fn open(path: &Path, model: &LlamaConfig) -> Result<Self> {
        check_holds_adapter(path)?;
        let config = path.join(ADAPTER_CONFIG);
        let text = foreign::read_text(&config, "the adapter's config")?;
        let form = adapter_config::parse(&config, &text)?;
        let file = TensorFile::open(&path.join(WEIGHTS))?;
        let modules = find_modules(&file)?;
        let AdapterForm { rank, alpha, dropout, rslora, .. } = form;
        let mut settings = LoraSettings { modules, rank, alpha, dropout, rslora };
        let forms = form.patterns.forms(&config, model.layers, ModuleForm { rank, alpha })?;
        if let Some(forms) = &forms {
            settings.rank = forms.largest_rank(&settings);
        }
        let folder = AdapterFolder { path: path.to_path_buf(), settings, form, forms, file };
        folder.check_tensors(model)?;
        Ok(folder)
    }

    /// The folder, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its form, as a model has it: where ranks differ between modules, with the largest of them.
    pub fn settings(&self) -> LoraSettings {
        self.settings
    }

    /// The factor of what the adapter of a module adds, by the module's name in the model.
    pub fn scale(&self, name: &str) -> f64 {
        let scale = || {
            let (layer, path) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let module = AdaptedModule::ALL.into_iter().find(|module| module.path() == path)?;
            Some(self.forms.as_ref()?.scale(layer.parse().ok()?, module, &self.settings))
        };
        scale().unwrap_or_else(|| self.settings.scale())
    }

    /// Adds the adapter to `model`, whose weights are frozen from then on.
    ///
    /// # Errors
    /// As [`Llama::adapt`].
    pub fn attach<D: Device>(&self, model: &mut Llama<D>) -> Result<()> {
        model.adapt_with(self.settings, self.forms.clone(), |tensor| self.values(tensor))
    }

    /// A tensor of the model's adapter as the folder holds it.
    fn in_file(&self, tensor: &TensorSpec) -> TensorSpec {
        self.forms.as_ref().map_or_else(|| tensor.clone(), |forms| forms.in_files(tensor))
    }

    /// The values of a tensor of the adapter as a model has it, widened to f32: beyond the module's own rank they are zero.
    ///
    /// # Errors
    /// [`Error::Bug`] for a tensor that it does not have: all were looked for when the folder was opened.
    pub fn values(&self, tensor: &TensorSpec) -> Result<Vec<f32>> {
        let values = self.file.get(&tensor.name).and_then(|entry| self.file.values(entry));
        let values = values.filter(|values| values.len() == self.in_file(tensor).values());
        let values = values.map(widened).ok_or_else(|| {
            Error::bug(format!("{}: there is no tensor `{}`", self.file.path().display(), tensor.name))
        })?;
        Ok(match &self.forms {
            Some(forms) => forms.widen(tensor, values),
            None => values,
        })
    }

    /// BLAKE3 over the form and over names, dtypes and bytes of all tensors.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?}", self.settings).as_bytes());
        if let Some(forms) = &self.forms {
            hasher.update(format!("{forms:?}").as_bytes());
        }
        let names: BTreeSet<&str> = self.file.tensors().map(|(name, _)| name).collect();
        for name in names {
            let Some(entry) = self.file.get(name) else { continue };
            hasher.update(format!("{name} {:?} {:?}", entry.dtype, entry.shape).as_bytes());
            hasher.update(self.file.bytes(entry));
        }
        *hasher.finalize().as_bytes()
    }

    /// Every tensor of the form is there with its shape, its values are numbers, and no other tensor is.
    fn check_tensors(&self, model: &LlamaConfig) -> Result<()> {
        let layout = LlamaTensors::<FusedTensor>::layout(model).with_adapters(model, &self.settings);
        let mut wanted = BTreeSet::new();
        for tensor in layout.adapter_tensors() {
            wanted.insert(tensor.name.as_str());
            self.check_tensor(&self.in_file(tensor))?;
        }
        match self.file.tensors().find(|(name, _)| !wanted.contains(name)) {
            None => Ok(()),
            Some((name, _)) => Err(Error::model(
                self.file.path(),
                format!("holds `{name}`, and the model has {} layers", model.layers),
                "the adapter was trained on another model: give that one with --model",
            )),
        }
    }

    fn check_tensor(&self, tensor: &TensorSpec) -> Result<()> {
        let file = self.file.path();
        let name = &tensor.name;
        let Some(entry) = self.file.get(name) else {
            return Err(Error::model(
                file,
                format!(
                    "`{name}` is missing: an adapter must have the same modules in every layer of the model"
                ),
                "give the model that it was trained on; an adapter of some layers only must be merged with PEFT's \
                 merge_and_unload()",
            ));
        };
        if entry.shape != tensor.shape {
            return Err(Error::model(
                file,
                format!(
                    "tensor `{name}` has shape {:?}; the model and `r` (or `rank_pattern`) ask for {:?}",
                    entry.shape, tensor.shape
                ),
                "the adapter was trained on another model, or adapter_config.json is not its own",
            ));
        }
        let Some(values) = self.file.values(entry) else {
            return Err(Error::model(
                file,
                format!("tensor `{name}` is stored as {:?}; f32, f16 and bf16 are supported", entry.dtype),
                "save the adapter in float32",
            ));
        };
        match first_non_finite(values) {
            None => Ok(()),
            Some(index) => Err(Error::model(
                file,
                format!("tensor `{name}` holds NaN or infinity at index {index} of shape {:?}", entry.shape),
                "the adapter is damaged, or its training diverged: use an earlier one",
            )),
        }
    }
}

/// Refuses a path that is not a folder with an adapter in it.
fn check_holds_adapter(path: &Path) -> Result<()> {
    let wanted = "give the folder that holds adapter_config.json and adapter_model.safetensors";
    let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, "read", error))?;
    if !metadata.is_dir() {
        return Err(Error::model(path, "this is a file; an adapter is a folder", wanted));
    }
    if !path.join(ADAPTER_CONFIG).is_file() {
        let found = match path.join("config.json").is_file() {
            true => "this is the folder of a whole model: it has no adapter_config.json",
            false => "no adapter_config.json: this is not the folder of an adapter",
        };
        return Err(Error::model(path, found, wanted));
    }
    if path.join(WEIGHTS).is_file() {
        return Ok(());
    }
    if path.join(PICKLED_WEIGHTS).is_file() {
        return Err(Error::model(
            path,
            format!(
                "the adapter is in {PICKLED_WEIGHTS}; only safetensors is read, because pickle files can run code"
            ),
            "load it with PEFT and save it again: save_pretrained writes safetensors",
        ));
    }
    Err(Error::model(path, format!("{WEIGHTS} is missing"), "copy the adapter's folder again"))
}

/// The modules whose adapters the file holds.
fn find_modules(file: &TensorFile) -> Result<AdaptedModules> {
    let mut modules = Vec::new();
    let names: BTreeSet<&str> = file.tensors().map(|(name, _)| name).collect();
    for name in names {
        modules.push(module_of(name).ok_or_else(|| strange_tensor(file.path(), name))?);
    }
    match modules.is_empty() {
        true => Err(Error::model(file.path(), "holds no tensors", "copy the adapter's folder again")),
        false => Ok(AdaptedModules::of(modules)),
    }
}

/// The module of a tensor `base_model.model.model.layers.N.MODULE.lora_A.weight` (or `lora_B`).
fn module_of(name: &str) -> Option<AdaptedModule> {
    let rest = name.strip_prefix(PEFT_PREFIX)?.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    layer.parse::<usize>().ok()?;
    let path = ["lora_A", "lora_B"].iter().find_map(|end| rest.strip_suffix(&format!(".{end}.weight")))?;
    AdaptedModule::ALL.into_iter().find(|module| module.path() == path)
}

fn strange_tensor(file: &Path, name: &str) -> Error {
    let what =
        if name.contains("lora_embedding_") || name.contains("embed_tokens") || name.contains("lm_head") {
            "an adapter or a copy of the embedding or the output head"
        } else if name.contains("lora_magnitude_vector") {
            "the magnitudes of DoRA"
        } else if name.contains(".lora_A.") || name.contains(".lora_B.") {
            "no adapter of q, k, v, o, gate, up or down under PEFT's name"
        } else {
            "no part of a plain LoRA adapter"
        };
    Error::model(
        file,
        format!("holds `{name}`: {what}"),
        "merge it into its base model with PEFT's merge_and_unload(), and give the merged model",
    )
}

fn widened(values: RawValues<'_>) -> Vec<f32> {
    let two = |bytes: &[u8]| bytes.first_chunk().map_or(0, |&two| u16::from_le_bytes(two));
    let one = |bytes: &[u8]| match values.storage {
        StorageType::F32 => bytes.first_chunk().map_or(0.0, |&four| f32::from_le_bytes(four)),
        StorageType::F16 => half::f16::from_bits(two(bytes)).to_f32(),
        StorageType::Bf16 => half::bf16::from_bits(two(bytes)).to_f32(),
    };
    values.bytes.chunks_exact(values.storage.size()).map(one).collect()
}

/// The form of adapters that are saved.
#[derive(Clone, Copy, Debug)]
pub enum SavedForm<'a> {
    /// All modules have the same.
    New(&'a LoraSettings),
    /// That of the folder that they began as.
    Continued(&'a AdapterFolder),
}

/// Writes adapter folder `target`, replacing an earlier adapter there and nothing else: the tensors in f32, and the
/// companions but for the model's own config. `form` is that of the adapters, or the folder that they began as; `base` is where
/// PEFT looks for the model; `fill(tensor, offset, values)` assigns the values of a tensor of `tensors`, the model's, from row-major index
/// `offset` on.
///
/// # Errors
/// Those of `fill` and of the disk, after which `target` is what it was before; [`Error::Config`] where `target` holds
/// something that is not part of an adapter.
pub fn save_adapter(
    target: &Path,
    companions: &CompanionFiles,
    (form, base): (SavedForm<'_>, &str),
    tensors: &[TensorSpec],
    mut fill: impl FnMut(&str, usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let folder = AtomicFolder::create(target, belongs_to_an_adapter)?;
    let (form, modules, forms) = match form {
        SavedForm::New(settings) => (AdapterForm::of(settings), settings.modules, None),
        SavedForm::Continued(from) => (from.form.clone(), from.settings.modules, from.forms.as_ref()),
    };
    let in_file = |spec: &TensorSpec| forms.map_or_else(|| spec.clone(), |forms| forms.in_files(spec));
    let stored: Vec<StoredTensor> = tensors
        .iter()
        .map(in_file)
        .map(|spec| StoredTensor::new(&spec.name, Dtype::F32, &spec.shape))
        .collect();
    write_tensors(folder.file(WEIGHTS)?, &stored, &[("format", "pt")], |tensor, offset, bytes| {
        let values = bytemuck::cast_slice_mut(bytes);
        let whole = tensors.iter().find(|spec| spec.name == tensor.name);
        match forms.zip(whole) {
            None => fill(&tensor.name, offset, values),
            Some((forms, whole)) => {
                forms.narrow(whole, offset, values, |offset, values| fill(&tensor.name, offset, values))
            }
        }
    })?;
    folder.write_file(ADAPTER_CONFIG, adapter_config::write(&form, modules, base).as_bytes())?;
    for (name, content) in companions.iter().filter(|(name, _)| *name != save::CONFIG) {
        folder.write_file(name, content)?;
    }
    folder.commit()
}

/// Whether a file of this name may be lost when an adapter folder is replaced by a newer adapter.
fn belongs_to_an_adapter(name: &str) -> bool {
    name == ADAPTER_CONFIG
        || name == WEIGHTS
        || (save::belongs_to_a_model(name) && !name.starts_with("model"))
}
