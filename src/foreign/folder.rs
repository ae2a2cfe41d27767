//! What people give for a model folder that is none: a Hub id, a file, an adapter, a folder of another format. Each is
//! named for what it is, with the way from there to a folder that can be read.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Foreign, hub, recognise_file};
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const ADAPTER: &str = "adapter_config.json";

/// Refuses a path that is not a folder with a `config.json`.
///
/// # Errors
/// [`Error::Model`] that says what the path is instead, [`Error::Io`] where nothing is there or it cannot be read.
pub fn check_holds_config(path: &Path) -> Result<()> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_link(path) => {
            return Err(absent(path, error));
        }
        Err(error) => return Err(Error::io(path, "read", error)),
    };
    if !metadata.is_dir() {
        return Err(not_a_folder(path));
    }
    let config = path.join(CONFIG);
    if config.is_file() {
        return Ok(());
    }
    if is_link(&config) && !config.exists() {
        return Err(broken_link(&config));
    }
    let listing = Listing::read(path)?;
    let (message, help) = listing
        .weights_of_another_kind()
        .or_else(|| listing.checkpoint_of_a_run())
        .or_else(|| listing.folder_above_models())
        .or_else(|| listing.checkpoint_of_a_trainer())
        .unwrap_or_else(|| listing.no_model());
    Err(Error::model(path, message, help))
}

/// What a folder with a `config.json` and without safetensors weights is.
pub fn without_weights(folder: &Path) -> Error {
    let weights = ["model.safetensors", "model.safetensors.index.json"].map(|name| folder.join(name));
    if let Some(link) = weights.iter().find(|path| is_link(path) && !path.exists()) {
        return broken_link(link);
    }
    match Listing::read(folder) {
        Ok(listing) => {
            let (message, help) = listing
                .pickled_weights()
                .or_else(|| listing.weights_of_another_kind())
                .or_else(|| listing.safetensors_of_other_names())
                .or_else(|| listing.checkpoint_of_a_trainer())
                .unwrap_or_else(|| {
                    (
                        "neither model.safetensors nor model.safetensors.index.json is there".into(),
                        "download the model's weights into this folder".into(),
                    )
                });
            Error::model(folder, message, help)
        }
        Err(error) => error,
    }
}

/// What to say of a complete model folder that also holds an adapter's config.
pub fn leftover_adapter(folder: &Path) -> Option<String> {
    folder.join(ADAPTER).is_file().then(|| {
        format!(
            "{} is ignored: the folder's own weights are read, without an adapter",
            folder.join(ADAPTER).display()
        )
    })
}

/// A message and its advice.
type Description = (String, String);

/// The names in a folder.
struct Listing {
    path: PathBuf,
    /// Sorted.
    names: Vec<String>,
}

impl Listing {
    fn read(path: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(path).map_err(|error| Error::io(path, "read", error))?;
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(Listing { path: path.to_path_buf(), names })
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|other| other == name)
    }

    fn first(&self, matches: impl Fn(&str) -> bool) -> Option<&str> {
        self.names.iter().map(String::as_str).find(|name| matches(name))
    }

    fn shown(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    fn pickled_weights(&self) -> Option<Description> {
        let name = self.first(|name| name.starts_with("pytorch_model") && is_pickle_name(name))?;
        if recognise_file(&self.path.join(name)) == Some(Foreign::LfsPointer) {
            return Some((
                format!("the weights are in {name}, which is a git-lfs pointer, not the real file"),
                format!(
                    "download the safetensors version of this model; else run `git lfs pull`, and then {}",
                    self.save_again("", "", "")
                ),
            ));
        }
        Some((
            format!("the weights are in {name}; only safetensors is read, because pickle files can run code"),
            format!("convert them with transformers: {}", self.save_again("", "", "")),
        ))
    }

    /// The command that makes a folder of safetensors. `imports` come first; `arguments` follow the folder's name for
    /// model and tokenizer, `of_model` for the model alone.
    fn save_again(&self, imports: &str, arguments: &str, of_model: &str) -> String {
        let folder = self.shown();
        format!(
            "`python -c \"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; {imports}\
             M.from_pretrained('{folder}'{arguments}{of_model}).save_pretrained('NEW'); \
             T.from_pretrained('{folder}'{arguments}).save_pretrained('NEW')\"` writes the folder NEW"
        )
    }

    fn weights_of_another_kind(&self) -> Option<Description> {
        self.adapter()
            .or_else(|| self.gguf())
            .or_else(|| self.meta())
            .or_else(|| self.onnx())
            .or_else(|| self.other_framework())
    }

    fn adapter(&self) -> Option<Description> {
        if !self.has(ADAPTER) {
            return None;
        }
        let config = std::fs::read_to_string(self.path.join(ADAPTER)).unwrap_or_default();
        let config: Value = serde_json::from_str(&config).unwrap_or_default();
        let base = match config["base_model_name_or_path"].as_str() {
            Some(base) if !base.is_empty() => format!(" of the model {base:?}"),
            _ => String::new(),
        };
        let kind = config["peft_type"].as_str().unwrap_or("PEFT").to_string();
        Some((
            format!("this is an adapter ({kind}){base}, not a whole model"),
            format!(
                "give the folder of its base model with --model, and --adapter {}; `mmpo-fast merge` with the same flags \
                 writes both as one model",
                self.shown()
            ),
        ))
    }

    fn gguf(&self) -> Option<Description> {
        let name = self.first(|name| has_extension(name, "gguf"))?;
        Some((
            format!("this folder holds a GGUF file of llama.cpp ({name}); only safetensors is read"),
            self.convert_gguf(name),
        ))
    }

    fn convert_gguf(&self, name: &str) -> String {
        format!(
            "take the model's original folder; or let transformers (with the packages gguf and accelerate) convert it: {}",
            self.save_again(
                "from transformers import GgufConfig; ",
                &format!(", gguf_file='{name}'"),
                ", quantization_config=GgufConfig(dequantize=True)"
            )
        )
    }

    fn meta(&self) -> Option<Description> {
        let consolidated = self.first(|name| name.starts_with("consolidated."));
        if !self.has("params.json") && consolidated.is_none() {
            return None;
        }
        Some((
            "this is a model in Meta's own format (params.json, consolidated.*.pth)".into(),
            "download the Hugging Face version of the same model, or convert it with \
             convert_llama_weights_to_hf.py of the transformers repository"
                .into(),
        ))
    }

    fn onnx(&self) -> Option<Description> {
        let inner = self.path.join("onnx").is_dir().then_some("onnx/");
        let name = self.first(|name| has_extension(name, "onnx")).or(inner)?;
        Some((
            format!("the weights are in ONNX format ({name})"),
            "take the original model that they were exported from, with model.safetensors".into(),
        ))
    }

    fn other_framework(&self) -> Option<Description> {
        let known =
            [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("rust_model.ot", "rust-bert")];
        let named = known.into_iter().find(|(name, _)| self.has(name));
        let nemo = self.first(|name| has_extension(name, "nemo")).map(|name| (name, "NeMo"));
        let (name, kind) = named.or(nemo)?;
        Some((
            format!("the weights are in {kind}'s format ({name}); only safetensors is read"),
            "download the safetensors version of this model".into(),
        ))
    }

    fn safetensors_of_other_names(&self) -> Option<Description> {
        let found: Vec<&String> =
            self.names.iter().filter(|name| has_extension(name, "safetensors")).collect();
        let first = found.first()?;
        Some(match first.contains("-of-") {
            true => (
                format!("{} shards like {first}, but no model.safetensors.index.json", found.len()),
                "download the index of the shards too: it says which tensors belong to the model".into(),
            ),
            false => (
                format!("there is {first}, but no model.safetensors"),
                "if it holds the model's weights, rename it to model.safetensors".into(),
            ),
        })
    }

    /// A checkpoint that this program wrote, and the folders around it.
    fn checkpoint_of_a_run(&self) -> Option<Description> {
        let is_checkpoint = self.has("state.json") && self.has("state.safetensors");
        let is_run = self.has(crate::config::RESOLVED_FILE) && !is_checkpoint;
        let run = if is_checkpoint {
            self.path.parent()?.parent()?
        } else if self.first(|name| name.starts_with("step-")).is_some() {
            self.path.parent()?
        } else if is_run {
            &self.path
        } else {
            return None;
        };
        let run = if run.as_os_str().is_empty() { Path::new(".") } else { run };
        let what = match is_run {
            true => "this is the folder of a run",
            false => "this is a checkpoint of a run, which only --resume reads",
        };
        let model = run.join("model");
        let adapter = run.join("adapter");
        let help = match model.join(CONFIG).is_file() {
            true => format!("give the model that the run wrote: {}", model.display()),
            false if adapter.join(ADAPTER).is_file() => {
                format!(
                    "the run trained an adapter: give its base model with --model, and --adapter {}",
                    adapter.display()
                )
            }
            false => format!(
                "the run has not written its model yet; `mmpo-fast train --resume --output {}` finishes it",
                run.display()
            ),
        };
        Some((what.into(), help))
    }

    /// The cache of the Hub, and any folder whose folders are models.
    fn folder_above_models(&self) -> Option<Description> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let (Some(id), true) = (name.strip_prefix("models--"), self.has("snapshots")) {
            let id = id.replacen("--", "/", 1);
            return Some(match self.snapshot() {
                Some(snapshot) => (
                    format!("this is the Hub's cache of {id}; the model lies in one of its snapshots"),
                    format!("give {}", snapshot.display()),
                ),
                None => (
                    format!("this is the Hub's cache of {id}, without a complete snapshot"),
                    format!("download it with `hf download {id}`"),
                ),
            });
        }
        if let Some(cached) = self.first(|name| name.starts_with("models--")) {
            return Some((
                "this is the cache of the Hub, which holds folders of several models".into(),
                format!(
                    "give the snapshot of one, such as {}",
                    self.path.join(cached).join("snapshots/*").display()
                ),
            ));
        }
        let mut models: Vec<&String> =
            self.names.iter().filter(|name| self.path.join(name).join(CONFIG).is_file()).collect();
        // checkpoint-900 comes before checkpoint-1000, the newer one.
        models.sort_by_key(|name| (name.len(), name.as_str()));
        let last = models.last()?;
        let count = match models.len() {
            1 => "a folder".to_string(),
            count => format!("{count} folders"),
        };
        Some((
            format!("no config.json, but {count} inside with a model"),
            format!("give the model's own folder, such as {}", self.path.join(last).display()),
        ))
    }

    /// The snapshot that the cache's main branch names, else the last one.
    fn snapshot(&self) -> Option<PathBuf> {
        let snapshots = self.path.join("snapshots");
        let complete = |path: &PathBuf| path.join(CONFIG).is_file();
        let main = std::fs::read_to_string(self.path.join("refs/main")).unwrap_or_default();
        let main = Path::new(main.trim()).file_name().map(|name| snapshots.join(name));
        main.filter(complete).or_else(|| {
            let listing = Listing::read(&snapshots).ok()?;
            listing.names.iter().map(|name| snapshots.join(name)).rfind(complete)
        })
    }

    fn checkpoint_of_a_trainer(&self) -> Option<Description> {
        let deepspeed = |name: &str| {
            name == "zero_to_fp32.py"
                || name.starts_with("global_step")
                || name.starts_with("zero_pp_rank")
                || name.starts_with("mp_rank_")
        };
        let distributed = |name: &str| {
            name == ".metadata" || has_extension(name, "distcp") || name.starts_with("pytorch_model_fsdp")
        };
        let megatron = |name: &str| name == "latest_checkpointed_iteration.txt" || name.starts_with("iter_0");
        if self.first(deepspeed).is_some() {
            return Some((
                "this is a DeepSpeed checkpoint, whose weights lie in pieces".into(),
                format!(
                    "join them with `python {} {} NEW`, and copy config.json and the tokenizer's files into NEW",
                    self.path.join("zero_to_fp32.py").display(),
                    self.shown()
                ),
            ));
        }
        if self.first(distributed).is_some() {
            return Some((
                "this is a checkpoint of PyTorch's FSDP, whose weights lie in pieces".into(),
                format!(
                    "join them with `accelerate merge-weights {} NEW`, and copy config.json and the tokenizer's files into NEW",
                    self.shown()
                ),
            ));
        }
        self.first(megatron).map(|_| {
            (
                "this is a checkpoint of Megatron".into(),
                "convert it to a Hugging Face folder with the tools of the program that wrote it".into(),
            )
        })
    }

    fn no_model(&self) -> Description {
        const WANTED: &str = "give the folder that holds config.json, tokenizer.json and model.safetensors";
        if self.names.is_empty() {
            return ("no config.json: the folder is empty".into(), WANTED.into());
        }
        if let Some(name) = self.first(|name| is_pickle_name(name) || has_extension(name, "safetensors")) {
            return (
                format!("no config.json beside {name}: the weights alone do not say what model they are of"),
                "copy the model's config.json and tokenizer files into the folder".into(),
            );
        }
        ("no config.json: this is not a Hugging Face model folder".into(), WANTED.into())
    }
}

/// Nothing is there: perhaps the name of a model on the Hub that is not in its cache.
fn absent(path: &Path, error: std::io::Error) -> Error {
    let name = path.to_string_lossy();
    let is_word = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    match hub::absent_model(path) {
        Some((message, help)) => Error::model(path, message, help),
        // A word alone may be a path that is wrong, or the name of one of the Hub's old models.
        None if is_word => Error::Io {
            path: path.to_path_buf(),
            action: "read",
            cause: error,
            help: format!(
                "check the path; a model of that name on the Hugging Face Hub must be fetched first: `hf download {name}`"
            ),
        },
        None => Error::io(path, "read", error),
    }
}

/// A file where a folder should be.
fn not_a_folder(path: &Path) -> Error {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if has_extension(&name, "gguf") || recognise_file(path) == Some(Foreign::Gguf) {
        let listing = Listing { path: parent.to_path_buf(), names: Vec::new() };
        return Error::model(
            path,
            "this is a GGUF file of llama.cpp; only folders with safetensors are read",
            listing.convert_gguf(&name),
        );
    }
    if parent.join(CONFIG).is_file() {
        return Error::model(
            path,
            "this is a file; a model is a folder",
            format!("give the folder: {}", parent.display()),
        );
    }
    let kind = recognise_file(path).map_or("a file".to_string(), |kind| kind.name().to_string());
    Error::model(
        path,
        format!("this is {kind}; a model is a folder"),
        "give the folder that holds config.json, tokenizer.json and model.safetensors",
    )
}

/// The error of a symbolic link to nothing, such as a file of the Hub's cache whose blob was deleted.
pub fn broken_link(link: &Path) -> Error {
    let target = std::fs::read_link(link).unwrap_or_default();
    Error::model(
        link,
        format!("this is a link to {}, which is not there", target.display()),
        "download the model again: a folder of the Hub's cache needs its blobs beside it",
    )
}

fn is_link(path: &Path) -> bool {
    path.is_symlink()
}

fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|other| other.eq_ignore_ascii_case(extension))
}

/// `pytorch_model.bin`, its shards and their index, and the like.
fn is_pickle_name(name: &str) -> bool {
    ["bin", "pt", "pth", "ckpt"].iter().any(|extension| has_extension(name, extension))
        || name.ends_with(".bin.index.json")
}
