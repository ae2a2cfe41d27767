//! Writing a model folder that transformers loads: weights in bf16, config and tokenizer of the source.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::atomic::{AtomicFolder, list};
use crate::checkpoint::tensor_writer::{StoredTensor, write_tensors};
use crate::data::{TEMPLATE_FILE, TEMPLATE_FOLDER};
use crate::error::{Error, Result};
use crate::foreign::json;
use crate::model::{LlamaConfig, TensorSpec};

/// Largest shard unless a single tensor is larger: 5 GB, the limit below which every host of models takes a file.
pub const SHARD_BYTES: u64 = 5_000_000_000;

pub(super) const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// The files that are copied from the source unchanged, where they are there: what transformers reads beside the
/// weights. LICENSE and README are not among them: whoever publishes a trained model decides on its name and its terms.
const COMPANIONS: &[&str] = &[
    GENERATION_CONFIG,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    LEGACY_TEMPLATE,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
];
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The file in which processors keep a chat template.
const LEGACY_TEMPLATE: &str = "chat_template.json";

/// The files beside the weights. Read when a run starts, so that its end does not depend on the source still being
/// there, and so that the source folder itself may be the target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompanionFiles {
    /// Name and content; [`CompanionFiles::set`] replaces one.
    files: Vec<(String, Vec<u8>)>,
}

impl CompanionFiles {
    /// The config, as it will be saved, and the tokenizer files of `source`.
    ///
    /// # Errors
    /// [`Error::Io`] if a file that is there cannot be read.
    pub fn read(source: &Path, config: &LlamaConfig) -> Result<Self> {
        let mut companions = CompanionFiles::default();
        companions.set(CONFIG, config.to_saved_json());
        for (name, content) in CompanionFiles::read_named(source)? {
            companions.set(&name, content);
        }
        Ok(companions)
    }

    /// The files of `source` that stand beside weights, where they are there.
    fn read_named(source: &Path) -> Result<Vec<(String, Vec<u8>)>> {
        let mut found = Vec::new();
        let mut names: Vec<String> = COMPANIONS.iter().map(|name| name.to_string()).collect();
        for path in list(&source.join(TEMPLATE_FOLDER))? {
            let name =
                path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".jinja"));
            if let (Some(name), true) = (name, path.is_file()) {
                names.push(format!("{TEMPLATE_FOLDER}/{name}"));
            }
        }
        for name in names {
            let path = source.join(&name);
            match std::fs::read(&path) {
                Ok(content) => found.push((name, content)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(&path, "read", error)),
            }
        }
        Ok(found)
    }

    /// Puts the companions that `folder` has in the place of these: those of an adapter, which was trained with its own
    /// tokenizer files. The config stays.
    ///
    /// # Errors
    /// [`Error::Io`] where one cannot be read.
    pub fn overlay(&mut self, folder: &Path) -> Result<()> {
        let theirs = CompanionFiles::read_named(folder)?;
        // A template that the adapter does not have was replaced by another one when it was trained.
        if theirs.iter().any(|(name, _)| *name == *TOKENIZER_CONFIG) {
            let is_template = |name: &str| {
                name == TEMPLATE_FILE
                    || name == LEGACY_TEMPLATE
                    || name.starts_with(&format!("{TEMPLATE_FOLDER}/"))
            };
            self.files.retain(|(name, _)| !is_template(name));
        }
        theirs.into_iter().for_each(|(name, content)| self.set(&name, content));
        Ok(())
    }

    /// Puts `templates`, of which one is called `default`, in the place of the source's, as transformers writes them:
    /// the default in `chat_template.jinja`, the others in `additional_chat_templates/`, and none elsewhere.
    ///
    /// # Errors
    /// [`Error::Model`] for a `tokenizer_config.json` that is no JSON object; `source` is what it names.
    pub fn replace_chat_templates(&mut self, source: &Path, templates: &BTreeMap<&str, &str>) -> Result<()> {
        let in_folder =
            |name: &str| name.strip_prefix(TEMPLATE_FOLDER).is_some_and(|rest| rest.starts_with('/'));
        self.files.retain(|(name, _)| name != LEGACY_TEMPLATE && !in_folder(name));
        if let Some(mut config) = self.object(source, TOKENIZER_CONFIG)?
            && config.shift_remove("chat_template").is_some()
        {
            self.set(TOKENIZER_CONFIG, json::write(&Value::Object(config)) + "\n");
        }
        for (name, text) in templates {
            match *name {
                "default" => self.set(TEMPLATE_FILE, *text),
                // A name that would leave the folder cannot come from one.
                name if name.contains('/') => {}
                name => self.set(&format!("{TEMPLATE_FOLDER}/{name}.jinja"), *text),
            }
        }
        Ok(())
    }

    /// Makes text generation stop at the tokens `ends`, beside those at which it stops already: they are added to
    /// `eos_token_id` of `generation_config.json`, which is made where there is none. Nothing changes where nothing
    /// is to be added.
    ///
    /// # Errors
    /// [`Error::Model`] for a `generation_config.json` that is no JSON object; `source` is what it names.
    pub fn stop_at(&mut self, source: &Path, config: &LlamaConfig, ends: &[u32]) -> Result<()> {
        let given = self.object(source, GENERATION_CONFIG)?;
        let listed = given.as_ref().and_then(|given| given.get("eos_token_id")).filter(|ids| !ids.is_null());
        let mut ids: Vec<Value> = match listed {
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
            None => config.stop_token_ids.iter().map(|&id| id.into()).collect(),
        };
        let before = ids.len();
        for &end in ends {
            if !ids.contains(&end.into()) {
                ids.push(end.into());
            }
        }
        if ids.len() == before {
            return Ok(());
        }
        let mut generation = given.unwrap_or_else(|| {
            // What transformers makes of config.json where there is no generation_config.json.
            let tokens = [
                ("bos_token_id", config.bos_token_id.map(Value::from)),
                ("pad_token_id", config.value("pad_token_id").cloned()),
            ];
            let tokens = tokens.into_iter().filter_map(|(name, id)| Some((name.to_string(), id?)));
            [("_from_model_config".to_string(), true.into())].into_iter().chain(tokens).collect()
        });
        generation.insert("eos_token_id".to_string(), ids.into());
        self.set(GENERATION_CONFIG, json::write(&Value::Object(generation)) + "\n");
        Ok(())
    }

    /// A companion that is a JSON object; `None` if it is absent.
    fn object(&self, source: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
        let Some((_, content)) = self.files.iter().find(|(other, _)| other == name) else { return Ok(None) };
        let broken = |error: String| {
            Error::model(&source.join(name), format!("broken JSON: {error}"), "copy the model's file again")
        };
        let text = std::str::from_utf8(content).map_err(|error| broken(error.to_string()))?;
        match json::parse(text).map_err(|error| broken(error.to_string()))? {
            Value::Object(members) => Ok(Some(members)),
            _ => Err(broken("it is not an object".into())),
        }
    }

    /// Adds file `name`, or replaces it.
    pub fn set(&mut self, name: &str, content: impl Into<Vec<u8>>) {
        self.files.retain(|(other, _)| other != name);
        self.files.push((name.to_string(), content.into()));
    }

    /// Names and contents.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files.iter().map(|(name, content)| (name.as_str(), content.as_slice()))
    }
}

/// Writes model folder `target`, replacing an earlier model there and nothing else. `tensors` are those of
/// [`LlamaConfig::tensors`], in that order, which decides what falls into which shard; `fill(tensor, offset, values)`
/// assigns the values of a tensor from row-major index `offset` on. At most 8 MiB of weights are in memory at a time.
///
/// A model larger than `shard_bytes` is cut as transformers cuts it, into `model-00001-of-0000N.safetensors` and so on
/// with their index.
///
/// # Errors
/// Those of `fill` and of the disk, after which `target` is what it was before; [`Error::Config`] where `target` holds
/// something that is not part of a model.
pub fn save_model(
    target: &Path,
    companions: &CompanionFiles,
    tensors: &[TensorSpec],
    shard_bytes: u64,
    mut fill: impl FnMut(&TensorSpec, usize, &mut [bf16]) -> Result<()>,
) -> Result<()> {
    let folder = AtomicFolder::create(target, belongs_to_a_model)?;
    let shards = cut_into_shards(tensors, shard_bytes);
    let shard_name = |shard: usize| match shards.len() {
        1 => "model.safetensors".to_string(),
        count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
    };
    for (number, shard) in shards.iter().enumerate() {
        let stored: Vec<StoredTensor> =
            shard.iter().map(|spec| StoredTensor::new(&spec.name, Dtype::BF16, &spec.shape)).collect();
        let file = folder.file(&shard_name(number))?;
        write_tensors(file, &stored, &[("format", "pt")], |tensor, offset, bytes| {
            let spec = TensorSpec::new(&tensor.name, &tensor.shape);
            fill(&spec, offset, bytemuck::cast_slice_mut(bytes))
        })?;
    }
    if shards.len() > 1 {
        folder.write_file(INDEX, index(&shards, shard_name).as_bytes())?;
    }
    for (name, content) in companions.iter() {
        folder.write_file(name, content)?;
    }
    folder.commit()
}

/// Fills shards in the order given, each with as many tensors as fit; a tensor above the limit has a shard to itself.
fn cut_into_shards(tensors: &[TensorSpec], shard_bytes: u64) -> Vec<Vec<&TensorSpec>> {
    let mut shards: Vec<Vec<&TensorSpec>> = Vec::new();
    let mut current = Vec::new();
    let mut used = 0;
    for tensor in tensors {
        let bytes = bf16_bytes(tensor);
        if bytes > shard_bytes {
            shards.push(vec![tensor]);
            continue;
        }
        if used + bytes > shard_bytes {
            shards.push(std::mem::take(&mut current));
            used = 0;
        }
        current.push(tensor);
        used += bytes;
    }
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    shards
}

fn index(shards: &[Vec<&TensorSpec>], shard_name: impl Fn(usize) -> String) -> String {
    let all = || shards.iter().flatten();
    let mut files: Vec<(&str, String)> = shards
        .iter()
        .enumerate()
        .flat_map(|(number, shard)| shard.iter().map(move |tensor| (tensor.name.as_str(), number)))
        .map(|(name, number)| (name, shard_name(number)))
        .collect();
    files.sort();
    let index = json!({
        "metadata": {
            "total_parameters": all().map(|tensor| tensor.values()).sum::<usize>(),
            "total_size": all().map(|tensor| bf16_bytes(tensor)).sum::<u64>(),
        },
        "weight_map": files.into_iter().map(|(name, file)| (name.to_string(), file.into())).collect::<serde_json::Map<String, Value>>(),
    });
    format!("{index:#}\n")
}

fn bf16_bytes(tensor: &TensorSpec) -> u64 {
    tensor.values() as u64 * size_of::<bf16>() as u64
}

/// Whether a file of this name may be lost when a model folder is replaced by a newer model.
pub(super) fn belongs_to_a_model(name: &str) -> bool {
    name == CONFIG
        || name == INDEX
        || COMPANIONS.contains(&name)
        || name
            .strip_prefix(TEMPLATE_FOLDER)
            .is_some_and(|rest| rest == "/" || (rest.starts_with('/') && rest.ends_with(".jinja")))
        || (name.starts_with("model") && name.ends_with(".safetensors"))
}
